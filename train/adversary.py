"""Adversarial loss of the waveform decoder: discriminators by period and by spectrum. Optional.

    wave [B, s] --fold every p samples into a row--> [B, 1, s / p, p] --4 strided convolutions, 1, 1--> scores
                --complex STFT, window w-----------> [B, 2, s / hop, w / 2 + 1] --6 convolutions-----> scores

The first kind is HiFi-GAN's multi-period discriminator (Kong et al. 2020, section 2.3), the second EnCodec's
multi-scale STFT discriminator (Defossez et al. 2022, section 3.4, with its code's kernels of 3 x 9). All convolutions
are weight-normalised, leaky ReLU between them.

    least_squares   D: (D(real) - 1)^2 + D(fake)^2                      G: (D(fake) - 1)^2             HiFi-GAN, 2.4
    hinge           D: max(0, 1 - D(real)) + max(0, 1 + D(fake))        G: max(0, 1 - D(fake))         EnCodec, 3.4
    matching        G: mean |feature(real) - feature(fake)| of each layer but the scores, summed       HiFi-GAN, 2.4

Means over positions, summed over discriminators as in HiFi-GAN. EnCodec divides matching by the mean of the real
features over the batch, which is a ratio and no sum of shares, so it is left out. As in train/waveform_loss.py each
waveform's mean counts as many times as it has samples: divide every sum by the samples of the global batch.

Cost, default sizes (41.6 M parameters, as in the papers): 20 G multiply-adds forward for a second of sound, against the
released decoder's 32 G; discriminator_loss costs six times that, generator_loss three times. A quarter of each width is
1.3 G, `AdversaryConfig((2, 5), (8, 16, 32, 32), (512,), 8)` 0.1 G. Initial weights are a pure function of sizes and
seed. In a recipe both losses go backward together, so each side answers to what the other was before the step.

Letters: S samples end to end, s samples of each of B waveforms of one length, p period, N positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from train.errors import RecipeError
from train.waveform_loss import by_length

GAMES = ("least_squares", "hinge")
SLOPE = 0.1  # of leaky ReLU below zero


@dataclass(frozen=True)
class AdversaryConfig:
    """Sizes. Defaults are the papers'; `AdversaryConfig((2, 5), (8, 16, 32, 32), (512,), 8)` runs on a laptop."""

    periods: tuple[int, ...] = (2, 3, 5, 7, 11)
    period_widths: tuple[int, ...] = (32, 128, 512, 1024)  # channels after each strided convolution
    windows: tuple[int, ...] = (2048, 1024, 512, 256, 128)
    window_width: int = 32
    game: str = "least_squares"

    def __post_init__(self) -> None:
        """Reject sizes that no discriminator can have."""
        for name in ("periods", "period_widths", "windows"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.periods and not self.windows:
            raise RecipeError("adversary.periods and adversary.windows are both empty: there is no discriminator")
        if min((*self.periods, *self.period_widths, self.window_width)) < 1 or not self.period_widths:
            raise RecipeError("adversary: periods, period_widths and window_width must be above 0")
        if any(window < 16 or window % 4 for window in self.windows):
            raise RecipeError(f"adversary.windows must be multiples of 4 from 16 on, not {list(self.windows)}")
        if self.game not in GAMES:
            raise RecipeError(f"adversary.game can be {', '.join(GAMES)}, not {self.game!r}")


class Discriminator(nn.Module):
    """A stack of convolutions over some picture of a waveform."""

    def __init__(self, convs: Sequence[_Conv]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(convs)

    def picture(self, wave_Bs: Tensor) -> Tensor:
        """What the convolutions see of float [B, s]: [B, channels, height, width]."""
        raise NotImplementedError

    def judge(self, waves: Sequence[Tensor]) -> list[tuple[list[Tensor], Tensor]]:
        """Of each float [B, s], s at least 1: features of every layer but the last, and scores fp32 [B, N].

        No `forward`, see _Conv.
        """
        pictures, found = [self.picture(wave_Bs.float()) for wave_Bs in waves], [[] for _ in waves]
        *convs, last = (conv for conv in self.convs if isinstance(conv, _Conv))
        for conv in convs:
            pictures = [F.leaky_relu(x, SLOPE) for x in conv.on(pictures)]
            found = [[*features, x] for features, x in zip(found, pictures, strict=True)]
        scores = [x.flatten(1).float() for x in last.on(pictures)]
        return list(zip(found, scores, strict=True))


class PeriodDiscriminator(Discriminator):
    """Sees samples that lie `period` apart below one another."""

    def __init__(self, period: int, widths: Sequence[int], generator: torch.Generator) -> None:
        ins, last = (1, *widths[:-1]), widths[-1]
        convs = [_conv(a, b, (5, 1), generator, stride=(3, 1)) for a, b in zip(ins, widths, strict=True)]
        super().__init__([*convs, _conv(last, last, (5, 1), generator), _conv(last, 1, (3, 1), generator)])
        self.period = period

    def picture(self, wave_Bs: Tensor) -> Tensor:
        """[B, s] -> [B, 1, s / p, p], zeros after the end."""
        padded = F.pad(wave_Bs, (0, -wave_Bs.shape[1] % self.period))
        return padded.unflatten(1, (-1, self.period)).unsqueeze(1)


class SpectrumDiscriminator(Discriminator):
    """Sees real and imaginary parts of a short-time Fourier transform, hop a quarter of the window."""

    def __init__(self, window: int, width: int, generator: torch.Generator) -> None:
        convs = [_conv(2, width, (3, 9), generator)]
        convs += [_conv(width, width, (3, 9), generator, stride=(1, 2), dilation=(d, 1)) for d in (1, 2, 4)]
        super().__init__([*convs, _conv(width, width, (3, 3), generator), _conv(width, 1, (3, 3), generator)])
        self.window = window

    def picture(self, wave_Bs: Tensor) -> Tensor:
        """[B, s] -> [B, 2, s / hop + 1, w / 2 + 1], scaled by the window's norm."""
        window = torch.hann_window(self.window, device=wave_Bs.device)
        spectrum = torch.stft(
            wave_Bs, self.window, self.window // 4, window=window, pad_mode="constant", return_complex=True
        )
        return torch.view_as_real(spectrum / window.norm()).permute(0, 3, 2, 1)


class Adversary(nn.Module):
    """All discriminators. Losses are sums, see above; each of the two touches every parameter whatever the batch."""

    def __init__(self, config: AdversaryConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        generator = torch.Generator().manual_seed(seed)
        parts: list[Discriminator] = [PeriodDiscriminator(p, config.period_widths, generator) for p in config.periods]
        parts += [SpectrumDiscriminator(window, config.window_width, generator) for window in config.windows]
        self.discriminators = nn.ModuleList(parts)

    def discriminator_loss(self, real_S: Tensor, fake_S: Tensor, lengths: Sequence[int]) -> tuple[Tensor, int]:
        """What the discriminators minimise, fp32 scalar, and samples to divide by. No gradient reaches `fake`.

        real and fake are float [S], waveforms end to end that have `lengths` samples each.
        """
        total = real_S.new_zeros((), dtype=torch.float32)
        reals, fakes, weights = self._groups(real_S, fake_S.detach(), lengths)
        for discriminator in self._judges:
            judged = discriminator.judge([*reals, *fakes])
            for weight, (_, real_BN), (_, fake_BN) in zip(
                weights, judged[: len(reals)], judged[len(reals) :], strict=True
            ):
                total = total + weight * (self._towards(real_BN, 1.0) + self._towards(fake_BN, self._fake)).mean()
        return total, sum(lengths)

    def generator_loss(self, real_S: Tensor, fake_S: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor, int]:
        """What the decoder minimises, adversarial and matching, fp32 scalars, and samples to divide both by.

        No gradient reaches the discriminators.
        """
        adversarial = matching = fake_S.float().sum() * 0.0
        reals, fakes, weights = self._groups(real_S, fake_S, lengths)
        with _standing_still(self):
            for discriminator in self._judges:
                judged = discriminator.judge([*reals, *fakes])
                for weight, (wanted, _), (features, scores_BN) in zip(
                    weights, judged[: len(reals)], judged[len(reals) :], strict=True
                ):
                    adversarial = adversarial + weight * self._towards(scores_BN, 1.0).mean()
                    for got, want in zip(features, wanted, strict=True):
                        matching = matching + weight * (got - want).abs().mean(dtype=torch.float32)
        return adversarial, matching, sum(lengths)

    @property
    def _judges(self) -> list[Discriminator]:
        return [part for part in self.discriminators if isinstance(part, Discriminator)]

    @property
    def _fake(self) -> float:
        """The score that fakes should get."""
        return -1.0 if self.config.game == "hinge" else 0.0

    def _towards(self, scores_BN: Tensor, goal: float) -> Tensor:
        """Penalty of each score; with hinge no more is won beyond the goal, 1 or -1."""
        return F.relu(1.0 - goal * scores_BN) if self.config.game == "hinge" else (scores_BN - goal).square()

    def _groups(
        self, real_S: Tensor, fake_S: Tensor, lengths: Sequence[int]
    ) -> tuple[list[Tensor], list[Tensor], list[int]]:
        """Real and fake waveforms [B, s] of each length, and their weights."""
        groups = by_length(lengths, real_S, fake_S)
        if not groups:  # weight 0: gradients of zeros, by the same way back
            groups = [[real_S.new_zeros(1, 1), fake_S.sum().view(1, 1) * 0.0]]
        reals, fakes = ([group[place] for group in groups] for place in (0, 1))
        return reals, fakes, [real_Bs.numel() if sum(lengths) else 0 for real_Bs in reals]


@contextmanager
def _standing_still(module: nn.Module) -> Iterator[None]:
    """Parameters get no gradient from what is computed inside; what they are to other forwards stays."""
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


class _Conv(nn.Conv2d):
    """A convolution that gives its weights away, to be used on pictures of several sizes.

    Sharded engines meet on all ranks whenever a module is entered, and on the way back for each tensor that it gave.
    So none may be entered, or give tensors, as often as a rank has lengths of waveforms.
    """

    def forward(self) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Kernel and bias."""
        assert self.bias is not None
        return self.weight, self.bias * 1.0  # no parameter: what is gathered is taken away again

    def on(self, pictures: Sequence[Tensor]) -> list[Tensor]:
        """Of each [B, channels, height, width]."""
        weight, bias = self()
        return [self._conv_forward(x.to(weight.dtype), weight, bias) for x in pictures]


def _conv(
    ins: int,
    outs: int,
    kernel: tuple[int, int],
    generator: torch.Generator,
    stride: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
) -> _Conv:
    """Convolution of odd kernel, padded so that stride 1 keeps the size; weights uniform as PyTorch's own, bias 0."""
    padding = (kernel[0] // 2 * dilation[0], kernel[1] // 2 * dilation[1])
    conv = _Conv(ins, outs, kernel, stride, padding, dilation)
    bound = (ins * kernel[0] * kernel[1]) ** -0.5
    with torch.no_grad():
        conv.weight.uniform_(-bound, bound, generator=generator)
        conv.bias.zero_()  # pyright: ignore[reportOptionalMemberAccess]
    weight_norm(conv)
    return conv
