"""Norm, rotary positions and gate: hand-written gradients against autograd in float64."""

from __future__ import annotations

import pytest
import torch

from models.layers.moe import Gate
from models.layers.norm import RMSNorm
from models.layers.rope import angles, rotate


def gradients(function, *leaves):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    (out * weights).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("shape", [(7, 16), (5, 3, 8), (0, 16), (0, 3, 8)])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_norm(shape, dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(shape[-1], 1e-6)
    x = torch.randn(shape, generator=generator).to(dtype)
    weight = torch.rand(shape[-1], generator=generator).to(dtype)

    def ours(x, weight):
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    def plain(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    for got, want in zip(gradients(ours, x, weight), gradients(plain, x.double(), weight.double()), strict=True):
        assert got.dtype is dtype
        assert (got.double() - want).norm() <= tolerance * want.norm()


def test_rotation_by_complex_numbers():
    generator = torch.Generator().manual_seed(0)
    position_ids_3T = torch.rand(3, 9, generator=generator) * 40_000  # ids may be fractional and large
    head_dim, section = 16, (4, 2, 2)
    axis_of = [0, 1, 2, 0, 1, 2, 0, 0]  # interleaved as far as the sections reach, then time
    rates = 1e6 ** (-torch.arange(0, 16, 2).double() / 16)
    angle_TC = torch.stack([position_ids_3T[a].double() * r for a, r in zip(axis_of, rates, strict=True)], 1)
    cos_TC, sin_TC = angles(position_ids_3T, head_dim, 1e6, section)
    torch.testing.assert_close(
        cos_TC[:, :8].double(), angle_TC.cos(), atol=5e-3, rtol=0
    )  # fp32 angles up to 40,000 rad
    x_THC = torch.randn(9, 2, head_dim, generator=generator)

    def plain(x_THC):
        turned = torch.complex(x_THC[..., :8], x_THC[..., 8:]) * torch.complex(cos_TC[:, 8:], sin_TC[:, 8:]).unsqueeze(
            1
        )
        return torch.cat([turned.real, turned.imag], -1)

    for got, want in zip(gradients(lambda x: rotate(x, cos_TC, sin_TC), x_THC), gradients(plain, x_THC), strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


def test_text_positions_turn_all_axes_alike():
    """Equal ids on the three axes are ordinary rotary positions, whatever the sections."""
    position_ids_3T = torch.arange(20.0).expand(3, -1)
    for section in ((8, 0, 0), (4, 2, 2)):
        cos_TC, _ = angles(position_ids_3T, 16, 1e4, section)
        torch.testing.assert_close(
            cos_TC[:, :8], (torch.arange(20.0)[:, None] * 1e4 ** (-torch.arange(0, 16, 2) / 16)).cos()
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_is_fp32(dtype):
    gate = Gate(6, 16).to(dtype)
    torch.nn.init.normal_(gate.weight)
    x_TD = torch.randn(9, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits_TE = gate(x_TD)
    assert logits_TE.dtype is torch.float32
    got = gradients(lambda x, w: torch.func.functional_call(gate, {"weight": w}, (x,)), x_TD, gate.weight)
    want = gradients(lambda x, w: x @ w.t(), x_TD.double(), gate.weight.double())
    for ours, theirs in zip(got, want, strict=True):
        assert (ours.double() - theirs).norm() <= (1e-6 if ours.dtype is torch.float32 else 1e-2) * theirs.norm()
