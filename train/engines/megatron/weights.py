"""Which ranges of the released tensors lie in a parameter of Megatron's, and the marks that Megatron wants on it.

    Megatron's parameter here, flat   [ run | run | run ]
                                         |     |     '--> name of ours, first element in the whole tensor
    a range of it (the distributed optimizer's)  --pieces-->  ranges of ours

    linear_qkv [(G, H/G + 2) C / tp, D]: for each key-value group its queries, its key, its value
    linear_proj, shared_experts.linear_fc2, down_proj under expert_tp: cut by columns, so a run for every row
    shared_experts.linear_fc1, gate_up_proj under expert_tp: gate and up, each cut by rows
    experts.*: this rank's experts, as they are; embedding, head: rows of words; all else whole on every tensor rank

Nothing is copied to find a range. Cost: a few runs a parameter, a run for every row where columns are cut.

Letters: D hidden, H query heads, G key-value heads, C head_dim, E experts, F expert width.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from megatron.core import parallel_state
from torch import nn

from models.config import TextConfig

mpu: Any = parallel_state
NAMES = {  # of a layer
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.experts.gate_up_proj": "mlp.experts.gate_up_proj",
    "mlp.experts.down_proj": "mlp.experts.down_proj",
    "mlp.shared_experts.gate_weight": "mlp.shared_expert_gate.weight",
    "mlp.shared_experts.linear_fc2.weight": "mlp.shared_expert.down_proj.weight",
}


class Run(NamedTuple):
    """Elements [offset, offset + length) of a parameter here are [start, start + length) of the tensor `name`."""

    name: str
    start: int
    offset: int
    length: int


@dataclass(frozen=True)
class Placed:
    """A parameter here: its runs, in order and without a gap."""

    runs: tuple[Run, ...]
    owned: bool  # False: a tensor rank before this one has the same
    split: bool  # tensor ranks hold different parts

    def pieces(self, start: int, length: int) -> Iterator[Run]:
        """Cut elements [start, start + length) of the parameter into ranges of ours; offsets count from `start`."""
        end = start + length
        place = bisect_right(self.runs, start, key=lambda run: run.offset) - 1
        for run in self.runs[place:]:
            low, high = max(start, run.offset), min(end, run.offset + run.length)
            if low >= high:
                return
            yield Run(run.name, run.start + low - run.offset, low - start, high - low)


@dataclass(frozen=True)
class Degrees:
    """This rank's number and the count of ranks, for each way of cutting."""

    tp: tuple[int, int]
    ep: tuple[int, int]
    expert_tp: tuple[int, int]

    @classmethod
    def here(cls) -> Degrees:
        """Of Megatron's groups."""
        return cls(
            (mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()),
            (mpu.get_expert_model_parallel_rank(), mpu.get_expert_model_parallel_world_size()),
            (mpu.get_expert_tensor_parallel_rank(), mpu.get_expert_tensor_parallel_world_size()),
        )


def place_parameters(
    stage: nn.Module, prefix: str, text: TextConfig, degrees: Degrees, layers: dict[int, int]
) -> dict[nn.Parameter, Placed]:
    """Where every parameter of a stage belongs, and Megatron's marks on it.

    `prefix` begins the names of ours ("thinker.", "talker." or none); `layers` are the numbers over all stages, from 0,
    of the layers here.
    """
    found = {}
    for name, parameter in stage.named_parameters():
        found[parameter] = placed = _place(name, tuple(parameter.shape), prefix, text, degrees, layers)
        # the global gradient norm counts what is marked on every tensor rank, all else once
        parameter.tensor_model_parallel = placed.split  # type: ignore[attr-defined]
    return found


def _place(
    name: str, shape: tuple[int, ...], prefix: str, text: TextConfig, degrees: Degrees, layers: dict[int, int]
) -> Placed:
    rank, size = degrees.tp
    beside = {
        "embedding.weight": "model.embed_tokens.weight",
        "head.linear.weight": "codec_head.weight" if prefix == "talker." else "lm_head.weight",
    }
    if name in beside:
        return _rows(prefix + beside[name], shape, rank, size)
    if name == "decoder.final_layernorm.weight":
        return _whole(prefix + "model.norm.weight", shape, rank)
    if name.startswith("encoders.thinker."):
        return _whole(prefix + name.removeprefix("encoders.thinker."), shape, rank)
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", name)
    if match is None:
        return _whole(prefix + name, shape, rank)  # the Talker's front
    layer, rest = f"{prefix}model.layers.{layers[int(match[1])]}.", match[2]
    if rest == "self_attention.linear_qkv.weight":
        return _qkv(layer, shape, text, rank, size)
    if rest == "mlp.shared_experts.linear_fc1.weight":
        half = shape[0] // 2 * shape[1]
        names = (f"{layer}mlp.shared_expert.{part}_proj.weight" for part in ("gate", "up"))
        return Placed(tuple(Run(name, rank * half, i * half, half) for i, name in enumerate(names)), True, True)
    ours = layer + NAMES[rest]
    if rest.startswith("mlp.experts."):
        return _experts(ours, shape, degrees, halves=rest.endswith("gate_up_proj"))
    if rest.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return Placed(tuple(_columns(ours, 0, shape, rank, size, 0)), True, True)
    return _whole(ours, shape, rank)


def _whole(name: str, shape: tuple[int, ...], rank: int) -> Placed:
    return Placed((Run(name, 0, 0, prod(shape)),), rank == 0, False)


def _rows(name: str, shape: tuple[int, ...], rank: int, size: int) -> Placed:
    length = prod(shape)
    return Placed((Run(name, rank * length, 0, length),), True, True)


def _columns(name: str, begin: int, shape: tuple[int, ...], rank: int, size: int, offset: int) -> Iterator[Run]:
    """A matrix [rows, columns / size] at `offset` here, of one that begins at `begin` in the whole tensor."""
    rows, columns = shape
    if size == 1:
        yield Run(name, begin, offset, rows * columns)
        return
    for row in range(rows):
        yield Run(name, begin + (row * size + rank) * columns, offset + row * columns, columns)


def _qkv(layer: str, shape: tuple[int, ...], text: TextConfig, rank: int, size: int) -> Placed:
    head, groups = text.head_dim * shape[1], text.num_key_value_heads // size
    queries = text.num_attention_heads // text.num_key_value_heads * head
    runs, offset = [], 0
    for group in range(rank * groups, (rank + 1) * groups):
        for part, length in (("q", queries), ("k", head), ("v", head)):
            runs.append(Run(f"{layer}self_attn.{part}_proj.weight", group * length, offset, length))
            offset += length
    return Placed(tuple(runs), True, True)


def _experts(name: str, shape: tuple[int, ...], degrees: Degrees, halves: bool) -> Placed:
    rank, (part, parts) = degrees.ep[0], degrees.expert_tp
    count, one = shape[0], shape[1] * shape[2]
    if parts == 1:
        runs = [Run(name, rank * count * one, 0, count * one)]
    elif halves:  # [E, 2F, D]: gate and up, each cut by rows
        half = one // 2
        runs = [
            Run(name, ((rank * count + e) * 2 + i) * half * parts + part * half, (2 * e + i) * half, half)
            for e in range(count)
            for i in (0, 1)
        ]
    else:  # [E, D, F]: cut by columns
        runs = [
            run
            for e in range(count)
            for run in _columns(name, (rank * count + e) * one * parts, shape[1:], part, parts, e * one)
        ]
    return Placed(tuple(runs), True, True)
