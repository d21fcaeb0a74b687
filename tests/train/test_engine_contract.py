"""The engine contract: the same numbers whatever the engine, the ranks, the degrees and the split into micro-batches.

`local` is the reference. See tests/train/engine_cases.py for the model, the batches and what the processes run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import spawn
from tests.train import engine_cases as cases
from train.engines import MOMENTS, WEIGHT
from train.engines.build import build_engine
from train.engines.deepspeed import check_degrees
from train.errors import EngineError

pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
NAMES = list(cases.LAYOUTS)


def assert_close(got: Any, expected: Any, rtol: float = 1e-5) -> None:
    torch.testing.assert_close(
        torch.tensor(got, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64), rtol=rtol, atol=1e-7
    )


def assert_same_state(got: cases.State, expected: cases.State, rtol: float = 1e-5) -> None:
    """Every tensor within rtol of the other, by norm, above what fp32 sums leave of a gradient that cancels out."""
    assert got.keys() == expected.keys()
    for key, tensor in expected.items():
        error, norm = (got[key] - tensor).norm(), tensor.norm()
        assert error < rtol * norm + 1e-8 * tensor.numel() ** 0.5, f"{key}: relative error {error / norm:.1e}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("contract")


@pytest.fixture(scope="module")
def local(folder: Path) -> dict[str, Any]:
    """The reference: numbers of the steps, evaluation, and what a step after it gives."""
    torch.set_num_threads(1)
    engine = build_engine(cases.setup("local"))
    rows = cases.run(engine, str(folder), "local")
    return {"rows": rows, "look": cases.look(engine), "after": cases.train(engine, cases.STEPS, cases.STEPS + 1)}


@pytest.fixture(scope="module")
def sharded(local: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """What two processes found, by rank."""
    return spawn(cases.two_processes, 2, str(folder), timeout=280)


def test_the_cases_are_telling(local: dict[str, Any]) -> None:
    """The clip bites in some steps only, and the batches have what the contract speaks of."""
    clip = cases.LINEAR["clip"]
    norms = [row[2] for row in local["rows"]]
    assert min(norms) < 0.99 * clip and max(norms) > 1.01 * clip
    batches = [cases.pack(step, part) for step in range(5) for rank in cases.SPLITS[step] for part in rank]
    assert any(not batch.doc_lengths for batch in batches)
    assert any(batch.doc_lengths and (batch.labels_T == -100).all() for batch in batches)
    assert all(not any(cases.FRAMES.get(i) for part in cases.SPLITS[step][1] for i in part) for step in (0, 1, 2, 3))


def test_local_does_not_see_the_split(local: dict[str, Any], folder: Path) -> None:
    engine = build_engine(cases.setup("local"))
    assert_close(cases.train(engine, 0, cases.STEPS, whole=True), local["rows"])
    assert_same_state(cases.gather(engine), cases.load(str(folder), "local-last"))


@pytest.mark.parametrize("name", NAMES)
def test_layouts_equal_local(name: str, local: dict[str, Any], sharded: list[dict[str, Any]], folder: Path) -> None:
    for rank in (0, 1):
        assert_close(sharded[rank]["layouts"][name]["rows"], local["rows"])
        assert_close(sharded[rank]["layouts"][name]["after"], local["after"], rtol=2e-5)
    assert_same_state(cases.load(str(folder), f"{name}-last"), cases.load(str(folder), "local-last"))


def test_without_sharing_the_encoders(local: dict[str, Any], sharded: list[dict[str, Any]]) -> None:
    for rows in (*sharded[0]["alone"], *sharded[1]["alone"]):
        assert_close(rows, local["rows"])


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_equals_local(name: str, local: dict[str, Any], sharded: list[dict[str, Any]]) -> None:
    first, second = (sharded[rank]["layouts"][name]["look"] for rank in (0, 1))
    assert_close(first["sums"], local["look"]["sums"])
    assert first["sums"] == second["sums"]
    # documents of the first batch are all on rank 1; of the second, two are on rank 0
    assert second["answers"][:3] + first["answers"] + second["answers"][3:] == local["look"]["answers"]
    for found, expected in zip(
        second["nats"][:3] + first["nats"] + second["nats"][3:], local["look"]["nats"], strict=True
    ):
        assert found == pytest.approx(expected, rel=1e-5)


def test_losses_of_documents_are_those_of_the_batch(local: dict[str, Any]) -> None:
    assert sum(found[0] for found in local["look"]["nats"]) == pytest.approx(local["look"]["sums"][0], rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_restore_into_layout(name: str, local: dict[str, Any], sharded: list[dict[str, Any]]) -> None:
    restored = sharded[0]["layouts"][name]["restored"]
    assert "local" in restored and (name == NAMES[0] or len(restored) > 1)
    for source, (rows, differing) in restored.items():
        assert not differing, f"from {source}: {differing}"
        assert_close(rows, local["rows"][cases.SAVED :])


@pytest.mark.parametrize("name", NAMES)
def test_restore_into_local(name: str, local: dict[str, Any], sharded: list[dict[str, Any]], folder: Path) -> None:
    engine = build_engine(cases.setup("local"))
    rows, differing = cases.go_on(engine, cases.load(str(folder), f"{name}-saved"))
    assert not differing
    assert_close(rows, local["rows"][cases.SAVED :])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_restore_every_pair(local: dict[str, Any], sharded: list[dict[str, Any]], folder: Path) -> None:
    restored = spawn(cases.every_pair, 2, str(folder), timeout=500)[0]
    for name in NAMES:
        for source, (rows, differing) in restored[name].items():
            assert not differing, f"{source} to {name}: {differing}"
            assert_close(rows, local["rows"][cases.SAVED :])


@pytest.mark.slow
def test_four_processes_and_offload(local: dict[str, Any]) -> None:
    for rows in spawn(cases.more_processes, 4, timeout=250)[0]:
        assert_close(rows, local["rows"])


def test_one_process_without_torchrun(
    local: dict[str, Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No compiler is needed, and a stale lock of the op that DeepSpeed compiles does not make it wait for ever."""
    (tmp_path / "deepspeed_shm_comm").mkdir()
    (tmp_path / "deepspeed_shm_comm/lock").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    (result,) = spawn(cases.one_process, 1, str(folder))
    assert_close(result["rows"], local["rows"])
    assert result["look"]["answers"] == local["look"]["answers"]
    assert_same_state(cases.load(str(folder), "one-process-last"), cases.load(str(folder), "local-last"))


@pytest.fixture(scope="module")
def phases_of_local(folder: Path) -> dict[str, list[list[list[float]]]]:
    return {
        precision: cases.phases(f"local-0-1-{precision}", str(folder), name="local", precision=precision)
        for precision in ("fp32", "bf16")
    }


@pytest.mark.parametrize("index", range(len(cases.PHASE_CASES)), ids=map(str, cases.PHASE_CASES))
def test_phases_with_frozen_parameters(
    index: int, phases_of_local: dict[str, Any], sharded: list[dict[str, Any]], folder: Path
) -> None:
    """Two phases in one process, without a clip and with scaled learning rates. Frozen weights keep their bits."""
    zero, ep, precision = cases.PHASE_CASES[index]
    initial = cases.gather(build_engine(cases.setup("local")))
    for number, rows in enumerate(sharded[0]["phases"][index]):
        got = cases.load(str(folder), f"deepspeed-{zero}-{ep}-{precision}-{number}")
        expected = cases.load(str(folder), f"local-0-1-{precision}-{number}")
        assert got.keys() == expected.keys()
        frozen = {key for key in got if key.startswith(WEIGHT) and not got.kinds(key.split("|")[1]) & set(MOMENTS)}
        assert any(".experts." in key for key in frozen)
        before = initial if number == 0 else cases.load(str(folder), f"deepspeed-{zero}-{ep}-{precision}-0")
        assert not frozen & set(before.differs(got))
        columns = 3 if precision == "bf16" else None  # rounding sends some tokens to other experts
        theirs = [row[:columns] for row in phases_of_local[precision][number]]
        assert_close([row[:columns] for row in rows], theirs, rtol=1e-5 if precision == "fp32" else 1e-2)
        if precision == "fp32":
            for state in (
                got,
                expected,
            ):  # softmax ignores this bias: its gradient is rounding, which AdamW makes large
                state.pop(f"{WEIGHT}|audio_tower.layers.0.self_attn.k_proj.bias")
            assert_same_state(got, expected, rtol=1e-3)


@pytest.mark.parametrize(
    ("ep", "world", "message"),
    [
        (3, 3, "engine.ep=3 does not divide the 8 experts of the model"),
        (2, 1, "engine.ep=2 does not divide the 1 processes of the run"),
    ],
)
def test_impossible_degrees(ep: int, world: int, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        check_degrees(ep, 8, world)
