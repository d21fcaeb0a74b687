"""What DeepSpeed's AutoEP makes of the mixture-of-experts block, as data and pure functions.

    layers.N.mlp.gate.weight            [E, D]       ->  mlp.router.gate.weight  [E, D]
    layers.N.mlp.experts.gate_up_proj   [E, 2F, D]   ->  mlp.experts.w1, w3      [E/ep, F, D] on each rank
    layers.N.mlp.experts.down_proj      [E, D, F]    ->  mlp.experts.w2          [E/ep, D, F]
    layers.N.mlp.shared_expert, its gate             ->  mlp.shared_experts, mlp.shared_experts_gate

A checkpoint knows only the left side. `pieces` cuts a flat range of a parameter on the right into ranges of one on the
left: w1 and w3 alternate in gate_up_proj, so a range is split at the bounds of experts: a piece for each.

Letters: E experts, F expert width, D hidden.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from train.loss import Family

PREFIX = "omniloom_"  # of our presets' names
RENAMED = {
    ".router.gate.": ".gate.",
    ".shared_experts.": ".shared_expert.",
    ".shared_experts_gate.": ".shared_expert_gate.",
}


def register(families: Sequence[Family]) -> dict[str, int]:
    """Tell AutoEP of the mixture-of-experts layers; returns attributes that it must find in `model.config`.

    Each family is a preset of its own, and DeepSpeed tries all that it knows. The attributes have names that none of
    its own presets reads, so those find nothing.
    """
    from deepspeed.module_inject.auto_ep_presets.base import MoEModelPreset
    from deepspeed.module_inject.auto_ep_presets.registry import PRESET_MODELS

    attributes = {}
    for name in [name for name in PRESET_MODELS if name.startswith(PREFIX)]:
        del PRESET_MODELS[name]  # of an engine that was closed
    for family in families:
        experts, top_k = f"{family.name}_num_experts", f"{family.name}_top_k"
        attributes |= {experts: family.experts, top_k: family.top_k}
        PRESET_MODELS[PREFIX + family.name] = MoEModelPreset(
            moe_layer_pattern=re.escape(family.decoder) + r"\.layers\.\d+\.mlp",
            router_pattern="gate",
            experts_pattern="experts",
            expert_storage="fused_3d",
            expert_w1="gate_up_proj",
            expert_w2="down_proj",
            expert_w3=None,  # fused into w1
            num_experts_attr=experts,
            top_k_attr=top_k,
            score_func="softmax",
            score_apply="post",
            route_norm=True,
            gate_bias=False,
            has_shared_experts=family.shared,
            shared_experts_pattern="shared_expert" if family.shared else "",
            shared_experts_gate_pattern="shared_expert_gate" if family.shared else "",
        )
    return attributes


class Piece(NamedTuple):
    """Elements [offset, offset + length) of a range are elements [start, start + length) of the parameter `name`."""

    name: str
    start: int
    offset: int
    length: int


def pieces(
    name: str, start: int, length: int, experts: Sequence[int] | None, shapes: Mapping[str, Sequence[int]]
) -> Iterator[Piece]:
    """Cut elements [start, start + length) of the engine's parameter `name` into pieces of the model's parameters.

    Args:
        name: as the engine calls it, without a wrapper's prefix.
        start: first element of the range in the flattened local parameter.
        length: its number of elements.
        experts: ids of the experts in the local parameter; None where it is no expert parameter.
        shapes: name in the model -> full shape.
    """
    if experts is None:
        for theirs, mine in RENAMED.items():
            name = name.replace(theirs, mine)
        yield Piece(name, start, 0, length)
        return
    prefix, which = name[:-2], name[-2:]
    ours = prefix + ("down_proj" if which == "w2" else "gate_up_proj")
    whole = shapes[ours][1] * shapes[ours][2]  # elements of one expert in our parameter and in AutoEP's
    block, shift = (whole, 0) if which == "w2" else (whole // 2, whole // 2 * (which == "w3"))
    end = start + length
    for slot in range(start // block, -(-end // block)):
        low, high = max(start, slot * block), min(end, (slot + 1) * block)
        yield Piece(ours, experts[slot] * whole + shift + low - slot * block, low - start, high - low)
