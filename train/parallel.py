"""How a run lies on its processes: the degrees of an engine's settings, and which of them can be.

    Layout(name, tp, ep, ..., world)  --check_layout-->  one line that names the setting, or nothing
                                      --derived------->  data-parallel ranks, of the experts too

Pure functions of numbers, so that a layout is refused before any rank allocates the model, and so that the advisor
(launch/plan.py) and the engines refuse the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from models.config import TextConfig, ThinkerConfig, TranscriberConfig
from models.omni_config import OmniConfig
from train.errors import EngineError

Model = ThinkerConfig | OmniConfig | TranscriberConfig
ENGINES = ("local", "deepspeed", "megatron")


@dataclass(frozen=True)
class Degrees:
    """The settings of an engine that decide what lies where."""

    name: str = "local"
    """local (one process), deepspeed or megatron (docs/engines.md)."""
    precision: str = "fp32"
    """fp32, or bf16 with fp32 master weights."""
    zero: int = 2
    """deepspeed: ZeRO stage 1, 2 or 3."""
    offload: bool = False
    """deepspeed: optimizer state in host memory."""
    ep: int = 1
    """deepspeed, megatron: expert parallel degree; must divide the experts and the processes."""
    tp: int = 1
    """megatron: tensor parallel degree, always with sequence parallelism; must divide the heads."""
    pp: int = 1
    """megatron: pipeline stages."""
    cp: int = 1
    """megatron, deepspeed: context parallel degree: ranks that share a pack's tokens. Under deepspeed by Ulysses."""
    expert_tp: int = 1
    """megatron: tensor parallel degree of the experts."""
    interleave: int = 1
    """megatron: model chunks of a rank in the interleaved pipeline schedule; 1 is 1F1B."""
    recompute: bool = False
    """Recompute the experts' activations in backward instead of keeping them."""
    recompute_layers: bool = False
    """Recompute whole decoder layers in backward: of each its input alone is kept."""
    offload_activations: bool = False
    """local, deepspeed: those inputs wait for backward in host memory. Needs recompute_layers."""
    tiles: int = 1
    """local, deepspeed: parts in which a pack's tokens pass the experts of a layer, and its sound the convolutions of
    the audio encoder, each recomputed in backward: of their activations those of one part exist."""


@dataclass(frozen=True)
class Layout(Degrees):
    """Degrees on a number of processes."""

    world: int = 1
    """Processes, one a GPU."""

    @property
    def replica(self) -> int:
        """Processes that hold one copy of the dense weights."""
        return self.tp * self.pp * self.cp

    @property
    def dp(self) -> int:
        """Ranks with packs of their own."""
        return self.world // self.replica

    @property
    def dense_dp(self) -> int:
        """Ranks with the same dense weights: what the optimizer state of those is sharded over."""
        return self.world // (self.tp * self.pp)

    @property
    def expert_dp(self) -> int:
        """Ranks with the same experts."""
        return self.world // (self.pp * self.ep * self.expert_tp)


def thinker_of(model: Model) -> ThinkerConfig:
    """The Thinker's sizes."""
    return model if isinstance(model, ThinkerConfig) else model.thinker


def decoders(model: Model) -> Iterator[tuple[str, TextConfig]]:
    """The mixture-of-experts decoders of a model, with their names."""
    yield "thinker", thinker_of(model).text
    if isinstance(model, OmniConfig) and model.talker is not None:
        yield "talker", model.talker.text


def first_layers(model: Model) -> int:
    """Decoder layers that the first chunk of the pipeline must hold: those that DeepStack's features are added after.

    At least one.
    """
    vision = thinker_of(model).vision
    return max(1, len(vision.deepstack_visual_indexes)) if vision is not None else 1


def check_layout(model: Model, layout: Layout) -> None:
    """Raise EngineError, one line that names the setting, for degrees that cannot be.

    What a rank's memory holds is another question: train.memory.check_fits.
    """
    for name in ("world", "ep", "tp", "pp", "cp", "expert_tp", "interleave"):
        if getattr(layout, name) < 1:
            raise EngineError(f"engine.{name}={getattr(layout, name)}: it must be at least 1")
    if layout.name not in ENGINES:
        raise EngineError(f"engine.name={layout.name}; it is one of {', '.join(ENGINES)}")
    if layout.name != "megatron":
        _check_flat(layout)
    elif layout.offload:
        raise EngineError("engine.offload=true is deepspeed's; set it to false or take engine.name=deepspeed")
    check_long(model, layout)
    if layout.name == "deepspeed" and layout.zero not in (1, 2, 3):
        raise EngineError(f"engine.zero={layout.zero}; it is 1, 2 or 3")
    for name, text in decoders(model):
        _check_decoder(name, text, layout)
    _check_ranks(layout)
    _check_stages(model, layout)


def _check_flat(layout: Layout) -> None:
    """Only megatron cuts the dense layers and the stack of layers."""
    for name in ("tp", "pp", "expert_tp", "interleave"):
        if getattr(layout, name) > 1:
            raise EngineError(f"engine.{name}={getattr(layout, name)} needs engine.name=megatron, not {layout.name}")
    if layout.name == "local":
        if layout.world > 1:
            raise EngineError("engine.name=local is one process; with torchrun use deepspeed or megatron")
        if layout.ep > 1:
            raise EngineError(f"engine.ep={layout.ep} needs engine.name=deepspeed or megatron, not local")


def check_long(model: Model, layout: Layout) -> None:
    """Raise EngineError, one line that names the setting, for means against long packs that cannot be."""
    if layout.tiles < 1:
        raise EngineError(f"engine.tiles={layout.tiles}: it must be at least 1")
    if layout.offload_activations and not layout.recompute_layers:
        raise EngineError(
            "engine.offload_activations=true keeps inputs of layers: set engine.recompute_layers=true too"
        )
    if layout.name == "megatron":
        if layout.offload_activations:
            raise EngineError("engine.offload_activations=true: megatron does not; set it to false, raise engine.cp")
        if layout.tiles > 1:
            raise EngineError(f"engine.tiles={layout.tiles}: megatron does not; set engine.recompute=true")
        return
    if layout.cp == 1:
        return
    if layout.name == "local":
        raise EngineError(f"engine.cp={layout.cp} needs engine.name=deepspeed or megatron, not local")
    if layout.world % layout.cp:
        raise EngineError(f"engine.cp={layout.cp} does not divide the {layout.world} processes of the run")
    text = thinker_of(model).text
    heads, groups = text.num_attention_heads, text.num_key_value_heads
    if heads % layout.cp or (groups % layout.cp and layout.cp % groups):
        raise EngineError(
            f"engine.cp={layout.cp} must divide the {heads} attention heads of the thinker, and divide its {groups} "
            "key-value heads or be a multiple of them"
        )


def _check_ranks(layout: Layout) -> None:
    """Degrees against the number of processes."""
    world = layout.world
    if world % layout.replica:
        product = " x ".join(f"engine.{key}={getattr(layout, key)}" for key in ("tp", "pp", "cp"))
        raise EngineError(f"{product} = {layout.replica} does not divide the {world} processes of the run")
    if world % (layout.pp * layout.ep * layout.expert_tp):
        keys = [key for key in ("ep", "expert_tp", "pp") if key == "ep" or getattr(layout, key) > 1]
        product = " x ".join(f"engine.{key}={getattr(layout, key)}" for key in keys)
        raise EngineError(f"{product} does not divide the {world} processes of the run")


def _check_decoder(name: str, text: TextConfig, layout: Layout) -> None:
    """Degrees against the sizes of one decoder."""
    tp, experts = layout.tp, text.num_experts
    sizes = {
        "key-value heads": text.num_key_value_heads,
        "attention heads": text.num_attention_heads,
        "words of the vocabulary": text.vocab_size,
    }
    for what, size in sizes.items():
        if size % tp:
            raise EngineError(f"engine.tp={tp} does not divide the {size} {what} of the {name}")
    if experts % layout.ep:
        raise EngineError(f"engine.ep={layout.ep} does not divide the {experts} experts of the {name}")
    width = text.moe_intermediate_size
    if width % layout.expert_tp:
        raise EngineError(
            f"engine.expert_tp={layout.expert_tp} does not divide moe_intermediate_size={width} of the {name}"
        )
    shared = text.shared_expert_intermediate_size
    if shared % tp:
        raise EngineError(f"engine.tp={tp} does not divide shared_expert_intermediate_size={shared} of the {name}")


def _check_stages(model: Model, layout: Layout) -> None:
    """The pipeline against the layers."""
    pp, interleave = layout.pp, layout.interleave
    if interleave > 1 and pp == 1:
        raise EngineError(f"engine.interleave={interleave} needs engine.pp above 1")
    for name, text in decoders(model):
        layers, chunks = text.num_hidden_layers, pp * interleave
        if interleave > 1 and layers % chunks:
            raise EngineError(
                f"engine.pp={pp} x engine.interleave={interleave} does not divide the {layers} layers of the {name}"
            )
        first = first_layers(model) if name == "thinker" else 1
        if interleave > 1 and layers // chunks < first:
            raise EngineError(
                f"engine.pp={pp} x engine.interleave={interleave} leaves {layers // chunks} layers to the first chunk "
                f"of the {name}; DeepStack needs {first}: take fewer chunks"
            )
        if pp > 1 and layers < first + chunks - 1:
            why = f", of which the first {first} stay together for DeepStack" if first > 1 else ""
            raise EngineError(f"engine.pp={pp} is more than the {layers} layers of the {name} allow{why}")


def check_sequence(layout: Layout, tokens: int) -> None:
    """Raise EngineError for packs of `tokens` that the ranks of a replica cannot share evenly."""
    if layout.tp * layout.cp == 1:
        return
    if layout.name == "deepspeed":
        return  # packs are padded, and attention's work is even over heads
    parts = 2 * layout.cp * layout.tp  # each context rank has an early and a late stretch, so that work is even
    if tokens % parts:
        raise EngineError(
            f"data.sequence_length={tokens} is not a multiple of 2 x engine.cp={layout.cp} x engine.tp={layout.tp} = "
            f"{parts}; take {tokens // parts * parts or parts}"
        )


def check_microbatches(layout: Layout, microbatches: int) -> None:
    """Raise EngineError where the interleaved schedule cannot run so many micro-batches a step on a rank."""
    if layout.interleave > 1 and microbatches % layout.pp:
        raise EngineError(
            f"engine.interleave={layout.interleave} needs micro-batches a step and rank, {microbatches}, to be a "
            f"multiple of engine.pp={layout.pp}: change data.sequences_per_step or set engine.interleave=1"
        )
