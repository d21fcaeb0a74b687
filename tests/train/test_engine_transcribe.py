"""The engine contract for an audio encoder with its text decoder: two processes give the numbers of one.

Clips have windows of their own, rank 1 has no audio in most steps, and splits are uneven.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed import spawn
from tests.train import transcribe_cases as cases
from train.engines.build import build_engine

pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
NAMES = [f"zero{zero}-{kind}" for zero in cases.ZEROS for kind in cases.KINDS]
NAMES += ["ep2-tied", "offload-tied", "alone-tied", "megatron-tied"]


def assert_close(got: Any, expected: Any, rtol: float = 1e-5) -> None:
    torch.testing.assert_close(
        torch.tensor(got, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64), rtol=rtol, atol=1e-7
    )


@pytest.fixture(scope="module")
def local() -> dict[str, dict[str, Any]]:
    torch.set_num_threads(1)
    return {kind: cases.run("local", tied=tied) for kind, tied in cases.KINDS.items()}


@pytest.fixture(scope="module")
def sharded() -> list[dict[str, Any]]:
    return spawn(cases.two_processes, 2, timeout=240)


def test_the_cases_are_telling(local: dict[str, dict[str, Any]]) -> None:
    """The clip bites in some steps only, clips have several windows, and drawn windows show in the numbers."""
    norms = [row[1] for row in local["tied"]["rows"]]
    assert min(norms) < 0.99 * cases.CLIP and max(norms) > 1.01 * cases.CLIP, norms
    engine = build_engine(cases.setup("local"))
    losses = [engine.train_step([cases.pack(0, (0, 1, 2), drawn)], 0.0).loss for drawn in (True, False)]
    assert abs(losses[0] - losses[1]) > 1e-4
    assert any("lm_head" in key for key in local["untied"]["state"])
    assert not any("lm_head" in key for key in local["tied"]["state"])


def test_local_goes_on_exactly(local: dict[str, dict[str, Any]]) -> None:
    for found in local.values():
        assert found["again"] == found["after"]


@pytest.mark.parametrize("name", NAMES)
def test_layouts_equal_local(name: str, local: dict[str, Any], sharded: list[dict[str, Any]]) -> None:
    expected = local[name.split("-")[1]]
    for rank in (0, 1):
        found = sharded[rank][name]
        assert_close(found["rows"], expected["rows"])
        assert_close(found["after"], expected["after"], rtol=2e-5)
        assert_close(found["again"], expected["after"], rtol=2e-5)
        assert found["state"].keys() == expected["state"].keys()
        for key, values in found["state"].items():
            tensor = torch.tensor(expected["state"][key])
            error = (torch.tensor(values) - tensor).norm()
            assert error < 1e-5 * tensor.norm() + 1e-8 * tensor.numel() ** 0.5, key


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_equals_local(name: str, local: dict[str, Any], sharded: list[dict[str, Any]]) -> None:
    expected = local[name.split("-")[1]]["look"]
    first, second = (sharded[rank][name]["look"] for rank in (0, 1))
    assert_close(first["sums"], expected["sums"])
    assert first["sums"] == second["sums"]
    assert second["answers"][:3] + first["answers"] + second["answers"][3:] == expected["answers"]
