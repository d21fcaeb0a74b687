"""Bytes that a rank needs for a training step, by part: before anything is built.

    model, layout --pieces of a stage--> weights, gradients, optimizer state of a rank
    pack, micro-batches, max_logits  --> what is alive at every moment of forward and backward; the fullest one
    every stage of the pipeline      --> the worst rank's Memory

The pieces and what they keep: train/activations.py. Here they are laid on a rank's time: a micro-batch piles up its
activations, in backward they go while gradients come, and in a pipeline the first stages hold several micro-batches.

What the model knows: tests/train/test_memory.py says how far it is from measured peaks, and for which engines. What it
does not: an allocator's gaps, libraries' own buffers and routing that favours some ranks; leave a tenth of a GPU free.

Cost: milliseconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from models.audio_encoder import num_audio_tokens
from models.config import TextConfig, TranscriberConfig
from models.omni_config import OmniConfig
from train.activations import Cut, Pack, Piece, audio, decoder_layer, head, recomputed, vision
from train.activations_talker import talker_front
from train.activations_transcriber import audio_decoder
from train.engine_state import Job, State, size_of
from train.parallel import Layout, Model, first_layers, thinker_of
from train.stages import encoder_layers, head_layers, stage_layers

PARTS = ("weights", "gradients", "optimizer", "attention", "experts", "norms", "encoders", "head", "logits", "buffers")


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank by part, at its fullest moment."""

    parts: dict[str, int]
    stage: int = 0

    @property
    def total(self) -> int:
        """All parts."""
        return sum(self.parts.values())

    def largest(self, count: int = 3) -> list[tuple[str, int]]:
        """The parts that need most."""
        return Counter(self.parts).most_common(count)


def memory_of(model: Model, layout: Layout, job: Job) -> Memory:
    """The worst rank's. Raises EngineError where the pipeline has more stages than layers."""
    counts = layers_of(model, layout, job.pack)
    return max((stage_memory(model, layout, job, stage, counts) for stage in range(layout.pp)), key=lambda m: m.total)


def layers_of(model: Model, layout: Layout, pack: Pack) -> list[int]:
    """Layers of every chunk of the pipeline, for media as in `pack`."""
    costs = encoder_layers(model, media_share(model, pack)), head_layers(model)
    layers = thinker_of(model).text.num_hidden_layers
    return stage_layers(layers, layout.pp, layout.interleave, *costs, least_first=first_layers(model))


def media_share(model: Model, pack: Pack) -> float:
    """Share of a pack's tokens that are of media."""
    config = thinker_of(model).vision
    media = sum(map(num_audio_tokens, pack.mel_lengths))
    media += pack.patches // config.spatial_merge_size**2 if config else 0
    return media / max(1, pack.tokens)


def weights_of(model: Model, layout: Layout) -> tuple[int, int]:
    """Elements of the dense weights and of the experts on a rank, the mean over stages."""
    thinker, pack = thinker_of(model), Pack((2 * layout.tp * layout.cp,))
    text, cut = thinker.text, Cut(size_of(layout), "cuda", layout.tp, layout.cp, layout.ep, layout.expert_tp)
    if isinstance(model, TranscriberConfig):
        alone = [*audio(thinker.audio, pack, cut), *audio_decoder(model, pack, cut, 1, True)]
        return sum(piece.weights for piece in alone), 0
    layer = decoder_layer(text, pack, cut)
    ends = [*head(text, pack, cut, 1, True), *audio(thinker.audio, pack, cut)]
    ends += vision(thinker.vision, pack, cut) if thinker.vision is not None else []
    table = text.vocab_size // layout.tp * text.hidden_size
    dense, experts = (sum(piece.weights for piece in layer if piece.sharded is kind) for kind in (False, True))
    dense = dense * text.num_hidden_layers + table + sum(piece.weights for piece in ends)
    return dense // layout.pp, experts * text.num_hidden_layers // layout.pp


def stage_memory(model: Model, layout: Layout, job: Job, stage: int, counts: Sequence[int]) -> Memory:
    """That of a rank of one pipeline stage; `counts` are layers of all chunks of the Thinker."""
    places = range(stage, len(counts), layout.pp)
    passes = [[piece for place in places for piece in chunk_pieces(model, layout, job, place, counts)]]
    if not {"decoder", "audio", "vision"} & {*job.train}:  # it is only read, up to a layer before its head
        passes = [[unkept(piece) for piece in passes[0]]]
    front, talker = talker_pieces(model, layout, job, stage)
    if layout.name == "megatron":  # the Talker's pass is one of its own, between its front's forward and backward
        passes += [talker] if talker else []
    else:
        passes[0] += [*front, *talker]
    pieces = [*(piece for each in passes for piece in each), *(front if len(passes) > 1 else [])]
    states = State.of(layout, job)
    found = Counter(states.of_pieces(pieces, job.train))
    thinker = thinker_of(model)
    patch = thinker.vision.patch_dim if thinker.vision is not None else 0
    found["buffers"] += batches(job, thinker.audio.num_mel_bins, patch)
    if layout.name == "megatron":
        found["buffers"] += standing(thinker.text, layout, job)
    moments = [*states.after(pieces, job)]
    for number, each in enumerate(passes):
        beside = front if number else []
        moment = fullest(each, states, job.train, pieces)
        for piece in beside:
            moment[piece.part] += piece.kept * job.microbatches
        moments.append(moment + waiting(each, layout, in_flight(layout, stage, job.microbatches)))
    found.update(max(moments, key=lambda parts: sum(parts.values())))
    return Memory({part: found[part] for part in PARTS}, stage)


def unkept(piece: Piece) -> Piece:
    """The same where nothing is learnt: what it would keep goes with it."""
    passing = 0 if piece.part in ("head", "logits") else piece.kept + piece.forward
    return replace(piece, kept=0, forward=passing, backward=0, early=False)


def waiting(pieces: Sequence[Piece], layout: Layout, chunks: int) -> Counter[str]:
    """Activations of micro-batches whose backward comes later: those of one are in `fullest`."""
    each = Counter[str]()
    if layout.pp > 1:
        for piece in pieces:
            each[piece.part] += piece.kept
    return Counter({p: max(0, size * (chunks - layout.interleave) // layout.interleave) for p, size in each.items()})


def talker_pieces(model: Model, layout: Layout, job: Job, stage: int) -> tuple[list[Piece], list[Piece]]:
    """The Talker's front, on the last stage, and the rest of it on one: layers; head and code predictor on the last."""
    config = model.talker if isinstance(model, OmniConfig) else None
    if config is None:
        return [], []
    text, cut, learns = config.text, cut_of(layout, job), "talker" in job.train
    pack = job.spoken or Pack((2 * layout.tp * layout.cp,), targets=0)
    counts = stage_layers(text.num_hidden_layers, layout.pp, layout.interleave)[stage :: layout.pp]
    layers = cut_layers(text, pack, cut, layout, sum(counts))
    front = []
    if stage == layout.pp - 1:
        first, residual = talker_front(config, pack, cut, job.max_logits, learns)
        front = [first]
        layers += [*head(text, pack, cut, job.max_logits, learns), *residual]
    if job.spoken is None:
        front, layers = (
            [replace(piece, kept=0, forward=0, backward=0, early=False) for piece in each] for each in (front, layers)
        )
    front, layers = ([replace(piece, owner="talker") for piece in each] for each in (front, layers))
    return front, layers


def batches(job: Job, mels: int, patch: int) -> int:
    """What was read: a whole step on a CPU; one micro-batch on a GPU, to which it is copied when its turn comes."""
    pack = job.pack
    tokens = pack.tokens * 28  # ids, labels, three positions
    media = (sum(pack.mel_lengths) * mels + pack.patches * patch) * 4
    return (tokens + media) * (job.microbatches if job.kernels != "cuda" else 1)


def standing(text: TextConfig, layout: Layout, job: Job) -> int:
    """What Megatron's engine has of all micro-batches, and its buffer for what tensor ranks gather."""
    seen, size = job.pack.tokens // layout.cp, size_of(layout)
    turns = 2 * seen * text.head_dim * size  # cosines and sines
    rows = 16 * seen + 8 * job.pack.tokens * (layout.cp > 1)
    return job.microbatches * (turns + rows) + seen * text.hidden_size * size * (layout.tp > 1)


def in_flight(layout: Layout, stage: int, microbatches: int) -> int:
    """Chunks of micro-batches whose activations a stage holds at once.

    1F1B: one for every stage from here on. Interleaved (Narayanan et al. 2021, section 2.2, as Megatron-Core warms up):
    twice the stages after this one, and pp for every chunk but the last.
    """
    if layout.interleave == 1:
        return min(layout.pp - stage, microbatches)
    warm = 2 * (layout.pp - stage - 1) + (layout.interleave - 1) * layout.pp + 1
    return min(warm, microbatches * layout.interleave)


def chunk_pieces(model: Model, layout: Layout, job: Job, place: int, counts: Sequence[int]) -> list[Piece]:
    """The pieces of one chunk of the pipeline in forward order, parameters and activations of one rank."""
    thinker, pack = thinker_of(model), job.pack
    text, cut = thinker.text, cut_of(layout, job)
    pieces = encoders(model, layout, job, cut) if place == 0 else []
    if isinstance(model, TranscriberConfig):
        return [*pieces, *audio_decoder(model, pack, cut, job.max_logits, "decoder" in job.train)]
    if place == 0:
        tokens = pack.tokens // layout.cp
        table = text.vocab_size // layout.tp * text.hidden_size
        stream = tokens * text.hidden_size * cut.size
        turns = 0 if cut.megatron else 2 * tokens * text.head_dim * cut.size
        pieces.append(Piece("attention", turns, stream * 2, stream, table))
    pieces += cut_layers(text, pack, cut, layout, counts[place])
    if place < len(counts) - 1:  # what is sent on stays until its gradient comes
        pieces.append(Piece("norms", pack.tokens // (layout.tp * layout.cp) * text.hidden_size * cut.size))
    else:
        pieces += head(text, pack, cut, job.max_logits, "decoder" in job.train)
    return pieces


def cut_of(layout: Layout, job: Job) -> Cut:
    """What of a layer is on one rank."""
    auto = layout.name == "deepspeed" and layout.ep > 1  # AutoEP's own experts, which keep everything
    return Cut(
        size=size_of(layout),
        kernels=job.kernels,
        tp=layout.tp,
        cp=layout.cp,
        ep=layout.ep,
        expert_tp=layout.expert_tp,
        recompute=layout.recompute and not auto,
        dispatched=layout.name == "megatron" or auto,
        grouped=auto,
        layers=layout.recompute_layers,
        tiles=layout.tiles,
        megatron=layout.name == "megatron",
    )


def cut_layers(text: TextConfig, pack: Pack, cut: Cut, layout: Layout, count: int) -> list[Piece]:
    """So many decoder layers of a rank."""
    layer = decoder_layer(text, pack, cut)
    if layout.recompute_layers:
        tokens = pack.tokens // (layout.tp * layout.cp)
        stream = tokens * text.hidden_size * cut.size
        # what routers chose leaves the layer, for the balance loss; under Megatron that is in the layer
        routed = 0 if layout.name == "megatron" else tokens * text.num_experts * 4
        waits = layout.offload_activations and cut.kernels == "cuda"  # in host memory
        layer = recomputed(layer, routed + (0 if waits else stream))
    return layer * count


def encoders(model: Model, layout: Layout, job: Job, cut: Cut) -> list[Piece]:
    """Whole weights on each rank of the first stage, the work shared by those of a replica."""
    thinker, shares = thinker_of(model), layout.tp * layout.cp
    whole = replace(cut, tp=1, cp=1)
    pieces = audio(thinker.audio, job.pack, whole)
    pieces += vision(thinker.vision, job.pack, whole) if thinker.vision is not None else []
    parted = []
    for piece in pieces:
        sizes = {name: getattr(piece, name) // shares for name in ("kept", "forward", "backward")}
        if piece.owner not in job.train:  # no gradient comes so far
            sizes |= {"kept": 0, "backward": 0, "forward": sizes["kept"] + sizes["forward"]}
        elif layout.name == "deepspeed" and layout.world > 1:  # engine.share_encoders: a step's media at once
            sizes["kept"] *= job.microbatches
        parted.append(replace(piece, **sizes))
    return parted


def fullest(pieces: Sequence[Piece], state: State, train: Collection[str], every: Sequence[Piece]) -> Counter[str]:
    """Activations and gradients by part at the fullest moment of a micro-batch's forward and backward.

    `every` has the rank's pieces, also those of which this pass runs nothing.
    """
    held, best, most = Counter[str](), Counter[str](), -1
    learning = [piece for piece in pieces if piece.owner in train]
    held["gradients"] = state.sum_of([piece for piece in every if piece.owner in train], state.standing)
    held["buffers"] = state.gathered(sum(piece.weights for piece in pieces))

    def look(part: str, beside: int, gradients: int = 0) -> None:
        nonlocal best, most
        total = sum(held.values()) + beside + gradients
        if total > most:
            most, best = total, held.copy()
            best[part] += beside
            best["gradients"] += gradients

    for piece in pieces:
        held[piece.part] += piece.kept
        look(piece.part, piece.forward)
    held["buffers"] += state.reducing(learning)
    for piece in reversed(pieces):
        fresh = piece.weights * state.fresh if piece.owner in train else 0
        done = piece.weights * 4 if piece.early else 0  # in `kept` already
        if done and state.fresh == 4:
            fresh = 0
        look(piece.part, piece.backward, fresh)
        held[piece.part] -= piece.kept
        if state.stays:
            held["gradients"] += fresh + (done if state.fresh == 4 else 0)
    look("gradients", 0)
    return best
