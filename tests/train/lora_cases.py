"""Adapters on the tiny model of the engine contract, and what two processes run with them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.train import engine_cases as cases
from train.engines.build import build_engine
from train.engines.setup import EngineSetup
from train.lora_config import LoraConfig

EVERYTHING = ["thinker.model.layers.*", "thinker.audio_tower.*", "thinker.visual.*"]
STAGES = (1, 2, 3)


def setup(name: str, zero: int = 2, ep: int = 1, targets: list[str] | None = None, **engine: Any) -> EngineSetup:
    lora = LoraConfig(rank=4, alpha=8.0, targets=targets or EVERYTHING)
    return replace(cases.setup(name, zero, ep, **engine), lora=lora)


def two_processes(folder: str) -> dict[str, Any]:
    """Under every ZeRO stage: the steps, then those after the state that `local` has kept."""
    found = {}
    for zero in STAGES:
        engine = build_engine(setup("deepspeed", zero))
        rows = cases.run(engine, folder, f"lora{zero}")
        engine.close()
        engine = build_engine(setup("deepspeed", zero))
        engine.restore(cases.load(folder, "lora-saved"), optimizer_step=cases.SAVED)
        found[str(zero)] = {"rows": rows, "after": cases.train(engine, cases.SAVED, cases.STEPS)}
        engine.close()
    return found
