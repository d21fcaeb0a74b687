"""What the loader hands to training.

T = tokens, F = mel frames (10 ms each), M = mel bins, P = patches of pictures, X = values of a patch, R = rows
that the Talker reads of the Thinker where that does not run, H = its width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor


class Speech(Protocol):
    """What the answers of a batch sound like, as the model's layout makes it; data only moves it."""

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same with every tensor replaced by `change(tensor)`."""
        ...


@dataclass(frozen=True, slots=True)
class SpeechPairs:
    """Answers in two ways each, the better one first, as preference optimisation takes them.

    Of one conversation `parts` are its two ways; of a batch one part holds all of them, end to end.
    """

    parts: tuple[Speech, ...]
    logprobs_N2: Tensor  # float32, nats, by the reference, of each way: of first codes with the end, of residual codes

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> SpeechPairs:
        """See Speech."""
        return SpeechPairs(tuple(part.map_tensors(change) for part in self.parts), change(self.logprobs_N2))

    @staticmethod
    def join(join_speech: Callable[[Sequence[Any]], Speech], pairs: Sequence[Any]) -> SpeechPairs:
        """SpeechPairs of conversations as those of a batch."""
        whole = join_speech([part for pair in pairs for part in pair.parts])
        return SpeechPairs((whole,), torch.cat([torch.empty(0, 2), *(pair.logprobs_N2 for pair in pairs)]))


@dataclass(frozen=True, slots=True)
class Batch:
    """One packed sequence, which is one micro-batch: whole documents end to end, no padding."""

    token_ids_T: Tensor  # int64
    labels_T: Tensor  # int64: the token that position t must predict (already shifted), -100 = no loss
    position_ids_3T: Tensor  # float32: temporal, height and width position; starts anew in every document
    doc_lengths: tuple[int, ...]  # tokens of each document; they sum to T
    mel_FM: Tensor  # float32 log-mel of all clips end to end, in the order of their placeholder runs
    mel_lengths: tuple[int, ...]  # frames of each clip; they sum to F
    keys: tuple[str, ...]  # "shard.tar:key" of each document
    skipped: tuple[str, ...] = ()  # one line for each sample of the plan that had to be left out
    pixels_PX: Tensor = field(default_factory=lambda: torch.empty(0, 0))  # float32, images and videos in order
    grids: tuple[tuple[int, int, int], ...] = ()  # frames, rows and columns of patches of each image or video
    speech: Speech | None = None  # of every document, where the Talker learns
    media_RH: Tensor = field(default_factory=lambda: torch.empty(0, 0))  # instead of media: data/hidden.py
    windows: tuple[int, ...] = ()  # mel frames of each clip's attention windows, where they are drawn

    @classmethod
    def empty(cls, num_mels: int, skipped: tuple[str, ...] = ()) -> Batch:
        """A batch without tokens: what a rank gets when a step has too few sequences for all ranks."""
        ids = torch.empty(0, dtype=torch.int64)
        return cls(ids, ids, torch.empty(3, 0), (), torch.empty(0, num_mels), (), (), skipped)

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with every tensor replaced by `change(tensor)`."""
        tensors = {name: change(getattr(self, name)) for name in _TENSORS}
        speech = None if self.speech is None else self.speech.map_tensors(change)
        return replace(self, **tensors, speech=speech)

    def pin_memory(self) -> Batch:
        """Page-locked copies, for asynchronous copies to a GPU (called by torch's DataLoader)."""
        return self.map_tensors(Tensor.pin_memory)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`; asynchronous where the batch is pinned."""
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=True))


_TENSORS = ("token_ids_T", "labels_T", "position_ids_3T", "mel_FM", "pixels_PX", "media_RH")
