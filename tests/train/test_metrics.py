"""metrics.jsonl reads like one unbroken run, and the curves are drawn from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from data.types import Batch
from train.config import LogConfig
from train.engines import StepStats
from train.metrics import Meters, cut_after, draw_curves


def stats(loss: float, targets: int = 10) -> StepStats:
    shares = {"router.expert_share": torch.tensor([[0.5, 0.5], [0.75, 0.25]])}
    return StepStats(loss, {"text": loss}, 1.1, 0.5, 100, targets, 1, shares)


def run_steps(folder: Path, start: int, stop: int, every: int = 2, **log) -> None:
    meters = Meters(
        folder, LogConfig(every=every, **log), start_step=start, end_step=stop, flops=lambda batch: 1000,
        peak_flops=1e9, enabled=True,
    )  # fmt: skip
    for step in range(start + 1, stop + 1):
        meters.update(step, stats(step, targets=step), [Batch.empty(128)], lr=0.1, phase="all", wait=0.0)
    meters.close()


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_lines_and_means(tmp_path: Path) -> None:
    run_steps(tmp_path, 0, 5)
    found = lines(tmp_path)
    assert [line["step"] for line in found] == [2, 4, 5]  # every second one, and the last
    assert found[0]["mean_loss"] == pytest.approx((1 * 1 + 2 * 2) / 3)  # weighted by targets
    assert found[1]["mean_loss"] == pytest.approx((3 * 3 + 4 * 4) / 7)
    assert found[0]["expert_load"] == [1.0, 1.5] and found[-1]["skipped"] == 5
    assert found[0]["mfu"] > 0 and found[0]["tokens_per_second"] > 0


def test_resume_cuts_the_lost_steps_and_a_half_line(tmp_path: Path) -> None:
    run_steps(tmp_path, 0, 6, every=1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    run_steps(tmp_path, 4, 8, every=1)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_cut_of_nothing(tmp_path: Path) -> None:
    cut_after(tmp_path / "absent.jsonl", 3)
    assert not (tmp_path / "absent.jsonl").exists()


def test_curves(tmp_path: Path) -> None:
    assert draw_curves(tmp_path) is None
    run_steps(tmp_path, 0, 5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5, "eval": "heldout", "wer": 0.3, "words": 9}) + "\n")
    path = draw_curves(tmp_path)
    assert path is not None and path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Works without an account, and the key in the environment is nowhere in what was written."""
    pytest.importorskip("wandb")
    secret = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setenv("WANDB_API_KEY", secret)
    monkeypatch.setenv("WANDB_SILENT", "true")
    run_steps(tmp_path, 0, 4, wandb="offline")
    written = [path for path in (tmp_path / "wandb").rglob("*") if path.is_file()]
    assert written
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
