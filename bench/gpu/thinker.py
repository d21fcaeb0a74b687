"""A slice of the released Thinker: 12 of 48 layers at their true widths with embedding and head, beside transformers'.

    documents of natural lengths, packed --embed, layers, norm--> hidden --head, cross-entropy--> loss --> gradients

Weights and gradients are bf16 and the same tensors on both sides (bench/gpu/peers.py); the encoders, the balance loss
and the optimizer are left out. Candidates:

* ours; and "ours, recompute", which keeps no activation of the experts.
* transformers: as it comes, sdpa with its block-diagonal mask, F.cross_entropy on full fp32 logits. Natural routing
  only.
* transformers +: the same decoder with our attention kernel and our chunked loss, the most that a user could give it.
* transformers +, checkpointed: each layer recomputed.

What runs out of memory says so. The optimizer is measured apart: engine `local` keeps fp32 masters, gradients and
moments, 18 bytes a parameter, and 8 billion of them fit no GPU of today; AdamW is bound by memory, so that one layer's
parameters tell its speed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.gpu import peers
from bench.gpu.measure import Clock, Work, compared, figure, free, synchronise
from bench.gpu.sizes import Sizes, natural_lengths
from models.flops import text_flops
from models.layers.attention import make_segments
from models.layers.head import LMHead
from models.thinker import Decoder
from train.loss import cross_entropy_sum

IGNORE = -100


@dataclass(frozen=True)
class Pack:
    """Documents end to end."""

    ids_T: Tensor
    labels_T: Tensor
    positions_T: Tensor
    lengths: tuple[int, ...]

    @property
    def targets(self) -> int:
        """Tokens with a next one in their document."""
        return len(self.ids_T) - len(self.lengths)


@dataclass(frozen=True)
class Models:
    """The slice, ours and transformers', on one set of weights."""

    sizes: Sizes
    device: torch.device
    ours: Any
    lean: Any
    theirs: Any
    head: Any

    @property
    def first_gradient(self) -> Tensor:
        """What both sides must agree on: the whole backward leads to it."""
        return self.ours.layers[0].self_attn.q_proj.weight.grad

    def clean(self) -> None:
        """Drop all gradients."""
        self.ours.zero_grad()
        self.head.zero_grad()


def pieces(sizes: Sizes, device: torch.device) -> dict[str, Callable[[Clock], dict[str, Any]]]:
    """Measurements by name, the most telling first."""
    text = sizes.thinker
    ours = peers.on_device(lambda: Decoder(text, False), "model", device)
    peers.protect_marks(ours, text)
    lean = peers.same_weights(lambda: Decoder(text, True), ours, device)
    theirs = peers.same_weights(lambda: peers.text_model(text), ours, device)
    head = peers.on_device(lambda: LMHead(text.hidden_size, text.vocab_size), "lm_head", device)
    models = Models(sizes, device, ours, lean, theirs, head)
    cases = [(tokens, kind) for kind in peers.ROUTINGS for tokens in sizes.packs]
    found: dict[str, Callable[[Clock], dict[str, Any]]] = {
        f"{tokens} tokens, {kind}": partial(measure, models, tokens, kind) for tokens, kind in cases
    }
    return found | {"optimizer, one layer": partial(optimizer, models)}


def pack(sizes: Sizes, tokens: int, device: torch.device) -> Pack:
    """Random ids whose groups of experts come in turn, labels of the next token, one fixed seed."""
    groups = peers.groups_of(sizes.thinker)
    generator = torch.Generator().manual_seed(1)
    drawn_T = torch.randint(0, sizes.thinker.vocab_size // groups, (tokens,), generator=generator)
    ids_T = drawn_T * groups + torch.arange(tokens) % groups
    lengths = natural_lengths(tokens, sizes.median_document)
    labels_T = F.pad(ids_T[1:], (0, 1), value=IGNORE)
    labels_T[torch.tensor(lengths).cumsum(0) - 1] = IGNORE
    return Pack(ids_T.to(device), labels_T.to(device), peers.positions_of(lengths, device), lengths)


def measure(models: Models, tokens: int, kind: str, clock: Clock) -> dict[str, Any]:
    """One length of the pack and one routing."""
    sizes, device = models.sizes, models.device
    batch = pack(sizes, tokens, device)
    load = set_routing(models, batch, kind)
    works: dict[str, Callable[[], Tensor]] = {
        "ours": partial(our_step, models, models.ours, batch),
        "ours, recompute": partial(our_step, models, models.lean, batch),
        "transformers +": partial(their_step, models, batch, peers.PACKED, False),
        "transformers +, checkpointed": partial(their_step, models, batch, peers.PACKED, True),
    }
    if kind == "natural":
        works["transformers"] = partial(their_step, models, batch, "sdpa", False)
    found = compared(
        works,
        device,
        sizes.rounds,
        clock,
        clean=models.clean,
        done=Work(tokens, text_flops(sizes.thinker, batch.lengths)),
        side=sizes.gemm,
        gradient="the first query projection's gradient",
    )
    spread = f"log-normal, {min(batch.lengths)} to {max(batch.lengths)} tokens, one fixed seed"
    found["figures"]["load"] = figure(load, "x mean", "tokens of the heaviest expert over the mean, mean over layers")
    found["figures"]["documents"] = figure(len(batch.lengths), "documents", spread)
    return found


@torch.no_grad()
def set_routing(models: Models, batch: Pack, kind: str) -> float:
    """Set the gates for a routing; what share of the mean the heaviest expert then has.

    Two passes: the first, with natural routing, finds how strong the marks are at each gate.
    """
    text, strengths = models.sizes.thinker, []
    gates = [layer.mlp.gate.weight for layer in models.ours.layers]
    peers.route(gates, text, "natural", [1.0] * len(gates))
    hooks = [
        layer.post_attention_layernorm.register_forward_hook(
            lambda _, __, out: strengths.append(out[:, 0].mean().item())
        )
        for layer in models.ours.layers
    ]
    hidden(models.ours, batch)
    for hook in hooks:
        hook.remove()
    peers.route(gates, text, kind, strengths)
    load = peers.expert_load(hidden(models.ours, batch)[1], text.num_experts_per_tok)
    free(models.device)
    return load


def hidden(decoder: nn.Module, batch: Pack) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Our decoder on text alone: hidden states [T, D] and router logits."""
    positions_3T = batch.positions_T.expand(3, -1)
    hidden_TD, logits, _ = decoder(batch.ids_T, positions_3T, batch.lengths, (), None, None, None, False)
    return hidden_TD, logits


def our_step(models: Models, decoder: nn.Module, batch: Pack) -> Tensor:
    """Forward and backward of our decoder, chunked loss."""
    hidden_TD, _ = hidden(decoder, batch)
    (models.head(hidden_TD, partial(cross_entropy_sum, labels_T=batch.labels_T)) / batch.targets).backward()
    return models.first_gradient


def their_step(models: Models, batch: Pack, attention: str, checkpointed: bool) -> Tensor:
    """Forward and backward of transformers' decoder: its own attention and a plain loss, or both ours."""
    theirs, extra = models.theirs, {}
    peers.attention(theirs, attention)
    if attention == peers.PACKED:
        extra["segments"] = make_segments(batch.lengths, models.device)
    if checkpointed:
        theirs.activation_checkpointing_enable()
    else:
        theirs.activation_checkpointing_disable()
    positions_41T = batch.positions_T.long().expand(4, 1, -1)
    out = theirs(input_ids=batch.ids_T[None], position_ids=positions_41T, use_cache=False, **extra)
    hidden_TD = out.last_hidden_state[0]
    if attention == peers.PACKED:
        total = models.head(hidden_TD, partial(cross_entropy_sum, labels_T=batch.labels_T))
    else:
        total = F.cross_entropy(models.head(hidden_TD).float(), batch.labels_T, reduction="sum")
    (total / batch.targets).backward()
    return models.first_gradient


def optimizer(models: Models, clock: Clock) -> dict[str, Any]:
    """Fused AdamW over fp32 copies of one layer's parameters, as engine `local` steps on its masters."""
    device = models.device
    models.clean()
    free(device)
    masters = [parameter.detach().float() for parameter in models.ours.layers[0].parameters()]
    for master in masters:
        master.grad = torch.full_like(master, 1e-3)
    count = sum(master.numel() for master in masters)
    whole = sum(p.numel() for part in (models.ours, models.head) for p in part.parameters())
    adamw = torch.optim.AdamW(masters, lr=1e-6, fused=True)
    seconds = []
    timer = time.perf_counter if device.type == "cuda" else time.process_time
    for _ in range(1 + models.sizes.rounds):
        synchronise(device)
        began = timer()
        adamw.step()
        synchronise(device)
        seconds.append(timer() - began)
    took, how = median(seconds[1:]), f"median of {len(seconds) - 1}, torch.optim.AdamW, fused, fp32"
    return {
        "status": "ok",
        "figures": {
            "parameters": figure(count, "parameters", "of one decoder layer"),
            "time": figure(1e3 * took, "ms", how),
            "per billion": figure(1e12 * took / count, "ms per 1e9 parameters", how),
            "whole slice": figure(18 * whole / 1e9, "GB", "18 bytes a parameter, by count, not run"),
        },
    }
