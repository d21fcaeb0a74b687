"""Floating-point operations of a training step, for utilisation figures.

Convention (that of the published figures for mixture-of-experts models): a multiply-add is 2; forward and backward
are 3 times forward; only chosen experts count; attention counts the causal half; embedding lookup, norms and
softmax do not count; nor does recomputation. For Qwen3-30B-A3B at 4,096 tokens it gives 23.08 GFLOP per token.
"""

from __future__ import annotations

from collections.abc import Sequence

from models.audio_encoder import CHUNK_FRAMES, CHUNK_TOKENS, num_audio_tokens
from models.config import AudioConfig, TextConfig, ThinkerConfig, TranscriberConfig, VisionConfig
from models.omni_config import CodePredictorConfig, TalkerConfig


def active_parameters(config: TextConfig) -> int:
    """Weights that one token meets in the decoder's matmuls, output head included, embedding not."""
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    attention = config.hidden_size * config.head_dim * heads
    experts = 3 * config.hidden_size * config.moe_intermediate_size * config.num_experts_per_tok
    router = config.hidden_size * config.num_experts
    shared = config.shared_expert_intermediate_size
    beside = config.hidden_size * (3 * shared + 1) if shared else 0  # and its gate
    layer = attention + experts + router + beside
    return config.num_hidden_layers * layer + config.hidden_size * config.vocab_size


def text_flops(config: TextConfig, doc_lengths: Sequence[int]) -> int:
    """Forward and backward of the decoder and head over packed documents."""
    tokens, squares = sum(doc_lengths), sum(length * length for length in doc_lengths)
    attention = 4 * config.num_attention_heads * config.head_dim * config.num_hidden_layers * squares // 2
    return 3 * (2 * active_parameters(config) * tokens + attention)


def flops_per_token(config: TextConfig, doc_length: int) -> float:
    """Forward and backward per token of documents of `doc_length` tokens."""
    return text_flops(config, [doc_length]) / doc_length


def audio_flops(config: AudioConfig, mel_lengths: Sequence[int], windows: Sequence[int] = ()) -> int:
    """Forward and backward of the audio encoder and adapter over clips of so many mel frames.

    `windows`: mel frames of each clip's attention windows; without, the configured ones.
    """
    channels, mels, width = config.downsample_hidden_size, config.num_mel_bins, config.d_model
    chunk, inputs, frames = 0, 1, CHUNK_FRAMES
    for _ in range(3):
        mels, frames = (mels + 1) // 2, (frames + 1) // 2
        chunk += 9 * inputs * channels * mels * frames
        inputs = channels
    chunk += CHUNK_TOKENS * channels * mels * width
    layer = 4 * width * width + 2 * width * config.encoder_ffn_dim
    token = config.encoder_layers * layer + width * width + width * config.output_dim
    windows = windows or [config.n_window_infer] * len(mel_lengths)
    clips = zip(map(num_audio_tokens, mel_lengths), map(num_audio_tokens, windows), strict=True)
    squares = sum((tokens // window) * window**2 + (tokens % window) ** 2 for tokens, window in clips)
    chunks = sum(-(-frames // CHUNK_FRAMES) for frames in mel_lengths)
    tokens = sum(map(num_audio_tokens, mel_lengths))
    return 3 * (2 * (chunks * chunk + tokens * token) + 4 * width * config.encoder_layers * squares)


def vision_flops(config: VisionConfig, grids: Sequence[tuple[int, int, int]]) -> int:
    """Forward and backward of the vision encoder and its mergers over images and videos of so many patches."""
    width, block = config.hidden_size, config.hidden_size * config.spatial_merge_size**2
    layer = 4 * width * width + 2 * width * config.intermediate_size
    mergers = (1 + len(config.deepstack_visual_indexes)) * block * (block + config.out_hidden_size)
    patches = sum(frames * rows * columns for frames, rows, columns in grids)
    squares = sum(frames * (rows * columns) ** 2 for frames, rows, columns in grids)
    patch = config.patch_dim * width + config.depth * layer + mergers // config.spatial_merge_size**2
    return 3 * (2 * patches * patch + 4 * width * config.depth * squares)


def training_flops(
    config: ThinkerConfig,
    doc_lengths: Sequence[int],
    mel_lengths: Sequence[int],
    grids: Sequence[tuple[int, int, int]],
) -> int:
    """Forward and backward of the whole Thinker over a pack."""
    seen = vision_flops(config.vision, grids) if config.vision is not None else 0
    return text_flops(config.text, doc_lengths) + audio_flops(config.audio, mel_lengths) + seen


def audio_decoder_flops(config: TranscriberConfig, text_lengths: Sequence[int], frame_lengths: Sequence[int]) -> int:
    """Forward and backward of the text decoder over documents of so many text tokens and audio tokens."""
    sizes, width = config.decoder, config.decoder.hidden_size
    source, layers = config.thinker.audio.output_dim, config.decoder.num_hidden_layers
    token = layers * (6 * width * width + 3 * width * sizes.intermediate_size) + width * config.thinker.text.vocab_size
    frame = layers * 2 * source * width
    squares = sum(length * length for length in text_lengths) // 2
    across = sum(text * frames for text, frames in zip(text_lengths, frame_lengths, strict=True))
    attention = 4 * width * layers * (squares + across)
    return 3 * (2 * (token * sum(text_lengths) + frame * sum(frame_lengths)) + attention)


def transcriber_flops(
    config: TranscriberConfig,
    text_lengths: Sequence[int],
    frame_lengths: Sequence[int],
    mel_lengths: Sequence[int],
    windows: Sequence[int] = (),
) -> int:
    """Forward and backward of an audio encoder and its decoder over a pack; lengths are those of each document."""
    decoded = audio_decoder_flops(config, text_lengths, frame_lengths)
    return decoded + audio_flops(config.thinker.audio, mel_lengths, windows)


def code_predictor_flops(config: CodePredictorConfig, frames: int) -> int:
    """Forward and backward of the code predictor and its heads over so many frames, all of a frame's codes known."""
    width, codes = config.hidden_size, config.num_code_groups
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    layer = width * config.head_dim * heads + 3 * width * config.intermediate_size
    matrices = codes * config.num_hidden_layers * layer + (codes - 1) * width * config.vocab_size
    attention = 4 * config.num_attention_heads * config.head_dim * config.num_hidden_layers * codes**2 // 2
    return 3 * frames * (2 * matrices + attention)


def talker_flops(
    config: TalkerConfig,
    doc_lengths: Sequence[int],
    frames: int,
    targets: int | None = None,
    text_rows: int = 0,
    media_rows: int = 0,
) -> int:
    """Forward and backward of the Talker and its code predictor over a pack.

    Args:
        config: sizes.
        doc_lengths: positions of each of the Talker's documents.
        frames: of speech, each of `num_code_groups` codes.
        targets: positions whose first code is predicted; None: a frame each, and the end of each document.
        text_rows: embeddings of text that are projected to the Talker's width.
        media_rows: hidden states of the Thinker that are.
    """
    text = config.text
    targets = frames + len(doc_lengths) if targets is None else targets
    head = text.hidden_size * text.vocab_size
    backbone = text_flops(text, doc_lengths) + 6 * head * (targets - sum(doc_lengths))
    wide = config.thinker_hidden_size
    projections = 6 * (text_rows + media_rows) * wide * (wide + text.hidden_size)
    return backbone + projections + code_predictor_flops(config.code_predictor, frames)
