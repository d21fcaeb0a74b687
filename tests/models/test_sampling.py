"""Choosing tokens: transformers' processors give the same distributions."""

from __future__ import annotations

import pytest
import torch

from models.config import ConfigError
from models.sampling import Sampling, kept


@pytest.mark.parametrize("seed", range(10))
def test_cuts_are_those_of_transformers(seed):
    process = pytest.importorskip("transformers.generation.logits_process")
    generator = torch.Generator().manual_seed(seed)
    logits_NV = torch.randn(5, 40, generator=generator) * 3
    top_k, top_p = int(torch.randint(1, 40, (), generator=generator)), float(torch.rand((), generator=generator))
    want_NV = process.TopPLogitsWarper(top_p)(None, process.TopKLogitsWarper(top_k)(None, logits_NV))
    assert torch.equal(kept(logits_NV, top_k, top_p), want_NV)


def test_repetition_penalty_is_that_of_transformers():
    process = pytest.importorskip("transformers.generation.logits_process")
    logits_NV = torch.tensor([[2.0, 1.9, -0.1, -0.2], [0.5, 3.0, 2.9, 0.0]])
    ids = torch.tensor([[0, 2], [1, 1]])
    seen_NV = torch.zeros(2, 4, dtype=torch.bool).scatter(1, ids, True)
    want_NV = process.RepetitionPenaltyLogitsProcessor(1.2)(ids, logits_NV.clone())
    assert torch.equal(Sampling(repetition_penalty=1.2).choose(logits_NV, seen_NV), want_NV.argmax(-1))
    assert Sampling(repetition_penalty=1.2).choose(logits_NV, seen_NV).tolist() == [1, 2]


def test_draws_follow_the_probabilities():
    generator = torch.Generator().manual_seed(0)
    logits_NV = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(20_000, -1)
    drawn_N = Sampling(temperature=1.0, top_k=3, top_p=0.9).choose(logits_NV, generator=generator)
    share = torch.bincount(drawn_N, minlength=4) / len(drawn_N)
    torch.testing.assert_close(share, torch.tensor([50, 30, 15, 0]) / 95, atol=0.01, rtol=0)
    assert torch.equal(drawn_N, Sampling(1.0, 3, 0.9).choose(logits_NV, generator=torch.Generator().manual_seed(0)))


def test_the_smallest_temperature_is_nearly_greedy():
    logits_NV = torch.randn(7, 30, generator=torch.Generator().manual_seed(1)) * 50
    assert torch.equal(Sampling(temperature=1e-30).choose(logits_NV), logits_NV.argmax(-1))


def test_temperature_zero_is_greedy():
    logits_NV = torch.randn(7, 30, generator=torch.Generator().manual_seed(1))
    assert torch.equal(Sampling(top_k=5, top_p=0.3).choose(logits_NV), logits_NV.argmax(-1))


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"top_k": -2}])
def test_refuses(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Sampling(**bad)
