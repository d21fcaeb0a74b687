"""The live view shows what a run tells, fits its terminal, and leaves the terminal whole."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console
from tqdm import tqdm

from train.views import Bar, Off, Rich, curve, open_view

LINE = {
    "step": 20,
    "phase": "pretrain",
    "mean_loss": 2.0,
    "loss": 2.0,
    "grad_norm": 0.5,
    "lr": 1e-3,
    "seconds_per_step": 1.25,
    "mfu": 0.412,
    "skipped": 2,
    "expert_load": [1.0, 1.32],
    "modalities": {"text": {"loss": 2.1, "targets": 5}, "audio+image": {"loss": 3.1, "targets": 4}},
    "grad_norms": {"audio": 0.3, "language": 0.4},
    "lrs": {"audio": 1e-4, "language": 1e-3},
    "times": {"data": 0.25, "forward": 0.5, "backward": 0.5},
    "memory_gb": 61.234,
    "fill": 0.97,
    "imbalance": {"work": 1.0, "seconds": 1.1, "slowest": 3},
}


def shown(width: int) -> str:
    """The table after a few lines."""
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True)
    view = Rich("omni", 10, 10, 110, 500, console, live=False)
    view.step(20, 2.0, 12345.0)
    for line in (LINE, {**LINE, "mean_loss": 1.0}):
        view.line(line)
    view.line({"step": 15, "eval": "voices", "wer": 0.25, "languages": {"en": 0.1}})
    view.line({"step": 16, "event": "spike", "text": "loss [bold]9.1[/bold]"})
    console.print(view.panel())
    return console.export_text()


def test_table() -> None:
    text = shown(120)
    for part in (
        "omni · pretrain", "10 of 100", "20 of 500", "2.0000", "█▁", "audio+image 3.1000", "12,345 tokens/s",
        "MFU 41.2%", "packs full 97.0%", "data 20%   forward 40%", "audio 0.3   language 0.4", "audio 1.00e-04",
        "61.23 GB", "slowest rank 3, 1.10 x the mean", "busiest 1.32 x the mean", "samples left out 2",
        "voices at 15   wer 0.25", "16  loss [bold]9.1[/bold]",
    ):  # fmt: skip
        assert part in text, part


@pytest.mark.parametrize("width", [20, 40, 80])
def test_any_width(width: int) -> None:
    """No line is longer than the terminal, and no name is torn from its number where both fit."""
    text = shown(width)
    assert max(map(len, text.splitlines())) == width
    assert width < 40 or "audio+image 3.1000" in text


def test_nothing_yet() -> None:
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(Rich("omni", 0, 0, 10, 10, console, live=False).panel())
    assert "0 of 10" in console.export_text()


def test_the_terminal_is_left_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines for people appear above; the cursor is visible while it runs, so that even kill -9 leaves it so."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    view = Rich("omni", 0, 0, 10, 10, Console(file=terminal, force_terminal=True, width=80))
    assert terminal.getvalue().rfind("\x1b[?25h") > terminal.getvalue().rfind("\x1b[?25l")
    view.step(1, 2.0, 10.0)
    tqdm.write("a line for people")
    assert sys.stdout is not terminal
    view.close()
    assert sys.stdout is terminal
    written = terminal.getvalue()
    assert "a line for people" in written and "1049" not in written
    assert written.rfind("\x1b[?25h") > written.rfind("\x1b[?25l") and "1 of 10" in written


def test_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    for name, kind in (("auto", Bar), ("rich", Bar), ("bar", Bar), ("off", Off)):
        view = open_view(name, "omni", 0, 0, 2, 2)
        assert type(view) is kind
        view.step(1, 2.0, 10.0)
        view.close()


def test_curve() -> None:
    assert curve([1.0]) == curve([]) == "" and curve([1.0, 1.0]) == "▁▁"
    assert curve([1.0, float("nan"), float("inf"), 8.0]) == "▁█"
