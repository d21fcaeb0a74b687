"""Adapters out of a run, in peft's format, and adapters merged into the weights beside them.

    checkpoint of a run with lora --write_adapter--> adapter_config.json, adapter_model.safetensors   (train/adapter.py)
    base weights, A and B --merged--> weights W + scale B A, each computed in fp32 when its range is read

Memory: merging keeps a block and the adapters of a few tensors; an adapter is written from memory, whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from launch.weights import new_folder
from models.hf import released_tensors
from models.lora import FUSED, delta, is_lora, pair_of
from train.adapter import CONFIG, WEIGHTS, as_matrix, peft_config, peft_tensors
from train.errors import CheckpointError
from train.folder_weights import Weight
from train.lora import targets_in
from train.lora_config import LoraConfig

Factors = Callable[[str], tuple[Tensor, Tensor]]  # of a target: A and B, [E, ...]
KEPT = 4  # targets whose A and B are in memory while ranges of their weights are read


def merged(weights: Mapping[str, Weight], adapter: Mapping[str, Weight], scale: float) -> dict[str, Weight]:
    """`weights` with what the parameters of `adapter` add to them; both by released names.

    Raises CheckpointError for a target that the weights lack or hold in another shape.
    """
    out = {name: weight for name, weight in weights.items() if not is_lora(name)}

    @lru_cache(KEPT)
    def factors(target: str) -> tuple[Tensor, Tensor]:
        a, b = (as_matrix(adapter[name]) for name in pair_of(target))
        return (a, b) if a.ndim == 3 else (a.unsqueeze(0), b.unsqueeze(0))

    for target in targets_in(list(adapter)):
        a, b = (adapter[name] for name in pair_of(target))
        for name, shape, expert, low in _places(target, a, b):
            if name not in out or out[name].shape != shape:
                there = f"with shape {list(out[name].shape)}" if name in out else "not at all"
                raise CheckpointError(
                    f"{a.source}: adapts {name} of shape {list(shape)}, which the weights have {there}"
                )
            out[name] = _sum(out[name], target, factors, expert, low, scale)
    return out


def _places(target: str, a: Weight, b: Weight) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
    """Released tensors that a target is made of: name, shape, expert, and the first of its rows in B."""
    if target.rpartition(".")[2] not in FUSED or len(a.shape) != 3:
        yield f"{target}.weight", (b.shape[0], a.shape[1]), 0, 0
        return
    count, rows, columns = b.shape[0], b.shape[1], a.shape[2]
    tensors = released_tensors(target, (count, rows, columns))
    each = len(tensors) // count
    for index, (name, shape) in enumerate(tensors):
        yield name, shape, index // each, index % each * shape[0]


def _sum(weight: Weight, target: str, factors: Factors, expert: int, low: int, scale: float) -> Weight:
    def read(start: int, length: int) -> Tensor:
        a_ERX, b_EYR = factors(target)
        rows_YR = b_EYR[expert, low : low + weight.shape[0]]
        return weight.read(start, length).float() + delta(a_ERX[expert], rows_YR, scale, start, length)

    return replace(weight, read=read, exact=False)


def write_adapter(
    to: Path, weights: Mapping[str, Weight], lora: LoraConfig, base: str | None, *, bare: bool, dtype: torch.dtype
) -> int:
    """Write the adapters among `weights` in peft's format, for the model or, `bare`, its Thinker; returns how many.

    Raises CheckpointError where there are none.
    """
    mine = {name: as_matrix(weight).to(dtype) for name, weight in weights.items() if is_lora(name)}
    if bare:
        mine = {name: tensor for name, tensor in mine.items() if name.startswith("thinker.")}
    targets = targets_in(list(mine))
    if not targets:
        raise CheckpointError(f"{to}: nothing to write: that part of the model has no adapters")
    config = peft_config(targets, lora.rank, lora.alpha, lora.rslora, bare) | {"base_model_name_or_path": base}
    with new_folder(to) as part:
        save_file(peft_tensors(mine, bare), part / WEIGHTS, metadata={"format": "pt"})
        (part / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return len(targets)
