"""The contract of a suite: what it asks, what it counts of each answer, and which numbers follow from the counts.

    prompts --ASKS: the model generates, chooses or reads--> Answered --count--> counts of each sample
    counts, summed over a group of samples --values--> METRICS

A suite is a module of this package (registry.py lists them). Every metric is a function of sums of counts over samples,
so a row of a table, the whole set and a bootstrap resample (launch/bootstrap.py) are one computation, and a
result does not depend on batches or ranks.

Letters: arrays of values may have any shape; for a bootstrap they are [resamples].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from data.prompts import Prompt

GENERATE = "generate"  # greedy text after the prompt
CHOOSE = "choose"  # log-likelihood of each choice after the prompt
READ = "read"  # cross-entropy of documents, whole

Counts = Mapping[str, float]
Sums = Mapping[str, np.ndarray]
Group = Callable[[Prompt], str]  # the row that a sample belongs to; "" for none


@dataclass(frozen=True)
class Answered:
    """What the model made of a prompt."""

    prompt: Prompt
    text: str = ""  # generated; of a choice, the likeliest
    logprobs: tuple[float, ...] = ()  # summed over the tokens of each choice, nats
    nats: float = 0.0  # cross-entropy of a document, summed
    targets: int = 0  # tokens that it is the sum over


class Suite(Protocol):
    """A module of this package."""

    @property
    def NAME(self) -> str:
        """As `suite=NAME` calls it."""
        ...

    @property
    def ABOUT(self) -> str:
        """What its table shows, for the heading."""
        ...

    @property
    def ASKS(self) -> str:
        """GENERATE, CHOOSE or READ."""
        ...

    @property
    def METRICS(self) -> Mapping[str, bool]:
        """Its metrics, the most telling first, and whether higher is better."""
        ...

    @property
    def TABLES(self) -> Mapping[str, Group]:
        """Tables beside those by language and source: title, and the row of a sample."""
        ...

    def refusal(self, prompt: Prompt) -> str:
        """Why a sample cannot be asked or graded, "" where it can."""
        ...

    def count(self, answers: Sequence[Answered]) -> list[Counts]:
        """Counts of each answer, the same names in each. All answers of the set, since some need to know the others."""
        ...

    def values(self, sums: Sums) -> dict[str, np.ndarray]:
        """Metrics of summed counts, elementwise; `num_samples` is among the sums."""
        ...


def ratio(sums: Sums, over: str, under: str = "num_samples") -> np.ndarray:
    """One sum over another, which counts as one at least."""
    return sums[over] / np.maximum(1, sums[under])


def minutes(prompt: Prompt) -> str:
    """The bucket of a recording's length; "" without sound or film."""
    if not prompt.minutes:
        return ""
    names = {1: "0-1 min", 5: "1-5 min", 15: "5-15 min", 40: "15-40 min"}
    return next((name for most, name in names.items() if prompt.minutes <= most), "40+ min")


def tenth(prompt: Prompt) -> str:
    """Of the recording, where the answer lies."""
    at = prompt.grading.position
    if at < 0:
        return ""
    place = min(9, int(at * 10))
    return f"{place * 10}-{place * 10 + 10} %"
