"""Documents: cross-entropy and perplexity.

    nats of all targets / tokens --> loss --exp--> perplexity
                        / bytes  --> loss_per_byte, which does not depend on the tokenizer

Targets are the document's text with loss and its end; media carry none. Bytes are those of the same text in UTF-8.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data.prompts import Prompt
from train.suites import READ, Answered, Counts, Group, Sums, ratio

NAME, ASKS = "text", READ
ABOUT = "cross-entropy of documents, nats a token and a byte"
METRICS: dict[str, bool] = {"loss": False, "perplexity": False, "loss_per_byte": False}
TABLES: dict[str, Group] = {}


def refusal(prompt: Prompt) -> str:
    """See train.suites.Suite."""
    return "" if prompt.num_bytes else "it has no text with loss"


def count(answers: Sequence[Answered]) -> list[Counts]:
    """See train.suites.Suite."""
    return [{"nats": each.nats, "targets": each.targets, "num_bytes": each.prompt.num_bytes} for each in answers]


def values(sums: Sums) -> dict[str, np.ndarray]:
    """See train.suites.Suite."""
    loss = ratio(sums, "nats", "targets")
    perplexity = np.exp(np.minimum(loss, 700))  # of more it would be infinite, which JSON does not know
    return {"loss": loss, "perplexity": perplexity, "loss_per_byte": ratio(sums, "nats", "num_bytes")}
