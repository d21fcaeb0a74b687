"""Tasks of a small world, which a tiny model masters in minutes on a laptop: what `make demo` learns.

    picture of one or two of 12 things, a sound, or a film of one thing  x  question in text or speech  --> answer

The languages, voices and drawing are the whole corpus' (data.demo_studio); only there is less to know. There are so few
scenes that holding some out would teach that they are never true: those of `scenes` are drawn anew, with other sizes,
shades and shifts. Answers about pictures are a word: `picture_aloud` and `words_aloud` have it spoken, too, and `words`
has them to be written down, so that a recogniser knows what it may hear. `animals_aloud` is planned with transcription
(data.demo_plan). Two voices of each language speak.
"""

from __future__ import annotations

from data.demo_language import PLACES, SINGLE_SOUNDS, Thing
from data.demo_scenes import Film, Picture
from data.demo_spoken import SPOKEN, read_aloud
from data.demo_studio import Sounds, Studio, told, write
from data.demo_tasks import TASKS, Task, caption
from data.demo_utterances import INSTRUCTIONS

THINGS = tuple(
    Thing(shape, colour, "big")
    for shape in ("circle", "triangle", "cross")
    for colour in ("red", "blue", "yellow", "black")
)
SIDES = PLACES[:2]
SHARE_OF_TWO = 0.3  # of pictures
VOICES = ("f1", "m1")


def picture_told(studio: Studio) -> list[dict]:
    """A picture told in text: each thing and where it is, which teaches more than a word does."""
    picture = _things(studio)
    return studio.ask([studio.show(picture)], [write(studio.words.describe)], caption(studio, picture))


def picture_text(studio: Studio) -> list[dict]:
    """A picture and a question in text."""
    picture, question, answer = _picture(studio)
    return studio.ask([studio.show(picture)], [write(question)], answer)


def picture_voice(studio: Studio) -> list[dict]:
    """A picture and a question in speech."""
    picture, question, answer = _picture(studio)
    return studio.ask([studio.show(picture)], [studio.speak(question)], answer)


def picture_aloud(studio: Studio) -> list[dict]:
    """A picture and a question in speech; the answer in text and speech."""
    picture, question, answer = _picture(studio)
    return studio.ask([studio.show(picture)], [studio.speak(question)], studio.say(answer, VOICES))


def sound_text(studio: Studio) -> list[dict]:
    """A sound and a question in text."""
    sounds, answer = _sound(studio)
    return studio.ask([studio.ring(sounds)], [write(studio.words.hear)], answer)


def sound_voice(studio: Studio) -> list[dict]:
    """A sound and a question in speech."""
    sounds, answer = _sound(studio)
    return studio.ask([studio.ring(sounds)], [studio.speak(studio.words.hear)], answer)


def film_text(studio: Studio) -> list[dict]:
    """A film of one thing that moves, appears or disappears, and a question in text."""
    film = _film(studio)
    return studio.ask([studio.play(film)], [write(studio.words.watch)], told(film).said(studio.words))


def film_voice(studio: Studio) -> list[dict]:
    """The same, asked in speech."""
    film = _film(studio)
    return studio.ask([studio.play(film)], [studio.speak(studio.words.watch)], told(film).said(studio.words))


def words(studio: Studio) -> list[dict]:
    """A word that answers about pictures, spoken, to be written down."""
    _, _, answer = _picture(studio)
    return studio.ask([studio.speak(answer)], [write(studio.rng.choice(INSTRUCTIONS))], answer)


def words_aloud(studio: Studio) -> list[dict]:
    """A word that answers about pictures, to be read aloud."""
    _, _, answer = _picture(studio)
    return read_aloud(studio, answer, VOICES)


SMALL = {
    "animals_aloud": Task(None, 130, ("sentences",)),
    "words_aloud": Task(words_aloud, 50, ("scenes",)),
    "picture_told": Task(picture_told, 80, ("scenes",)),
    "picture_text": Task(picture_text, 110, ("scenes",)),
    "picture_voice": Task(picture_voice, 110, ("voices", "scenes")),
    "picture_aloud": Task(picture_aloud, 45, ("voices", "scenes")),
    "sound_text": Task(sound_text, 10, ("scenes",)),
    "sound_voice": Task(sound_voice, 15, ("voices", "scenes")),
    "film_text": Task(film_text, 80, ("scenes",)),
    "film_voice": Task(film_voice, 35, ("voices", "scenes")),
    "words": Task(words, 30, ("voices",)),
}
KNOWN_TASKS = TASKS | SPOKEN | SMALL


def _picture(studio: Studio) -> tuple[Picture, str, str]:
    """A picture of a thing, or of two, a question about one, and the answer, a word.

    Where there is one thing alone, an answer needs no place: two make a model look where it is asked to.
    """
    picture = _things(studio)
    place, thing = studio.rng.choice(picture.things)
    kind = studio.rng.choice(("colour_at", "shape_at"))
    answer = studio.words.colour(thing.colour) if kind == "colour_at" else studio.words.shape(thing.shape)
    return picture, studio.words.say(kind, place=place), answer


def _things(studio: Studio) -> Picture:
    """A thing on one side, or on both."""
    sides = SIDES if studio.rng.random() < SHARE_OF_TWO else (studio.rng.choice(SIDES),)
    return Picture(tuple((side, studio.rng.choice(THINGS)) for side in sides))


def _sound(studio: Studio) -> tuple[Sounds, str]:
    """A sound and its name. There are too few names to hold some out: pitch, length and loudness are new ones."""
    name = studio.rng.choice(SINGLE_SOUNDS)
    return Sounds((name,)), studio.words.sequence([studio.words.heard(name)])


def _film(studio: Studio) -> Film:
    """A silent film."""
    action, thing = studio.rng.choice(("moves", "appears", "vanishes")), studio.rng.choice(THINGS)
    return Film(action, thing, direction=studio.rng.choice(SIDES) if action == "moves" else "")
