"""Memory and time of the cross-entropy over the released vocabulary: ours in chunks against the plain one.

    hidden [T, D] in bf16, head [V, D] --> loss, gradients of both

"extra" is the peak of memory above what was there, less the two gradients, which both must make. Where the plain one
fits, the gradients' cosines show that the chunks lose nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.measure import Clock, Work, compared, figure, free
from bench.gpu.peers import DTYPE
from bench.gpu.sizes import Sizes
from train.loss import cross_entropy_sum


def pieces(sizes: Sizes, device: torch.device) -> dict[str, Callable[[Clock], dict[str, Any]]]:
    """Measurements by name."""
    return {f"{tokens} tokens": partial(measure, sizes, device, tokens) for tokens in sizes.packs}


def plain(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
    """What a model with an lm_head and F.cross_entropy does."""
    return F.cross_entropy(F.linear(hidden_TD, weight_VD).float(), labels_T, reduction="sum")


def chunked(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
    """The loss of this project."""
    return cross_entropy_sum(hidden_TD, weight_VD, labels_T=labels_T)


def measure(sizes: Sizes, device: torch.device, tokens: int, clock: Clock) -> dict[str, Any]:
    """One number of tokens."""
    vocab, width = sizes.thinker.vocab_size, sizes.thinker.hidden_size
    torch.manual_seed(0)
    hidden_TD = torch.randn(tokens, width, device=device).to(DTYPE).requires_grad_()
    weight_VD = (torch.randn(vocab, width, device=device) * 0.02).to(DTYPE).requires_grad_()
    labels_T = torch.randint(0, vocab, (tokens,), device=device)
    kept: dict[str, tuple[Tensor, Tensor]] = {}

    def clean() -> None:
        hidden_TD.grad = weight_VD.grad = None

    def step(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        (loss(hidden_TD, weight_VD, labels_T) / tokens).backward()
        assert hidden_TD.grad is not None
        return hidden_TD.grad

    found = compared(
        {"ours": partial(step, chunked), "plain": partial(step, plain)},
        device,
        sizes.rounds,
        clock,
        clean=clean,
        done=Work(tokens, 6 * tokens * vocab * width),
        side=sizes.gemm,
        gradient="the hidden states' gradient",
    )
    gradients = (hidden_TD.numel() + weight_VD.numel()) * hidden_TD.element_size() / 1e9
    for row in found["rows"].values():
        if "added" in row:
            above = row["added"]["value"] - gradients
            row["extra"] = figure(above, "GB", f"{row['added']['how']}, less the gradients' {gradients:.3f} GB")
    if "extra" in found["rows"]["plain"]:
        try:
            for name, loss in (("ours", chunked), ("plain", plain)):
                clean()
                step(loss)
                assert hidden_TD.grad is not None and weight_VD.grad is not None
                kept[name] = hidden_TD.grad, weight_VD.grad
            for place, what in enumerate(("hidden states", "head")):
                value, how = cosine(kept["ours"][place], kept["plain"][place]), "of both gradients, fp64 sums"
                found["figures"][f"cosine, {what}"] = figure(value, "cosine", how)
        except torch.OutOfMemoryError:  # the plain one fitted, but not beside our gradients
            found["cosines"] = "out of memory"
    kept.clear()
    clean()
    free(device)
    return found


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of two tensors of one shape, row by row of a thousand, so that no whole copy is made."""
    sums = torch.zeros(3, dtype=torch.float64, device=a.device)
    for x, y in zip(a.split(1024), b.split(1024), strict=True):
        x, y = x.double(), y.double()
        sums += torch.stack([(x * y).sum(), (x * x).sum(), (y * y).sum()])
    dot, aa, bb = sums.tolist()
    return dot / (aa * bb) ** 0.5
