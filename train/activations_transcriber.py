"""What an audio encoder's text decoder keeps of a micro-batch: pieces beside those of train/activations.py.

text [X] --embed--> layers: self-attention, attention to the document's frames [E, S], SwiGLU --> norm, head
frames --norm, places--> keys' and values' source, kept once for all layers

Layers are kept whole: `recompute_layers` makes again those of the encoder. Letters: X text tokens of a pack, E audio
tokens, S their width, D hidden, H heads, C head_dim, I width of the feed-forward block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from models.audio_encoder import num_audio_tokens
from models.config import AudioDecoderConfig, TranscriberConfig
from models.layers.cross import make_pairs
from train.activations import Cut, Pack, Piece, attention_kept, head, norm


def shares_of(pack: Pack) -> tuple[list[int], list[int]]:
    """Text tokens and audio tokens of each document, where sound fills the documents one after the other."""
    left, frames = sum(map(num_audio_tokens, pack.mel_lengths)), []
    for length in pack.doc_lengths:
        frames.append(min(length, left))
        left -= frames[-1]
    return [length - heard for length, heard in zip(pack.doc_lengths, frames, strict=True)], frames


def audio_decoder(config: TranscriberConfig, pack: Pack, cut: Cut, max_logits: int, learns: bool) -> list[Piece]:
    """The decoder of models/audio_decoder.py in forward order. Of `pack` the text is read, and the sound's tokens."""
    sizes, source, size = config.decoder, config.thinker.audio.output_dim, cut.size
    texts, frames = shares_of(pack)
    words, heard, width = sum(texts), sum(frames), sizes.hidden_size
    stream, both = words * width * size, 2 * heard * source * size
    table = config.thinker.text.vocab_size * width
    tied = sizes.tie_word_embeddings
    # its output times sqrt(D), and cosines and sines; a second gradient of a tied matrix
    embed = Piece(
        "attention",
        2 * words * width // sizes.num_attention_heads * size,
        2 * stream,
        stream + (table * size if tied and learns else 0),
        0 if tied else table,
    )
    placed = norm(heard, source, size, "norms", both)
    placed = replace(placed, kept=placed.kept + both, forward=placed.forward + heard * source * 4)
    layer = _layer(sizes, source, texts, frames, cut)
    text = replace(config.thinker.text, hidden_size=width)  # what the head is made of
    said = Pack(tuple(length for length in texts if length) or (0,), targets=pack.targets)
    return [embed, placed, *layer * sizes.num_hidden_layers, *head(text, said, cut, max_logits, learns)]


def _layer(
    sizes: AudioDecoderConfig, source: int, texts: Sequence[int], frames: Sequence[int], cut: Cut
) -> list[Piece]:
    """A layer in forward order."""
    size, width, heads, inner = cut.size, sizes.hidden_size, sizes.num_attention_heads, sizes.intermediate_size
    words, heard, channels = sum(texts), sum(frames), width // heads
    stream, seen, scales = words * width * size, heard * width * size, 4 * heads
    floats = 0 if size == 4 else 4 * words * width
    own = attention_kept([length for length in texts if length], heads, heads, channels, cut)
    before, across = norm(words, width, size, "norms", stream), 2 * heard * source * size
    return [
        before,  # self-attention: projections, QK-norm and rotation, attention, output
        Piece("attention", stream, 0, stream * 4, 3 * width * width),
        Piece("attention", 2 * stream + 2 * words * scales, 2 * floats, 6 * stream + 2 * floats, 2 * channels),
        Piece("attention", own, stream, 5 * stream),
        Piece("attention", 0, 0, 2 * stream, width * width),
        before,  # cross-attention: the same of the tokens, then of the frames
        Piece("attention", 2 * stream + words * scales, floats, 3 * stream + floats, width * width + channels),
        # gradients of the frames, keys' and values' source, are there through all layers
        Piece("attention", seen + heard * scales, seen, across + 3 * seen, 2 * source * width + channels),
        Piece("attention", _across_kept(texts, frames, heads, width, cut), stream, across + 3 * stream + 4 * seen),
        Piece("attention", 0, 0, across + 2 * stream, width * width),
        before,  # SwiGLU; told as experts are, which stand in its place elsewhere
        Piece(
            "experts",
            stream + 4 * words * inner * size,
            stream,
            across + 2 * stream + 2 * words * inner * size,
            3 * width * inner,
        ),
    ]


def _across_kept(texts: Sequence[int], frames: Sequence[int], heads: int, width: int, cut: Cut) -> int:
    """Bytes that models.layers.cross.attend_across keeps, the input of the output matrix included."""
    words, heard, size = sum(texts), sum(frames), cut.size
    if cut.kernels == "cuda" and all(texts) and all(frames):
        return (2 * words + 2 * heard) * width * size + 4 * words * heads
    kept = words * width * size
    for bucket in make_pairs(texts, frames, torch.device("cpu")).buckets:
        asks, hears = bucket.token_rows_BL.numel(), bucket.frame_rows_BS.numel()
        mask = asks * bucket.frame_rows_BS.shape[1] * heads * size if bucket.heard_BS is not None else 0
        kept += (2 * asks + 2 * hears) * width * size + asks * heads * 4 + mask
    return kept
