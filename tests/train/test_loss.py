"""The chunked cross-entropy against torch's own, and the balance loss against its definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from train.loss import balance_loss, cross_entropy_sum, expert_count, next_share, uniform_share


def naive(hidden_TD: torch.Tensor, weight_VD: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden_TD, weight_VD).float(), labels_T, ignore_index=-100, reduction="sum")


@given(
    tokens=st.integers(1, 40),
    max_logits=st.integers(1, 1500),
    masked=st.floats(0, 1),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 999),
)
@settings(max_examples=40, deadline=None)
def test_equals_torch(tokens: int, max_logits: int, masked: float, scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    hidden = torch.randn(tokens, 12, dtype=torch.float32) * scale
    weight, labels = torch.randn(31, 12), torch.randint(0, 31, (tokens,))
    labels[torch.rand(tokens) < masked] = -100
    results = []
    for function in (naive, lambda h, w, y: cross_entropy_sum(h, w, labels_T=y, max_logits=max_logits)):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = function(h, w, labels)
        (loss * 0.37).backward()
        results.append((loss.detach(), h.grad, w.grad))
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert ours is not None and theirs is not None
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * scale)


def test_no_target_at_all_gives_zero_gradients() -> None:
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    loss = cross_entropy_sum(hidden, weight, labels_T=torch.full((5,), -100))
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None and weight.grad is not None
    assert hidden.grad.abs().sum() == 0 and weight.grad.abs().sum() == 0


def test_frozen_head_gets_no_gradient_and_costs_none() -> None:
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4)
    cross_entropy_sum(hidden, weight, labels_T=torch.arange(5)).backward()
    reference = hidden.detach().clone().requires_grad_()
    naive(reference, weight, torch.arange(5)).backward()
    torch.testing.assert_close(hidden.grad, reference.grad)


def test_bf16_is_close_to_fp32() -> None:
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(64, 32), torch.randn(101, 32), torch.randint(0, 101, (64,))
    exact = naive(hidden, weight, labels)
    rounded = cross_entropy_sum(hidden.bfloat16(), weight.bfloat16(), labels_T=labels, max_logits=1616)
    assert rounded.dtype is torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=2e-2)


def test_balance_loss_is_one_at_balance_and_experts_at_collapse() -> None:
    tokens, experts = 10, 4
    even = torch.full((2, experts), tokens / experts)
    assert balance_loss(uniform_share(2, experts), even, tokens).item() == pytest.approx(1.0)
    one = torch.zeros(2, experts)
    one[:, 0] = 1
    assert balance_loss(one, one * tokens, tokens).item() == pytest.approx(experts)


def test_shares_of_parts_add_up() -> None:
    """The balance loss is linear in the micro-batches: any split gives the same sum."""
    torch.manual_seed(0)
    share, probs = torch.rand(3, 8).softmax(-1), torch.rand(20, 3, 8).softmax(-1)
    whole = balance_loss(share, probs.sum(0), 20)
    parts = sum(balance_loss(share, part.sum(0), 20) for part in probs.split([3, 0, 16, 1]))
    torch.testing.assert_close(whole, parts)


def test_expert_count_and_share() -> None:
    logits = torch.tensor([[3.0, 2, 1, 0], [0, 1, 2, 3], [3, 0, 2, 1]])
    assert expert_count(logits, 2).tolist() == [2, 1, 2, 1]
    assert next_share(torch.tensor([[2.0, 1, 2, 1], [0, 0, 0, 0]])).sum(1).tolist() == [1, 1]
