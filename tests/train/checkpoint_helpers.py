"""A toy state with fused experts, cut into fragments as engines would."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from models.hf import released_pieces
from train.checkpoint import CheckpointReader, Manifest, Saver
from train.engines import MOMENTS, VALUE, WEIGHT, Fragment

KINDS = (WEIGHT, *MOMENTS)
SHAPES = {
    "model.embed_tokens.weight": (11, 4),
    "model.layers.0.mlp.gate.weight": (3, 4),
    "model.layers.0.mlp.experts.gate_up_proj": (3, 10, 4),
    "model.layers.0.mlp.experts.down_proj": (3, 4, 5),
    "model.norm.weight": (4,),
}
FROZEN = "model.norm.weight"  # has no moments
SHARE, SHARE_SHAPE = "router.expert_share", (1, 3)
IDENTITY = {"text": {"hidden_size": 4, "num_experts": 3}, "precision": "fp32"}
INFO = {"identity": IDENTITY, "recipe": "name: toy\n", "cursor": {"position": 7}, "seed": 3}

State = dict[tuple[str, str], Tensor]


def make_state(seed: int) -> State:
    """(kind, name) -> flat values."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        (kind, name): torch.randn(math.prod(shape), generator=generator)
        for name, shape in SHAPES.items()
        for kind in (KINDS if name != FROZEN else (WEIGHT,))
    }
    return state | {(VALUE, SHARE): torch.rand(math.prod(SHARE_SHAPE), generator=generator)}


def shape_of(name: str) -> tuple[int, ...]:
    return SHAPES.get(name, SHARE_SHAPE)


def cut(state: State, world: int, chooser: random.Random) -> list[list[Fragment]]:
    """The state as `world` ranks' fragments: every tensor cut at random places, the parts dealt out at random."""
    owned: list[list[Fragment]] = [[] for _ in range(world)]
    for name in (*SHAPES, SHARE):
        shape, numel = shape_of(name), math.prod(shape_of(name))
        kinds = [kind for kind, owner in state if owner == name]
        if name in (FROZEN, SHARE):  # every rank holds these
            tensors = {kind: state[kind, name] for kind in kinds}
            for rank in range(world):
                owned[rank].append(Fragment(name, shape, 0, numel, tensors, replicated=True))
            continue
        bounds = sorted({0, numel, *(chooser.randrange(numel) for _ in range(chooser.randrange(5)))})
        for start, end in zip(bounds, bounds[1:], strict=False):
            tensors = {kind: state[kind, name][start:end] for kind in kinds}
            owned[chooser.randrange(world)].append(Fragment(name, shape, start, end - start, tensors))
    for fragments in owned:
        chooser.shuffle(fragments)
    return owned


def savers(run: Path, world: int, launch: str, **options: object) -> list[Saver]:
    """One per rank, in this process."""
    common = {"timeout_s": 20.0, "released_pieces": released_pieces, **options}
    return [Saver(run, rank=rank, world=world, launch_id=launch, **common) for rank in range(world)]  # type: ignore


def save_all(all_savers: Sequence[Saver], step: int, owned: Sequence[Sequence[Fragment]]) -> None:
    for saver, fragments in zip(all_savers, owned, strict=True):
        saver.save(step, fragments, INFO)


def write_steps(run: Path, steps: Sequence[int], world: int = 2, **options: object) -> None:
    """A run's checkpoints: the state of step n is make_state(n)."""
    all_savers = savers(run, world, f"run{steps[0]}", **options)
    for step in steps:
        save_all(all_savers, step, cut(make_state(step), world, random.Random(step)))
    for saver in all_savers:
        saver.close()


def assert_holds(manifest: Manifest | None, state: State) -> None:
    """Every value of the state is in the checkpoint, bit for bit."""
    assert manifest is not None
    reader = CheckpointReader(manifest, released_pieces)
    for (kind, name), values in state.items():
        shape = shape_of(name)
        assert torch.equal(reader.read(kind, name, shape, 0, math.prod(shape)), values), (kind, name)
