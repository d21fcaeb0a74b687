"""What every codec asks of a waveform.

Letters: S samples.
"""

from __future__ import annotations

from torch import Tensor

from data.errors import BadSample


def check_waveform(waveform_S: Tensor, sample_rate: int, max_seconds: float) -> None:
    """Raise BadSample unless a waveform is mono floats [S], finite, and not too long."""
    if waveform_S.ndim != 1 or not waveform_S.is_floating_point():
        shape, dtype = list(waveform_S.shape), waveform_S.dtype
        raise BadSample(f"a waveform must be mono floats of shape [samples], not {dtype} {shape}")
    check_length(len(waveform_S), sample_rate, max_seconds)
    if not waveform_S.isfinite().all():
        raise BadSample("the waveform holds values that are not finite")


def check_length(samples: int, sample_rate: int, max_seconds: float) -> None:
    """Raise BadSample for more samples than `max_seconds` have."""
    if samples > max_seconds * sample_rate:
        raise BadSample(f"{samples / sample_rate:.0f} s of audio, but at most {max_seconds:.0f} s are allowed")
