"""Audio encoder: log-mel frames to 13 tokens a second in the decoder's width.

    mel [F, M] --cut into 1-s chunks--> [N, 1, M, 100] --3 convolutions of stride 2--> [N, X, M/8, 13]
      --linear, + sinusoid restarted in every chunk--> [N, 13, A] --drop padding--> pack [T, A]
      --layers, attention in 8-s windows--> [T, A] --adapter--> [T, D]

Chunks never cross clips and clips never share a window. What a clip gives does not depend on the clips beside it:
its last chunk is padded with silence to a whole second if the clip is longer than that, else it is not padded at
all, as when transformers encodes the clip alone. Cost: convolutions dominate short clips, 40 M multiply-adds per
second at 480 channels and 128 mels times X / 480; attention is linear in clip length.

Letters: F frames of all clips, M mel bins, N chunks, L frames of the longest chunk, X convolution channels, A encoder
width, T tokens of all clips, H heads, C head_dim, D decoder width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import AudioConfig
from models.layers.attention import Segments, attend, make_segments
from models.layers.saving import Saves

CHUNK_FRAMES, CHUNK_TOKENS = 100, 13


def num_audio_tokens(num_frames: Any) -> Any:
    """Tokens that clips of `num_frames` mel frames become; an int, an integer array or an integer tensor, and so
    the result.

    13 for each second and an eighth of the rest, rounded up (three convolutions of stride 2).
    """
    return num_frames // CHUNK_FRAMES * CHUNK_TOKENS + (num_frames % CHUNK_FRAMES + 7) // 8


class AudioAttention(nn.Module):
    """Bidirectional attention within windows."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.num_heads = config.encoder_attention_heads
        self.k_proj = nn.Linear(config.d_model, config.d_model)
        self.v_proj = nn.Linear(config.d_model, config.d_model)
        self.q_proj = nn.Linear(config.d_model, config.d_model)
        self.out_proj = nn.Linear(config.d_model, config.d_model)

    def forward(self, x_TA: Tensor, windows: Segments) -> Tensor:
        """[T, A] -> [T, A]."""
        q_THC, k_THC, v_THC = (
            proj(x_TA).unflatten(-1, (self.num_heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(attend(q_THC, k_THC, v_THC, windows, causal=False).flatten(1))


class AudioLayer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.self_attn = AudioAttention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.fc1 = nn.Linear(config.d_model, config.encoder_ffn_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model)

    def forward(self, x_TA: Tensor, windows: Segments) -> Tensor:
        """[T, A] -> [T, A]."""
        x_TA = x_TA + self.self_attn(self.self_attn_layer_norm(x_TA), windows)
        return x_TA + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x_TA))))


class AudioEncoder(Saves):
    """Log-mel spectrograms of a batch of clips to features in the decoder's width."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.config = config
        width, channels = config.d_model, config.downsample_hidden_size
        self.conv2d1 = nn.Conv2d(1, channels, 3, stride=2, padding=1)
        self.conv2d2 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.conv2d3 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.conv_out = nn.Linear(channels * (-(-config.num_mel_bins // 8)), width, bias=False)
        self.layers = nn.ModuleList(AudioLayer(config) for _ in range(config.encoder_layers))
        self.ln_post = nn.LayerNorm(width)
        self.proj1 = nn.Linear(width, width)
        self.proj2 = nn.Linear(width, config.output_dim)

    def forward(self, mel_FM: Tensor, mel_lengths: Sequence[int], windows: Sequence[int] = ()) -> Tensor:
        """Mel float [F, M], clips end to end, `mel_lengths` frames each -> [T, D], T = sum of `num_audio_tokens`.

        `windows`: frames of each clip's attention windows, whole seconds; without, all have `n_window_infer`. No clips
        at all are fine: the result is empty and every parameter's gradient zero.
        """
        if sum(mel_lengths) != len(mel_FM) or min(mel_lengths, default=1) < 1:
            raise ValueError(
                f"mel_lengths {list(mel_lengths)} must be positive and sum to the {len(mel_FM)} mel frames"
            )
        chunks_N1ML, run_N, tokens_N = _chunks(mel_FM.to(self.conv2d1.weight.dtype), mel_lengths)
        x_NLA = self.saving.rows(self._stem, chunks_N1ML, run_N)
        x_NLA = x_NLA + sinusoids(x_NLA.shape[1], x_NLA.shape[2], x_NLA.device).to(x_NLA.dtype)
        real_NL = torch.arange(x_NLA.shape[1]) < tokens_N.unsqueeze(1)
        x_TA = x_NLA.flatten(0, 1).index_select(0, real_NL.flatten().nonzero().squeeze(1).to(x_NLA.device))
        segments = make_segments(self._window_lengths(mel_lengths, windows), x_TA.device)
        for layer in self.layers:
            x_TA = self.saving.layer(partial(layer, windows=segments), x_TA)
        return self.proj2(F.gelu(self.proj1(self.ln_post(x_TA))))

    def _stem(self, x: Tensor, run_N: Tensor) -> Tensor:
        """Chunks [N, 1, M, L], which run for so many frames -> [N, L / 8, A].

        Activations are 8 MB a second of sound in the released shapes and 16 bits: as much as those of seven layers.
        """
        for conv in (self.conv2d1, self.conv2d2, self.conv2d3):
            run_N = (run_N + 1) // 2
            x = _without_overrun(F.gelu(conv(x)), run_N)
        return self.conv_out(x.permute(0, 3, 1, 2).flatten(2))

    def _window_lengths(self, mel_lengths: Sequence[int], windows: Sequence[int]) -> list[int]:
        """Tokens of each attention window; the last of a clip may be shorter."""
        windows = windows or [self.config.n_window_infer] * len(mel_lengths)
        if any(frames < CHUNK_FRAMES or frames % CHUNK_FRAMES for frames in windows):
            raise ValueError(f"windows {list(windows)} must be multiples of {CHUNK_FRAMES} frames")
        clips = [(num_audio_tokens(f), num_audio_tokens(w)) for f, w in zip(mel_lengths, windows, strict=True)]
        return [min(window, tokens - start) for tokens, window in clips for start in range(0, tokens, window)]


def _chunks(mel_FM: Tensor, mel_lengths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Chunks of at most a second [N, 1, M, L], padded with zeros to L frames; frames each runs for, and its tokens.

    A chunk runs for a whole second if its clip does, silence included, else for its own frames.
    """
    chunks = [  # (first row, frames, frames it runs for)
        (offset + start, min(CHUNK_FRAMES, frames - start), min(CHUNK_FRAMES, frames))
        for offset, frames in zip(_starts(mel_lengths), mel_lengths, strict=True)
        for start in range(0, frames, CHUNK_FRAMES)
    ]
    start_N, frames_N, run_N = torch.tensor(chunks, dtype=torch.int64).view(-1, 3).unbind(1)
    steps_L = torch.arange(int(run_N.max()) if chunks else CHUNK_FRAMES)
    real_NL = steps_L < frames_N.unsqueeze(1)
    rows_NL = torch.where(real_NL, start_N.unsqueeze(1) + steps_L, len(mel_FM))  # the row after the last is silence
    padded_FM = torch.cat([mel_FM, mel_FM.new_zeros(1, mel_FM.shape[1])])
    chunks_NLM = padded_FM.index_select(0, rows_NL.flatten().to(mel_FM.device)).view(*rows_NL.shape, mel_FM.shape[1])
    return chunks_NLM.transpose(1, 2).unsqueeze(1), run_N, num_audio_tokens(frames_N)


def _starts(lengths: Sequence[int]) -> list[int]:
    return [0, *accumulate(lengths)][:-1]


def _without_overrun(x_NXML: Tensor, run_N: Tensor) -> Tensor:
    """Zero what a convolution made beyond a chunk's own length: to the next one that is plain zero padding."""
    longest = x_NXML.shape[3]
    if bool((run_N >= longest).all()):
        return x_NXML
    runs_NL = (torch.arange(longest) < run_N.unsqueeze(1)).to(x_NXML.device, x_NXML.dtype)
    return x_NXML * runs_NL[:, None, None, :]


def sinusoids(length: int, width: int, device: torch.device) -> Tensor:
    """Fixed positions float32 [length, width]: sines, then cosines, of wavelengths from 2 pi to 20,000 pi."""
    rates_A = torch.exp(-math.log(10_000) / (width // 2 - 1) * torch.arange(width // 2, device=device))
    angles_LA = torch.arange(length, device=device).unsqueeze(1) * rates_A
    return torch.cat([angles_LA.sin(), angles_LA.cos()], dim=1)
