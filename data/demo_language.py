"""One language of the demo's corpus: its words, their forms, and the sentences made of them.

    thing (shape, colour, size) --forms by gender--> "ein großer roter Kreis" --template--> "Links ist ein ... Kreis."

Sentences are built so that a thing stands in the nominative wherever it is named: each language then needs no more
than its forms by gender. Answers that are one word use a word's own form ("Welche Farbe ist links?" "rot").
Words lie in data.demo_words_west and data.demo_words_east, as strings: words apart by commas, forms by slashes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "moon")
COLOURS = ("red", "blue", "green", "yellow", "black", "white")
SIZES = ("big", "small")
PLACES = ("left", "right", "top", "bottom", "middle")
DIRECTIONS = PLACES[:4]
SOUNDS = ("rising", "falling", "noise", "bell", "knock", "siren", "2 beeps", "3 beeps", "4 beeps", "5 beeps")
SINGLE_SOUNDS = SOUNDS[:6]


class Thing(NamedTuple):
    """A shape as one sees it."""

    shape: str  # of SHAPES
    colour: str  # of COLOURS
    size: str  # of SIZES


@dataclass(frozen=True)
class Language:
    """Words and sentences. Lists of words follow the order of SHAPES, COLOURS, SIZES, PLACES, DIRECTIONS, SOUNDS."""

    voice: str  # espeak-ng's name of the language
    genders: str  # a letter each; forms follow their order
    article: str  # forms, or "" where there is none
    thing: str  # order of {article} {size} {colour} {shape}
    shapes: str  # nouns, each led by its gender where there are several: "m:Kreis"
    colours: str  # forms beside a noun
    colour_names: str  # a colour's name alone
    sizes: str  # forms beside a noun
    places: str
    directions: str
    sounds: str
    counts: str  # 1 to 3, of shapes
    beep_counts: str  # 2 to 5, of beeps
    here: str  # {thing} is {place}
    first: str  # the first of several, {0}
    then: str  # each later one, {0}
    moves: str  # {thing} moves {direction}
    appears: str
    vanishes: str
    recolours: str
    collides: str  # {thing} and {other}
    what_at: str  # questions about a picture
    colour_at: str
    shape_at: str
    how_many: str
    is_there: str
    describe: str
    watch: str  # what happens in a film
    hear: str  # what is heard
    how_many_beeps: str
    write: str  # write down what is said
    read: str  # read aloud
    same: str  # are both the same
    which_has: str  # in which picture is {thing}
    which_more: str  # in which picture are more shapes
    which_told: str  # which picture was described
    match: str  # do both belong together
    minute: str  # what is heard in minute {minute}
    translate: str  # into this language
    picture: str
    sound: str
    film: str
    yes: str = "yes"
    no: str = "no"
    ordinals: str = ""  # the first (picture), the second
    stop: str = "."
    gap: str = " "  # between sentences

    def phrase(self, thing: Thing) -> str:
        """A thing in the nominative, as "a big red circle"."""
        gender, shape = self._shapes[thing.shape]
        return self.thing.format(
            article=_forms(self.article)[gender] if self.article else "",
            size=_forms(self._sizes[thing.size])[gender],
            colour=_forms(self._colours[thing.colour])[gender],
            shape=shape,
        )

    def shape(self, shape: str) -> str:
        """A noun alone."""
        return self._shapes[shape][1]

    def colour(self, colour: str) -> str:
        """A colour's name alone."""
        return _words(self.colour_names)[COLOURS.index(colour)]

    def heard(self, sound: str) -> str:
        """A sound in the nominative, as "three beeps"."""
        return _words(self.sounds)[SOUNDS.index(sound)]

    def count(self, number: int) -> str:
        """A number of shapes, 1 to 3."""
        return _words(self.counts)[number - 1]

    def count_beeps(self, number: int) -> str:
        """A number of beeps, 2 to 5."""
        return _words(self.beep_counts)[number - 2]

    def ordinal(self, place: int) -> str:
        """The first or second picture, `place` 0 or 1."""
        return _words(self.ordinals)[place]

    def say(self, template: str, **words: str | Thing | int) -> str:
        """The sentence `template`, a field's name, filled in.

        A Thing becomes its phrase; `place` and `direction` are words of PLACES and DIRECTIONS.
        """
        filled = {name: self.phrase(word) if isinstance(word, Thing) else str(word) for name, word in words.items()}
        for name, table, known in (("place", self.places, PLACES), ("direction", self.directions, DIRECTIONS)):
            if name in filled:
                filled[name] = _words(table)[known.index(filled[name])]
        return self._sentence(getattr(self, template).format(**filled))

    def sequence(self, phrases: Sequence[str]) -> str:
        """ "First ..., then ..., then ...": one sentence."""
        first, *others = phrases
        if not others:
            return self._sentence(first + self.stop)
        return self._sentence(
            self.first.format(first) + "".join(self.then.format(other) for other in others) + self.stop
        )

    def _sentence(self, text: str) -> str:
        """`text` with a capital, and with the forms of Korean particles that fit: "원<이/가>" becomes "원이"."""
        text = re.sub(r"([가-힣])<(.)/(.)>", _particle, text)
        mark = len(text) - len(text.lstrip("¿"))
        first = text[mark : mark + 1]
        capital = "İ" if self.voice == "tr" and first == "i" else first.upper()
        return text[:mark] + capital + text[mark + 1 :]

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, str]]:
        nouns = [word.rpartition(":") for word in _words(self.shapes)]
        return {
            shape: (self.genders.index(gender) if gender else 0, noun)
            for shape, (gender, _, noun) in zip(SHAPES, nouns, strict=True)
        }

    @cached_property
    def _colours(self) -> dict[str, str]:
        return dict(zip(COLOURS, _words(self.colours), strict=True))

    @cached_property
    def _sizes(self) -> dict[str, str]:
        return dict(zip(SIZES, _words(self.sizes), strict=True))


def _particle(found: re.Match[str]) -> str:
    syllable, after_consonant, after_vowel = found.groups()
    closed = (ord(syllable) - ord("가")) % 28 > 0
    return syllable + (after_consonant if closed else after_vowel)


def _words(words: str) -> list[str]:
    return words.split(", ")


def _forms(word: str) -> list[str]:
    """A form for each gender; a word of one form has it everywhere."""
    forms = word.split("/")
    return forms if len(forms) > 1 else forms * 3
