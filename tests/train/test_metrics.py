"""metrics.jsonl reads like one unbroken run, and the curves are drawn from it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from data.types import Batch
from train.config import LogConfig
from train.engines import StepStats
from train.media import GROUPS, KINDS
from train.metrics import About, Meters, cut_after, draw_curves, imbalance
from train.watch import Seen


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


def test_curves_of_a_set_without_words(tmp_path: Path) -> None:
    run_steps(tmp_path, 0, 5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5, "eval": "pictures", "accuracy": 0.5, "questions": 8}) + "\n")
        file.write(json.dumps({"step": 5, "eval": "nothing_heard", "wer": None}) + "\n")
    assert draw_curves(tmp_path) is not None


def told(audio_loss: float, norms: bool) -> Seen:
    """Two groups of documents, two towers, and on looked-at steps experts by kind."""
    media = torch.zeros(2, GROUPS, dtype=torch.float64)
    media[:, 0], media[:, 5] = torch.tensor([4.0, 2.0]), torch.tensor([audio_loss, 1.0])
    kinds = torch.zeros(len(KINDS), 2, 2, dtype=torch.float64)
    kinds[0], kinds[3] = torch.tensor([[3.0, 1.0], [2.0, 2.0]]), torch.tensor([[0.0, 4.0], [4.0, 0.0]])
    scales = {"audio": 0.1, "language": 1.0}
    return Seen(media, kinds, {"audio": 0.3, "language": 0.4} if norms else {}, scales, {"forward": 0.0}, 0.5)


def test_what_a_step_tells(tmp_path: Path) -> None:
    log, about = LogConfig(every=2, experts_every=4, view="off"), About(positions=32)
    meters = Meters(
        tmp_path, log, start_step=0, end_step=4, flops=lambda batch: 1, peak_flops=0.0, enabled=True, about=about
    )
    batch = dataclasses.replace(Batch.empty(128), token_ids_T=torch.zeros(24, dtype=torch.int64))
    for step in range(1, 5):
        look = meters.look(step)
        assert (look.norms, look.experts) == (step % 2 == 0, step == 4)
        seen = told(float(step), look.norms)
        meters.update(step, dataclasses.replace(stats(1.0), seen=seen), [batch], lr=0.5, phase="all", wait=0.0)
    meters.close()
    first, second, experts = lines(tmp_path)
    assert first["modalities"] == {"text": {"loss": 2.0, "targets": 4}, "audio+video": {"loss": 1.5, "targets": 2}}
    assert second["modalities"]["audio+video"]["loss"] == 3.5  # of steps 3 and 4 alone
    assert first["grad_norms"] == {"audio": 0.3, "language": 0.4}
    assert first["lrs"] == {"audio": 0.05, "language": 0.5}
    assert set(first["times"]) == {"data", "forward", "other"}
    assert sum(first["times"].values()) == pytest.approx(first["seconds_per_step"], abs=1e-5)
    assert first["fill"] == 0.75 and first["memory_gb"] > 0.01 and first["memory_of"] == "rss"
    assert "imbalance" not in first  # of one rank
    shares = experts["experts"]["thinker"]
    assert experts["step"] == 4 and set(shares) == {"all", "text", "video"}
    assert shares["text"] == [[0.75, 0.25], [0.5, 0.5]] and shares["video"] == [[0.0, 1.0], [1.0, 0.0]]


def test_lines_of_their_own_are_cut_too(tmp_path: Path) -> None:
    run_steps(tmp_path, 0, 4, every=1, experts_every=2, view="off")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        for step in (3, 4):
            file.write(json.dumps({"step": step, "event": "spike", "text": "high"}) + "\n")
    cut_after(tmp_path / "metrics.jsonl", 3)
    found = lines(tmp_path)
    assert max(line["step"] for line in found) == 3
    assert [line["step"] for line in found if "event" in line] == [3]
    assert [line["step"] for line in found if "experts" in line] == [2]


def test_imbalance() -> None:
    assert imbalance(torch.tensor([1.0, 3.0])) == 1.5
    assert imbalance(torch.zeros(2)) == 1.0
