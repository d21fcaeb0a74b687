"""Pieces of spoken answers for the waveform decoder: codes, those before them as context, and the sound they stand for.

    codes [G, F], waveform [S] --crop--> Segments --join--> Segments of a micro-batch

Integers and copies only. Cost: a copy of what is kept.

Letters: G codes of a frame, F frames, S samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data.errors import BadSample

SAMPLES_PER_FRAME = 1920  # 80 ms at 24 kHz
CONTEXT = 25  # frames, 2 s: what transformers' chunked decode of the released model gives each chunk


@dataclass(frozen=True, slots=True)
class Segments:
    """Aligned pieces of codes and waveform, end to end without padding. The first frames of each are its context.

    A data.types.Speech: what the answers of a batch sound like, where the decoder learns.
    """

    codes_GF: Tensor  # int64, context included
    wave_S: Tensor  # float, of the frames after the context
    frames: tuple[int, ...]  # of each segment, context included; they sum to F
    contexts: tuple[int, ...]  # frames that are decoded and not scored
    samples: tuple[int, ...]  # of each segment's waveform; they sum to S

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> Segments:
        """See data.types.Speech."""
        return replace(self, codes_GF=change(self.codes_GF), wave_S=change(self.wave_S))


def crop(
    codes_GF: Tensor,
    waveform_S: Tensor,
    frames: int,
    generator: torch.Generator | None,
    *,
    context: int = CONTEXT,
    samples_per_frame: int = SAMPLES_PER_FRAME,
) -> Segments:
    """Draw `frames` frames of an utterance, up to `context` frames before them, and their waveform.

    Frame f of codes int64 [G, F] stands for samples f * samples_per_frame and on of the waveform, mono float [S]; the
    last one may be cut short. Starts are uniform; a shorter utterance is taken whole. An utterance's own start has no
    context, as in generation.

    Raises BadSample where codes and waveform do not fit each other, ValueError for sizes that make no sense.
    """
    if frames < 1 or context < 0 or samples_per_frame < 1:
        raise ValueError(
            f"frames {frames} and samples_per_frame {samples_per_frame} must be above 0, context {context} not below"
        )
    if codes_GF.ndim != 2 or waveform_S.ndim != 1:
        raise BadSample(
            f"codes {list(codes_GF.shape)} must be [codebooks, frames], "
            f"the waveform {list(waveform_S.shape)} mono [samples]"
        )
    total, samples = codes_GF.shape[1], len(waveform_S)
    if not total or total != -(-samples // samples_per_frame):
        raise BadSample(
            f"{total} frames of codes do not fit {samples} samples at {samples_per_frame} a frame: "
            "encode this very waveform again"
        )
    start = int(torch.randint(max(0, total - frames) + 1, (), generator=generator))
    stop, first = min(start + frames, total), max(0, start - context)
    wave_S = waveform_S[start * samples_per_frame : stop * samples_per_frame].clone()  # not a view of the utterance
    return Segments(codes_GF[:, first:stop].clone(), wave_S, (stop - first,), (start - first,), (len(wave_S),))


def join(segments: Sequence[Segments]) -> Segments:
    """Segments end to end; at least one. For a rank that has none: `no_segments`."""
    return Segments(
        torch.cat([segment.codes_GF for segment in segments], 1),
        torch.cat([segment.wave_S for segment in segments]),
        *(
            tuple(n for segment in segments for n in getattr(segment, name))
            for name in ("frames", "contexts", "samples")
        ),
    )


def no_segments(num_code_groups: int) -> Segments:
    """A micro-batch without segments, for a rank that has run out of data."""
    return Segments(torch.empty(num_code_groups, 0, dtype=torch.int64), torch.empty(0), (), (), ())
