"""Synthetic sounds that have names: tones that rise or fall, noise, a bell, a knock, a siren, counted beeps.

    name, seed --numpy--> float32 [S] at 16 kHz, within -1 to 1, 0.2 to 1.2 s

Pitch, length and loudness differ from seed to seed; what the name says does not. Cost: 0.2 ms a sound.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from data.audio import SAMPLE_RATE

BEEP_SECONDS = 0.1


def make_sound(name: str, rng: random.Random) -> np.ndarray:
    """The sound called `name`, one of demo_language.SOUNDS or "1 beeps": float32 [S] at 16 kHz."""
    loudness = 0.25 + 0.35 * rng.random()
    if name.endswith("beeps"):
        return _beeps(int(name.split()[0]), loudness, rng)
    makers = {
        "rising": lambda: _glide(1, rng),
        "falling": lambda: _glide(-1, rng),
        "noise": lambda: _noise(rng),
        "bell": lambda: _bell(rng),
        "knock": lambda: _knock(rng),
        "siren": lambda: _siren(rng),
    }
    return (loudness * makers[name]()).astype(np.float32)


def make_sequence(names: Sequence[str], rng: random.Random) -> np.ndarray:
    """Sounds one after another, 0.3 to 0.6 s apart: float32 [S]."""
    pieces = [silence(0.1)]
    for name in names:
        pieces += [make_sound(name, rng), silence(0.3 + 0.3 * rng.random())]
    return np.concatenate(pieces)


def silence(seconds: float) -> np.ndarray:
    """Zeros, float32."""
    return np.zeros(round(seconds * SAMPLE_RATE), np.float32)


def _glide(direction: int, rng: random.Random) -> np.ndarray:
    """A tone that moves by more than an octave."""
    time_S = _time(0.5 + 0.4 * rng.random())
    low = 250 + 150 * rng.random()
    octaves = 1.2 + 0.6 * rng.random()
    share_S = time_S / time_S[-1]
    hertz_S = low * 2 ** (octaves * (share_S if direction > 0 else 1 - share_S))
    phase_S = 2 * np.pi * np.cumsum(hertz_S) / SAMPLE_RATE
    return _edges(np.sin(phase_S) + 0.3 * np.sin(2 * phase_S)) / 1.3


def _noise(rng: random.Random) -> np.ndarray:
    time_S = _time(0.4 + 0.4 * rng.random())
    return _edges(np.random.default_rng(rng.getrandbits(32)).uniform(-0.6, 0.6, len(time_S)))


def _bell(rng: random.Random) -> np.ndarray:
    """Partials out of tune that die away, the high ones first."""
    time_S = _time(0.9 + 0.3 * rng.random())
    hertz = 500 + 300 * rng.random()
    partials = ((0.5, 0.4), (1.0, 1.0), (1.2, 0.5), (2.0, 0.6), (2.7, 0.4), (4.1, 0.2))
    wave_S = sum(
        weight * np.exp(-3.5 * ratio * time_S) * np.sin(2 * np.pi * hertz * ratio * time_S)
        for ratio, weight in partials
    )
    return _edges(np.asarray(wave_S)) / 2.5


def _knock(rng: random.Random) -> np.ndarray:
    """A dull thud."""
    time_S = _time(0.2)
    hertz = 90 + 60 * rng.random()
    thud_S = np.exp(-28 * time_S) * np.sin(2 * np.pi * hertz * time_S)
    click_S = np.exp(-250 * time_S) * np.random.default_rng(rng.getrandbits(32)).uniform(-1, 1, len(time_S))
    return _edges(1.2 * thud_S + 0.4 * click_S, 0.001)


def _siren(rng: random.Random) -> np.ndarray:
    """Two tones in turn."""
    low, high = 420 + 60 * rng.random(), 620 + 80 * rng.random()
    turn = 0.16 + 0.06 * rng.random()
    time_S = _time(5 * turn)
    hertz_S = np.where((time_S / turn).astype(int) % 2 == 0, low, high)
    return _edges(np.sin(2 * np.pi * np.cumsum(hertz_S) / SAMPLE_RATE))


def _beeps(count: int, loudness: float, rng: random.Random) -> np.ndarray:
    tone_S = _edges(np.sin(2 * np.pi * (900 + 300 * rng.random()) * _time(BEEP_SECONDS)))
    gap_S = silence(0.11 + 0.05 * rng.random())
    beeps = [piece for _ in range(count) for piece in (tone_S, gap_S)]
    return (loudness * np.concatenate(beeps)).astype(np.float32)


def _time(seconds: float) -> np.ndarray:
    return np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE


def _edges(wave_S: np.ndarray, seconds: float = 0.01) -> np.ndarray:
    """Fade in and out, so that nothing clicks."""
    length = round(seconds * SAMPLE_RATE)
    ramp = np.linspace(0, 1, length)
    wave_S[:length] *= ramp
    wave_S[-length:] *= ramp[::-1]
    return wave_S
