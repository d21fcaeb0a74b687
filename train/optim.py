"""AdamW's parameter groups and its learning rate, both pure functions.

named parameters -> groups (decay or not, learning-rate multiplier), every trainable one in exactly one group
step             -> learning rate: warm-up, then cosine or warm-up-stable-decay
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable
from typing import Any

from torch import nn

from models.hf import full_name
from train.config import OptimConfig, Phase
from train.errors import RecipeError


def lr_at(step: int, start: int, phase: Phase, optim: OptimConfig) -> float:
    """Learning rate of the update that makes step `step` into `step + 1`; the phase starts at step `start`."""
    peak = optim.lr if phase.lr is None else phase.lr
    warmup = optim.warmup_steps if phase.warmup_steps is None else phase.warmup_steps
    done = step - start
    if done < warmup:
        return peak * (done + 1) / warmup
    if optim.schedule == "wsd":
        left = phase.steps - done
        share = min(1.0, left / (optim.decay_steps + 1))
    else:
        progress = (done - warmup) / max(1, phase.steps - warmup)
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return peak * (optim.final_lr + (1 - optim.final_lr) * share)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a parameter's name fits one of the shell-style patterns."""
    return any(fits(name, pattern) for pattern in patterns)


def fits(name: str, pattern: str) -> bool:
    """Whether a parameter's name fits a shell-style pattern, `thinker.` before either of them or not.

    A Thinker by itself has `model.norm.weight`, the same in a whole model is `thinker.model.norm.weight`.
    """
    whole = full_name(name)
    return any(fnmatch.fnmatchcase(each, pattern) for each in {name, whole, whole.removeprefix("thinker.")})


def select_trainable(model: nn.Module, phase: Phase, where: str) -> None:
    """Freeze what the phase does not train. Raises RecipeError for a pattern that fits nothing."""
    names = [name for name, _ in model.named_parameters()]
    for key in ("train", "freeze"):
        for pattern in getattr(phase, key):
            if not any(fits(name, pattern) for name in names):
                raise RecipeError(
                    f"phases.{where}.{key}: no parameter fits {pattern!r}; names look like {names[0]!r}, {names[-1]!r}"
                )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(matches(name, phase.train) and not matches(name, phase.freeze))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise RecipeError(f"phases.{where}: freeze leaves nothing to train")


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Weight decay is for matrices: not for norms, biases and embeddings."""
    return parameter.ndim >= 2 and "embed_tokens" not in name


def group_of(name: str, parameter: nn.Parameter, optim: OptimConfig) -> tuple[float, bool]:
    """Learning-rate multiplier of a parameter, and whether it is decayed."""
    scale = next((s for pattern, s in optim.lr_scale.items() if fits(name, pattern)), 1.0)
    return scale, is_decayed(name, parameter)


def param_groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Groups for AdamW: name, params, weight_decay, lr, lr_scale; they cover every trainable parameter once."""
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale, decay = group_of(name, parameter, optim)
        group = groups.setdefault(
            (scale, decay),
            {
                "name": f"{'decay' if decay else 'plain'}-x{scale:g}",
                "params": [],
                "weight_decay": optim.weight_decay if decay else 0.0,
                "lr": optim.lr * scale,
                "lr_scale": scale,
            },
        )
        group["params"].append(parameter)
    covered = sum(len(group["params"]) for group in groups.values())
    assert covered == sum(p.requires_grad for p in model.parameters()), "a trainable parameter is in no group"
    return list(groups.values())


def set_lr(groups: Iterable[dict[str, Any]], lr: float) -> None:
    """Give every group its share of the step's learning rate."""
    for group in groups:
        group["lr"] = lr * group["lr_scale"]
