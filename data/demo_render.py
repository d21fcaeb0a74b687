"""What a sample's media will hold, turned into their bytes.

    Picture --draw--> png, jpg, webp      Film, Narrated --draw; sound, speech--> mp4
    Answer --espeak-ng--> 22,050 Hz --> flac
    Speech --espeak-ng--> 16 kHz --> flac, mp3      Sounds, Recording --synthesis--> flac, mp3

Cost of one: 1 ms a picture, 15 ms a film, 3 ms a spoken flac, 15 ms more an mp3, 0.1 s for 10 minutes of a recording.

Shapes: S samples at 16 kHz, or of an Answer at 22,050 Hz.
"""

from __future__ import annotations

import random

import numpy as np
import soxr

from data.audio import SAMPLE_RATE
from data.demo_media import encode_film, encode_image, encode_sound
from data.demo_scenes import Film, Picture, draw_film, draw_picture
from data.demo_sounds import make_sequence, make_sound
from data.demo_studio import Answer, Medium, Narrated, Recording, Speech
from data.espeak import Synthesizer

_TIMES_A_MINUTE = 4
_LEAD = 0.2  # seconds of a film before someone speaks


def render(medium: Medium, extension: str, espeak: Synthesizer) -> bytes:
    """The bytes of a member of the given extension, "0.flac" as well as "flac"."""
    content, rng = medium.content, random.Random(medium.seed)
    kind = extension.rpartition(".")[2]
    if isinstance(content, Picture):
        return encode_image(draw_picture(content, rng), kind)
    if isinstance(content, Film | Narrated):
        return _film(content, rng, espeak)
    if isinstance(content, Speech):
        return encode_sound(_spoken(content, espeak), kind)
    if isinstance(content, Answer):
        said = content.speech
        wave_S = espeak.speak(said.text, said.speaker, said.rate, said.pitch)
        return encode_sound(wave_S, kind, espeak.sample_rate)
    if isinstance(content, Recording):
        return encode_sound(_recording(content, rng, espeak), kind)
    return encode_sound(make_sequence(content.names, rng), kind)


def _spoken(speech: Speech, espeak: Synthesizer) -> np.ndarray:
    """float32 [S]."""
    wave_S = espeak.speak(speech.text, speech.speaker, speech.rate, speech.pitch) / np.float32(1 << 15)
    return soxr.resample(wave_S, espeak.sample_rate, SAMPLE_RATE)  # int16 it dithers, never twice the same way


def _film(content: Film | Narrated, rng: random.Random, espeak: Synthesizer) -> bytes:
    if isinstance(content, Narrated):
        voice_S = _spoken(content.speech, espeak)
        frames_NHWC, fps, _ = draw_film(content.film, rng, len(voice_S) / SAMPLE_RATE + 2 * _LEAD)
        return encode_film(frames_NHWC, fps, _placed(voice_S, _LEAD, len(frames_NHWC) / fps))
    frames_NHWC, fps, moment = draw_film(content, rng)
    if not content.sound:
        return encode_film(frames_NHWC, fps)
    return encode_film(frames_NHWC, fps, _placed(make_sound(content.sound, rng), moment, len(frames_NHWC) / fps))


def _placed(wave_S: np.ndarray, start: float, seconds: float) -> np.ndarray:
    """A sound that starts then, or as late as it can, in so many seconds of silence."""
    length = round(seconds * SAMPLE_RATE)
    first = max(min(round(start * SAMPLE_RATE), length - len(wave_S)), 0)
    return np.pad(wave_S, (first, max(length - first - len(wave_S), 0)))


def _recording(recording: Recording, rng: random.Random, espeak: Synthesizer) -> np.ndarray:
    """int16 [S], a minute for each item, in which it is heard once in every quarter."""
    slot = 60 * SAMPLE_RATE // _TIMES_A_MINUTE
    wave_S = np.zeros(len(recording.minutes) * _TIMES_A_MINUTE * slot, np.int16)
    for minute, item in enumerate(recording.minutes):
        sound_S = _spoken(item, espeak) if isinstance(item, Speech) else make_sound(item, rng)
        heard_S = np.rint(sound_S * ((1 << 15) - 1)).clip(-(1 << 15), (1 << 15) - 1).astype(np.int16)
        for part in range(_TIMES_A_MINUTE):
            start = (minute * _TIMES_A_MINUTE + part) * slot + rng.randrange(slot - len(heard_S))
            wave_S[start : start + len(heard_S)] = heard_S
    return wave_S
