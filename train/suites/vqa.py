"""Questions about pictures: VQA accuracy, exact match, and the letter where there are choices.

    answer, references --articles, punctuation, number words--> VQA accuracy

VQA accuracy (Antol et al., "VQA: Visual Question Answering", 2015, section 4): an answer is right as far as three
annotators gave it, min(matches / 3, 1), averaged over the sets of all annotators but one. It needs at least FEW
annotators; with fewer references, which then are other ways to say the same, one match is enough.
Texts are normalised as that paper's evaluation does it: lower case, no articles, digits for number words, no
punctuation except within numbers; apostrophes are left out on both sides instead of being put into contractions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from data.prompts import Prompt
from train.suites import GENERATE, Answered, Counts, Group, Sums, ratio
from train.suites.qa import by_letter

NAME, ASKS = "vqa", GENERATE
ABOUT = "VQA accuracy; share of answers that are one of the references"
METRICS: dict[str, bool] = {"accuracy": True, "exact": True, "no_choice": False}
TABLES: dict[str, Group] = {"media": lambda prompt: prompt.media or "text"}
FEW = 4  # references that are annotators
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_ARTICLES = ("a", "an", "the")


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


def count(answers: Sequence[Answered]) -> list[Counts]:
    """See train.suites.Suite."""
    return [_count(each) for each in answers]


def _count(each: Answered) -> Counts:
    if each.prompt.grading.choices:
        counts = by_letter(each)
        return {**counts, "accuracy": counts["num_right"]}
    answer, references = normalise(each.text), [normalise(text) for text in each.prompt.references]
    right = {"num_right": float(answer in references), "accuracy": accuracy(answer, references)}
    return {**right, "num_choices": 0.0, "num_unclear": 0.0}


def values(sums: Sums) -> dict[str, np.ndarray]:
    """See train.suites.Suite."""
    return {
        "accuracy": ratio(sums, "accuracy"),
        "exact": ratio(sums, "num_right"),
        "no_choice": ratio(sums, "num_unclear", "num_choices"),
    }
