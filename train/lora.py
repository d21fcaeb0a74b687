"""Adapters in training: which parameters get one, what they start from, and which engines can.

    model, lora.targets --adapt--> adapters, the base frozen           (models/lora.py)
    weights to start from + lora.adapter, or drawn values --LoraState--> what an engine restores

Adapters lie in checkpoints beside the base under their own names, so a run goes on without the folder it began from.
First values follow from (seed, name), whatever starts the run.
"""

from __future__ import annotations

import fnmatch
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from models.hf import full_name
from models.lora import add_lora, init_lora, is_lora, pair_of, targets_of
from train.adapter import as_matrix, open_adapter
from train.config import EngineConfig
from train.engines import WEIGHT, StateReader
from train.errors import CheckpointError, EngineError, RecipeError
from train.folder_weights import Weight
from train.lora_config import LoraConfig

KEPT = 2  # tensors of LoraState: ranges of one come in turns


def adapt(model: nn.Module, lora: LoraConfig, seed: int, drawn: bool = True) -> None:
    """Give `model` its adapters, in place. Raises RecipeError for a pattern of targets that fits nothing."""
    names = [full_name(name) for name in targets_of(model)]
    for pattern in lora.targets:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise RecipeError(
                f"lora.targets: no linear map and no experts fit {pattern!r}; there are {names[0]!r}, {names[-1]!r}"
            )
    add_lora(model, lambda name: _fits(full_name(name), lora.targets), lora.rank, lora.scale)
    if drawn:
        for name, parameter in model.named_parameters():
            if is_lora(name):
                init_lora(name, parameter, seed)


def freeze_base(model: nn.Module, where: str) -> None:
    """Let adapters alone learn, of what a phase trains. Raises RecipeError where that is nothing."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and is_lora(name))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise RecipeError(f"phases.{where}: of what train and freeze leave, nothing has an adapter; see lora.targets")


def check_engine(engine: EngineConfig, names: Iterable[str]) -> None:
    """Raise EngineError where an engine cannot train a model with adapters, whose parameters have these `names`."""
    if engine.name == "megatron":
        raise EngineError("engine.name=megatron has no adapters: leave lora out, or take engine=deepspeed")
    on_experts = any(is_lora(name) and ".experts." in name for name in names)
    if engine.name == "deepspeed" and engine.ep > 1 and on_experts:
        raise EngineError(
            f"engine.ep={engine.ep}: adapters of experts are not sharded with them; set engine.ep=1 "
            "(engine.zero=3 shards the frozen experts), or leave experts out of lora.targets"
        )


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


class LoraState:
    """Weights to start from, and of adapters that they lack an adapter's folder or first values."""

    step = 0

    def __init__(self, base: StateReader, lora: LoraConfig, seed: int) -> None:
        """Raises CheckpointError for a folder that cannot be used."""
        self._base, self._seed = base, seed
        self._given: Mapping[str, Weight] = open_adapter(Path(lora.adapter)).weights if lora.adapter else {}
        self._kept = OrderedDict[str, Tensor]()

    def kinds(self, name: str) -> frozenset[str]:
        """See train.engines.StateReader."""
        return frozenset({WEIGHT}) if is_lora(name) else self._base.kinds(name)

    def read(self, kind: str, name: str, shape: Sequence[int], start: int, length: int) -> Tensor:
        """See train.engines.StateReader."""
        given = full_name(name) in self._given
        if not is_lora(name) or (not given and self._base.kinds(name)):
            return self._base.read(kind, name, shape, start, length)
        if name not in self._kept:
            self._kept[name] = self._whole(name, tuple(shape), self._given.get(full_name(name)))
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return self._kept[name].view(-1)[start : start + length]

    def _whole(self, name: str, shape: tuple[int, ...], given: Weight | None) -> Tensor:
        if given is None:
            whole = torch.empty(shape)
            init_lora(name, whole, self._seed)
            return whole
        if given.shape != shape:
            raise CheckpointError(
                f"{given.source}: {name} has shape {list(given.shape)}, the model wants {list(shape)}"
            )
        return as_matrix(given).contiguous()


def targets_in(names: Sequence[str]) -> list[str]:
    """The targets whose adapters are among parameters of these names."""
    found = [name for name in names if is_lora(name)]
    stems = (name.removesuffix(".weight") for name in found)
    targets = [stem[: -len(".lora_A")] for stem in stems if stem.endswith("lora_A")]
    assert all(pair_of(target)[0] in found for target in targets)
    return targets
