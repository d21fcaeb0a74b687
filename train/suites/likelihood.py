"""Multiple choice by likelihood: the model reads each choice after the prompt, and the likeliest is its answer.

    log p(choice | prompt), summed over tokens ------------------> accuracy
                            per byte of the choice in UTF-8 -----> accuracy_norm

In a conversation a choice is what the assistant would answer, in a document it goes on where the text ends (a choice
then begins with the space that parts it). The end of the turn does not count. Prompt and choice are tokenised apart.
For the letters of a shown list, give the letters as choices.
Scores are those of Brown et al., "Language models are few-shot learners", 2020, section 2.4, with bytes in place of
tokens, which do not depend on the tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data.prompts import Prompt
from train.suites import CHOOSE, Answered, Counts, Group, Sums, minutes, ratio

NAME, ASKS = "likelihood", CHOOSE
ABOUT = "the right choice is the likeliest, summed and per byte"
METRICS: dict[str, bool] = {"accuracy": True, "accuracy_norm": True, "choice_loss": False}
TABLES: dict[str, Group] = {"media": lambda prompt: prompt.media or "text", "minutes": minutes}


def refusal(prompt: Prompt) -> str:
    """See train.suites.Suite."""
    return "" if prompt.grading.choices else "it has no grading.choices"


def count(answers: Sequence[Answered]) -> list[Counts]:
    """See train.suites.Suite."""
    return [_count(each) for each in answers]


def _count(each: Answered) -> Counts:
    grading, logprobs = each.prompt.grading, np.array(each.logprobs)
    sizes = np.array([len(choice.encode()) for choice in grading.choices])
    return {
        "num_right": float(logprobs.argmax() == grading.correct),
        "num_right_norm": float((logprobs / sizes).argmax() == grading.correct),
        "nats": -float(logprobs[grading.correct]),
    }


def values(sums: Sums) -> dict[str, np.ndarray]:
    """See train.suites.Suite. `choice_loss`: nats of the right choice, a mean over samples."""
    return {
        "accuracy": ratio(sums, "num_right"),
        "accuracy_norm": ratio(sums, "num_right_norm"),
        "choice_loss": ratio(sums, "nats"),
    }
