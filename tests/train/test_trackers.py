"""wandb and TensorBoard get the lines of metrics.jsonl, go on after a resume, and hold nothing up."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.train.test_metrics import run_steps
from train.config import LogConfig
from train.errors import RecipeError
from train.trackers import flatten, open_trackers, run_id

SECRET = "0123456789abcdef0123456789abcdef01234567"


def test_flatten() -> None:
    line = {
        "step": 4,
        "phase": "all",
        "mfu": None,
        "modalities": {"audio": {"loss": 1.5, "targets": 3}},
        "expert_load": [1.0, 2.0],
        "experts": {"thinker": {"text": [[0.25, 0.75], [0.5, 0.5]]}},
    }
    assert dict(flatten(line)) == {
        "modalities/audio/loss": 1.5,
        "modalities/audio/targets": 3.0,
        "expert_load/highest": 2.0,
        "expert_load/mean": 1.5,
        "experts/thinker/text/busiest": 1.5,
    }
    assert dict(flatten({"step": 4, "eval": "voices", "wer": 0.5, "rows": []})) == {"eval/voices/wer": 0.5}
    assert dict(flatten({"step": 4, "event": "spike", "text": "high", "loss": 9.0}))["event/spike"] == 1.0


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("WANDB_SILENT", "true")


def written(folder: Path) -> list[Path]:
    """Files of wandb; the key must be in none, nor anywhere else."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    return [path for path in files if "wandb" in path.parts]


def test_wandb_offline_goes_on_under_its_id(tmp_path: Path, key: None) -> None:
    run_steps(tmp_path, 0, 4, wandb="offline")
    name = run_id(tmp_path)
    run_steps(tmp_path, 4, 6, wandb="offline")
    names = [path.name for path in written(tmp_path) if path.suffix == ".wandb"]
    assert run_id(tmp_path) == name and set(names) == {f"run-{name}.wandb"}


def test_wandb_that_cannot_be_reached(
    tmp_path: Path, key: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, and the run is kept offline."""
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("train.trackers.PATIENCE", 3)
    run_steps(tmp_path, 0, 2, wandb="online")
    said = [line for line in capsys.readouterr().out.splitlines() if "log.wandb" in line]
    assert len(said) == 1 and "does not work, so the run is kept offline" in said[0]
    assert [path for path in written(tmp_path) if "offline-run" in str(path) and path.suffix == ".wandb"]


def test_tensorboard_has_no_point_twice(tmp_path: Path) -> None:
    """Steps after the checkpoint are purged when a run goes on from it."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_steps(tmp_path, 0, 6, every=1, tensorboard=True)
    run_steps(tmp_path, 4, 8, every=1, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    points = events.Scalars("mean_loss")
    assert [point.step for point in points] == [1, 2, 3, 4, 5, 6, 7, 8] == [point.value for point in points]
    assert "expert_load/highest" in events.Tags()["scalars"]


@pytest.mark.parametrize(
    ("package", "log", "message"),
    [
        ("wandb", LogConfig(wandb="offline"), r"log.wandb=offline needs the package: pip install 'omniloom\[wandb\]'"),
        ("torch.utils.tensorboard.writer", LogConfig(tensorboard=True), r"pip install 'omniloom\[tensorboard\]'"),
    ],
)
def test_missing_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, log: LogConfig, message: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RecipeError, match=message):
        open_trackers(log, tmp_path, 0, print)
