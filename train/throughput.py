"""How long a step takes in a layout, by a simple model of the machine: for ranking layouts, not for promises.

    FLOPs of a rank / (peak * EFFICIENCY)   -> compute, with what is recomputed, and what experts with few rows wait for
                                               their weights
    bubble, experts, tensor, context, stages -> beside it, nothing hidden
    gradients and weights over data ranks    -> hidden behind half of compute, the rest beside it

Every term is bytes or FLOPs that follow from the layout over a figure of the GPU's data sheet (train/hardware.py). No
term is measured. EFFICIENCY is one number for all layouts, so it orders nothing but compute against communication.

A collective's bytes are those a rank sends, which are as many as it receives. Groups are laid out as Megatron-Core
lays them: neighbours in a machine are tensor ranks, then context, then data, then stages; of the experts' groups,
expert tensor ranks, then expert ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from models.config import TranscriberConfig
from models.flops import training_flops, transcriber_flops
from train.activations import Pack
from train.activations_transcriber import shares_of
from train.hardware import Gpu
from train.memory import layers_of, media_share, weights_of
from train.parallel import Layout, Model, thinker_of
from train.stages import encoder_layers, head_layers

EFFICIENCY = 0.4  # of the peak that matrix products reach: assumed
HIDDEN = 0.5  # of compute that gradients' reduction can hide behind: assumed


@dataclass(frozen=True)
class Exchange:
    """Bytes that experts exchange: every chosen expert gets its own copy of a token, forward and backward."""

    token: float
    """Of one token over all layers, in the convention that counts all copies (there is no deduplication)."""
    leaving: float
    """Of these, what goes to another rank when routing is even."""
    nodes: float
    """Of these, what goes to another machine."""
    step: float
    """What one rank sends in a step."""


@dataclass(frozen=True)
class Estimate:
    """Seconds of a step, by term, and what it is made of."""

    compute: float
    bubble: float
    experts: float
    tensor: float
    context: float
    stages: float
    data: float
    """What is not hidden."""
    exchange: Exchange
    tensor_bytes: float
    context_bytes: float
    data_bytes: float
    idle: float
    """Share of a rank's time in the pipeline's bubble."""
    tokens: float
    """Of a step and GPU."""

    @property
    def seconds(self) -> float:
        """The step."""
        terms = self.compute, self.bubble, self.experts, self.tensor, self.context, self.stages, self.data
        return sum(terms)

    @property
    def rate(self) -> float:
        """Tokens a second and GPU."""
        return self.tokens / self.seconds


def bubble(pp: int, microbatches: int, interleave: int) -> float:
    """Share of a step that a rank waits: (pp - 1) / (microbatches * interleave + pp - 1).

    Narayanan et al. 2021, section 2.2, there as a share of the work: (pp - 1) / (microbatches * interleave).
    """
    return (pp - 1) / (microbatches * interleave + pp - 1)


def pack_flops(model: Model, pack: Pack) -> int:
    """Forward and backward over a pack, nothing made again; a Talker is not counted."""
    if isinstance(model, TranscriberConfig):
        return transcriber_flops(model, *shares_of(pack), pack.mel_lengths)
    return training_flops(thinker_of(model), pack.doc_lengths, pack.mel_lengths, pack.grids)


def expert_exchange(model: Model, layout: Layout, tokens: float, per_node: int, size: int = 2) -> Exchange:
    """Bytes of the all-to-all; `tokens` are those that pass one rank in a step.

    A token goes to its K experts and comes back, forward and backward: 4 K D elements a layer. With expert tensor
    parallelism every copy goes to all ranks of its group.
    """
    if isinstance(model, TranscriberConfig):
        return Exchange(0.0, 0.0, 0.0, 0.0)
    text = thinker_of(model).text
    a_layer = 4 * text.num_experts_per_tok * text.hidden_size * size
    token = float(text.num_hidden_layers * a_layer)
    group = layout.ep * layout.expert_tp
    copies = layout.expert_tp
    leaving = token * copies * (1 - 1 / group)
    nodes = token * copies * max(0.0, 1 - per_node / group)
    again = 1.5 if layout.recompute_layers else 1.0  # forward's half once more
    return Exchange(token, leaving, nodes, leaving * again * tokens / layout.pp)


def estimate(
    model: Model, layout: Layout, pack: Pack, microbatches: int, sequences: int, gpu: Gpu, per_node: int
) -> Estimate:
    """A step of `sequences` packs like `pack`, `microbatches` of them on each data rank one after the other."""
    text, size = thinker_of(model).text, 2 if layout.precision == "bf16" else 4
    work = pack_flops(model, pack) * microbatches / layout.replica
    work *= _again(model, layout) * _uneven(model, layout, pack)
    speed = gpu.flops * EFFICIENCY * (size == 2 or 0.5)
    passing = pack.tokens * microbatches / (layout.tp * layout.cp)  # tokens that pass a rank in a step
    compute = work / speed + _starved(model, layout, passing, microbatches, speed, gpu)
    idle = bubble(layout.pp, microbatches, layout.interleave)
    layers = text.num_hidden_layers / layout.pp
    exchange = expert_exchange(model, layout, passing, per_node, size)
    share = exchange.nodes / exchange.leaving if exchange.leaving else 0.0
    stream = text.hidden_size * size
    # gather and scatter around attention, both ways, and its input gathered once more in backward
    tensor = 5 * (layout.tp - 1) * passing * stream * layers * (1.4 if layout.recompute_layers else 1.0)
    pairs = 2 * text.num_key_value_heads // layout.tp * text.head_dim * size
    context = 2 * (layout.cp - 1) * (pack.tokens / layout.cp) * microbatches * pairs * layers
    if layout.name == "deepspeed":  # q, k, v and the output change places, forward and backward
        heads = 2 * text.num_attention_heads + 2 * max(text.num_key_value_heads, layout.cp)
        context = 2 * passing * (1 - 1 / layout.cp) * heads * text.head_dim * size * layers
        context *= 1.5 if layout.recompute_layers else 1.0
    stages = 2 * passing * stream * layout.interleave * (layout.pp > 1)
    data = data_bytes(model, layout, microbatches, size)
    inside = layout.tp * layout.cp <= per_node
    data_time = data / (gpu.nvlink if layout.world <= per_node else gpu.network)
    return Estimate(
        compute=compute,
        bubble=compute * idle / (1 - idle),
        experts=exchange.step * ((1 - share) / gpu.nvlink + share / gpu.network),
        tensor=tensor / (gpu.nvlink if layout.tp <= per_node else gpu.network),
        context=context / (gpu.nvlink if inside else gpu.network),
        stages=stages / (gpu.nvlink if layout.world <= per_node else gpu.network),
        data=max(0.0, data_time - HIDDEN * compute),
        exchange=exchange,
        tensor_bytes=tensor,
        context_bytes=context,
        data_bytes=data,
        idle=idle,
        tokens=pack.tokens * sequences / layout.world,
    )


def data_bytes(model: Model, layout: Layout, microbatches: int, size: int) -> float:
    """Bytes that a rank sends for its gradients and weights: fp32 gradients scattered, weights gathered.

    ZeRO-3 gathers weights for every micro-batch, forward and backward, and ZeRO 2 and 3 scatter gradients for each.
    """
    dense, experts = weights_of(model, layout)
    times = microbatches if layout.name == "deepspeed" and layout.zero > 1 else 1
    gathers = 2 * microbatches if layout.name == "deepspeed" and layout.zero == 3 else 1
    total = 0.0
    for elements, ranks in ((dense, layout.dense_dp), (experts, layout.expert_dp)):
        total += elements * (1 - 1 / ranks) * (4 * times + size * gathers)
    return total


def _starved(model: Model, layout: Layout, passing: float, microbatches: int, speed: float, gpu: Gpu) -> float:
    """Seconds that experts wait for memory beyond their products: with few rows an expert, weights take longer.

    Every micro-batch reads them forward and backward, and reads and writes their fp32 gradients.
    """
    if isinstance(model, TranscriberConfig):
        return 0.0
    text = thinker_of(model).text
    one = 3 * text.hidden_size * text.moe_intermediate_size
    layers = text.num_hidden_layers / layout.pp
    products = 6 * one * text.num_experts_per_tok * passing * layers / speed
    here = one * text.num_experts / (layout.ep * layout.expert_tp) * layers
    size = 2 if layout.precision == "bf16" else 4
    return max(0.0, here * microbatches * (2 * size + 8) / gpu.bandwidth - products)


def _again(model: Model, layout: Layout) -> float:
    """Work beside forward and backward, as a factor."""
    text = thinker_of(model).text
    if layout.recompute_layers:
        return 4 / 3
    if not layout.recompute:
        return 1.0
    experts = 3 * text.moe_intermediate_size * text.num_experts_per_tok
    attention = text.head_dim * 2 * (text.num_attention_heads + text.num_key_value_heads)
    return 1 + experts / (experts + attention) * 2 / 9  # the first of two products again, of nine in all


def _uneven(model: Model, layout: Layout, pack: Pack) -> float:
    """Work of the largest stage over the mean."""
    if layout.pp == 1:
        return 1.0
    share = media_share(model, pack)
    counts = layers_of(model, layout, pack)
    costs = [float(sum(counts[stage :: layout.pp])) for stage in range(layout.pp)]
    costs[0] += encoder_layers(model, share)
    costs[-1] += head_layers(model)
    return max(costs) / (sum(costs) / layout.pp)
