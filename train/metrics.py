"""What a run tells: every number goes to metrics.jsonl, and from there to views, trackers and curves.

    StepStats, every step -> running sums -> every log.every steps: one line (docs/metrics.md has its keys)
                             '-- of all ranks: work, seconds, memory, tokens, in one small reduction a line
    line -> metrics.jsonl, train/views.py (the terminal), train/trackers.py (wandb, TensorBoard)
    metrics.jsonl -> curves.png

Only the main rank writes. After a resume the lines of steps that were lost with the killed process are cut off, so that
the file reads like one unbroken run.
"""

from __future__ import annotations

import json
import os
import resource
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from data.types import Batch
from train import ranks
from train.config import LogConfig
from train.engines import StepStats
from train.journal import Journal
from train.loss import SHARE
from train.media import GROUPS, KINDS, group_name
from train.trackers import open_trackers
from train.views import open_view
from train.watch import Look


@dataclass(frozen=True)
class About:
    """What meters must know of a phase to make sense of its numbers."""

    first_step: int = 0
    """Of the phase."""
    total_steps: int = 0
    """Of the whole run."""
    positions: int = 0
    """Tokens that the packs of a step have room for; 0 where packs are not of tokens."""
    leads: bool = True
    """Whether of the ranks that read the same packs this is the one whose tokens count."""
    device: torch.device = torch.device("cpu")


class Meters:
    """Collects the steps' numbers and writes them. Rates cover the steps since the last line.

    `update` is collective where a line is due: every rank calls it for every step.
    """

    def __init__(
        self,
        folder: Path,
        log: LogConfig,
        *,
        start_step: int,
        end_step: int,
        flops: Callable[[Batch], int],
        peak_flops: float,
        enabled: bool,
        num_skipped: int = 0,
        about: About = About(),  # noqa: B008  frozen
    ) -> None:
        self.log, self.enabled, self.path = log, enabled, folder / "metrics.jsonl"
        self.flops, self.peak_flops, self.about, self.end_step = flops, peak_flops, about, end_step
        self.num_skipped = num_skipped  # over the whole run, so a checkpoint carries it
        self._reset()
        if not enabled:
            return
        self._trackers = open_trackers(log, folder, start_step, self.say)
        cut_after(self.path, start_step)
        self._file = Journal(self.path, self.say)
        self._view = open_view(log.view, folder.name, about.first_step, start_step, end_step, about.total_steps)

    def _reset(self) -> None:
        self._since, self._wait, self._steps, self._tokens, self._targets = time.monotonic(), 0.0, 0, 0, 0
        self._loss_sum, self._work, self._read = 0.0, 0, 0
        self._times: Counter[str] = Counter()
        self._own = 0.0  # seconds of this rank's own work, data and step
        self._media = torch.zeros(2, GROUPS, dtype=torch.float64)

    def _due(self, step: int) -> bool:
        return step % self.log.every == 0 or step == self.end_step

    def look(self, step: int) -> Look:
        """What the update that leads to `step` is asked beside its numbers; the same on all ranks."""
        often = self.log.experts_every
        return Look(norms=self._due(step), experts=often > 0 and step % often == 0)

    def update(
        self, step: int, stats: StepStats, microbatches: Sequence[Batch], *, lr: float, phase: str, wait: float
    ) -> None:
        """Take the numbers of the update that led to `step`; `wait` is the seconds spent waiting for its data."""
        self._steps, self._wait = self._steps + 1, self._wait + wait
        self._tokens += stats.num_tokens
        if stats.applied:  # what is not finite is in no mean
            self._targets += stats.num_targets
            self._loss_sum += stats.loss * stats.num_targets
            self._media += stats.seen.media
        self._work += sum(self.flops(batch) for batch in microbatches)
        self._read += sum(len(batch.token_ids_T) for batch in microbatches) * self.about.leads
        self._times.update(stats.seen.times)
        self._own += wait + stats.seen.own
        self.num_skipped += stats.num_skipped
        seconds = max(1e-9, time.monotonic() - self._since)
        due = self._due(step)
        of_ranks = self._of_ranks() if due else {}
        if self.enabled:
            self._view.step(step, stats.loss, self._tokens / seconds)
            if due:
                self._write({**self._line(step, stats, seconds, lr, phase), **of_ranks})
            if stats.expert_shares and self.look(step).experts:
                self._write({"step": step, "experts": experts_of(stats)})
        if due:
            self._reset()

    def _line(self, step: int, stats: StepStats, seconds: float, lr: float, phase: str) -> dict[str, Any]:
        """Of the steps since the last one, as the main rank knows them."""
        line: dict[str, Any] = {
            "step": step,
            "phase": phase,
            "loss": stats.loss,
            "mean_loss": self._loss_sum / self._targets if self._targets else None,
            "balance_loss": stats.balance_loss,
            "grad_norm": stats.grad_norm,
            "lr": lr,
            "tokens": stats.num_tokens,
            "targets": stats.num_targets,
            "skipped": self.num_skipped,
            "tokens_per_second": self._tokens / seconds,
            "seconds_per_step": seconds / self._steps,
            "wait_share": self._wait / seconds,
            "mfu": self._work / seconds / self.peak_flops if self.peak_flops else None,
            **{name.replace("router.expert_share", "expert_load"): load(s) for name, s in stats.expert_shares.items()},
        }
        if len(stats.terms) > 1:
            line["terms"] = dict(stats.terms)
        if not stats.applied:
            line["applied"] = False
        media = zip(*self._media.tolist(), strict=True)
        line["modalities"] = {
            group_name(group): {"loss": loss / targets, "targets": int(targets)}
            for group, (loss, targets) in enumerate(media)
            if targets
        }
        line["grad_norms"] = dict(stats.seen.norms)
        line["lrs"] = {tower: lr * scale for tower, scale in stats.seen.scales.items()}
        times = {"data": self._wait, **self._times}
        times["other"] = max(0.0, seconds - sum(times.values()))
        line["times"] = {part: round(spent / self._steps, 6) for part, spent in times.items()}
        return line

    def _of_ranks(self) -> dict[str, Any]:
        """What takes the numbers of all ranks. Collective."""
        rows = torch.zeros(ranks.world(), 4, dtype=torch.float64)
        rows[ranks.rank()] = torch.tensor([self._work, self._own, peak_memory(self.about.device), self._read])
        work_R, own_R, memory_R, read_R = ranks.total(rows).unbind(1)
        found: dict[str, Any] = {"memory_gb": round(float(memory_R.max()) / 1e9, 4)}
        found["memory_of"] = "cuda" if self.about.device.type == "cuda" else "rss"
        if len(rows) > 1:
            found["imbalance"] = {
                "work": imbalance(work_R),
                "seconds": imbalance(own_R),
                "slowest": int(own_R.argmax()),
            }
        if self.about.positions:
            found["fill"] = round(float(read_R.sum()) / (self.about.positions * self._steps), 6)
        return found

    def exclude(self, seconds: float) -> None:
        """Take the time of an evaluation or a save out of the rates."""
        self._since += seconds

    def record(self, step: int, values: Mapping[str, Any]) -> None:
        """A line of its own, for instance an evaluation's."""
        if self.enabled:
            self._write({"step": step, **values})

    def say(self, text: str) -> None:
        """A line for people, above the view."""
        if self.enabled:
            tqdm.write(text)

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(line)
        self._view.line(line)
        for tracker in self._trackers:
            tracker.log(line)

    def close(self) -> None:
        """Flush everything and leave the terminal."""
        if self.enabled:
            self._view.close()
            self._file.close()
            for tracker in self._trackers:
                tracker.close()


def experts_of(stats: StepStats) -> dict[str, dict[str, list[list[float]]]]:
    """Shares of the assignments that each expert received, [L][E] by decoder and kind of routed token."""
    names = {"thinker" if name == SHARE else name.split(".")[0]: s for name, s in stats.expert_shares.items()}
    found = {name: {"all": _rounded(share_LE)} for name, share_LE in names.items()}
    if stats.seen.kinds is not None:
        for kind, count_LE in zip(KINDS, stats.seen.kinds, strict=True):
            if (total := count_LE.sum(1, keepdim=True)).all():  # of layers: none of this kind in the step
                found["thinker"][kind] = _rounded(count_LE / total)
    return found


def _rounded(share_LE: Tensor) -> list[list[float]]:
    return [[round(share, 5) for share in row] for row in share_LE.tolist()]


def imbalance(values_R: Tensor) -> float:
    """The highest over the mean of ranks: 1 is even."""
    mean = float(values_R.mean())
    return round(float(values_R.max()) / mean, 4) if mean else 1.0


def peak_memory(device: torch.device) -> float:
    """Bytes at most since the process began: allocated on the GPU, or resident of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def load(share_LE: Tensor) -> list[float]:
    """Busiest expert over the mean, per layer: 1 is balanced."""
    return [round(value, 4) for value in (share_LE.amax(1) * share_LE.shape[1]).tolist()]


def worst_load(line: Mapping[str, Any]) -> float:
    """Of all decoders of a step's line; 1 without any."""
    return max((max(loads) for name, loads in line.items() if name.endswith("expert_load")), default=1.0)


def cut_after(path: Path, step: int) -> None:
    """Drop the lines of later steps, and a half-written last line."""
    if not path.exists():
        return
    kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step or '"event": "hang"' in line]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in kept))
    os.replace(temporary, path)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def draw_curves(folder: Path) -> Path | None:
    """Loss, learning rate, gradient norm and expert load against the step, as curves.png; None without any line."""
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    steps = [line for line in lines if "loss" in line and "eval" not in line]
    evals = [line for line in lines if "eval" in line]
    if not steps:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 6.5), layout="constrained", sharex=True)
    at = [line["step"] for line in steps]
    panels = {
        "loss per target (nats)": [line["mean_loss"] for line in steps],
        "gradient norm before clipping": [line["grad_norm"] for line in steps],
        "learning rate": [line["lr"] for line in steps],
        "busiest expert over the mean (worst layer)": [worst_load(line) for line in steps],
    }
    for axis, (title, values) in zip(axes.flat, panels.items(), strict=True):
        axis.plot(at, values, color="tab:blue", linewidth=1.2)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    axes[0, 0].set_yscale("log")
    names = sorted({line["eval"] for line in evals})
    if names:
        right = axes[0, 0].twinx()
        right.set_ylabel("evaluation", fontsize=9)
        for number, name in enumerate(names):
            mine = [line for line in evals if line["eval"] == name]
            shown = next(key for key in mine[-1] if key not in ("step", "eval"))  # the suite's most telling one
            points = [(line["step"], line[shown]) for line in mine if line.get(shown) is not None]
            if points:
                label = f"{shown} {name}".replace("_", " ")
                right.plot(*zip(*points, strict=True), "o--", color=f"C{number + 1}", label=label, markersize=4)
        right.set_ylim(bottom=0)
        right.legend(fontsize=8)
    for axis in axes[1]:
        axis.set_xlabel("step")
    out = folder / "curves.png"
    part = out.with_suffix(".part.png")
    figure.savefig(part, dpi=110)
    plt.close(figure)
    os.replace(part, out)
    return out
