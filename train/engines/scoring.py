"""What evaluation asks beside answers: the cross-entropy of each document, and the likelihood of choices.

    batch            --Thinker, head: a few logits at a time--> nats of each target --summed--> nats of each document
    prompts, choices --models/likelihood.py, from the cache--> nats of each choice

Letters: T tokens, N targets, C of them at a time, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data.types import Batch
from models.likelihood import likelihoods
from train import ranks
from train.engines.setup import AnyObjective, read_whole
from train.loss import IGNORE


class Scoring:
    """`losses` and `likelihoods` of train.engines.Engine, where the modules run in one piece."""

    objective: Any  # train.loss.Objective or its like
    device: torch.device

    @torch.no_grad()
    def losses(self, batch: Batch) -> list[float]:
        """See train.engines.Engine."""
        self.objective.train(False)
        return document_losses(self.objective, batch.to(self.device))

    @torch.no_grad()
    def likelihoods(self, batch: Batch, choices: Sequence[Sequence[Sequence[int]]]) -> list[list[float]]:
        """See train.engines.Engine."""
        self.objective.train(False)
        found = likelihoods(self.objective.thinker, batch.to(self.device), choices, most_of_all)
        return [[logprob for logprob, _ in document] for document in found]


def document_losses(objective: AnyObjective, batch: Batch) -> list[float]:
    """Cross-entropy of each document's targets, summed, nats."""
    hidden_TD, labels_T, lm_head = read_whole(objective, batch)
    index_N = (labels_T != IGNORE).nonzero().squeeze(1)
    head = partial(_losses, target_N=labels_T.index_select(0, index_N), most=objective.max_logits)
    losses_N = lm_head(hidden_TD.index_select(0, index_N), head)
    # an audio encoder's decoder reads the text alone: its targets are those of the pack, in the same order
    return by_document(losses_N, (batch.labels_T != IGNORE).nonzero().squeeze(1), batch.doc_lengths).tolist()


def by_document(losses_N: Tensor, index_N: Tensor, doc_lengths: Sequence[int]) -> Tensor:
    """Sums over each document, float64, of losses at these rows of a pack."""
    lengths = torch.tensor(doc_lengths, dtype=torch.int64, device=index_N.device)
    documents_T = torch.repeat_interleave(torch.arange(len(lengths), device=index_N.device), lengths)
    sums = torch.zeros(len(lengths), dtype=torch.float64, device=index_N.device)
    return sums.index_add(0, documents_T[index_N], losses_N.double())


def most_of_all(numbers: list[int]) -> list[int]:
    """The largest of all ranks, number by number. Collective."""
    found = torch.cat(ranks.gather(torch.tensor([numbers], dtype=torch.int64)))
    return found.amax(0).tolist()


def _losses(hidden_ND: Tensor, weight_VD: Tensor, *, target_N: Tensor, most: int) -> Tensor:
    """Cross-entropy of each target, fp32 [N]; `most` logits at a time."""
    rows = max(1, most // len(weight_VD))
    found = [
        F.cross_entropy(F.linear(hidden_ND[start : start + rows], weight_VD).float(), target_C, reduction="none")
        for start, target_C in ((start, target_N[start : start + rows]) for start in range(0, len(target_N), rows))
    ]
    return torch.cat(found) if found else hidden_ND.new_zeros(0, dtype=torch.float32)
