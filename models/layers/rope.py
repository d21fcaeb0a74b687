"""Rotary positions with interleaved time, height and width (TM-RoPE).

    position ids [3, T] --angles--> cos, signed sin [T, C] --rotate--> q, k

Frequency i takes its angle from height when i % 3 == 1, from width when i % 3 == 2, as far as their sections reach,
and from time otherwise. Angles stay in fp32: ids may be fractional and run to tens of thousands, so they are made from
the constants at every call and never live in a buffer that a cast to bf16 could round. Cost: O(T C), once per forward.

Letters: T tokens, H heads, C head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def angles(
    position_ids_3T: Tensor, head_dim: int, theta: float, mrope_section: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Position ids float32 [3, T] -> cos and sin, float32 [T, head_dim], as `rotate` takes them.

    Channels i and i + C/2 turn together, so both halves hold the same angles; the first half of sin is negated.
    """
    exponent_C = torch.arange(0, head_dim, 2, device=position_ids_3T.device, dtype=torch.float32) / head_dim
    freqs_3TC = position_ids_3T.float().unsqueeze(-1) / theta**exponent_C
    freqs_TC = freqs_3TC[0].clone()
    for axis in (1, 2):
        of_axis = slice(axis, 3 * mrope_section[axis], 3)
        freqs_TC[:, of_axis] = freqs_3TC[axis, :, of_axis]
    cos_TC, sin_TC = freqs_TC.cos(), freqs_TC.sin()
    return torch.cat([cos_TC, cos_TC], dim=1), torch.cat([-sin_TC, sin_TC], dim=1)


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
