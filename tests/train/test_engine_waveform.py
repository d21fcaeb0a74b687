"""The engine contract for the waveform decoder: DeepSpeed on two processes gives the numbers of one process.

Segments have many lengths, every rank lacks some in some step, and discriminators join in the second phase.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.distributed import spawn
from tests.train import waveform_cases as cases
from train.engines.build import build_engine
from train.errors import EngineError
from train.media import GROUPS

pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")


def assert_close(got: Any, expected: Any, rtol: float = 1e-5) -> None:
    torch.testing.assert_close(
        torch.tensor(got, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64), rtol=rtol, atol=1e-7
    )


@pytest.fixture(scope="module")
def local() -> dict[str, Any]:
    torch.set_num_threads(1)
    return cases.run("local")


@pytest.fixture(scope="module")
def sharded() -> list[dict[str, Any]]:
    return spawn(cases.two_processes, 2, timeout=120)


@pytest.mark.parametrize("way", cases.WAYS)
def test_what_each_way_reports(way: str, local: dict[str, Any]) -> None:
    """Loss is the weighted sum of the terms; decoder and discriminators alone have moments; a restore is exact."""
    weights = [15.0, 15.0, 15.0] + [1.0, 2.0, 1.0] * (way == "adversarial")
    for loss, *terms in local[way]["rows"]:
        assert loss == pytest.approx(sum(w * term for w, term in zip(weights, terms, strict=False)), rel=1e-6)
        towers = 1 + (way == "adversarial")  # the decoder, and its discriminators
        assert len(terms) == len(weights) + 3 + 2 * GROUPS + towers
    moments = {key.split("|")[1].split(".")[0] for key in local[way]["state"] if key.startswith("exp_avg|")}
    assert moments == {"code2wav"} | ({"adversary"} if way == "adversarial" else set())
    assert local[way]["again"] == local[way]["after"]


def test_megatron_has_nobody_to_evaluate() -> None:
    with pytest.raises(EngineError, match="set eval.sets={} or take another engine"):
        build_engine(replace(cases.setup("megatron", "waveform"), evaluates=True))


@pytest.mark.parametrize("name", [*(f"zero{zero}" for zero in cases.ZEROS), "megatron"])
@pytest.mark.parametrize("way", cases.WAYS)
def test_layouts_equal_local(way: str, name: str, local: dict[str, Any], sharded: list[dict[str, Any]]) -> None:
    for rank in (0, 1):
        found = sharded[rank][name][way]
        assert_close(found["rows"], local[way]["rows"])
        assert_close(found["after"], local[way]["after"], rtol=2e-5)
        assert_close(found["again"], local[way]["after"], rtol=2e-5)
        assert found["state"].keys() == local[way]["state"].keys()
        for key, values in found["state"].items():
            expected = torch.tensor(local[way]["state"][key])
            assert (torch.tensor(values) - expected).norm() < 1e-5 * expected.norm() + 1e-7, key
