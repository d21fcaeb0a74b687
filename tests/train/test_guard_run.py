"""Whole runs with steps that are not finite, spikes and a full disk: what is killed and goes on was never killed."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import spawn
from tests.run_kit import command, losses, write_corpus
from train.checkpoint import CheckpointReader, candidates, verify
from train.guard import Guard
from train.main import main

RECIPE = "recipe=transcribe"
SPIKY = (
    "guard.spike.window=8", "guard.spike.least=3", "guard.spike.steps=2", "guard.spike.norm=0", "guard.spike.loss=30",
    "guard.spike.before=0", "guard.spike.after=3", "guard.spike.rewind=true", "save.keep=9",
)  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield


def settings(corpus: Path, run: Path, *more: str) -> list[str]:
    whole = command(corpus, run, "guard.hang_s=0", *more)
    return whole[whole.index(RECIPE) :]


def events(run: Path, kind: str = "") -> list[dict[str, Any]]:
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("event", "-").startswith(kind or "-") or kind == line.get("event")]


def same_weights(first: Path, second: Path) -> None:
    """The newest checkpoints of two runs hold the same bits, moments too."""
    states = [CheckpointReader(verify(candidates(run)[0])) for run in (first, second)]
    assert states[0].step == states[1].step and states[0].names() == states[1].names()
    for name, shape in states[0].names().items():
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            values = [state.read_released(kind, name, 0, math.prod(shape)) for state in states]
            assert values[0].equal(values[1]), (kind, name)


def spoil(patch: pytest.MonkeyPatch, bad: set[int]) -> None:
    """The data of these steps is not finite."""
    original = Guard.step

    def step(self: Guard, engine: Any, step: int, microbatches: Any, lr: float, look: Any) -> Any:
        if step in bad:
            microbatches = [
                dataclasses.replace(batch, mel_FM=batch.mel_FM * math.nan) if len(batch.mel_FM) else batch
                for batch in microbatches
            ]
            assert any(len(batch.mel_FM) for batch in microbatches)
        return original(self, engine, step, microbatches, lr, look)

    patch.setattr(Guard, "step", step)


def spike(bad: set[int], patch: Any = None) -> None:
    """The loss of these steps' data is fifty times what it is."""
    original = Guard.step

    def step(self: Guard, engine: Any, step: int, microbatches: Any, lr: float, look: Any) -> Any:
        stats = original(self, engine, step, microbatches, lr, look)
        return dataclasses.replace(stats, loss=stats.loss * 50) if step in bad and stats.applied else stats

    (patch.setattr if patch else setattr)(Guard, "step", step)


def test_skipped_steps_and_resume(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 1, 5 and 6 are left out; stopped after 1 and after 7, the run ends with the same bits."""
    spoil(monkeypatch, {0, 4, 5})
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(settings(corpus, whole)) == 0
    for stop in ("1", "7", "12"):
        assert main(settings(corpus, cut, f"max_steps={stop}")) == 0
    same_weights(whole, cut)
    for run in (whole, cut):
        found = events(run, "skipped_step")
        assert [line["step"] for line in found] == [1, 5, 6]
        assert all(line["keys"] and line["what"] == "loss" for line in found)
        assert [step for step, loss in losses(run).items() if loss is None] == [1, 5, 6]
    assert losses(whole) == losses(cut)
    info = verify(candidates(whole)[0]).info["guard"]
    assert info["left_out"] == 3 and info["skips"] == [1, 5, 6]


def test_too_many_skipped_steps(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(monkeypatch, {3, 4, 7})
    run = tmp_path / "run"
    assert main(settings(corpus, run, "guard.max_skipped=3")) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and "3 of the last 100 steps" in error[0] and "saved as step 8" in error[0]
    assert candidates(run)[0].name == "step-00000008"


def test_a_spike_goes_back_and_a_kill_changes_nothing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spike at 8 and 9: back to 6, past the data of 8 to 10. Stopped before, on the way and after: the same bits."""
    spike({7, 8}, monkeypatch)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(settings(corpus, whole, *SPIKY)) == 0
    (event,) = events(whole, "rewind")
    assert event["step"] == 6 and event["passed"] == [8, 10] and event["spike"] == 8 and event["keys"]
    assert [step for step, loss in losses(whole).items() if loss is None] == [8, 9, 10]
    assert len(losses(whole)) == 12
    for stop in ("8", "9", "10", "12"):
        assert main(settings(corpus, cut, *SPIKY, f"max_steps={stop}")) == 0
    same_weights(whole, cut)
    assert losses(whole) == losses(cut)
    info = verify(candidates(whole)[0]).info["guard"]
    assert info["passed"] == [7, 8, 9] and info["rewinds"] == 1 and info["left_out"] == 3


def test_a_spike_before_the_first_checkpoint_goes_back_to_the_beginning(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spike({4, 5}, monkeypatch)
    run = tmp_path / "run"
    assert main(settings(corpus, run, *SPIKY, "save.every=100")) == 0
    assert "back to the beginning" in capsys.readouterr().out
    assert [step for step, loss in losses(run).items() if loss is None] == [5, 6, 7]


def test_a_spike_without_rewind_is_a_warning(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spike({7, 8}, monkeypatch)
    run = tmp_path / "run"
    assert main(settings(corpus, run, *SPIKY, "guard.spike.rewind=false")) == 0
    (event,) = events(run, "spike")
    assert event["step"] == 9 and event["first"] == 8 and not events(run, "rewind") and len(event["keys"]) > 2


def under_deepspeed(arguments: list[str]) -> int:
    spike({7, 8})
    return main(arguments)


@pytest.mark.timeout(300)
def test_a_spike_under_deepspeed(corpus: Path, tmp_path: Path) -> None:
    """Two processes go back together, past the same data."""
    pytest.importorskip("deepspeed")
    run = tmp_path / "run"
    more = ("engine=deepspeed", "engine.zero=2", "engine.ep=2")
    assert spawn(under_deepspeed, 2, settings(corpus, run, *SPIKY, *more), timeout=280) == [0, 0]
    (event,) = events(run, "rewind")
    assert event["step"] == 6 and event["passed"] == [8, 10]
    assert [step for step, loss in losses(run).items() if loss is None] == [8, 9, 10]
    assert verify(candidates(run)[0]).info["guard"]["left_out"] == 3


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("mounting a tmpfs needs the right to")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Leave no room."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file:
        try:
            for size in (1 << 16, 1):
                while file.write(b"x" * size):
                    pass
        except OSError:
            pass
    return path


def test_a_full_disk(
    corpus: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Full from step 5 on: the run goes on, ends with one line, the checkpoint before loads, and with room it ends."""
    run, original = small_disk / "run", Guard.step

    def step(self: Guard, engine: Any, step: int, microbatches: Any, lr: float, look: Any) -> Any:
        if step == 4:
            while not candidates(run):  # the one of step 4 is being written
                time.sleep(0.05)
            fill(small_disk)
        return original(self, engine, step, microbatches, lr, look)

    with monkeypatch.context() as patch:
        patch.setattr(Guard, "step", step)
        assert main(settings(corpus, run, "save.every=4")) == 2
    said = capsys.readouterr()
    assert said.err.count("error: ") == 1 and "Traceback" not in said.err
    assert "error: the last save failed: step 12: [Errno 28] No space left on device" in said.err
    assert verify(candidates(run)[0]).step == 4
    assert max(losses(run)) >= 4
    assert main(settings(corpus, run, "save.every=4")) == 2, "still full"
    assert "No space left" in capsys.readouterr().err
    (small_disk / "filler").unlink()
    assert main(settings(corpus, run, "save.every=4")) == 0
    assert sorted(losses(run)) == list(range(1, 13))
    whole = small_disk.parent / "whole"
    assert main(settings(corpus, whole, "save.every=4")) == 0
    same_weights(whole, run)
    shutil.rmtree(whole)
