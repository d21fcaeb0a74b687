"""What a sample's media will hold, turned into their bytes.

    Picture --draw--> png, jpg, webp      Film, Narrated --draw; sound, speech--> mp4
    Speech --espeak-ng, before anything else--> 16 kHz --> flac, mp3      Sounds, Recording --synthesis--> flac, mp3

Cost of one: 1 ms a picture, 15 ms a film, 3 ms a spoken flac, 15 ms more an mp3, 0.1 s for 10 minutes of a recording.

espeak-ng reads memory that it never wrote: after the work of an encoder, one clip in some hundred ended in samples that
differed by 3 of 32,768. Spoken one after another, all clips of a hundred runs were the same.

Shapes: S samples at 16 kHz.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping

import numpy as np
import soxr

from data.audio import SAMPLE_RATE
from data.demo_media import encode_film, encode_image, encode_sound
from data.demo_scenes import Film, Picture, draw_film, draw_picture
from data.demo_sounds import make_sequence, make_sound
from data.demo_studio import Medium, Narrated, Recording, Speech
from data.espeak import Synthesizer

_TIMES_A_MINUTE = 4
_LEAD = 0.2  # seconds of a film before someone speaks


Spoken = Mapping[Speech, np.ndarray]  # int16 [S]


def speak_all(media: Iterable[Medium], seed: int) -> Spoken:
    """All speech of some media. Raises DataError where espeak-ng is absent or lacks a voice."""
    found = {}
    with Synthesizer(seed) as espeak:
        for medium in media:
            for speech in _speeches(medium):
                found[speech] = espeak.speak(speech.text, speech.speaker, speech.rate, speech.pitch)
        rate = espeak.sample_rate
    return {speech: soxr.resample(wave_S, rate, SAMPLE_RATE) for speech, wave_S in found.items()}


def render(medium: Medium, extension: str, spoken: Spoken) -> bytes:
    """The bytes of a member of the given extension, "0.flac" as well as "flac"; `spoken` has its speech."""
    content, rng = medium.content, random.Random(medium.seed)
    kind = extension.rpartition(".")[2]
    if isinstance(content, Picture):
        return encode_image(draw_picture(content, rng), kind)
    if isinstance(content, Film | Narrated):
        return _film(content, rng, spoken)
    if isinstance(content, Speech):
        return encode_sound(spoken[content], kind)
    if isinstance(content, Recording):
        return encode_sound(_recording(content, rng, spoken), kind)
    return encode_sound(make_sequence(content.names, rng), kind)


def _speeches(medium: Medium) -> list[Speech]:
    content = medium.content
    if isinstance(content, Recording):
        return [item for item in content.minutes if isinstance(item, Speech)]
    if isinstance(content, Narrated):
        return [content.speech]
    return [content] if isinstance(content, Speech) else []


def _film(content: Film | Narrated, rng: random.Random, spoken: Spoken) -> bytes:
    if isinstance(content, Narrated):
        voice_S = spoken[content.speech] / np.float32(1 << 15)
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


def _recording(recording: Recording, rng: random.Random, spoken: Spoken) -> np.ndarray:
    """int16 [S], a minute for each item, in which it is heard once in every quarter."""
    slot = 60 * SAMPLE_RATE // _TIMES_A_MINUTE
    wave_S = np.zeros(len(recording.minutes) * _TIMES_A_MINUTE * slot, np.int16)
    for minute, item in enumerate(recording.minutes):
        if isinstance(item, Speech):
            heard_S = spoken[item]
        else:
            heard_S = np.rint(make_sound(item, rng) * ((1 << 15) - 1)).astype(np.int16)
        for part in range(_TIMES_A_MINUTE):
            start = (minute * _TIMES_A_MINUTE + part) * slot + rng.randrange(slot - len(heard_S))
            wave_S[start : start + len(heard_S)] = heard_S
    return wave_S
