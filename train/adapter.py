"""An adapter in peft's format: a folder with adapter_config.json and adapter_model.safetensors.

    base_model.model.thinker.model.language_model.layers.0.self_attn.q_proj.lora_A.weight      [r, in]
    base_model.model.thinker.model.language_model.layers.0.mlp.experts.base_layer.lora_A.weight   [E r, in], inner
    base_model.model.thinker.model.language_model.layers.0.mlp.experts.lora_B.weight              [out, r E], outer
        --open_adapter--> thinker.model.layers.0.self_attn.q_proj.lora_A.weight, ...mlp.experts.gate_up_proj_lora_A

Of fused experts peft 0.21 adapts a parameter, not a module: A holds the experts one after the other, B has rank major
and expert minor. Where both parameters of the experts have an adapter it nests two wrappers, gate_up_proj inside.
Names are those of transformers' modules (models.hf.LAYOUTS). Dropout is left out: it changes nothing but training.

Cost: headers; a tensor is read whole whenever a range of it is asked for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.hf import COMPONENTS, full_name, released_name
from models.lora import FUSED, A, B, pair_of
from train.errors import CheckpointError
from train.folder_weights import Weight, open_file, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
INNER = ".base_layer"
# Of peft's settings, those that change what an adapter computes or holds; none of them has a place here.
_REFUSED = (
    "use_dora",
    "lora_bias",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "trainable_token_indices",
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "velora_config",
    "kasa_config",
    "monteclora_config",
    "arrow_config",
)
_KEY = re.compile(rf"(.+)\.({A}|{B})\.weight")
# Released names -> those of the modules of transformers 5.23, which peft addresses: models.hf.LAYOUTS backwards.
_IN_MEMORY = (
    (r"thinker\.(audio_tower|visual)\.(.+)", r"thinker.model.\1.\2"),
    (r"thinker\.model\.(.+)", r"thinker.model.language_model.\1"),
)


@dataclass(frozen=True)
class Adapter:
    """What a folder holds, under our names."""

    rank: int
    alpha: float
    rslora: bool
    targets: tuple[str, ...]
    weights: Mapping[str, Weight]  # by the released name of our parameter


def open_adapter(folder: Path) -> Adapter:
    """Check a folder and read its headers. Raises CheckpointError naming the file, and the setting or the tensor."""
    config = read_json(folder / CONFIG)
    where = folder / CONFIG
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{where}: peft_type is {config.get('peft_type')!r}; only LORA is read")
    refused = [key for key in _REFUSED if config.get(key)]
    if config.get("bias") not in (None, "none"):
        refused.append("bias")
    if refused:
        raise CheckpointError(f"{where}: {refused[0]} is {str(config[refused[0]])[:60]}, which is not supported")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise CheckpointError(f"{where}: r and lora_alpha must be above 0, not {rank!r} and {alpha!r}")
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder}: no {WEIGHTS}")
    found = open_file(folder / WEIGHTS)
    weights: dict[str, Weight] = {}
    targets: dict[str, set[str]] = {}
    for key, weight in found.items():
        target, part = _place(key, config, found)
        expert = target.rpartition(".")[2] in FUSED
        targets.setdefault(target, set()).add(part)
        name = pair_of(target)[part == B]
        weights[name] = _fused(weight, part, rank) if expert else weight
        if weights[name].shape[1 if expert and part == A else -1 if part == B else 0] != rank:
            raise CheckpointError(f"{folder / WEIGHTS}: {key} has shape {list(weight.shape)}, which is not of r={rank}")
    if half := [target for target, parts in targets.items() if len(parts) != 2]:
        raise CheckpointError(f"{folder / WEIGHTS}: {half[0]} lacks {A} or {B}")
    if not targets:
        raise CheckpointError(f"{folder / WEIGHTS}: holds no adapter")
    return Adapter(rank, float(alpha), bool(config.get("use_rslora")), tuple(targets), weights)


def _place(key: str, config: Mapping[str, Any], found: Mapping[str, Weight]) -> tuple[str, str]:
    """The target that a tensor of the file belongs to, by its released name, and whether it is A or B."""
    match = _KEY.fullmatch(key.removeprefix(PREFIX))
    if match is None or not key.startswith(PREFIX) or re.search(r"\.experts\.\d+\.", key):
        raise CheckpointError(f"{WEIGHTS}: holds {key[:200]}, which is no A or B of a linear map or of fused experts")
    module, part = match[1], match[2]
    inner = module.endswith(INNER)
    module = module.removesuffix(INNER)
    name = released_name(module if module.startswith(COMPONENTS) else COMPONENTS[0] + module)
    if not name.endswith(".mlp.experts"):
        return name, part
    if inner:
        return f"{name}.{FUSED[0]}", part
    if f"{PREFIX}{module}{INNER}.{A}.weight" in found:
        return f"{name}.{FUSED[1]}", part
    asked = config.get("target_parameters") or []
    mine = [each for each in FUSED if any(f".{module}.{each}".endswith(f".{pattern}") for pattern in asked)]
    if len(mine) != 1:
        raise CheckpointError(f"{CONFIG}: target_parameters do not say which of {', '.join(FUSED)} {module} adapts")
    return f"{name}.{mine[0]}", part


def _fused(weight: Weight, part: str, rank: int) -> Weight:
    """peft's matrix of all experts as our 3-D parameter."""
    if part == A:
        rows, columns = weight.shape
        return weight.part(0, (rows // rank, rank, columns))
    rows, columns = weight.shape
    shape = columns // rank, rows, rank

    def read(start: int, length: int) -> Tensor:
        whole_YRE = weight.read(0, weight.numel).view(rows, rank, columns // rank)
        return whole_YRE.permute(2, 0, 1).reshape(-1)[start : start + length]

    return Weight(shape, weight.dtype, weight.source, read)


def peft_tensors(weights: Mapping[str, Tensor], bare: bool) -> dict[str, Tensor]:
    """Our adapter parameters, by released names, as peft holds them; `bare`: for the Thinker alone."""
    out: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        fused = next((each for each in FUSED if name.endswith((f".{each}_{A}", f".{each}_{B}"))), None)
        if fused is None:
            out[f"{PREFIX}{memory_name(name, bare)}"] = tensor
            continue
        stem, part = name.rsplit(".", 1)[0], name[-len(A) :]
        both = all(f"{stem}.{each}_{A}" in weights for each in FUSED)
        nested = INNER if both and fused == FUSED[0] else ""
        matrix = tensor.flatten(0, 1) if part == A else tensor.permute(1, 2, 0).flatten(1)
        out[f"{PREFIX}{memory_name(stem, bare)}{nested}.{part}.weight"] = matrix.contiguous()
    return out


def peft_config(targets: list[str], rank: int, alpha: float, rslora: bool, bare: bool) -> dict[str, Any]:
    """adapter_config.json for `targets`, by released names."""
    fused = [target for target in targets if target.rpartition(".")[2] in FUSED and ".experts." in target]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": rslora,
        "use_dora": False,
        "modules_to_save": None,
        "target_modules": [memory_name(target, bare) for target in targets if target not in fused],
        "target_parameters": [memory_name(target, bare) for target in fused] or None,
    }


def memory_name(name: str, bare: bool) -> str:
    """A released name as transformers has it in memory; `bare`: of the Thinker alone, without its prefix."""
    name = full_name(name)
    for pattern, meant in _IN_MEMORY:
        if match := re.fullmatch(pattern, name):
            name = match.expand(meant)
            break
    return name.removeprefix(COMPONENTS[0]) if bare else name


def as_matrix(whole: Weight) -> Tensor:
    """A tensor of an adapter, whole, fp32."""
    return whole.read(0, whole.numel).to(torch.float32).view(whole.shape)
