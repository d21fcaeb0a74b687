"""A loss or gradient that is not finite: no rank makes the update, and nothing of the engine's state changes a bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.distributed import spawn
from tests.train import guard_cases as cases
from tests.train import waveform_cases
from train.engines.build import build_engine


def check(found: dict[str, Any]) -> None:
    assert found["said"][0] == found["said"][1] == [False, False]  # a loss that is not finite
    assert found["said"][2] == found["said"][3] == [False, True]  # a gradient, of one rank alone
    assert not found["differing"]
    assert found["rows"][0] == found["rows"][1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_local(precision: str) -> None:
    check(cases.skips(name="local", precision=precision))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("quick", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["two", "all"])
@pytest.mark.parametrize("name", ["deepspeed", "megatron"])
def test_two_processes(name: str, quick: bool) -> None:
    """Of one rank alone, of one expert, before the first update and after; the steps that follow know nothing of it."""
    pytest.importorskip({"deepspeed": "deepspeed", "megatron": "megatron.core"}[name])
    for rank in spawn(cases.all_of, 2, name, quick, timeout=280):
        for found in rank:
            check(found)


def test_waveform_with_discriminators() -> None:
    """Both sides keep their bits where the sound is not finite."""
    torch.set_num_threads(1)
    engine = build_engine(waveform_cases.setup("local", "adversarial"))
    waveform_cases.train(engine, 0, 1)
    before = waveform_cases.gather(engine, "adversarial")
    batch = waveform_cases.pack(1, (0, 1))
    batch.speech.wave_S[5] = math.nan  # type: ignore[union-attr]
    stats = engine.train_step([batch], 1.0)
    assert not stats.applied and not math.isfinite(stats.loss)
    assert not before.differs(waveform_cases.gather(engine, "adversarial"))
    assert engine.train_step([waveform_cases.pack(1, (0, 1))], 0.01).applied
