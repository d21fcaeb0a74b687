"""Where one sample of the demo's corpus is made up: its scene, sentences and voice, on its side of the split.

    (seed, split, number) --> random numbers --> things, pictures, films, sounds, statements, a voice
    the sample's parts + for each medium what it will hold, to be drawn and spoken later (data.demo_render)

A scene or a statement has a name that does not depend on language or seed, and the hash of the name says whether it is
held out: an eighth is. So no corpus of any seed or size trains on what another holds out.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

from data.demo_language import (
    COLOURS,
    DIRECTIONS,
    PLACES,
    SHAPES,
    SINGLE_SOUNDS,
    SIZES,
    SOUNDS,
    Language,
    Thing,
)
from data.demo_scenes import ACTIONS, Film, Picture
from data.demo_words import LANGUAGES

TRAIN_VARIANTS = ("", "f1", "f2", "f3", "f5", "m1", "m3", "m4", "m6", "m7", "Annie", "Denis")
HELDOUT_VARIANTS = ("f4", "m2", "steph")
SPEAKERS = {"f1": ("f1", 50), "f2": ("Annie", 50), "m1": ("m1", 40), "m2": ("m7", 65)}  # variant and pitch
SHARE_HELDOUT = 8  # one in so many
_MOST_TRIES = 100_000  # a bound on a mistake in a task: what is asked for comes up within some hundred
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Speech:
    """A sentence to be spoken."""

    text: str
    speaker: str  # voice and variant of espeak-ng, as "de+f2"
    rate: int  # words a minute
    pitch: int  # 0 to 99


@dataclass(frozen=True)
class Answer:
    """An answer that one of a language's few named speakers says, "de_f1"; kept at espeak-ng's own rate."""

    speech: Speech


@dataclass(frozen=True)
class Sounds:
    """Sounds one after another."""

    names: tuple[str, ...]

    @property
    def name(self) -> str:
        """All that can be asked about it."""
        return f"sounds: {'; '.join(self.names)}"


@dataclass(frozen=True)
class Narrated:
    """A film over which someone speaks."""

    film: Film
    speech: Speech


@dataclass(frozen=True)
class Recording:
    """A long recording: in each minute one sound, or one sentence, is heard, several times."""

    minutes: tuple[str | Speech, ...]

    @property
    def name(self) -> str:
        """All that can be asked about it."""
        heard = (minute if isinstance(minute, str) else minute.text for minute in self.minutes)
        return f"recording: {'; '.join(heard)}"


class Medium(NamedTuple):
    """What a member of a sample will hold; `seed` is for what cannot be asked about."""

    content: Picture | Film | Narrated | Speech | Answer | Sounds | Recording
    seed: int


class Statement(NamedTuple):
    """A sentence about things that any language can say: a template of Language and its words."""

    template: str
    words: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        """The same in every language."""
        shown = (" ".join(word) if isinstance(word, Thing) else word for _, word in self.words)
        return f"{self.template}: {'; '.join(shown)}"

    def said(self, language: Language) -> str:
        """In words."""
        return language.say(self.template, **dict(self.words))


def heldout(name: str) -> bool:
    """Whether a scene or a statement of this name is kept out of training."""
    return zlib.crc32(name.encode()) % SHARE_HELDOUT == 0


def here(place: str, thing: Thing) -> Statement:
    """There is a thing at a place."""
    return Statement("here", (("thing", thing), ("place", place)))


def told(film: Film) -> Statement:
    """What a film shows."""
    words = {"thing": film.thing, "other": film.other, "direction": film.direction}
    return Statement(film.action, tuple((name, word) for name, word in words.items() if word))


class Studio:
    """Makes up what one sample holds; `media` fills as parts are made."""

    def __init__(self, seed: int, split: str, number: int, language: str, languages: Sequence[str]) -> None:
        self.rng = random.Random(f"{seed} {split} {number}")  # seeded by text: the same numbers in every process
        self.split, self.language, self.words = split, language, LANGUAGES[language]
        self.languages = languages
        self.media: dict[str, Medium] = {}
        self.speaker = ""
        self._variant = self.rng.choice(HELDOUT_VARIANTS if split == "voices" else TRAIN_VARIANTS)
        self._rate, self._pitch = self.rng.randint(140, 210), self.rng.randint(30, 70)

    # Scenes and statements, each on its side of the split

    def until(self, make: Callable[[], _Made | None]) -> _Made:
        """The first thing that `make` makes and does not take back."""
        for _ in range(_MOST_TRIES):
            if (made := make()) is not None:
                return made
        raise RuntimeError(f"{self.split}, {self.language}: found nothing that this split may hold")

    def fits(self, *content: Picture | Film | Sounds | Recording | Statement) -> bool:
        """Whether scenes and statements are ones that this split may hold."""
        sides = ("sentences" if isinstance(item, Statement) else "scenes" for item in content)
        return all(heldout(item.name) == (self.split == side) for item, side in zip(content, sides, strict=True))

    def thing(self) -> Thing:
        """Any thing."""
        return Thing(self.rng.choice(SHAPES), self.rng.choice(COLOURS), self.rng.choice(SIZES))

    def like(self, thing: Thing) -> Thing:
        """A thing that differs in one way."""
        name, known = self.rng.choice((("shape", SHAPES), ("colour", COLOURS), ("size", SIZES)))
        others = [word for word in known if word != getattr(thing, name)]
        return thing._replace(**{name: self.rng.choice(others)})

    def picture(self, fewest: int = 1, most: int = 3) -> Picture:
        """Different things in different places."""

        def make() -> Picture | None:
            places = self.rng.sample(PLACES, self.rng.randint(fewest, most))
            things = tuple((place, self.thing()) for place in sorted(places, key=PLACES.index))
            picture = Picture(things)
            return picture if len({thing for _, thing in things}) == len(things) and self.fits(picture) else None

        return self.until(make)

    def film(self, sounds: Sequence[str] = ("",)) -> Film:
        """A thing that does something, while one of `sounds` is heard."""

        def make() -> Film | None:
            action, thing = self.rng.choice(ACTIONS), self.thing()
            film = Film(action, thing, sound=self.rng.choice(sounds))
            if action == "moves":
                film = replace(film, direction=self.rng.choice(DIRECTIONS))
            elif action == "recolours":
                film = replace(film, colour=self.rng.choice([colour for colour in COLOURS if colour != thing.colour]))
            elif action == "collides":
                film = replace(film, other=self.like(thing), sound="1 beeps" if film.sound else "")
            return film if self.fits(film) else None

        return self.until(make)

    def sounds(self, fewest: int = 2, most: int = 3) -> Sounds:
        """Different sounds, beeps once at most."""

        def make() -> Sounds | None:
            names = self.rng.sample(SOUNDS, self.rng.randint(fewest, most))
            sounds = Sounds(tuple(names))
            return sounds if sum(name not in SINGLE_SOUNDS for name in names) <= 1 and self.fits(sounds) else None

        return self.until(make)

    def recording(self, count: int) -> tuple[Recording, list[str]]:
        """Minutes of sounds and sentences, and in words what is heard in each."""

        def make() -> tuple[Recording, list[str]] | None:
            names = [self.rng.choice(SINGLE_SOUNDS) if self.rng.random() < 0.6 else "" for _ in range(count)]
            texts = [self.words.heard(name) if name else self.statement().said(self.words) for name in names]
            minutes = (name or self._speech(text) for name, text in zip(names, texts, strict=True))
            recording = Recording(tuple(minutes))
            return (recording, texts) if self.fits(recording) else None

        return self.until(make)

    def statement(self) -> Statement:
        """A sentence about a thing, or two."""

        def make() -> Statement | None:
            kind, thing = self.rng.choice(("here", "here", "here", *ACTIONS)), self.thing()
            words: dict[str, Any] = {"thing": thing}
            if kind == "here":
                words["place"] = self.rng.choice(PLACES)
            elif kind == "moves":
                words["direction"] = self.rng.choice(DIRECTIONS)
            elif kind == "collides":
                words["other"] = self.like(thing)
            about = Statement(kind, tuple(words.items()))
            return about if self.fits(about) else None

        return self.until(make)

    # Parts of the sample

    def show(self, picture: Picture) -> dict:
        """An image part."""
        return self._add("image", self.rng.choice(("png", "png", "jpg", "webp")), picture)

    def play(self, film: Film, narration: str = "") -> dict:
        """A video part, heard if it has a sound or someone speaks over it."""
        content = Narrated(film, self._speech(narration)) if narration else film
        part = self._add("video", "mp4", content)
        return part | {"sound": True} if film.sound or narration else part

    def ring(self, sounds: Sounds) -> dict:
        """An audio part of sounds."""
        return self._add("audio", self.rng.choice(("flac", "mp3")), sounds)

    def record(self, recording: Recording) -> dict:
        """A long audio part."""
        return self._add("audio", "mp3" if len(recording.minutes) < 3 else "flac", recording)

    def speak(self, text: str) -> dict:
        """An audio part of speech, in the sample's voice."""
        return self._add("audio", self.rng.choice(("flac", "mp3")), self._speech(text))

    def put(self, text: str, spoken: bool) -> dict:
        """A part that says `text`, aloud or in writing."""
        return self.speak(text) if spoken else write(text)

    def say(self, text: str, voices: Sequence[str] = tuple(SPEAKERS)) -> list[dict]:
        """The parts of an answer that is also spoken, by one of the language's named speakers, or of some `voices`."""
        name = self.rng.choice(voices)
        variant, pitch = SPEAKERS[name]
        speech = Speech(text, f"{self.words.voice}+{variant}", self.rng.randint(155, 190), pitch)
        self.media["speech.flac"] = Medium(Answer(speech), 0)
        speaker = f"{self.language}_{name}"
        self.speaker = self.speaker or speaker  # where someone asks aloud, the sample is that voice's
        return [write(text), {"type": "speech", "speech": "speech.flac", "speaker": speaker}]

    def ask(self, material: Sequence[dict], question: Sequence[dict], answer: str | Sequence[dict]) -> list[dict]:
        """A conversation of one answer; the material before or after the question, now and then in a system turn."""
        reply = {"role": "assistant", "content": answer}
        place = self.rng.random()
        if place < 0.125:
            return [{"role": "system", "content": [*material]}, {"role": "user", "content": [*question]}, reply]
        content = [*question, *material] if place < 0.4 else [*material, *question]
        return [{"role": "user", "content": content}, reply]

    def _speech(self, text: str) -> Speech:
        self.speaker = f"{self.words.voice}+{self._variant}" if self._variant else self.words.voice
        return Speech(text, self.speaker, self._rate, self._pitch)

    def _add(self, kind: str, extension: str, content: Any) -> dict:
        name = f"{len(self.media)}.{extension}"
        self.media[name] = Medium(content, self.rng.getrandbits(32))
        return {"type": kind, kind: name}


def write(text: str) -> dict:
    """A text part."""
    return {"type": "text", "text": text}
