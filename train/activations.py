"""What a forward keeps for its backward, and what each piece needs beside that while it runs.

    pieces in forward order:  audio, vision | norm, projections, attention, norm, experts | ... | norm, head
    forward  -->  kept piles up
    backward <--  kept goes, gradients of the weights come, `backward` bytes beside it for a moment

A Piece is a stretch of the model whose tensors live and die together. The pieces follow the code of models/layers:
which tensors autograd saves, which are views, which copies padding costs. tests/train/test_memory.py holds them against
measured peaks. Sizes are bytes. Cost: a few hundred small objects, no tensor of the model's size.

Letters: T tokens, D hidden, H query heads, G key-value heads, C head_dim, E experts, K chosen experts, F expert width,
R rows of routed tokens, V vocabulary, N targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from models.audio_encoder import CHUNK_FRAMES, num_audio_tokens
from models.config import AudioConfig, TextConfig, VisionConfig
from models.layers.attention import STRIP, STRIPS_UP_TO, make_segments
from models.layers.experts import BLOCK_ROWS
from models.layers.ragged import STRIP as QUERIES
from models.layers.ragged import make_pieces

KERNELS = ("cuda", "cpu", "cpu-upcast")


@dataclass(frozen=True)
class Piece:
    """Bytes of one stretch of the model."""

    part: str
    kept: int
    """From its forward to the end of its backward."""
    forward: int = 0
    """Beside `kept`, at the fullest moment of forward."""
    backward: int = 0
    """Beside `kept` and the new gradients, at the fullest moment of backward."""
    weights: int = 0
    """Elements of its parameters that lie on this rank."""
    sharded: bool = False
    """Whether these are experts, which have data-parallel ranks of their own."""
    early: bool = False
    """Whether their gradients are made in forward, in fp32: `kept` has them already."""
    owner: str = "decoder"
    """decoder, audio, vision or talker: what a phase trains or freezes."""


@dataclass(frozen=True)
class Pack:
    """What a micro-batch holds, as far as memory depends on it."""

    doc_lengths: tuple[int, ...]
    mel_lengths: tuple[int, ...] = ()
    grids: tuple[tuple[int, int, int], ...] = ()
    targets: int | None = None
    """Tokens with a label; None: all."""

    @property
    def tokens(self) -> int:
        """Tokens of the pack."""
        return sum(self.doc_lengths)

    @property
    def patches(self) -> int:
        """Patches of all pictures."""
        return sum(frames * rows * columns for frames, rows, columns in self.grids)


@dataclass(frozen=True)
class Cut:
    """What of a layer's work is on one rank, and how it is computed there."""

    size: int
    """Bytes of an activation's element."""
    kernels: str = "cuda"
    """cuda: grouped_mm and attention for packed sequences; cpu: those of models/layers; cpu-upcast: where fp32 matrix
    products beat 16-bit ones."""
    tp: int = 1
    cp: int = 1
    ep: int = 1
    expert_tp: int = 1
    recompute: bool = False
    dispatched: bool = False
    """Whether rows are sent to their experts' ranks, so that what arrives is a tensor of its own."""
    grouped: bool = False
    """Whether grouped products run the experts whatever the device, as in DeepSpeed's AutoEP."""
    layers: bool = False
    """Whether layers keep their input alone; here for the encoders', those of decoders are in train/memory.py."""
    tiles: int = 1
    """Parts in which tokens pass the experts."""
    megatron: bool = False
    """Whether layers are Megatron-Core's, as train/engines/megatron/block.py puts them together."""

    @property
    def wide(self) -> int:
        """Bytes of an element inside the experts."""
        return 4 if self.kernels == "cpu-upcast" else self.size


def norm(rows: int, width: int, size: int, part: str, beside: int) -> Piece:
    """RMSNorm of [rows, width]; `beside` are bytes of gradients that pass it by."""
    whole = rows * width
    if size == 4:
        return Piece(part, whole * 4 + rows * 4, whole * 8, beside + whole * 8, width)
    return Piece(part, whole * size + rows * 4, whole * 8, beside + whole * (12 + size), width)


def ragged_kept(lengths: Sequence[int], heads: int, groups: int, channels: int, cut: Cut) -> int:
    """The same for the queries of one context rank, the one with most, and keys of all (models/layers/ragged.py)."""
    padded, each = -(-sum(lengths) // (2 * cut.cp)) * 2 * cut.cp, channels * cut.size
    seen, half = padded // cut.cp, padded // (2 * cut.cp)
    most = 0
    for rank in range(cut.cp):
        stretches = [(part * half, (part + 1) * half) for part in (rank, 2 * cut.cp - 1 - rank)]
        pieces = make_pieces(stretches, lengths, torch.device("cpu")).all
        if cut.kernels == "cuda":  # keys and values of every piece are copied
            keys = sum(piece.last - piece.first for piece in pieces) * 2 * groups * each
        else:  # views of the pack's, and a mask whose corners all strips of queries share
            longest = max((piece.last - piece.first for piece in pieces), default=0)
            keys = padded * 2 * groups * each + QUERIES * longest * cut.size
        most = max(most, keys)
    outputs = 1 if cut.kernels == "cuda" else 2  # strips are put together
    return most + seen * heads * ((1 + outputs) * each + 4)


def ulysses_kept(lengths: Sequence[int], heads: int, groups: int, channels: int, cut: Cut) -> int:
    """The same where ranks exchange tokens for heads (train/engines/ulysses.py): whole packs, of some heads."""
    whole = sum(lengths) // cut.cp * heads * channels * cut.size  # what came back, for the output matrix
    return whole + attention_kept(lengths, heads // cut.cp, max(1, groups // cut.cp), channels, cut)


def attention_kept(
    lengths: Sequence[int], heads: int, groups: int, channels: int, cut: Cut, causal: bool = True
) -> int:
    """Bytes that attention keeps of q, k, v [T, heads, channels] and its output, that of the output matrix included."""
    tokens, size = sum(lengths), cut.size
    each = channels * size
    if cut.kernels == "cuda":
        return tokens * ((2 * heads + 2 * groups) * each + 4 * heads)
    segments = make_segments(lengths, torch.device("cpu"))
    if not segments.buckets:
        return 0
    gathered = sum(bucket.num * bucket.longest for bucket in segments.buckets if bucket.start is None)
    rows = sum(bucket.num * bucket.longest for bucket in segments.buckets)
    sliced = tokens if rows > gathered else 0
    strips = [b.longest for b in segments.buckets if causal and size == 4 and STRIP < b.longest <= STRIPS_UP_TO]
    copied = len(segments.buckets) > 1 or bool(strips) or segments.back_T is not None
    kept = (sliced + gathered) * (heads + 2 * groups) * each + rows * heads * (each + 4)
    return kept + (tokens * heads * each if copied else 0) + sum(STRIP * longest * 4 for longest in strips)


def decoder_layer(text: TextConfig, pack: Pack, cut: Cut) -> list[Piece]:
    """One layer of a mixture-of-experts decoder."""
    size, hidden, channels = cut.size, text.hidden_size, text.head_dim
    heads, groups = text.num_attention_heads // cut.tp, text.num_key_value_heads // cut.tp
    tokens, seen = pack.tokens // (cut.tp * cut.cp), pack.tokens // cut.cp
    stream, query, pair = tokens * hidden * size, seen * heads * channels * size, seen * groups * channels * size
    keeps = attention_kept if cut.cp == 1 else ragged_kept if cut.megatron else ulysses_kept
    attended = keeps(pack.doc_lengths, heads, groups, channels, cut)
    # q, k, v are one product that stays whole: the norm of k reads it; that of q reads a copy
    mixed = query + pair if cut.megatron else 0
    whole = seen * hidden * size if cut.tp > 1 else 0  # tokens of all tensor ranks, gathered for a projection
    scales = seen * (heads + groups) * 4
    floats = 0 if size == 4 else 2 * query * 4 // size
    in_out = hidden * heads * channels
    return [
        norm(tokens, hidden, size, "norms", stream),
        Piece("attention", stream, whole, stream * 3 + whole + query, in_out + 2 * hidden * groups * channels),
        Piece(
            "attention", query + pair + scales + mixed, floats, stream + 3 * query + 2 * pair + floats, 2 * channels
        ),  # QK-norm, rotation
        Piece("attention", attended, query, stream + 2 * query + 2 * pair),
        Piece("attention", 0, whole, stream + whole + query, in_out),
        norm(tokens, hidden, size, "norms", stream),
        *(moe(text, tokens, cut) if cut.tiles == 1 else tiled_moe(text, tokens, cut)),
    ]


def tiled_moe(text: TextConfig, tokens: int, cut: Cut) -> list[Piece]:
    """The block on one part of the tokens after another, each made again in backward (models/layers/saving.py).

    Gradients of a part come beside those of the parts before it.
    """
    part, stream = moe(text, -(-tokens // cut.tiles), cut), tokens * text.hidden_size * cut.size
    again = recomputed(part, stream + tokens * text.num_experts * 4)  # its inputs are views of the norm's output
    summed = sum(piece.weights for piece in part) * cut.size
    again[-1] = replace(again[-1], backward=again[-1].backward + stream + summed)
    again[0] = replace(again[0], forward=again[0].forward + stream)
    return again


def recomputed(layer: Sequence[Piece], stream: int, shared: int = 0) -> list[Piece]:
    """Pieces of which only the input is kept; backward makes the rest again, and lets go of it from the last on.

    `shared` bytes of what they keep are that input.
    """
    behind = accumulate(piece.kept for piece in layer)
    most = max(kept + piece.backward for kept, piece in zip(behind, layer, strict=True))
    out = [replace(piece, kept=0, forward=max(piece.forward, piece.kept), backward=0) for piece in layer]
    out[0] = replace(out[0], kept=stream)
    out[-1] = replace(out[-1], backward=most - shared)
    return out


def moe(text: TextConfig, tokens: int, cut: Cut) -> list[Piece]:
    """Router, experts and, where the decoder has one, the expert that all tokens pass."""
    size, hidden = cut.size, text.hidden_size
    width, experts = text.moe_intermediate_size // cut.expert_tp, text.num_experts // cut.ep
    chosen, stream = text.num_experts_per_tok, tokens * text.hidden_size * size
    rows = tokens * chosen * cut.expert_tp
    router = tokens * (8 * text.num_experts + 12 * chosen)
    elements = 3 * experts * hidden * width
    pieces = [Piece("experts", stream + router, stream, 2 * stream + tokens * text.num_experts * 8, router_of(text))]
    if cut.megatron:  # routing maps and probabilities are dense, and the dispatcher holds on to them
        router = tokens * (10 * text.num_experts + 12 * chosen) + rows * 16
        pieces[0] = replace(pieces[0], kept=stream + router)
    if cut.kernels == "cuda" or cut.grouped:
        return [*pieces, *grouped_experts(rows, stream, elements, hidden, width, cut), *dense_expert(text, tokens, cut)]
    return [
        *pieces,
        block_experts(rows, tokens, elements, experts, hidden, width, cut),
        *dense_expert(text, tokens, cut),
    ]


def block_experts(rows: int, tokens: int, elements: int, experts: int, hidden: int, width: int, cut: Cut) -> Piece:
    """The CPU's path. Under Megatron its tokens are the rows, which the dispatcher has sorted."""
    size, wide = cut.size, cut.wide
    inputs = rows if cut.megatron else tokens
    blocks = blocks_of(rows, experts)
    most, arrived = max(blocks), rows * hidden * size if cut.megatron else 0
    # gradients of rows, pre-activations and their gradients, gradients of activations: once, for the largest block
    standing = most * (hidden + 5 * width) * wide
    # rows and gradients of outputs, silu, activations and a product of them: while a block runs, and the last one's
    # until it has its own
    beside = [2 * hidden + (3 if cut.kernels == "cpu" else 5) * width] * len(blocks)
    passing = max(
        [rows * each for rows, each in zip(blocks, beside, strict=True)]
        + [2 * (here + last) * hidden + 2 * last * width for here, last in zip(blocks[1:], blocks[:-1], strict=True)]
    )
    outside = inputs * hidden * (wide if wide == size else 3 * wide)
    kept = arrived + rows * 4 + (0 if cut.recompute else rows * 2 * width * size)
    forward = inputs * hidden * 2 * wide + most * (2 * hidden + 4 * width) * wide
    backward = inputs * hidden * size + outside + standing + passing * wide + rows * 12
    return Piece("experts", kept, forward, backward, elements, sharded=True)


def router_of(text: TextConfig) -> int:
    """Elements of a router."""
    return text.num_experts * text.hidden_size


def blocks_of(rows: int, experts: int) -> list[int]:
    """Rows of each block of consecutive experts, for even routing."""
    of_one = max(1, -(-rows // experts))
    together = max(1, BLOCK_ROWS // of_one)
    return [min(together, experts - first) * of_one for first in range(0, experts, together)]


def grouped_experts(rows: int, stream: int, elements: int, hidden: int, width: int, cut: Cut) -> list[Piece]:
    """Grouped matrix products: rows, both pre-activations, silu, their product, and that times the routing weight.

    AutoEP multiplies by the routing weight last, in fp32, and keeps what it multiplies.
    """
    size = cut.size
    at_work = stream + rows * (2 * hidden + 4 * width) * size
    if cut.grouped:
        kept, moved = rows * (hidden * (size + 4) + 4 * width * size), 4 * rows * hidden * size
        return [Piece("experts", kept, moved, at_work + moved, elements, True)]
    inside = rows * ((hidden + 5 * width) * size + 24)
    arrived = rows * hidden * size if cut.dispatched else 0
    if cut.recompute:
        return [Piece("experts", rows * 8 + arrived, inside, inside + at_work, elements, True)]
    return [Piece("experts", inside, rows * hidden * size + arrived, at_work, elements, True)]


def dense_expert(text: TextConfig, tokens: int, cut: Cut) -> list[Piece]:
    """The Talker's shared expert and its gate."""
    width = text.shared_expert_intermediate_size // cut.tp
    if not width:
        return []
    seen, stream = tokens * cut.tp, tokens * text.hidden_size * cut.size
    kept = seen * width * 4 * cut.size + 2 * stream
    elements = 3 * text.hidden_size * width + text.hidden_size
    return [Piece("experts", kept, stream, 2 * stream + 2 * seen * width * cut.size, elements)]


def head(text: TextConfig, pack: Pack, cut: Cut, max_logits: int, learns: bool) -> list[Piece]:
    """The last norm and the chunked cross-entropy, whose gradients are made in forward (train/loss.py).

    Cut over tensor ranks the chunks are made again in backward, and their gradients of the matrix added up.
    """
    size, hidden, vocab = cut.size, text.hidden_size, text.vocab_size // cut.tp
    tokens = pack.tokens // cut.cp
    targets = tokens if pack.targets is None else pack.targets // cut.cp
    rows = max(1, min(targets, max_logits // text.vocab_size))
    matrix, states = vocab * hidden, targets * hidden * size
    last = norm(tokens // cut.tp, hidden, size, "norms", 0)
    if cut.tp > 1:
        whole = 0 if size == 4 else 4 * (tokens * hidden + matrix)  # in fp32, for gradients where there is no target
        logits = rows * vocab * (4 if size == 4 else 6)
        summed = matrix * size if learns and targets > rows else 0
        return [
            last,
            Piece("head", states, max(whole, tokens * hidden * size), summed + 2 * states, matrix),
            Piece("logits", 0, logits, logits + summed + (matrix * size if learns else 0) + 2 * states),
        ]
    each = 4 if size == 4 else 8
    product = matrix * size if learns and size < 4 else 0
    kept = states + (matrix * 4 if learns else 0)
    return [
        last,
        Piece("head", kept, states, 2 * tokens * hidden * size, matrix, early=learns),
        Piece("logits", 0, rows * (vocab * each + 2 * hidden * size) + product + 2 * states),
    ]


def audio(config: AudioConfig, pack: Pack, cut: Cut) -> list[Piece]:
    """The audio encoder and its adapter."""
    size, width, channels = cut.size, config.d_model, config.downsample_hidden_size
    tokens = sum(map(num_audio_tokens, pack.mel_lengths))
    chunks = sum(-(-frames // CHUNK_FRAMES) for frames in pack.mel_lengths)
    frames, mels, kept, inputs = (
        CHUNK_FRAMES,
        config.num_mel_bins,
        chunks * CHUNK_FRAMES * config.num_mel_bins * size,
        1,
    )
    sizes, elements = [kept], 0
    for _ in range(3):
        frames, mels = (frames + 1) // 2, (mels + 1) // 2
        sizes.append(chunks * channels * mels * frames * size)
        elements += 9 * inputs * channels + channels
        inputs = channels
    first = sizes[0] + 2 * sum(sizes[1:])
    elements += channels * mels * width
    # both sides of a convolution are laid out anew for it, as long as it runs
    stem = Piece("encoders", first, max(0, 2 * sizes[0] + 3 * sizes[1] - first), 2 * sizes[1], elements)
    window = num_audio_tokens(config.n_window_infer)
    clips = [num_audio_tokens(frames) for frames in pack.mel_lengths]
    windows = [min(window, clip - start) for clip in clips for start in range(0, clip, window)]
    heads, inner = config.encoder_attention_heads, config.encoder_ffn_dim
    attended = attention_kept(windows, heads, heads, width // heads, cut, causal=False)
    layer = Piece(
        "encoders",
        tokens * (4 * width + 2 * inner) * size + tokens * 16 + attended,
        tokens * inner * size,
        tokens * (2 * width + 2 * inner) * size,
        4 * width * width + 2 * width * inner + 9 * width + inner,
    )
    adapter = width * width + width + width * config.output_dim + config.output_dim + 2 * width
    last = Piece("encoders", tokens * (4 * width) * size, 0, tokens * 2 * width * size, adapter)
    if cut.layers or cut.tiles > 1:
        (stem,) = recomputed([stem], kept)
        stem = replace(stem, forward=stem.forward // cut.tiles, backward=stem.backward // cut.tiles)
    if cut.layers:
        (layer,) = recomputed([layer], tokens * width * size)
    named = [replace(piece, owner="audio") for piece in (stem, layer, last)]
    return [named[0], *[named[1]] * config.encoder_layers, named[2]]


def vision(config: VisionConfig, pack: Pack, cut: Cut) -> list[Piece]:
    """The vision encoder and its mergers."""
    size, width, inner, patches = cut.size, config.hidden_size, config.intermediate_size, pack.patches
    merge = config.spatial_merge_size**2
    lengths = [rows * columns for frames, rows, columns in pack.grids for _ in range(frames)]
    heads = config.num_heads
    attended = attention_kept(lengths, heads, heads, width // heads, cut, causal=False)
    stem = config.patch_dim * width + width + config.num_position_embeddings * width
    pixels = 0 if size == 4 else patches * config.patch_dim * size
    first = Piece("encoders", pixels, patches * width * (size + 8), 2 * patches * width * size, stem)
    block = Piece(
        "encoders",
        # both norms' inputs and outputs; v is a view of q, k and v together; both sides of the activation
        patches * (4 * width + 2 * width + 2 * inner) * size + patches * 16 + attended,
        patches * inner * size,
        patches * (2 * width + 2 * inner) * size,
        4 * width * width + 2 * width * inner + 9 * width + inner,
    )
    if cut.layers:
        (block,) = recomputed([block], patches * width * size)
    wide = merge * width
    elements = wide * wide + wide + wide * config.out_hidden_size + config.out_hidden_size
    made = patches // merge * config.out_hidden_size * size
    deep = Piece("encoders", 3 * patches * width * size + made, 0, 3 * patches * width * size, elements + 2 * wide)
    last = Piece("encoders", 4 * patches * width * size + made, 0, 3 * patches * width * size, elements + 2 * width)
    first, block, deep, last = (replace(piece, owner="vision") for piece in (first, block, deep, last))
    pieces = [first]
    for index in range(config.depth):
        pieces += [block, *([deep] if index in config.deepstack_visual_indexes else [])]
    return [*pieces, last]
