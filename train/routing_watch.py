"""Experts that receive nothing, and routers that use few of them.

    expert shares [L, E] of a step --zero, for how many steps?--------------> dead experts
                                   --exp(entropy) / E, for how many steps?--> collapse

exp of the entropy of the assignments is the number of experts that they would fill evenly: E at balance, top_k where
every token takes the same ones. What is counted begins anew after a restart: a warning may come later, never twice.

Cost: a few operations on [L, E] numbers a step. Letters: L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

MOST = 20  # experts or layers that a line names


class Event(NamedTuple):
    """Something to say: its kind, a sentence, and more for metrics.jsonl."""

    kind: str
    text: str
    more: Mapping[str, Any]


class RoutingWatch:
    """Watches the routers of every decoder."""

    def __init__(self, dead_steps: int, collapse: float, collapse_steps: int) -> None:
        self.dead_steps, self.collapse, self.collapse_steps = dead_steps, collapse, collapse_steps
        self._idle: dict[str, Tensor] = {}  # int64 [L, E]: steps without a token
        self._narrow: dict[str, Tensor] = {}  # int64 [L]: steps below the bound
        self._told: dict[str, Tensor] = {}  # bool [L, E]
        self._quiet: dict[str, int] = {}  # steps since a decoder's last event of dead experts

    def take(self, shares: Mapping[str, Tensor]) -> Iterator[Event]:
        """Note the shares of a step; what is to be said."""
        for name, share_LE in shares.items():
            decoder = name.partition(".")[0] if name.startswith("talker.") else "thinker"
            if name not in self._idle:
                self._idle[name] = torch.zeros(share_LE.shape, dtype=torch.int64)
                self._told[name] = torch.zeros(share_LE.shape, dtype=torch.bool)
                self._narrow[name] = torch.zeros(len(share_LE), dtype=torch.int64)
                self._quiet[name] = self.dead_steps
            if self.dead_steps:
                yield from self._dead(name, decoder, share_LE)
            if self.collapse_steps:
                yield from self._collapsed(name, decoder, share_LE)

    def _dead(self, name: str, decoder: str, share_LE: Tensor) -> Iterator[Event]:
        idle_LE = self._idle[name] = (self._idle[name] + 1) * (share_LE == 0)
        self._told[name] &= idle_LE > 0
        self._quiet[name] += 1
        new_LE = (idle_LE >= self.dead_steps) & ~self._told[name]
        if not new_LE.any() or self._quiet[name] < self.dead_steps:
            return
        self._told[name] |= new_LE
        self._quiet[name] = 0
        pairs = new_LE.nonzero().tolist()
        named = ", ".join(f"{layer}.{expert}" for layer, expert in pairs[:MOST])
        rest = f" and {len(pairs) - MOST} more" if len(pairs) > MOST else ""
        dead = int((idle_LE >= self.dead_steps).sum())
        text = (
            f"{decoder}: experts (layer.expert) {named}{rest} have received no token for {self.dead_steps} steps; "
            f"{dead} of {idle_LE.numel()} are dead. If it goes on, raise loss.balance or lower the learning rate"
        )
        experts = {str(layer): [e for at, e in pairs if at == layer] for layer in sorted({layer for layer, _ in pairs})}
        yield Event("dead_experts", text, {"decoder": decoder, "experts": experts, "dead": dead})

    def _collapsed(self, name: str, decoder: str, share_LE: Tensor) -> Iterator[Event]:
        used_L = torch.special.entr(share_LE.double()).sum(1).exp()
        narrow_L = self._narrow[name] = (self._narrow[name] + 1) * (used_L < self.collapse * share_LE.shape[1])
        new = (narrow_L == self.collapse_steps).nonzero().flatten().tolist()  # once, until it is above again
        if not new:
            return
        found = [
            {
                "layer": layer,
                "used": round(float(used_L[layer]), 2),
                "busiest": int(share_LE[layer].argmax()),
                "share": round(float(share_LE[layer].max()), 4),
            }
            for layer in new
        ]
        named = "; ".join(
            f"layer {each['layer']} uses its experts as if it had {each['used']}, expert {each['busiest']} takes "
            f"{each['share']:.0%}"
            for each in found[:MOST]
        )
        text = f"{decoder}: routers have collapsed for {self.collapse_steps} steps: {named}"
        yield Event("router_collapse", text, {"decoder": decoder, "layers": found, "experts": share_LE.shape[1]})
