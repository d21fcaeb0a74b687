"""What an engine keeps of weights, gradients and optimizer state, in bytes per element of a rank's parameters.

    layout --State.of--> bytes per element of dense weights and of experts, and the buffers that reduce gradients

What the engines do, as seen in measured peaks (tests/train/test_memory.py):

* local: fp32 gradients from backward to update; in bf16 masters beside the weights, and bf16 gradients that each
  micro-batch adds to fp32 ones.
* deepspeed: fp32 masters at every precision. Gradients are copied into a bucket of at most BUCKET elements; when it is
  full it is copied once more to be sent, in fp32. ZeRO-1 in bf16 is its BF16_Optimizer, with whole fp32 gradients.
  ZeRO-2 puts together its part of the gradients anew for the update. ZeRO-3 keeps weights gathered that are needed
  again within a thousand million elements.
* megatron: fp32 gradients whole on a rank from start to end, beside those that a backward makes in the model's
  precision; moments, and in bf16 masters, in parts over data-parallel ranks. In fp32 a weight is its own master.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from train.activations import Pack, Piece
from train.parallel import Layout

OWNERS = ("decoder", "audio", "vision", "talker")
BUCKET = 50_000_000  # elements: train.engines.deepspeed
LIVE = 1_000_000_000  # elements that ZeRO-3 keeps gathered: DeepSpeed's default
GLOO = 1.5  # bytes of an element in flight, beside a tensor that gloo sends


@dataclass(frozen=True)
class Job:
    """What a step does, as far as memory depends on it."""

    pack: Pack
    microbatches: int = 1
    """Of a rank in a step."""
    max_logits: int = 40_000_000
    train: Collection[str] = field(default=OWNERS)
    """Which of OWNERS learn."""
    kernels: str = "cuda"
    spoken: Pack | None = None
    """What the Talker reads, its frames as targets. None: its activations are not counted."""


def size_of(layout: Layout) -> int:
    """Bytes of a weight and of an activation."""
    return 2 if layout.precision == "bf16" else 4


@dataclass(frozen=True)
class State:
    """Bytes per element. Pairs are of dense weights and of experts."""

    weights: tuple[float, float]
    optimizer: tuple[float, float]
    standing: tuple[float, float] = (4.0, 4.0)
    """Gradients that are there while the last micro-batch runs."""
    fresh: int = 4
    """Gradients that its backward makes."""
    stays: bool = False
    """Whether these stay until the update, or go where `standing` ones are."""
    at_update: tuple[float, float] = (4.0, 4.0)
    """Gradients at the update."""
    frozen: float = 0.0
    """Masters of weights that do not learn."""
    bucket: float = 0.0
    """Of an element of the bucket, all through backward."""
    sending: float = 0.0
    """Of an element of the bucket beside it, when it is sent."""
    whole: float = 0.0
    """Weights that are gathered, up to LIVE."""
    sent: tuple[float, float] | None = None
    """Gradients when the last bucket is sent, where these are not `standing`."""
    ep: int = 1
    partial: float = 0.0
    """Of a parameter that two ranks share at the bound of their parts, at the update."""

    @classmethod
    def of(cls, layout: Layout, job: Job) -> State:
        """An engine's."""
        size, several = size_of(layout), job.microbatches > 1
        masters = 4.0 if size == 2 else 0.0
        whole = float(size), float(size)
        if layout.name == "local":
            standing = (4.0, 4.0) if several else (0.0, 0.0)
            stays = size == 2 or not several
            return cls(whole, (masters + 8, masters + 8), standing, size, stays, frozen=masters)
        parts = layout.dense_dp, layout.expert_dp
        if layout.name == "deepspeed":
            return cls._zero(layout, size, several, job.kernels != "cuda")
        return cls(whole, _over(masters + 8, parts), fresh=size)

    @classmethod
    def _zero(cls, layout: Layout, size: int, several: bool, gloo: bool) -> State:
        parts, whole = (layout.dense_dp, layout.expert_dp), (float(size), float(size))
        state = (0.0, 0.0) if layout.offload else _over(12, parts)
        if layout.zero == 1 and size == 2:
            return cls(whole, state, fresh=size)
        if layout.zero == 1:
            standing = (4.0, 4.0) if several else (0.0, 0.0)
            return cls(whole, state, standing, 4, not several, bucket=4, sending=4, ep=layout.ep)
        held = _over(4, parts)
        if layout.zero == 2:
            standing = held if several else (0.0, 0.0)
            return cls(
                whole, state, standing, size, False, _over(12, parts), bucket=size, sending=4 if size == 4 else 6
            )
        weights = _over(size, parts)
        return cls(weights, state, held, size, False, held, 0.0, 4, 8 + GLOO * gloo, size, None, layout.ep)

    def of_pieces(self, pieces: Sequence[Piece], train: Collection[str]) -> dict[str, int]:
        """Weights and optimizer state."""
        learn = [piece for piece in pieces if piece.owner in train]
        rest = sum(piece.weights for piece in pieces if piece.owner not in train)
        optimizer = self.sum_of(learn, self.optimizer) + int(rest * self.frozen)
        return {"weights": self.sum_of(pieces, self.weights), "optimizer": optimizer}

    @staticmethod
    def sum_of(pieces: Iterable[Piece], each: tuple[float, float]) -> int:
        """Bytes of all pieces' parameters."""
        return int(sum(piece.weights * each[piece.sharded] for piece in pieces))

    def bucket_of(self, pieces: Iterable[Piece]) -> int:
        """Elements of the bucket: BUCKET, or all of the model that learn."""
        return min(BUCKET, sum(piece.weights * (self.ep if piece.sharded else 1) for piece in pieces))

    def gathered(self, elements: int) -> int:
        """Weights of all ranks that are here, of so many that are used."""
        return int(min(LIVE, elements) * self.whole)

    def reducing(self, learning: Sequence[Piece]) -> int:
        """The bucket in backward; where it is filled more than once, also what is sent of it."""
        several = sum(piece.weights for piece in learning) > BUCKET
        return int(self.bucket_of(learning) * (self.bucket + self.sending * several))

    def after(self, pieces: Sequence[Piece], job: Job) -> list[Counter[str]]:
        """The moments after backward: the last bucket is sent, and the update."""
        learning = [piece for piece in pieces if piece.owner in job.train]
        bucket = self.bucket_of(learning)
        sent = Counter(
            gradients=self.sum_of(learning, self.sent or self.standing),
            buffers=int(bucket * (self.bucket + self.sending)) + self.gathered(max(p.weights for p in pieces)),
        )
        bound = int(max(piece.weights for piece in learning) * self.partial) if learning else 0
        update = Counter(gradients=self.sum_of(learning, self.at_update) + bound, buffers=int(bucket * self.bucket))
        return [sent, update]


def _over(size: float, parts: tuple[int, int]) -> tuple[float, float]:
    """Bytes per element of what is cut into parts."""
    return size / parts[0], size / parts[1]
