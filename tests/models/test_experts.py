"""The experts against a loop over tokens in float64: both paths, both memory modes, any routing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from models.layers.experts import _grouped_experts, experts

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def case(seed, tokens, num_experts, top_k, dtype=torch.float32, skew=0.0):
    generator = torch.Generator().manual_seed(seed)
    hidden, width = 16, 8
    x_TD = torch.randn(tokens, hidden, generator=generator)
    gate_up_EGD = torch.randn(num_experts, 2 * width, hidden, generator=generator) / 4
    down_EDF = torch.randn(num_experts, hidden, width, generator=generator) / 3
    popularity_E = skew * torch.arange(num_experts).float()
    best_TK, chosen_TK = (torch.randn(tokens, num_experts, generator=generator) - popularity_E).topk(top_k)
    arguments = [x_TD.to(dtype), gate_up_EGD.to(dtype), down_EDF.to(dtype), chosen_TK, best_TK.softmax(-1)]
    grad_TD = torch.randn(tokens, hidden, generator=generator).to(dtype)
    return arguments, grad_TD


def results(function, arguments, grad_TD):
    leaves = [a.detach().clone().requires_grad_(a.is_floating_point()) for a in arguments]
    out = function(*leaves)
    out.backward(grad_TD.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.requires_grad)]


def by_token(x_TD, gate_up_EGD, down_EDF, chosen_TK, weight_TK):
    gate, up = torch.einsum("td,tkgd->tkg", x_TD, gate_up_EGD[chosen_TK]).chunk(2, -1)
    return torch.einsum("tkf,tkdf,tk->td", F.silu(gate) * up, down_EDF[chosen_TK], weight_TK)


def check(function, arguments, grad_TD):
    dtype = arguments[0].dtype
    exact = [a.double() if a.is_floating_point() else a for a in arguments]
    want, got = results(by_token, exact, grad_TD), results(function, arguments, grad_TD)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.shape == theirs.shape
        # The added 1 is the scale of one element: a single gradient may cancel to almost nothing.
        assert (ours.double() - theirs).norm() <= TOLERANCE[dtype] * (theirs.norm() + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", [False, True])
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    tokens=st.integers(0, 60),
    num_experts=st.integers(1, 9),
    top_k=st.integers(1, 4),
    skew=st.sampled_from([0.0, 3.0]),
)
def test_cpu_path(dtype, recompute, seed, tokens, num_experts, top_k, skew):
    arguments, grad_TD = case(seed, tokens, num_experts, min(top_k, num_experts), dtype, skew)
    check(lambda *a: experts(*a, recompute=recompute), arguments, grad_TD)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("skew", [0.0, 3.0])
def test_many_blocks(recompute, skew):
    """More rows than a block holds, with and without one expert that outgrows a block."""
    check(lambda *a: experts(*a, recompute=recompute), *case(0, 2100, 6, 2, skew=skew))


@pytest.mark.parametrize("skew", [0.0, 3.0])
def test_grouped_path(skew):
    """What a GPU runs; grouped_mm exists on CPU too."""
    check(_grouped_experts, *case(1, 50, 8, 2, skew=skew))


def test_frozen_experts():
    """Gradients of the input and the routing weights do not depend on whether the experts learn."""
    (x_TD, gate_up_EGD, down_EDF, chosen_TK, weight_TK), grad_TD = case(3, 40, 5, 2)
    want = results(experts, [x_TD, gate_up_EGD, down_EDF, chosen_TK, weight_TK], grad_TD)
    x_TD.requires_grad_(), weight_TK.requires_grad_()
    experts(x_TD, gate_up_EGD, down_EDF, chosen_TK, weight_TK).backward(grad_TD)
    assert torch.equal(x_TD.grad, want[1]) and torch.equal(weight_TK.grad, want[4])
    assert gate_up_EGD.grad is None


def test_upcast_path(monkeypatch):
    """What a CPU without 16-bit matmul instructions runs, and one with them."""
    for upcast in (True, False):
        monkeypatch.setattr("models.layers.experts._upcasts", lambda x, answer=upcast: answer)
        check(experts, *case(2, 80, 5, 2, torch.bfloat16))
