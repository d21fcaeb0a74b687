"""Waveform decoder: frames of codes at 12.5 a second to a waveform at 24 kHz.

    codes [B, G, T] --embed, mean over G--> [B, T, D] --causal transformer, window of W frames--> [B, D, T]
      --(transposed convolution, ConvNeXt) x 2--> [B, D, 4 T] --convolution--> --(Snake, transposed convolution,
      3 residual units) x 4--> --Snake, convolution, clamp--> wave [B, S]

Names and numbers are those of the released Qwen3-Omni checkpoint. Nothing looks ahead further than the frame that a
transposed convolution waits for, so S = `num_samples(T)` = 1920 T - 555 in the released shape, and the decode of the
first frames is the beginning of the decode of all. Two things follow. Utterances of different lengths go in one batch
padded on the right with any codes: the first `num_samples` of its own frames are each one's waveform. And a
stream gives out a sample as soon as it is final: `Code2WavStream`.

Cost, released shape (216 M parameters): 2.6 G multiply-adds a frame, 2.4 G of them in convolutions, so 32 G for a
second of sound; linear in T. Training keeps 700 MB for a second of sound in fp32, most of it in the last two blocks.
Without gradients a few tensors of 9 MB a second live at once; `Code2Wav.decode` needs no more than a chunk's, however
long the sound.

Letters: B batch, G codebooks, T frames, t frames of a chunk, D hidden size, C channels, S samples.
"""

from __future__ import annotations

from itertools import count

import torch
from torch import Tensor, nn

from models.layers.conv import CausalConv, ConvNeXtBlock, ResidualUnit, SnakeBeta, TransposedConv
from models.layers.moe import SwiGLU
from models.layers.norm import RMSNorm
from models.layers.rope import angles
from models.layers.sliding import SlidingAttention, sliding_mask
from models.layers.stream import Past
from models.omni_config import Code2WavConfig


class LayerScale(nn.Module):
    """A factor for each channel."""

    def __init__(self, size: int, initial: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((size,), initial))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        return self.scale * x_BTD


class PreLayer(nn.Module):
    """Pre-norm transformer layer whose branches are scaled."""

    def __init__(self, config: Code2WavConfig) -> None:
        super().__init__()
        size, initial = config.hidden_size, config.layer_scale_initial_scale
        self.self_attn = SlidingAttention(
            size, config.num_attention_heads, config.num_key_value_heads, config.sliding_window
        )
        self.mlp = SwiGLU(size, config.intermediate_size)
        self.input_layernorm = RMSNorm(size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(size, config.rms_norm_eps)
        self.self_attn_layer_scale = LayerScale(size, initial)
        self.mlp_layer_scale = LayerScale(size, initial)

    def forward(self, x_BTD: Tensor, cos_TC: Tensor, sin_TC: Tensor, mask_N1QK: Tensor, past: Past | None) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        attended_BTD = self.self_attn(self.input_layernorm(x_BTD), cos_TC, sin_TC, mask_N1QK, past)
        x_BTD = x_BTD + self.self_attn_layer_scale(attended_BTD)
        return x_BTD + self.mlp_layer_scale(self.mlp(self.post_attention_layernorm(x_BTD)))


class PreTransformer(nn.Module):
    """Causal transformer over frames."""

    def __init__(self, config: Code2WavConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(PreLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_BTD: Tensor, past: Past | None) -> Tensor:
        """[B, T, D] -> [B, T, D]; positions go on from the stream's past."""
        config, frames, device = self.config, x_BTD.shape[1], x_BTD.device
        before = past.frames if past is not None else 0
        mask_N1QK = sliding_mask(frames, config.sliding_window, min(before, config.sliding_window), device)
        positions_3T = torch.arange(before, before + frames, device=device, dtype=torch.float32).expand(3, -1)
        head_dim = config.hidden_size // config.num_attention_heads
        cos_TC, sin_TC = angles(positions_3T, head_dim, config.rope_theta, (head_dim // 2, 0, 0))  # time alone
        cos_TC, sin_TC = cos_TC.to(x_BTD.dtype), sin_TC.to(x_BTD.dtype)
        for layer in self.layers:
            x_BTD = layer(x_BTD, cos_TC, sin_TC, mask_N1QK, past)
        return self.norm(x_BTD)


class DecoderBlock(nn.Module):
    """Snake, upsampling, and residual units of growing dilation."""

    def __init__(self, in_size: int, out_size: int, rate: int) -> None:
        super().__init__()
        self.block = nn.ModuleList([SnakeBeta(in_size), TransposedConv(in_size, out_size, rate, overlap=True)])
        self.block.extend(ResidualUnit(out_size, dilation) for dilation in (1, 3, 9))

    def forward(self, x_BCT: Tensor, past: Past | None) -> Tensor:
        """[B, C, T] -> [B, C / 2, rate (T - 1)]; `rate` T in a stream after its first chunk."""
        for part in self.block:
            x_BCT = part(x_BCT, past)
        return x_BCT


class Code2Wav(nn.Module):
    """Codes to waveform."""

    def __init__(self, config: Code2WavConfig) -> None:
        super().__init__()
        self.config = config
        size, rates = config.hidden_size, config.upsample_rates
        self.pre_transformer = PreTransformer(config)
        self.code_embedding = nn.Embedding(config.codebook_size * config.num_quantizers, size)
        self.upsample = nn.ModuleList(
            nn.ModuleList([TransposedConv(size, size, factor, overlap=False), ConvNeXtBlock(size)])
            for factor in config.upsampling_ratios
        )
        widths = [config.decoder_dim // 2**i for i in range(len(rates) + 1)]
        self.decoder = nn.ModuleList([CausalConv(size, widths[0], 7)])
        self.decoder.extend(DecoderBlock(widths[i], widths[i + 1], rate) for i, rate in enumerate(rates))
        self.decoder.extend([SnakeBeta(widths[-1]), CausalConv(widths[-1], 1, 7)])

    def num_samples(self, num_frames: int) -> int:
        """Samples that `num_frames` frames become; every transposed convolution with overlap costs a stride."""
        samples = num_frames
        for ratio in self.config.upsampling_ratios:
            samples *= ratio
        for rate in self.config.upsample_rates:
            samples = max(samples - 1, 0) * rate
        return samples

    def forward(self, codes_BGT: Tensor, past: Past | None = None) -> Tensor:
        """Codes int64 [B, G, T], each in 0 .. codebook_size - 1 -> wave [B, num_samples(T)] in [-1, 1].

        B or T may be 0, or T too small for a sample: the result is empty and every parameter's gradient zero. `past`
        is a stream's; `Code2WavStream` looks after it. The range of codes is not checked here, since that would wait
        for the device; it is in a stream. Raises ValueError for another number of codebooks.
        """
        config = self.config
        batch, groups, frames = codes_BGT.shape
        if groups != config.num_quantizers:
            raise ValueError(f"codes have {groups} codebooks, but this decoder has {config.num_quantizers}")
        if past is None and not (batch and self.num_samples(frames)):  # decode something and keep nothing of it
            enough = next(frames for frames in count(1) if self.num_samples(frames))
            nothing = self(codes_BGT.new_zeros(1, groups, enough)).flatten()[:0]
            return nothing.view(batch, self.num_samples(frames))
        offset_G1 = torch.arange(groups, device=codes_BGT.device).unsqueeze(1) * config.codebook_size
        x_BTD = self.code_embedding(codes_BGT + offset_G1).mean(1)
        x_BCT = self.pre_transformer(x_BTD, past).transpose(1, 2)
        for blocks in self.upsample:
            for block in blocks:  # pyright: ignore[reportGeneralTypeIssues]
                x_BCT = block(x_BCT, past)
        for block in self.decoder:
            x_BCT = block(x_BCT, past)
        if past is not None:
            past.frames += frames
        return x_BCT.squeeze(1).clamp(-1.0, 1.0)

    @torch.no_grad()
    def decode(self, codes_BGT: Tensor, chunk_frames: int = 300) -> Tensor:
        """The wave of `forward`, [B, S], without gradients and with the memory of `chunk_frames` frames (24 s).

        A stream, so exact: the past of every layer is carried over. transformers' `chunked_decode` starts each chunk
        of 300 frames anew on 25 frames of left context, where 8 layers of attention see back 568, and loses the 555
        samples that every chunk lacks at its end: 23 ms less sound at each seam, and after it another waveform (by 2 %
        of its norm in the tests' random model).
        """
        if chunk_frames < 1:
            raise ValueError(f"chunk_frames must be at least 1, not {chunk_frames}")
        stream = Code2WavStream(self)
        waves = [stream.push(codes_BGt) for codes_BGt in codes_BGT.split(chunk_frames, dim=2)]
        return torch.cat([*waves, stream.finish()], dim=1)


class Code2WavStream:
    """Decodes codes as they come. The chunks, joined, are the decode of the whole, however they were cut.

    The same numbers enter every sum. Kernels choose the order of adding by shape, so chunks differ from the whole by
    rounding and no more: in fp32 on a CPU below 1e-6 of full scale (6e-7 measured in the released shape, random
    weights, a frame at a time), in fp64 below 1e-12. Convolutions in TF32, CUDA's default, round far more. Work and
    memory of a frame do not depend on the past; a chunk computes one column of each transposed convolution again.
    """

    def __init__(self, model: Code2Wav) -> None:
        self._model, self._past = model, Past()
        self._waiting: Tensor | None = None  # first frames, where they are too few for a sample
        self._batch: int | None = None
        self._finished = False

    @torch.no_grad()
    def push(self, codes_BGt: Tensor) -> Tensor:
        """Next frames int64 [B, G, t], t >= 0 -> every sample that is final now and was not before, [B, s].

        The first chunk gives `num_samples(t)`, 1365 of one frame in the released shape; later ones 1920 t.
        Raises ValueError for codes outside the codebooks, for another number of streams than before, after `finish`.
        """
        self._check(codes_BGt)
        if self._waiting is not None:
            codes_BGt = torch.cat([self._waiting, codes_BGt], dim=2)
        batch, _, frames = codes_BGt.shape
        self._batch, started = batch, self._past.frames > 0
        if not batch or not (frames if started else self._model.num_samples(frames)):
            self._waiting = None if started else codes_BGt
            return self._nothing(batch)
        self._waiting = None
        return self._model(codes_BGt, self._past)

    def finish(self) -> Tensor:
        """End the stream. The rest [B, 0] is empty: the released model drops what would follow the last frame."""
        self._finished, self._past, self._waiting = True, Past(), None
        return self._nothing(self._batch or 0)

    def _check(self, codes_BGt: Tensor) -> None:
        if self._finished:
            raise ValueError("this stream is finished: start another Code2WavStream")
        config = self._model.config
        if codes_BGt.ndim != 3 or codes_BGt.shape[1] != config.num_quantizers:
            raise ValueError(f"codes {list(codes_BGt.shape)} must have shape [B, {config.num_quantizers}, t]")
        if self._batch is not None and len(codes_BGt) != self._batch:
            raise ValueError(f"a chunk for {len(codes_BGt)} streams after one for {self._batch}")
        if codes_BGt.numel():
            low, high = codes_BGt.min().item(), codes_BGt.max().item()
            if low < 0 or high >= config.codebook_size:
                raise ValueError(f"codes go from {low} to {high}, but must lie in 0 .. {config.codebook_size - 1}")

    def _nothing(self, batch: int) -> Tensor:
        return self._model.code_embedding.weight.new_zeros(batch, 0)
