"""The engine contract: one whole optimizer step, whatever runs it.

    microbatches, lr, look  ->  Engine.train_step  ->  StepStats
                                Engine.fragments   ->  what this rank owns, for the checkpoint
    StateReader             ->  Engine.restore

A finer seam than the whole step leaks the engine into the loop: Megatron's schedule takes every micro-batch at
once, DeepSpeed counts its own micro-steps. So the loop hands over micro-batches and a learning rate, and gets numbers.

Rules that every engine keeps (tests/test_engine_contract.py holds them):

* The loss is a sum over targets divided by the count of targets in the *global* batch; never a mean of means.
* The learning rate is an argument. No scheduler state exists.
* The same global batch gives the same loss and gradient norm, whatever the ranks, degrees or split into micro-batches.
* Every rank enters the same modules in the same order, whatever its batch holds.
* Where the loss or the gradient is not finite, on whatever rank, no rank makes the update: weights, moments, the
  optimizer's count of steps and the expert shares keep their bits, and StepStats says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from data.types import Batch
from train.watch import NOTHING, Look, Seen

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")
VALUE = "value"  # state that is no parameter: expert shares, train.loss.Routers


@dataclass(frozen=True)
class Shard:
    """Which slice of the global batch a rank reads."""

    index: int
    count: int
    leads: bool = True
    """Whether of the ranks that read this slice it is the one whose samples and answers are counted."""


@dataclass(frozen=True)
class StepStats:
    """What one optimizer step reports. Every number is global: the same on all ranks."""

    loss: float  # weighted sum of the terms; text alone: cross-entropy per target token, nats
    terms: Mapping[str, float]  # mean of each term over its targets; 0.0 where the step has none
    balance_loss: float  # 1.0 when the routers are perfectly balanced
    grad_norm: float  # before clipping
    num_tokens: int  # of the first decoder whose routers learn: the Thinker, or the Talker's positions alone
    num_targets: int
    num_skipped: int  # samples left out because they could not be read
    expert_shares: Mapping[str, Tensor]  # [L, E] share of the assignments that each expert received, rows sum to 1
    seen: Seen = Seen()  # what else it tells; what costs something only where asked for
    applied: bool = True  # False: loss or gradient is not finite, and the step left the engine's state as it was


@dataclass(frozen=True)
class Fragment:
    """A flat range of one parameter that this rank owns: `start` and `length` count elements of the whole tensor."""

    name: str
    shape: tuple[int, ...]
    start: int
    length: int
    tensors: Mapping[str, Tensor] = field(repr=False)  # kind -> flat fp32 view [length]; see WEIGHT, MOMENTS, VALUE
    replicated: bool = False  # another rank holds the same range: only rank 0 writes it


class StateReader(Protocol):
    """A checkpoint as an engine sees it: ranges of tensors, by the names of the model in memory."""

    step: int

    def kinds(self, name: str) -> frozenset[str]:
        """Which kinds are stored for the parameter `name`; empty when it is unknown."""
        ...

    def read(self, kind: str, name: str, shape: Sequence[int], start: int, length: int) -> Tensor:
        """Elements [start, start + length) of the flat tensor, fp32. Raises CheckpointError when one is missing."""
        ...


class Engine(Protocol):
    """One way to run optimizer steps on this rank's share of the global batch."""

    shard: Shard
    is_main: bool

    def train_step(self, microbatches: Sequence[Batch], lr: float, look: Look = NOTHING) -> StepStats:
        """Run forward, backward and update over this rank's micro-batches; tell what `look` asks. Collective."""
        ...

    def eval_step(self, batch: Batch) -> Mapping[str, float]:
        """Sums over this rank's batch, without gradients: `loss_sum`, `targets`, `correct`. Collective."""
        ...

    def generate(self, batch: Batch, max_new_tokens: int, stop_id: int) -> list[list[int]]:
        """Greedy continuation of every document of a batch of prompts. Collective."""
        ...

    def losses(self, batch: Batch) -> list[float]:
        """Cross-entropy of each document's targets, summed, nats, without gradients. Collective."""
        ...

    def likelihoods(self, batch: Batch, choices: Sequence[Sequence[Sequence[int]]]) -> list[list[float]]:
        """Log-probability, summed over tokens, nats, of each document's choices as its continuation. Collective.

        `batch` holds prompts, `choices` the token ids of each choice of each of them.
        """
        ...

    def fragments(self) -> Iterator[Fragment]:
        """Name, range, fp32 weight and moments of what this rank owns. No communication."""
        ...

    def restore(self, state: StateReader, *, optimizer_step: int) -> None:
        """Read the ranges that this rank needs; with optimizer_step 0 the moments start afresh. Collective."""
        ...

    def close(self) -> None:
        """Release process groups and the like."""
        ...
