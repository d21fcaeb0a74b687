"""What the processes of the Megatron engine's contract test run, on the model and batches of engine_cases.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from models.omni_config import OmniConfig
from tests.train import engine_cases as cases
from tests.train import speech_cases
from train import ranks
from train.engines import Engine
from train.engines.build import build_engine
from train.engines.setup import EngineSetup

TWO: dict[str, dict[str, Any]] = {  # processes: layouts
    "tp2": {"tp": 2},
    "ep2": {"ep": 2},
    "pp2": {"pp": 2},
    "cp2": {"cp": 2},
}
FOUR: dict[str, dict[str, Any]] = {
    "tp2-ep2": {"tp": 2, "ep": 2},
    "pp2-ep2": {"pp": 2, "ep": 2},
}
MORE_OF_TWO: dict[str, dict[str, Any]] = {
    "dp2": {},
    "expert_tp2": {"expert_tp": 2},
    "tp2-expert_tp2": {"tp": 2, "expert_tp": 2},
    "ep2-overlap": {"ep": 2, "overlap": True},
    "pp2-recompute": {"pp": 2, "recompute": True},
    "tp2-recompute_layers": {"tp": 2, "recompute_layers": True},
    "cp2-recompute_layers": {"cp": 2, "recompute_layers": True},
}
MORE_OF_FOUR: dict[str, dict[str, Any]] = {
    "tp2-pp2": {"tp": 2, "pp": 2},
    "tp2-cp2": {"tp": 2, "cp": 2},
    "pp2-cp2": {"pp": 2, "cp": 2},
    "cp2-ep2": {"cp": 2, "ep": 2},
    "ep4": {"ep": 4},
    "cp4": {"cp": 4},
    "ep2-expert_tp2": {"ep": 2, "expert_tp": 2},
    "pp2-ep2-overlap": {"pp": 2, "ep": 2, "overlap": True, "recompute_layers": True},
}
SPEECH_OF_FOUR: dict[str, dict[str, Any]] = {
    "tp2-pp2": {"tp": 2, "pp": 2},
    "pp2-cp2-overlap": {"pp": 2, "cp": 2, "overlap": True, "recompute_layers": True},
}
PHASE_CASES: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("tp2", {"tp": 2}, "fp32"),
    ("pp2", {"pp": 2}, "fp32"),
    ("ep2", {"ep": 2}, "bf16"),
)
WAYS = ("frozen", "cached", "detached", "live", "off", "preference")
DEEP = 4  # layers of the model for the interleaved schedule
LATER = 10  # steps after a change of layout


def ten_more(engine: Engine, state: cases.State) -> tuple[list[list[float]], list[str]]:
    """Restore, and train ten steps: their numbers, and what the restored engine does not hold bit by bit."""
    engine.restore(state, optimizer_step=cases.SAVED)
    differing = state.differs(cases.gather(engine))
    return cases.train(engine, cases.SAVED, cases.SAVED + LATER), differing


def layouts(names: Mapping[str, dict[str, Any]], folder: str) -> dict[str, Any]:
    """Run every layout: numbers, evaluation, a step after it; restore it from plain torch."""
    out: dict[str, Any] = {}
    for name, degrees in names.items():
        engine = build_engine(cases.setup("megatron", **degrees))
        rows = cases.run(engine, folder, name)
        out[name] = {"rows": rows, "look": cases.look(engine), "shard": [engine.shard.index, engine.shard.count]}
        out[name]["after"] = cases.train(engine, cases.STEPS, cases.STEPS + 1)
        out[name]["restored"] = cases.go_on(engine, cases.load(folder, "local-saved"))
        engine.close()
    return out


def two_processes(folder: str) -> dict[str, Any]:
    out = {"layouts": layouts(TWO, folder)}
    state = cases.load(folder, "tp2-ep2-saved")  # of four processes
    for name, settings in {
        "pp2": {"name": "megatron", "pp": 2},
        "deepspeed-ep2": {"name": "deepspeed", "zero": 2, "ep": 2},
    }.items():
        engine = build_engine(cases.setup(**settings))
        out[name] = ten_more(engine, state)
        engine.close()
    out["phases"] = [
        cases.phases(f"megatron-{label}-{precision}", folder, name="megatron", precision=precision, **degrees)
        for label, degrees, precision in PHASE_CASES
    ]
    out["unused"] = unused_expert()
    ranks.stop()
    return out


def four_processes(folder: str) -> dict[str, Any]:
    out: dict[str, Any] = {"layouts": layouts(FOUR, folder)}
    engine = build_engine(cases.setup("megatron", ep=4))
    out["ep4"] = ten_more(engine, cases.load(folder, "tp2-ep2-saved"))
    engine.close()
    ranks.stop()
    return out


def more_layouts(folder: str, world: int) -> dict[str, Any]:
    """Layouts that take longer than every day's tests may."""
    out = layouts(MORE_OF_TWO if world == 2 else MORE_OF_FOUR, folder)
    ranks.stop()
    return out


def unused_expert() -> list[str]:
    """Three tokens reach six of eight experts at most. State after a step, restored under another layout."""
    whole = cases.pack(0, (4,))
    few = replace(
        whole,
        token_ids_T=whole.token_ids_T[:3],
        labels_T=(whole.token_ids_T[:3] * 7 + 3) % cases.WORDS,
        position_ids_3T=whole.position_ids_3T[:, :3],
        doc_lengths=(3,),
    )
    engine = build_engine(cases.setup("megatron", tp=2, linear=False))
    stats = engine.train_step([few], 0.01)
    assert all((row == 0).sum() >= 2 for row in stats.expert_shares["router.expert_share"])
    state = cases.gather(engine)
    engine.close()
    out = []
    for degrees in ({"ep": 2}, {"pp": 2}):
        engine = build_engine(cases.setup("megatron", **degrees, linear=False))
        engine.restore(state, optimizer_step=1)
        out += state.differs(cases.gather(engine))
        engine.close()
    return out


def deeper(setup: EngineSetup) -> EngineSetup:
    """With layers for two chunks on each of two stages."""
    model = setup.model
    if isinstance(model, OmniConfig):
        assert model.talker is not None
        talker = replace(model.talker, text=replace(model.talker.text, num_hidden_layers=DEEP))
        thinker = replace(model.thinker, text=replace(model.thinker.text, num_hidden_layers=DEEP))
        return replace(setup, model=replace(model, thinker=thinker, talker=talker))
    return replace(setup, model=replace(model, text=replace(model.text, num_hidden_layers=DEEP)))


def interleaved() -> dict[str, Any]:
    """Rows under 1F1B and under the interleaved schedule, which fills up micro-batches to pairs."""
    thinker, talker = [], []
    for settings in ({"pp": 2}, {"pp": 2, "interleave": 2}, {"pp": 2, "interleave": 2, "overlap": True}):
        engine = build_engine(deeper(cases.setup("megatron", **settings)))
        thinker.append(cases.train(engine, 0, cases.STEPS))
        engine.close()
        engine = build_engine(deeper(speech_cases.setup("megatron", "live", **settings)))
        talker.append(speech_cases.train(engine))
        engine.close()
    ranks.stop()
    return {"thinker": thinker, "talker": talker}


def speech(world: int) -> dict[str, Any]:
    """Rows and the whole state of every way under this number of processes' layouts."""
    out: dict[str, Any] = {}
    for way in WAYS:
        for name, degrees in (TWO if world == 2 else FOUR | SPEECH_OF_FOUR).items():
            engine = build_engine(speech_cases.setup("megatron", way, **degrees))
            rows, state = speech_cases.train(engine), speech_cases.gather(engine)
            kept = {key: values.tolist() for key, values in state.items() if "talker.model.layers.1" in key}
            out[f"{way}-{name}"] = {"rows": rows, "state": kept, "keys": sorted(state)}
            engine.close()
    ranks.stop()
    return out
