"""What a run tells: metrics.jsonl always, a progress bar, Weights & Biases when asked, curves.png at the end.

    StepStats, every step -> running sums -> every log.every steps: one JSON line, one wandb point
    metrics.jsonl         -> curves.png

Only the main rank writes. After a resume the lines of steps that were lost with the killed process are cut off, so that
the file reads like one unbroken run.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from data.types import Batch
from train.config import LogConfig
from train.engines import StepStats
from train.errors import RecipeError


class Meters:
    """Collects the steps' numbers and writes them. Rates cover the steps since the last line."""

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
    ) -> None:
        self.log, self.enabled, self.path = log, enabled, folder / "metrics.jsonl"
        self.flops, self.peak_flops = flops, peak_flops
        self.num_skipped = num_skipped  # over the whole run, so a checkpoint carries it
        self._reset()
        if not enabled:
            return
        cut_after(self.path, start_step)
        self._file = self.path.open("a")
        often = 0.5 if sys.stderr.isatty() else 30.0  # seconds: a log file needs no animation
        self._bar = tqdm(
            initial=start_step, total=end_step, unit="step", dynamic_ncols=True, smoothing=0.1, mininterval=often
        )
        self._wandb = start_wandb(log, folder) if log.wandb != "off" else None

    def _reset(self) -> None:
        self._since, self._wait, self._steps, self._tokens, self._targets = time.monotonic(), 0.0, 0, 0, 0
        self._loss_sum, self._work = 0.0, 0

    def update(
        self, step: int, stats: StepStats, microbatches: Sequence[Batch], *, lr: float, phase: str, wait: float
    ) -> None:
        """Take the numbers of the update that led to `step`; `wait` is the seconds spent waiting for its data."""
        self._steps, self._wait = self._steps + 1, self._wait + wait
        self._tokens, self._targets = self._tokens + stats.num_tokens, self._targets + stats.num_targets
        self._loss_sum += stats.loss * stats.num_targets
        self._work += sum(self.flops(batch) for batch in microbatches)
        self.num_skipped += stats.num_skipped
        if not self.enabled:
            return
        seconds = max(1e-9, time.monotonic() - self._since)
        rate = self._tokens / seconds
        self._bar.update(1)
        self._bar.set_postfix_str(f"loss {stats.loss:.3f}, {rate:,.0f} tokens/s", refresh=False)
        line: dict[str, Any] = {
            "step": step,
            "phase": phase,
            "loss": stats.loss,
            "mean_loss": self._loss_sum / max(1, self._targets),
            "balance_loss": stats.balance_loss,
            "grad_norm": stats.grad_norm,
            "lr": lr,
            "tokens": stats.num_tokens,
            "targets": stats.num_targets,
            "skipped": self.num_skipped,
            "tokens_per_second": rate,
            "seconds_per_step": seconds / self._steps,
            "wait_share": self._wait / seconds,
            "mfu": self._work / seconds / self.peak_flops if self.peak_flops else None,
            **{name.replace("router.expert_share", "expert_load"): load(s) for name, s in stats.expert_shares.items()},
        }
        if len(stats.terms) > 1:
            line["terms"] = dict(stats.terms)
        if step % self.log.every == 0 or step == self._bar.total:
            self._write(line)
            self._reset()

    def exclude(self, seconds: float) -> None:
        """Take the time of an evaluation or a save out of the rates."""
        self._since += seconds

    def record(self, step: int, values: Mapping[str, Any]) -> None:
        """A line of its own, for instance an evaluation's."""
        if self.enabled:
            self._write({"step": step, **values})

    def say(self, text: str) -> None:
        """A line for people, above the progress bar."""
        if self.enabled:
            tqdm.write(text)

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log({k: v for k, v in line.items() if k != "step"}, step=line["step"])

    def close(self) -> None:
        """Flush and end the progress bar."""
        if self.enabled:
            self._bar.close()
            self._file.close()
            if self._wandb is not None:
                self._wandb.finish()


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
    kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in kept))
    os.replace(temporary, path)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def start_wandb(log: LogConfig, folder: Path) -> Any:
    """A Weights & Biases run; offline needs no account. Its key is read by wandb from the environment, never saved."""
    try:
        import wandb
    except ImportError:
        raise RecipeError(f"log.wandb={log.wandb} needs the package: pip install 'omniloom[wandb]'") from None
    mode: Any = log.wandb
    return wandb.init(project=log.project, name=folder.name, dir=str(folder), mode=mode, resume="allow")


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
        right.set_ylabel("word error rate", fontsize=9)
        right.set_ylim(0, max(1.0, *(line["wer"] for line in evals)) * 1.05)
        for number, name in enumerate(names):
            points = [(line["step"], line["wer"]) for line in evals if line["eval"] == name]
            right.plot(*zip(*points, strict=True), "o--", color=f"C{number + 1}", label=f"WER {name}", markersize=4)
        right.legend(fontsize=8)
    for axis in axes[1]:
        axis.set_xlabel("step")
    out = folder / "curves.png"
    figure.savefig(out, dpi=110)
    plt.close(figure)
    return out
