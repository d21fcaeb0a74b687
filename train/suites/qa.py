"""Questions about sound, films, pictures or text, answered freely: exact match, or the letter of a choice.

    answer --lower case, no punctuation--> right where it is one of the references
    answer of a multiple choice --train/suites/letters.py--> right where it names the right choice

What a sample is graded by follows from its `grading`: the letter where there are choices. The prompt shows them, with
their letters; likelihood.py asks without.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data.prompts import Prompt
from train.suites import GENERATE, Answered, Counts, Group, Sums, minutes, ratio
from train.suites.letters import chosen
from train.word_errors import normalise

NAME, ASKS = "qa", GENERATE
ABOUT = "answers that are one of the references, or name the right choice"
METRICS: dict[str, bool] = {"accuracy": True, "no_choice": False}
TABLES: dict[str, Group] = {"media": lambda prompt: prompt.media or "text", "minutes": minutes}


def refusal(prompt: Prompt) -> str:
    """See train.suites.Suite."""
    if prompt.grading.choices or any(text.strip() for text in prompt.references):
        return ""
    return "it has neither an answer nor choices: there is nothing to compare with"


def count(answers: Sequence[Answered]) -> list[Counts]:
    """See train.suites.Suite."""
    return [_count(each) for each in answers]


def _count(each: Answered) -> Counts:
    if each.prompt.grading.choices:
        return by_letter(each)
    right = normalise(each.text) in {normalise(text) for text in each.prompt.references}
    return {"num_right": float(right), "num_choices": 0.0, "num_unclear": 0.0}


def by_letter(each: Answered) -> Counts:
    """Counts of an answer to a multiple choice."""
    grading = each.prompt.grading
    place = chosen(each.text, grading.choices)
    return {"num_right": float(place == grading.correct), "num_choices": 1.0, "num_unclear": float(place < 0)}


def values(sums: Sums) -> dict[str, np.ndarray]:
    """See train.suites.Suite. `no_choice`: of multiple choices, answers that name none."""
    return {"accuracy": ratio(sums, "num_right"), "no_choice": ratio(sums, "num_unclear", "num_choices")}
