"""Causal convolutions of the waveform decoder.

    CausalConv            [B, C, T] -> [B, C', T]            sees (kernel - 1) * dilation columns of the past
    TransposedConv        [B, C, T] -> [B, C', s T]          kernel s: every column becomes s
                          [B, C, T] -> [B, C', s (T - 1)]    kernel 2 s: every pair of neighbours becomes s
    ConvNeXtBlock, SnakeBeta, ResidualUnit                   keep the shape

The released model cuts kernel - stride samples off both ends of a transposed convolution. With kernel 2 s that leaves
just the stretches to which two neighbours contribute. So each such layer waits for one column more than it has given
out, and never gives out what would follow the last one. In a stream it keeps one input column rather than a tail
of sums: the same kernel then runs on the same numbers, at the price of computing that column twice.

Letters: B batch, C channels, T columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.stream import Past, with_past


class CausalConv(nn.Module):
    """Convolution of stride 1 that sees the past only."""

    def __init__(self, in_size: int, out_size: int, kernel: int, dilation: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_size, out_size, kernel, dilation=dilation, groups=groups)
        self.reach = (kernel - 1) * dilation

    def forward(self, x_BCT: Tensor, past: Past | None = None) -> Tensor:
        """[B, C, T] -> [B, C', T]."""
        return self.conv(with_past(self, x_BCT, self.reach, past))


class TransposedConv(nn.Module):
    """Upsampling by `stride`; with `overlap` the kernel is twice as long and output starts at the second column."""

    def __init__(self, in_size: int, out_size: int, stride: int, *, overlap: bool) -> None:
        super().__init__()
        self.trim = stride if overlap else 0
        self.reach = 1 if overlap else 0
        self.conv = nn.ConvTranspose1d(in_size, out_size, stride + self.trim, stride=stride)

    def forward(self, x_BCT: Tensor, past: Past | None = None) -> Tensor:
        """[B, C, T] -> [B, C', stride T]; with overlap a stream's first chunk, or the whole, is one stride shorter."""
        out_BCT = self.conv(with_past(self, x_BCT, self.reach, past, zeros=0))
        return out_BCT[:, :, self.trim : out_BCT.shape[2] - self.trim]


class SnakeBeta(nn.Module):
    """x + sin(a x)^2 / b with a and b of each channel, kept as logarithms (Ziyin et al. 2020, as BigVGAN has it)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x_BCT: Tensor, past: Past | None = None) -> Tensor:
        """[B, C, T] -> [B, C, T]."""
        alpha_C1, beta_C1 = self.alpha.exp().unsqueeze(1), self.beta.exp().unsqueeze(1)
        return x_BCT + (1.0 / (beta_C1 + 1e-9)) * (x_BCT * alpha_C1).sin().square()


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, then a wide layer at every column."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.dwconv = CausalConv(size, size, 7, groups=size)
        self.norm = nn.LayerNorm(size, eps=1e-6)
        self.pwconv1 = nn.Linear(size, 4 * size)
        self.pwconv2 = nn.Linear(4 * size, size)
        self.gamma = nn.Parameter(torch.full((size,), 1e-6))

    def forward(self, x_BCT: Tensor, past: Past | None = None) -> Tensor:
        """[B, C, T] -> [B, C, T]."""
        x_BTC = self.norm(self.dwconv(x_BCT, past).transpose(1, 2))
        x_BTC = self.gamma * self.pwconv2(F.gelu(self.pwconv1(x_BTC)))
        return x_BCT + x_BTC.transpose(1, 2)


class ResidualUnit(nn.Module):
    """A dilated convolution of kernel 7 and one of kernel 1, each after its activation."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.act1 = SnakeBeta(channels)
        self.conv1 = CausalConv(channels, channels, 7, dilation)
        self.act2 = SnakeBeta(channels)
        self.conv2 = CausalConv(channels, channels, 1)

    def forward(self, x_BCT: Tensor, past: Past | None = None) -> Tensor:
        """[B, C, T] -> [B, C, T]."""
        return x_BCT + self.conv2(self.act2(self.conv1(self.act1(x_BCT), past)), past)
