"""Rotary positions with interleaved time, height and width (TM-RoPE).

    position ids [3, T] --angles--> cos, signed sin [T, C] --rotate--> q, k

Frequency i takes its angle from height when i % 3 == 1, from width when i % 3 == 2, as far as their sections reach,
and from time otherwise. Angles stay in fp32: ids may be fractional and run to tens of thousands, so they are made from
the constants at every call and never live in a buffer that a cast to bf16 could round. A model that goes on beyond its
trained length stretches its frequencies (models.config.RopeScaling). Cost: O(T C), once per forward.

Letters: T tokens, H heads, C head_dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from models.config import RopeScaling


def angles(
    position_ids_3T: Tensor,
    head_dim: int,
    theta: float,
    mrope_section: tuple[int, int, int],
    scaling: RopeScaling | None = None,
) -> tuple[Tensor, Tensor]:
    """Position ids float32 [3, T] -> cos and sin, float32 [T, head_dim], as `rotate` takes them.

    Channels i and i + C/2 turn together, so both halves hold the same angles; the first half of sin is negated. With
    `scaling` both are those of longer waves, and of yarn multiplied by its attention factor.
    """
    exponent_C = torch.arange(0, head_dim, 2, device=position_ids_3T.device, dtype=torch.float32) / head_dim
    freqs_3TC = position_ids_3T.float().unsqueeze(-1) / theta**exponent_C
    if scaling is not None:
        freqs_3TC *= _shares(head_dim, theta, scaling).to(freqs_3TC.device)
    freqs_TC = freqs_3TC[0].clone()
    for axis in (1, 2):
        of_axis = slice(axis, 3 * mrope_section[axis], 3)
        freqs_TC[:, of_axis] = freqs_3TC[axis, :, of_axis]
    cos_TC, sin_TC = freqs_TC.cos(), freqs_TC.sin()
    if scaling is not None and (by := _attention_factor(scaling)) != 1:
        cos_TC, sin_TC = cos_TC * by, sin_TC * by
    return torch.cat([cos_TC, cos_TC], dim=1), torch.cat([-sin_TC, sin_TC], dim=1)


def _shares(head_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """What remains of each frequency, fp32 [head_dim / 2]: 1 / factor where it is stretched, 1 where it is left alone.

    As transformers computes them (modeling_rope_utils.py), whose ramp runs over whole channels.
    """
    if scaling.rope_type == "linear":
        return torch.full((head_dim // 2,), 1 / scaling.factor)
    length = scaling.original_max_position_embeddings
    assert length is not None

    def channel(turns: float) -> float:
        """Which channel turns so often over the original length."""
        waves = length / (turns * 2 * math.pi)
        return head_dim * math.log(waves) / (2 * math.log(theta))

    low = max(math.floor(channel(scaling.beta_fast)), 0)
    high = min(math.ceil(channel(scaling.beta_slow)), head_dim - 1)
    stretched_C = ((torch.arange(head_dim // 2) - low) / max(high - low, 0.001)).clamp(0, 1)
    return 1 - stretched_C * (1 - 1 / scaling.factor)


def _attention_factor(scaling: RopeScaling) -> float:
    if scaling.rope_type == "linear":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 0.1 * math.log(scaling.factor) + 1.0


class _Rotate(torch.autograd.Function):
    """Rotation by the angle; backward is the rotation by minus the angle, so x is not kept."""

    @staticmethod
    def forward(ctx: Any, x_THC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TC, sin_TC)
        return _rotated(x_THC, cos_TC, sin_TC, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_THC: Tensor) -> tuple[Tensor, None, None]:
        cos_TC, sin_TC = ctx.saved_tensors
        return _rotated(grad_THC, cos_TC, sin_TC, -1), None, None


def _rotated(x_THC: Tensor, cos_TC: Tensor, sin_TC: Tensor, sign: int) -> Tensor:
    partner_THC = x_THC.roll(x_THC.shape[-1] // 2, -1)
    return (x_THC * cos_TC.unsqueeze(1)).addcmul_(partner_THC, sin_TC.unsqueeze(1), value=sign)


def rotate(x_THC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """Rotate queries or keys [T, H, C] by `angles` cast to their dtype."""
    return _Rotate.apply(x_THC, cos_TC, sin_TC)
