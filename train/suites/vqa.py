"""Questions about pictures: VQA accuracy, exact and relaxed match, and the letter where there are choices.

    answer, references --articles, punctuation, number words--> VQA accuracy, exact
                       --as numbers, within 5 %--> relaxed

VQA accuracy (Antol et al., "VQA: Visual Question Answering", 2015, section 4): an answer is right as far as three
annotators gave it, min(matches / 3, 1), averaged over the sets of all annotators but one. It needs at least FEW
annotators; with fewer references, which then are other ways to say the same, one match is enough.
Texts are normalised as that paper's evaluation does it: lower case, no articles, digits for number words, no
punctuation except within numbers; apostrophes are left out on both sides instead of being put into contractions.
Relaxed accuracy (Masry et al., "ChartQA", 2022, section 5.1): a number is right within 5 % of the reference, all else
where it is exact. A percentage is a hundredth, as in the evaluation of Pix2Struct (Lee et al., 2023).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from data.prompts import Prompt
from train.suites import GENERATE, Answered, Counts, Group, Sums, ratio
from train.suites.qa import by_letter

NAME, ASKS = "vqa", GENERATE
ABOUT = "VQA accuracy; share of answers that are one of the references, and relaxed: numbers within 5 %"
METRICS: dict[str, bool] = {"accuracy": True, "exact": True, "relaxed": True, "no_choice": False}
TABLES: dict[str, Group] = {"media": lambda prompt: prompt.media or "text"}
FEW = 4  # references that are annotators
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_ARTICLES = ("a", "an", "the")
_NUMBER = re.compile(r"(-?)[$\u20ac\u00a3]?((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+) ?(%?)\.?")
_RELAXED = 0.05  # of the reference


def refusal(prompt: Prompt) -> str:
    """See train.suites.Suite."""
    if prompt.grading.choices or any(text.strip() for text in prompt.references):
        return ""
    return "it has neither an answer nor choices: there is nothing to compare with"


def normalise(text: str) -> str:
    """As VQA compares answers."""
    text = re.sub(r"['\u2019`]", "", text.lower())
    text = re.sub(r"(?<=\d),(?=\d)", "", text)  # 1,000
    text = re.sub(r"(?!(?<=\d)[.:](?=\d))[^\w\s]|_", " ", text)  # 3.5 and 10:30 stay
    return " ".join(_DIGITS.get(word, word) for word in text.split() if word not in _ARTICLES)


def accuracy(answer: str, references: Sequence[str]) -> float:
    """VQA accuracy of normalised texts."""
    matches, others = references.count(answer), len(references) - 1
    if others + 1 < FEW:
        return float(matches > 0)
    # without an annotator who gave this answer there is one match less
    without = [min((matches - (text == answer)) / 3, 1.0) for text in references]
    return sum(without) / len(references)


def number(text: str) -> float | None:
    """What a text says that is one number and nothing else: "1,200", "$3.50", "45 %"; None for all others."""
    found = _NUMBER.fullmatch(text.strip().replace("\u2212", "-"))
    if found is None or len(text) > 100:  # which no reference is: two that overflow would be near each other
        return None
    sign, digits, percent = found.groups()
    return float(sign + digits.replace(",", "")) / (100 if percent else 1)


def relaxed(answer: str, reference: str) -> bool:
    """Whether the answer is within 5 % of the reference where both are numbers, and the same text elsewhere."""
    found, expected = number(answer), number(reference)
    if found is None or expected is None:
        return normalise(answer) == normalise(reference)
    return abs(found - expected) <= _RELAXED * abs(expected) * (1 + 1e-9)  # 105 for 100 is right, as on paper


def count(answers: Sequence[Answered]) -> list[Counts]:
    """See train.suites.Suite."""
    return [_count(each) for each in answers]


def _count(each: Answered) -> Counts:
    if each.prompt.grading.choices:
        counts = by_letter(each)
        return {**counts, "accuracy": counts["num_right"], "num_close": counts["num_right"]}
    answer, references = normalise(each.text), [normalise(text) for text in each.prompt.references]
    near = any(relaxed(each.text, text) for text in each.prompt.references)
    right = {"num_right": float(answer in references), "num_close": float(near)}
    return {**right, "accuracy": accuracy(answer, references), "num_choices": 0.0, "num_unclear": 0.0}


def values(sums: Sums) -> dict[str, np.ndarray]:
    """See train.suites.Suite."""
    return {
        "accuracy": ratio(sums, "accuracy"),
        "exact": ratio(sums, "num_right"),
        "relaxed": ratio(sums, "num_close"),
        "no_choice": ratio(sums, "num_unclear", "num_choices"),
    }
