"""Cross-entropy over a large vocabulary: ours in chunks against the plain one.

    .venv/bin/python bench/loss.py

4,096 tokens, vocabulary 152,064, hidden size 2,048 as released, fp32, one thread, forward and backward, both in one
process and in turn: about five minutes and 10 GB. Peak memory is what the step adds to the resident set (the kernel's
high-water mark, reset before each), the gradients of hidden states and head included.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import report, reset_peak, resident
from train.loss import cross_entropy_sum

TOKENS, VOCAB, HIDDEN, ROUNDS = 4096, 152_064, 2048, 2


def plain(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
    """What a model with an lm_head and F.cross_entropy does."""
    return F.cross_entropy(F.linear(hidden_TD, weight_VD).float(), labels_T, reduction="sum")


def chunked(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
    """The loss of this project."""
    return cross_entropy_sum(hidden_TD, weight_VD, labels_T=labels_T)


def measure(loss: Callable[[Tensor, Tensor, Tensor], Tensor], hidden: Tensor, weight: Tensor, labels: Tensor) -> dict:
    """CPU seconds, added peak bytes and results of one forward and backward."""
    h, w = hidden.clone().requires_grad_(), weight.requires_grad_()
    w.grad = None
    gc.collect()
    reset_peak()
    before, began = resident("VmRSS"), time.process_time()
    value = loss(h, w, labels)
    value.backward()
    seconds = time.process_time() - began
    peak = resident("VmHWM") - before
    assert h.grad is not None and w.grad is not None
    return {"seconds": seconds, "peak": peak, "loss": value.item(), "dh": h.grad, "dw": w.grad.norm().item()}


def main() -> None:
    """Measure, print the table and the JSON line."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    hidden, weight = torch.randn(TOKENS, HIDDEN), torch.randn(VOCAB, HIDDEN) * 0.02
    labels = torch.randint(0, VOCAB, (TOKENS,))
    runs: dict[str, list[dict]] = {"ours": [], "plain": []}
    for _ in range(ROUNDS):
        runs["ours"].append(measure(chunked, hidden, weight, labels))
        runs["plain"].append(measure(plain, hidden, weight, labels))
    ours, peer = runs["ours"][-1], runs["plain"][-1]
    error = abs(ours["loss"] - peer["loss"]) / peer["loss"]
    error_h = ((ours["dh"] - peer["dh"]).norm() / peer["dh"].norm()).item()
    seconds = {name: median(run["seconds"] for run in of) for name, of in runs.items()}
    peak = {name: median(run["peak"] for run in of) for name, of in runs.items()}
    print(f"{'':8}{'CPU s':>10}{'peak GB':>10}")
    for name in runs:
        print(f"{name:8}{seconds[name]:>10.1f}{peak[name] / 1e9:>10.2f}")
    print(f"relative difference: loss {error:.1e}, gradient of hidden states {error_h:.1e}")
    print(f"time, plain over ours: {seconds['plain'] / seconds['ours']:.2f}")
    memory = peak["plain"] / peak["ours"]
    met = memory >= 4 and seconds["ours"] <= seconds["plain"] and error < 1e-6
    report(
        bench="loss",
        ours=peak["ours"] / 1e9,
        peer=peak["plain"] / 1e9,
        ratio=memory,
        unit="GB of peak memory; met asks that time is no worse, too",
        goal=4.0,
        met=met,
    )


if __name__ == "__main__":
    main()
