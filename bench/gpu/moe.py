"""The mixture-of-experts block alone at the released widths, forward and backward: ours against transformers'.

    x [T, D] --router, experts--> [T, D] --a fixed gradient--> gradients of x, gate and experts

Both hold the same weights in bf16; transformers' runs its default, grouped_mm. "ours, recompute" keeps no activation of
the experts. FLOPs: 3 x 2 x T x (K x 3 x D x F + D x E), recomputation not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.gpu.measure import Clock, Work, compared, figure
from bench.gpu.peers import DTYPE, ROUTINGS, expert_load, groups_of, mark, on_device, route, same_weights, text_model
from bench.gpu.sizes import Sizes
from models.layers.moe import MoE


def pieces(sizes: Sizes, device: torch.device) -> dict[str, Callable[[Clock], dict[str, Any]]]:
    """Measurements by name."""
    text = sizes.thinker
    shape = text.hidden_size, text.num_experts, text.num_experts_per_tok, text.moe_intermediate_size

    ours = on_device(lambda: MoE(*shape), "model.layers.0.mlp", device)
    lean = same_weights(lambda: MoE(*shape, recompute=True), ours, device)
    small = replace(text, num_hidden_layers=1, vocab_size=256)
    theirs = same_weights(lambda: text_model(small).get_submodule("layers.0.mlp"), ours, device)
    blocks = {"ours": ours, "ours, recompute": lean, "transformers": theirs}
    return {
        f"{tokens} tokens, {kind}": partial(measure, sizes, device, blocks, tokens, kind)
        for tokens in sizes.moe_tokens
        for kind in ROUTINGS
    }


def measure(
    sizes: Sizes, device: torch.device, blocks: dict[str, Any], tokens: int, kind: str, clock: Clock
) -> dict[str, Any]:
    """One number of tokens and one routing."""
    text, ours = sizes.thinker, blocks["ours"]
    torch.manual_seed(0)
    x_TD = torch.randn(tokens, text.hidden_size, device=device).to(DTYPE)
    mark(x_TD, torch.arange(tokens, device=device) % groups_of(text), groups_of(text), 1.0)
    grad_TD = torch.randn_like(x_TD)
    route([ours.gate.weight], text, kind, [1.0])
    with torch.no_grad():
        load = expert_load([ours.gate(x_TD)], text.num_experts_per_tok)
    x_TD.requires_grad_()

    def clean() -> None:
        x_TD.grad = None
        ours.zero_grad()

    sparse = 3 * text.hidden_size * text.moe_intermediate_size * text.num_experts_per_tok
    flops = 6 * tokens * (sparse + text.hidden_size * text.num_experts)
    works = {name: partial(step, block, x_TD, grad_TD) for name, block in blocks.items()}
    found = compared(
        works,
        device,
        sizes.rounds,
        clock,
        clean=clean,
        done=Work(tokens, flops),
        side=sizes.gemm,
        gradient="the input's gradient",
    )
    found["figures"]["load"] = figure(load, "x mean", "tokens of the heaviest expert over the mean, counted")
    return found


def step(block: nn.Module, x_TD: Tensor, grad_TD: Tensor) -> Tensor:
    """Forward and backward; returns the gradient of x."""
    out = block(x_TD[None])
    out = out[0] if isinstance(out, tuple) else out
    out.backward(grad_TD[None])
    assert x_TD.grad is not None
    return x_TD.grad
