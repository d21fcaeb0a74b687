"""Where metrics go beside metrics.jsonl: Weights & Biases, TensorBoard.

    line of metrics.jsonl --flatten--> "modalities/audio/loss": 1.2, ... --> every tracker that was asked for

A tracker never holds training up. wandb sends from a process of its own; a server that cannot be reached within
PATIENCE seconds is said in one line, and the run is kept offline beside the metrics, for `wandb sync` to send later.
Its key is wandb's own matter (WANDB_API_KEY or ~/.netrc): nothing here reads or writes it.

A resumed run goes on in the same place: under the wandb id that RUN/wandb/id.txt keeps, and in TensorBoard with the
points after the checkpoint purged. wandb gets nothing of steps that it has already: repeated, they have the same
numbers.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from train.config import LogConfig
from train.errors import RecipeError

PATIENCE = 30  # seconds that wandb may take to start, and at the end to send what is left
NAMED = ("eval", "event")  # keys whose value is the name of what the line is about


class Tracker(Protocol):
    """Takes the lines of metrics.jsonl."""

    def log(self, line: Mapping[str, Any]) -> None:
        """Take a line; it has a "step"."""
        ...

    def close(self) -> None:
        """Send what is left."""
        ...


def open_trackers(log: LogConfig, folder: Path, start_step: int, say: Callable[[str], None]) -> list[Tracker]:
    """Those that a recipe asks for. Raises RecipeError where the package is missing."""
    found: list[Tracker] = []
    if log.wandb != "off":
        found.append(Wandb(log, folder, say))
    if log.tensorboard:
        found.append(TensorBoard(folder, start_step))
    return found


class Wandb:
    """A Weights & Biases run; offline needs no account."""

    def __init__(self, log: LogConfig, folder: Path, say: Callable[[str], None]) -> None:
        try:
            import wandb
        except ImportError:
            raise RecipeError(f"log.wandb={log.wandb} needs the package: pip install 'omniloom[wandb]'") from None
        options: dict[str, Any] = {
            "project": log.project,
            "name": folder.name,
            "id": run_id(folder),
            "dir": str(folder),
            "resume": "allow",
        }
        settings = wandb.Settings(  # the terminal is the view's; nothing waits for ever
            console="off", silent=True, init_timeout=PATIENCE, login_timeout=PATIENCE, finish_timeout=PATIENCE
        )
        offline, self._run = log.wandb == "offline", None
        if not offline:
            try:
                self._run = wandb.init(mode="online", settings=settings, **options)
            except (wandb.Error, OSError, TimeoutError) as error:
                reason = " ".join(str(error).split())[:200]
                say(f"log.wandb=online does not work, so the run is kept offline (wandb sync sends it): {reason}")
                wandb.teardown(exit_code=1)  # it would hold the id
        if self._run is None:
            self._run = wandb.init(mode="offline", settings=settings, **options)

    def log(self, line: Mapping[str, Any]) -> None:
        """See Tracker."""
        assert self._run is not None
        if line["step"] >= self._run.step:
            self._run.log(dict(flatten(line)), step=line["step"])

    def close(self) -> None:
        """See Tracker."""
        assert self._run is not None
        self._run.finish()


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, folder: Path, start_step: int) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError:
            raise RecipeError("log.tensorboard=true needs the package: pip install 'omniloom[tensorboard]'") from None
        path = folder / "tensorboard"
        self._writer = SummaryWriter(str(path), purge_step=start_step + 1 if path.is_dir() else None, flush_secs=30)

    def log(self, line: Mapping[str, Any]) -> None:
        """See Tracker."""
        for name, value in flatten(line):
            self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        """See Tracker."""
        self._writer.close()


def run_id(folder: Path) -> str:
    """The wandb id of a run, drawn when it is first asked for."""
    path = folder / "wandb" / "id.txt"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(4) + "\n")
    return path.read_text().strip()


def flatten(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Names and numbers of a line, without its step.

    Mappings become paths. Of a list, as of layers, the highest and the mean; of expert shares [L][E] the busiest
    expert over the mean, in the worst layer. Texts and what is not there are left out.
    """
    kind = next((key for key in NAMED if key in line), "")
    prefix = f"{kind}/{line[kind]}" if kind else ""
    if kind == "event":
        yield prefix, 1.0
    yield from _numbers({key: value for key, value in line.items() if key != "step"}, f"{prefix}/" if kind else "")


def _numbers(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        name = prefix + key
        if isinstance(value, Mapping):
            yield from _numbers(value, name + "/")
        elif isinstance(value, list) and value and isinstance(value[0], list):
            yield f"{name}/busiest", max(max(row) * len(row) for row in value)
        elif isinstance(value, list) and value and isinstance(value[0], int | float):
            yield f"{name}/highest", max(value)
            yield f"{name}/mean", sum(value) / len(value)
        elif isinstance(value, int | float):
            yield name, float(value)
