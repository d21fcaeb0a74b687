"""Whether speech sounds like the voice that was asked for, by an embedding without weights.

    waveform at 16 kHz --log-mel, frames above the mean level--> mean, less the level, and spread of each of 128 bands
      --less the mean of the reference speakers, over the spread within each of them--> embedding [256] --> cosine

The long-term spectrum tells voices apart that differ in pitch, timbre or channel; it knows nothing of accent or rhythm,
and no human ear was asked. The figures of the recordings themselves, beside it, say how well it can tell at all.
Cost: one log-mel a clip, and a product of all clips with all references. Letters: S samples, F frames, M mel filters,
X = 2 M values, N references and clips, K speakers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.mel import log_mel

FLOOR = 0.05  # of the mean spread within speakers, below which no value's counts: few recordings may hardly vary


@dataclass(frozen=True)
class Likeness:
    """Means over clips; None where there is nothing to compare with: one voice alone is like and unlike nothing."""

    same: float | None  # cosine with recordings of the speaker asked for
    different: float | None  # with those of all others
    nearest: float | None  # share of clips whose nearest speaker, by the mean of its recordings, is the one asked for
    num_clips: int  # that were compared


def embed(wave_S: np.ndarray) -> Tensor:
    """float64 [256] of a clip, float32 [S] at 16 kHz, of at least 25 ms; nearly the same whatever its level."""
    mel_FM = log_mel(wave_S).double()
    level_F = mel_FM.mean(1)
    loud_FM = mel_FM[level_F >= level_F.mean()]
    mean_M = loud_FM.mean(0)
    return torch.cat([mean_M - mean_M.mean(), loud_FM.std(0, correction=0)])


class Voices:
    """The reference recordings of a set, whitened."""

    def __init__(self, references: Sequence[Tensor], speakers: Sequence[str]) -> None:
        """`references` are `embed`'s, of the named speakers; at least one."""
        raw_NX = torch.stack(list(references))
        self.names = sorted(set(speakers))
        self.is_of_NK = torch.tensor([[name == speaker for name in self.names] for speaker in speakers])
        count_K = self.is_of_NK.sum(0)
        means_KX = self.is_of_NK.T.double() @ raw_NX / count_K.unsqueeze(1)
        inside_NX = raw_NX - self.is_of_NK.double() @ means_KX
        self.mean_X = means_KX.mean(0)
        if not inside_NX.any():  # one recording of each speaker
            inside_NX = raw_NX - self.mean_X
        spread_X = inside_NX.square().mean(0).sqrt()
        self.scale_X = spread_X.clamp_min(FLOOR * float(spread_X.mean()) + 1e-9)
        self.white_NX = self._whiten(raw_NX)

    def likeness(self, clips: Sequence[Tensor | None], asked: Sequence[str]) -> Likeness:
        """Compare clip n, `embed`'s or None of a silent one, said for the speaker asked[n], with all references.

        Clip n and reference n are of the same sample and are not compared: a common text would count as likeness.
        """
        same, different, nearest = [], [], []
        for place, (clip, name) in enumerate(zip(clips, asked, strict=True)):
            if clip is None or name not in self.names:
                continue
            white_X = self._whiten(clip)
            others_N = torch.arange(len(self.white_NX)) != place
            is_of_NK, references_NX = self.is_of_NK[others_N], self.white_NX[others_N]
            mine_N = is_of_NK[:, self.names.index(name)]
            if not mine_N.any() or mine_N.all():
                continue
            cosine_N = torch.cosine_similarity(references_NX, white_X.unsqueeze(0), dim=1)
            same.append(float(cosine_N[mine_N].mean()))
            different.append(float(cosine_N[~mine_N].mean()))
            known_K = is_of_NK.any(0)
            means_KX = is_of_NK.T.double() @ references_NX / is_of_NK.sum(0).clamp_min(1).unsqueeze(1)
            near_K = torch.cosine_similarity(means_KX, white_X.unsqueeze(0), dim=1).masked_fill(~known_K, -2.0)
            nearest.append(float(self.names[int(near_K.argmax())] == name))
        return Likeness(_mean(same), _mean(different), _mean(nearest), len(same))

    def _whiten(self, raw: Tensor) -> Tensor:
        return (raw - self.mean_X) / self.scale_X


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
