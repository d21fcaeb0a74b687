"""Speech recognition, and any answer that is compared word by word: word and character error rate.

    answer, reference --lower case, no punctuation--> words, characters --jiwer--> errors, over all references together

Chinese and Japanese characters count as words of their own; spaces do not count as characters.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data.prompts import Prompt
from train.suites import GENERATE, Answered, Counts, Group, Sums, minutes, ratio
from train.word_errors import character_errors, normalise, word_errors

NAME, ASKS = "asr", GENERATE
ABOUT = "word error rate, answers that are right word by word"
METRICS: dict[str, bool] = {"wer": False, "cer": False, "accuracy": True}
TABLES: dict[str, Group] = {"minutes": minutes}


def refusal(prompt: Prompt) -> str:
    """See train.suites.Suite."""
    return "" if prompt.references else "its last turn is not the assistant's: there is nothing to compare with"


def count(answers: Sequence[Answered]) -> list[Counts]:
    """See train.suites.Suite. Of several references the one with the fewest word errors."""
    return [_count(each) for each in answers]


def _count(each: Answered) -> Counts:
    answer = normalise(each.text)
    references = [normalise(text) for text in each.prompt.references or ("",)]
    words, reference = min(((word_errors(text, answer), text) for text in references), key=lambda pair: pair[0].total)
    characters = character_errors(reference, answer)
    return {
        "num_right": float(reference == answer),
        "num_words": words.length,
        "substitutions": words.substitutions,
        "deletions": words.deletions,
        "insertions": words.insertions,
        "num_characters": characters.length,
        "character_errors": characters.total,
    }


def values(sums: Sums) -> dict[str, np.ndarray]:
    """See train.suites.Suite."""
    errors = sums["substitutions"] + sums["deletions"] + sums["insertions"]
    return {
        "wer": errors / np.maximum(1, sums["num_words"]),
        "cer": ratio(sums, "character_errors", "num_characters"),
        "accuracy": ratio(sums, "num_right"),
    }
