"""The engine contract for speech: Thinker and Talker under DeepSpeed give the numbers of one process.

Two families of experts are sharded, the frozen Thinker's too, and every rank lacks something in some step.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed import spawn
from tests.train import speech_cases as cases
from train.engines.build import build_engine

pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
CASES = [f"{way}-{name}" for way in cases.WAYS for name in cases.LAYOUTS]


def assert_close(got: Any, expected: Any, rtol: float = 1e-5) -> None:
    torch.testing.assert_close(
        torch.tensor(got, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64), rtol=rtol, atol=1e-7
    )


@pytest.fixture(scope="module")
def local() -> dict[str, Any]:
    torch.set_num_threads(1)
    found = {}
    for way in cases.WAYS:
        engine = build_engine(cases.setup("local", way))
        rows, state = cases.train(engine), cases.gather(engine)
        found[way] = {"rows": rows, "state": state, "after": cases.train(engine, cases.STEPS, cases.STEPS + 1)}
    return found


@pytest.fixture(scope="module")
def sharded() -> list[dict[str, Any]]:
    return spawn(cases.two_processes, 2, timeout=280)


def test_what_each_way_reports(local: dict[str, Any]) -> None:
    """Loss is the weighted sum of the terms, and only what learns has moments."""
    codes = {"code 0": 1.0, "code 1": 0.15, "code 2": 0.15}
    preference = {"margin": 0.0, "preference": 1.0, "right": 0.0, "sft": 0.2}
    for way, weights in {
        "frozen": codes,
        "cached": codes,
        "live": codes | {"text": 0.5},
        "off": {"text": 1.0},
        "preference": preference,
    }.items():
        loss, *row = local[way]["rows"][0]
        names = sorted(weights)
        assert loss == pytest.approx(sum(weights[name] * value for name, value in zip(names, row, strict=False)))
        moments = {key.split("|")[1].split(".")[0] for key in local[way]["state"] if key.startswith("exp_avg|")}
        learns = {"live": {"thinker", "talker"}, "off": {"thinker"}}.get(way, {"talker"})
        assert moments == learns


def test_cached_is_frozen(local: dict[str, Any]) -> None:
    """Losses, gradient norms, weights and moments after several steps."""
    assert_close(local["cached"]["rows"], local["frozen"]["rows"], rtol=1e-6)
    for key, values in local["frozen"]["state"].items():
        assert (local["cached"]["state"][key] - values).norm() <= 1e-5 * values.norm(), key


@pytest.mark.parametrize("way", ["frozen", "live", "preference"])
def test_layers_that_are_made_again_change_nothing(way: str, local: dict[str, Any]) -> None:
    """Those of Thinker, Talker and code predictor, whose layers run twice as often."""
    calls: dict[bool, int] = {False: 0, True: 0}
    for again in calls:
        engine = build_engine(cases.setup("local", way, recompute_layers=again))

        def count(*_: object, again: bool = again) -> None:
            calls[again] += 1

        engine.objective.omni.talker.code_predictor.model.layers[0].register_forward_hook(count)  # type: ignore[attr-defined]
        assert cases.train(engine) == local[way]["rows"]
    assert calls[True] == 2 * calls[False] > 0


@pytest.mark.parametrize("name", CASES)
def test_layouts_equal_local(name: str, local: dict[str, Any], sharded: list[dict[str, Any]]) -> None:
    way = name.split("-")[0]
    for rank in (0, 1):
        found = sharded[rank][name]
        assert_close(found["rows"], local[way]["rows"])
        if found["restored"]:
            assert_close(found["restored"], local[way]["after"], rtol=2e-5)
    for key, values in sharded[0][name]["weights"].items():
        expected = local[way]["state"][key]
        assert (torch.tensor(values) - expected).norm() < 1e-5 * expected.norm() + 1e-7, key
