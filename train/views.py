"""What the terminal shows of a run while it goes.

    every step           -> progress, loss, tokens/s
    lines of metrics.jsonl -> rich: loss by media, times, norms, experts, memory, last evaluation, last events
    lines for people     -> above either, by tqdm.write

`rich` is a table that is drawn again once a second, on a terminal only: what is no terminal gets `bar`, a line that
tqdm writes, every 30 seconds into a file. The cursor stays visible and the screen is never switched, so nothing has to
be put back: however the process ends, the terminal is whole. A table takes 6 ms of one core a second.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Protocol

from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

HISTORY = 32  # lines whose loss is drawn
GAP = "   "
BLOCKS = "▁▂▃▄▅▆▇█"
EVENTS = 3  # shown


class View(Protocol):
    """Shows a phase."""

    def step(self, step: int, loss: float, tokens_per_second: float) -> None:
        """A step is done."""
        ...

    def line(self, line: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl."""
        ...

    def close(self) -> None:
        """Leave the terminal to others."""
        ...


def open_view(name: str, run: str, first: int, step: int, end: int, total: int) -> View:
    """What log.view asks for; a table on a terminal only.

    The phase has steps [first, end) of the run's `total`; it goes on with `step`.
    """
    console = Console(stderr=True)
    if name in ("auto", "rich") and console.is_terminal and not console.is_dumb_terminal:
        return Rich(run, first, step, end, total, console)
    return Off() if name == "off" else Bar(step, end)


class Off:
    """Nothing."""

    def step(self, step: int, loss: float, tokens_per_second: float) -> None:
        """See View."""

    def line(self, line: Mapping[str, Any]) -> None:
        """See View."""

    def close(self) -> None:
        """See View."""


class Bar(Off):
    """One line."""

    def __init__(self, step: int, end: int) -> None:
        often = 0.5 if sys.stderr.isatty() else 30.0  # seconds: a log file needs no animation
        self._bar = tqdm(initial=step, total=end, unit="step", dynamic_ncols=True, smoothing=0.1, mininterval=often)

    def step(self, step: int, loss: float, tokens_per_second: float) -> None:
        """See View."""
        self._bar.update(1)
        self._bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s", refresh=False)

    def close(self) -> None:
        """See View."""
        self._bar.close()


class Rich:
    """A table that is drawn again in place."""

    def __init__(
        self, run: str, first: int, step: int, end: int, total: int, console: Console, *, live: bool = True
    ) -> None:
        """Without `live` it is only drawn by `panel`."""
        self._run, self._first, self._step, self._end, self._total = run, first, step, end, max(total, end)
        self._last: Mapping[str, Any] = {}
        self._evaluations: dict[str, Mapping[str, Any]] = {}
        self._events: deque[Mapping[str, Any]] = deque(maxlen=EVENTS)
        self._losses: deque[float] = deque(maxlen=HISTORY)
        self._times = deque([time.monotonic()], maxlen=50)  # when the last steps were done
        self._loss = self._rate = 0.0
        self._live = None
        if live:
            self._live = Live(
                get_renderable=self.panel,
                console=console,
                refresh_per_second=1,
                redirect_stdout=sys.stdout.isatty(),  # into a file it goes as it is
            )
            self._live.start()
            console.show_cursor(True)

    def step(self, step: int, loss: float, tokens_per_second: float) -> None:
        """See View."""
        self._step, self._loss, self._rate = step, loss, tokens_per_second
        self._times.append(time.monotonic())

    def line(self, line: Mapping[str, Any]) -> None:
        """See View."""
        if "event" in line:
            self._events.append(line)
        elif "eval" in line:
            self._evaluations[str(line["eval"])] = line
        elif "loss" in line:
            self._last = line
            self._losses.append(line["mean_loss"])

    def close(self) -> None:
        """See View."""
        if self._live is not None:
            self._live.stop()

    def panel(self) -> Panel:
        """All of it."""
        bars = Table.grid(padding=(0, 1), expand=True)
        bars.add_column(style="dim", no_wrap=True, width=8)
        bars.add_column(ratio=1)
        bars.add_column(justify="right", no_wrap=True)
        bars.add_column(justify="right", no_wrap=True, style="dim")
        bars.add_row("phase", *self._progress(self._step - self._first, self._end - self._first))
        if (self._first, self._end) != (0, self._total):
            bars.add_row("run", *self._progress(self._step, self._total))
        rows = Table.grid(padding=(0, 1), expand=True)
        rows.add_column(style="dim", no_wrap=True, width=8)
        rows.add_column(ratio=1)
        for name, cells in self._rows():
            rows.add_row(name, Flow(cells))
        whole = Table.grid(expand=True)
        whole.add_row(bars)
        whole.add_row(rows)
        phase = f" · {self._last['phase']}" if "phase" in self._last else ""
        return Panel(whole, title=Text(f"{self._run}{phase}"), title_align="left", border_style="dim", expand=True)

    def _progress(self, done: int, of: int) -> tuple[ProgressBar, str, str]:
        count = len(self._times) - 1
        pace = (self._times[-1] - self._times[0]) / count if count else 0.0
        left = f"{timedelta(seconds=round(pace * (of - done)))} left" if pace else "-:--:-- left"
        return ProgressBar(total=max(of, 1), completed=done), f"{done:,} of {of:,}", left

    def _rows(self) -> Iterable[tuple[str, list[Text]]]:
        """Names and cells of what is known so far."""
        last = self._last
        yield "loss", [Text(f"{self._loss:.4f}", "bold"), Text(curve(self._losses), "cyan")]
        if media := last.get("modalities"):
            yield "", [pair(name, f"{found['loss']:.4f}") for name, found in media.items()]
        yield "speed", list(_speed(self._rate, last))
        if times := last.get("times"):
            whole = sum(times.values()) or 1.0
            yield (
                "step",
                [pair(name.replace("_", " and "), f"{seconds / whole:.0%}") for name, seconds in times.items()],
            )
        if last:
            norms, rates = last.get("grad_norms") or {}, last.get("lrs") or {}
            cells = [pair(name, f"{norm:.3g}") for name, norm in norms.items()]
            yield "gradient", [Text(f"{last['grad_norm']:.3g}", "bold"), *(cells if len(cells) > 1 else [])]
            several = len(set(rates.values())) > 1
            cells = [pair(name, f"{rate:.2e}") for name, rate in rates.items() if several]
            yield "rate", [Text(f"{last['lr']:.2e}", "bold"), *cells]
            if experts := list(_experts(last)):
                yield "experts", experts
            yield "memory", list(_memory(last))
        for name, line in self._evaluations.items():
            numbers = {key: value for key, value in line.items() if key != "step" and isinstance(value, int | float)}
            shown = [pair(key, f"{value:.4g}") for key, value in [*numbers.items()][:5]]
            yield "eval", [pair(name, f"at {line['step']:,}"), *shown]
        for event in self._events:
            told = f"{event['step']:,}  {event.get('text', event['event'])}"
            yield "event", [Text(told, "yellow")]


class Flow:
    """Cells side by side, as many in a line as fit; one that is longer than a line is cut."""

    def __init__(self, cells: Sequence[Text]) -> None:
        self._cells = cells

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[Text]:
        line = Text(no_wrap=True, overflow="ellipsis")
        for cell in self._cells:
            if line and line.cell_len + len(GAP) + cell.cell_len > options.max_width:
                yield line
                line = Text(no_wrap=True, overflow="ellipsis")
            line.append(GAP if line else "").append_text(cell)
        yield line


def pair(name: str, value: str) -> Text:
    """A name and its number."""
    return Text.assemble((name, "dim"), " ", value)


def _speed(rate: float, last: Mapping[str, Any]) -> Iterable[Text]:
    yield Text(f"{rate:,.0f} tokens/s", "bold")
    if last:
        yield Text(f"{last['seconds_per_step']:.3g} s a step")
    if last.get("mfu") is not None:
        yield pair("MFU", f"{last['mfu']:.1%}")
    if last.get("fill") is not None:
        yield pair("packs full", f"{last['fill']:.1%}")


def _experts(last: Mapping[str, Any]) -> Iterable[Text]:
    for name, loads in last.items():
        if name.endswith("expert_load") and loads:
            whose = "busiest of the talker's" if "talker" in name else "busiest"
            yield pair(whose, f"{max(loads):.2f} x the mean")


def _memory(last: Mapping[str, Any]) -> Iterable[Text]:
    """What is of machines, and samples left out."""
    if "memory_gb" in last:
        yield Text(f"{last['memory_gb']:.2f} GB", "bold")
    if found := last.get("imbalance"):
        yield pair("slowest rank", f"{found['slowest']}, {found['seconds']:.2f} x the mean")
    if last.get("skipped"):
        yield pair("samples left out", f"{last['skipped']:,}")


def curve(values: Iterable[float]) -> str:
    """A line of blocks from the lowest to the highest; nothing of fewer than two numbers or of ones not finite."""
    found = [value for value in values if abs(value) < float("inf")]
    if len(found) < 2:
        return ""
    low, high = min(found), max(found)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((value - low) * scale)] for value in found)
