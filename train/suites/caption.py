"""Captions, against several references: CIDEr-D, BLEU-4 and ROUGE-L, each by its published formula.

    caption, references --lower case, no punctuation--> words --n-grams, longest common subsequence--> scores

- CIDEr-D (Vedantam, Zitnick, Parikh, "CIDEr: Consensus-based image description evaluation", 2015, sections 3 and 5):
  mean over n = 1..4 and over references of the cosine of TF-IDF vectors, the caption's weights clipped to the
  reference's, times a Gaussian penalty of the difference in words (sigma 6), times 10. Document frequencies are those
  of the references of this set; a set of one sample has none and gets 0.
- BLEU-4 (Papineni et al., "BLEU", 2002): geometric mean of the clipped n-gram precisions of the whole set, times the
  brevity penalty with the closest reference length; no smoothing, so 0 where no 4-gram matches.
- ROUGE-L (Lin, "ROUGE", 2004, section 3): F of the longest common subsequence with beta = 1.2, of the best precision
  and the best recall among the references.

Cost: of ROUGE-L, caption words times reference words; of the others, n-grams.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from data.prompts import Prompt
from train.suites import GENERATE, Answered, Counts, Group, Sums, ratio
from train.word_errors import normalise

NAME, ASKS = "caption", GENERATE
ABOUT = "captions against their references"
METRICS: dict[str, bool] = {"cider": True, "bleu": True, "rouge_l": True}
TABLES: dict[str, Group] = {"media": lambda prompt: prompt.media or "text"}
LONGEST, SIGMA, BETA = 4, 6.0, 1.2

Words = tuple[str, ...]
Grams = list[Counter[Words]]  # of n = 1, 2, ...


def refusal(prompt: Prompt) -> str:
    """See train.suites.Suite."""
    if any(normalise(text) for text in prompt.references):
        return ""
    return "it has no reference: there is nothing to compare with"


def count(answers: Sequence[Answered]) -> list[Counts]:
    """See train.suites.Suite."""
    captions = [tuple(normalise(each.text).split()) for each in answers]
    references = [
        [words for text in each.prompt.references if (words := tuple(normalise(text).split()))] for each in answers
    ]
    scores = cider(captions, references)
    return [
        {"cider": score, "rouge_l": rouge_l(caption, texts), **bleu_counts(caption, texts)}
        for score, caption, texts in zip(scores, captions, references, strict=True)
    ]


def values(sums: Sums) -> dict[str, np.ndarray]:
    """See train.suites.Suite."""
    return {"cider": ratio(sums, "cider"), "bleu": bleu(sums), "rouge_l": ratio(sums, "rouge_l")}


def grams(words: Words) -> Grams:
    """How often each n-gram occurs."""
    return [Counter(words[i : i + n] for i in range(len(words) - n + 1)) for n in range(1, LONGEST + 1)]


def cider(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """CIDEr-D of each caption, from 0 to 10."""
    known = [[grams(words) for words in texts] for texts in references]
    frequency: Counter[Words] = Counter()
    for texts in known:  # in the references of how many samples an n-gram occurs
        frequency.update({gram for each in texts for counts in each for gram in counts})
    log_samples = math.log(max(1, len(captions)))

    def weighted(counts: Counter[Words]) -> dict[Words, float]:
        return {gram: k * (log_samples - math.log(max(1, frequency[gram]))) for gram, k in counts.items()}

    found = []
    for caption, texts, lengths in zip(captions, known, references, strict=True):
        vectors, total = [weighted(counts) for counts in grams(caption)], 0.0
        for each, words in zip(texts, lengths, strict=True):
            near = math.exp(-((len(caption) - len(words)) ** 2) / (2 * SIGMA**2))
            pairs = zip(vectors, (weighted(counts) for counts in each), strict=True)
            total += near * sum(_clipped_cosine(*pair) for pair in pairs) / LONGEST
        found.append(10 * total / len(texts))
    return found


def _clipped_cosine(caption: Mapping[Words, float], reference: Mapping[Words, float]) -> float:
    norms = [math.sqrt(sum(weight**2 for weight in vector.values())) for vector in (caption, reference)]
    if not all(norms):
        return 0.0
    product = sum(min(weight, reference.get(gram, 0.0)) * reference.get(gram, 0.0) for gram, weight in caption.items())
    return product / (norms[0] * norms[1])


def bleu_counts(caption: Words, references: Sequence[Words]) -> dict[str, float]:
    """Matches and n-grams of each n, the caption's length and that of the reference nearest in length."""
    known = [grams(words) for words in references]
    counts: dict[str, float] = {}
    for n, own in enumerate(grams(caption)):
        most: Counter[Words] = Counter()
        for each in known:
            most |= each[n]
        counts[f"matches_{n + 1}"] = (own & most).total()
        counts[f"grams_{n + 1}"] = own.total()
    nearest = min((abs(len(words) - len(caption)), len(words)) for words in references)[1]
    return counts | {"num_words": len(caption), "reference_words": nearest}


def bleu(sums: Sums) -> np.ndarray:
    """BLEU-4 of summed counts."""
    logs = []
    with np.errstate(divide="ignore"):
        for n in range(1, LONGEST + 1):
            logs.append(np.log(sums[f"matches_{n}"] / np.maximum(1, sums[f"grams_{n}"])))
    ratio_of_lengths = sums["reference_words"] / np.maximum(1, sums["num_words"])
    return np.exp(sum(logs) / LONGEST + np.minimum(0, 1 - ratio_of_lengths))


def rouge_l(caption: Words, references: Sequence[Words]) -> float:
    """F measure of the longest common subsequence."""
    common = [_longest_common(caption, words) for words in references]
    precision = max(common) / max(1, len(caption))
    recall = max(each / len(words) for each, words in zip(common, references, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _longest_common(first: Words, second: Words) -> int:
    row = [0] * (len(second) + 1)
    for word in first:
        before = 0  # of the row above, one to the left
        for place, other in enumerate(second, 1):
            before, row[place] = row[place], before + 1 if word == other else max(row[place], row[place - 1])
    return row[-1]
