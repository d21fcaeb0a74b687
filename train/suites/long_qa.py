"""Questions about long recordings, by where in the recording the answer lies: graded as in qa.py.

grading.position, from 0 to 1 --> tenth of the recording --> accuracy of each
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data.prompts import Prompt
from train.suites import GENERATE, Answered, Counts, Group, Sums, minutes, qa, tenth

NAME, ASKS = "long_qa", GENERATE
ABOUT = "answers that are right, by where in the recording they lie"
METRICS: dict[str, bool] = qa.METRICS
TABLES: dict[str, Group] = {"position": tenth, "minutes": minutes}


def refusal(prompt: Prompt) -> str:
    """See train.suites.Suite."""
    if prompt.grading.position < 0:
        return "it has no grading.position: nobody knows where its answer lies"
    return qa.refusal(prompt)


def count(answers: Sequence[Answered]) -> list[Counts]:
    """See train.suites.Suite."""
    return qa.count(answers)


def values(sums: Sums) -> dict[str, np.ndarray]:
    """See train.suites.Suite."""
    return qa.values(sums)
