"""Schedules are pure functions, and groups cover every trainable parameter once."""

from __future__ import annotations

import math

import pytest
from torch import nn

from train.config import OptimConfig, Phase
from train.errors import RecipeError
from train.optim import fits, lr_at, param_groups, select_trainable


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens, self.tower, self.norm = nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4)


def test_cosine_rises_then_falls_to_its_end() -> None:
    optim, phase = OptimConfig(lr=1.0, warmup_steps=10, final_lr=0.1), Phase(steps=110)
    rates = [lr_at(step, 0, phase, optim) for step in range(110)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] == rates[10] == 1.0
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert rates[60] == pytest.approx(0.55) and lr_at(110, 0, phase, optim) == pytest.approx(0.1)


def test_wsd_is_flat_then_linear() -> None:
    optim = OptimConfig(lr=2.0, schedule="wsd", warmup_steps=5, decay_steps=9, final_lr=0.0)
    rates = [lr_at(step, 100, Phase(steps=50), optim) for step in range(100, 150)]
    assert set(rates[5:41]) == {2.0}
    falls = [a - b for a, b in zip(rates[41:], rates[42:], strict=False)]
    assert all(math.isclose(fall, 0.2) for fall in falls) and rates[-1] == pytest.approx(0.2)


def test_a_phase_has_its_own_rate_and_warmup() -> None:
    optim = OptimConfig(lr=1.0, warmup_steps=10)
    assert lr_at(50, 50, Phase(steps=10, lr=3.0, warmup_steps=0), optim) == 3.0


def test_groups_cover_and_split() -> None:
    model = Toy()
    groups = param_groups(model, OptimConfig(lr=1.0, weight_decay=0.2, lr_scale={"tower.*": 0.5}))
    found = {id(p): group for group in groups for p in group["params"]}
    assert len(found) == len(list(model.parameters()))
    assert found[id(model.tower.weight)]["weight_decay"] == 0.2 and found[id(model.tower.weight)]["lr"] == 0.5
    assert (
        found[id(model.tower.bias)]["weight_decay"] == 0 and found[id(model.embed_tokens.weight)]["weight_decay"] == 0
    )
    assert found[id(model.norm.weight)]["lr_scale"] == 1.0


def test_select_trainable() -> None:
    model = Toy()
    select_trainable(model, Phase(steps=1, train=["tower.*"], freeze=["*.bias"]), "adapter")
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["tower.weight"]
    with pytest.raises(RecipeError, match=r"phases.adapter.train: no parameter fits 'twer"):
        select_trainable(model, Phase(steps=1, train=["twer.*"]), "adapter")
    with pytest.raises(RecipeError, match="leaves nothing to train"):
        select_trainable(model, Phase(steps=1, freeze=["*"]), "adapter")


def test_patterns_fit_a_thinker_by_itself_and_in_a_whole_model() -> None:
    for pattern in ("audio_tower.*", "thinker.audio_tower.*"):
        assert fits("audio_tower.proj1.weight", pattern) and fits("thinker.audio_tower.proj1.weight", pattern)
    assert not fits("talker.model.norm.weight", "model.*") and fits("thinker.model.norm.weight", "model.*")
    assert not fits("audio_decoder.norm.weight", "thinker.*")
