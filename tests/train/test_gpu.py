"""The engine contract on one GPU: five steps of each engine against engine `local` in fp32 there."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from bench.gpu import contract
from tests.distributed import spawn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def statuses(engine: str) -> dict[str, str]:
    """What each model, precision and ZeRO stage came to; in a process of its own, as engines keep global state."""
    clock = contract.Clock(float("inf"))
    return {name: work(clock)["status"] for name, work in contract.pieces(engine, torch.device("cuda", 0)).items()}


@pytest.mark.parametrize("engine", contract.ZERO)
def test_engines_equal_local(engine: str) -> None:
    if engine == "deepspeed":
        pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
    if engine == "megatron" and importlib.util.find_spec("train.engines.megatron") is None:
        pytest.skip("no megatron engine")
    (found,) = spawn(statuses, 1, engine, timeout=250)
    assert found and set(found.values()) == {"ok"}, found
