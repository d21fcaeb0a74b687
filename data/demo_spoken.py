"""Tasks of the demo's corpus whose answers are spoken, for the Talker: a text read aloud, and answers to what is asked.

    statement, or image or sounds + spoken question --Studio.say--> answer in text, and its recording by a named voice

The voices are few and the same in all sets, since a Talker speaks as those that it has learnt; what they say in
`sentences` is never said in training. The recordings keep espeak-ng's own rate, as a codec may want more than 16 kHz.
"""

from __future__ import annotations

from collections.abc import Sequence

from data.demo_scenes import Picture
from data.demo_studio import SPEAKERS, Studio, here, write
from data.demo_tasks import Task, caption, picture_question, sound_question_of


def reading(studio: Studio) -> list[dict]:
    """Text that is to be read aloud, and that text, spoken."""
    return read_aloud(studio, studio.statement().said(studio.words))


def read_aloud(studio: Studio, text: str, voices: Sequence[str] = tuple(SPEAKERS)) -> list[dict]:
    """A system turn with a text that is to be read aloud, and that text, spoken.

    In a user turn the Talker would see it and learn to read that, not what the answer says: it reads user turns, and
    leaves system turns out.
    """
    return [
        {"role": "system", "content": [write(text)]},
        {"role": "user", "content": [write(studio.words.read)]},
        {"role": "assistant", "content": studio.say(text, voices)},
    ]


def spoken_answer(studio: Studio) -> list[dict]:
    """An image or sounds and a question in speech; the answer in text and speech."""
    kind = "caption" if studio.split == "sentences" else studio.rng.choice(("caption", "image", "sounds"))
    if kind == "caption":
        picture = studio.until(lambda: _tellable(studio))
        material, question, answer = studio.show(picture), studio.words.describe, caption(studio, picture)
    elif kind == "image":
        picture, question, answer = picture_question(studio)
        material = studio.show(picture)
    else:
        sounds = studio.sounds()
        question, answer = sound_question_of(studio, sounds.names)
        material = studio.ring(sounds)
    return studio.ask([material], [studio.speak(question)], studio.say(answer))


SPOKEN = {
    "reading": Task(reading, 120, ("sentences",)),
    "spoken_answer": Task(spoken_answer, 80, ("voices", "sentences", "scenes")),
}


def _tellable(studio: Studio) -> Picture | None:
    """A picture of one or two things; None where this split may not say what is told of it."""
    picture = studio.picture(most=2)
    return picture if studio.fits(*(here(place, thing) for place, thing in picture.things)) else None
