"""How an answer is graded: what evaluation knows of a sample besides its conversation, under "grading" in its JSON.

    {"messages": [...], "grading": {"answers": ["7", "seven"]}}                              several references
    {"messages": [...], "grading": {"choices": ["a dog", "a cat"], "correct": 1}}            multiple choice
    {"messages": [...], "grading": {"answers": ["in May"], "position": 0.83, "group": "history"}}

All of it is optional: without it the reference is the text of the last answer. Training takes no notice of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from data.errors import BadSample

MAX_CHOICES = 26  # each has a letter
MAX_ANSWERS = 100


@dataclass(frozen=True)
class Grading:
    """What an answer is compared with."""

    answers: tuple[str, ...] = ()  # accepted references, one for each annotator or caption writer, repeats and all
    choices: tuple[str, ...] = ()  # of a multiple choice, A first; for likelihoods, word for word what may be answered
    correct: int = -1  # which of the choices is right, from 0; -1 where there are none
    position: float = -1.0  # where in the recording the answer lies, from 0 to 1; -1 where that is unknown
    group: str = ""  # a row of its own in the tables, for instance a subject

    def __post_init__(self) -> None:
        """Raise BadSample for what cannot be graded by."""
        if any(not text.strip() for text in (*self.answers, *self.choices)):
            raise BadSample("grading: an answer or a choice is empty")
        if len(self.answers) > MAX_ANSWERS or len(self.choices) > MAX_CHOICES:
            raise BadSample(f"grading: at most {MAX_ANSWERS} answers and {MAX_CHOICES} choices")
        if len(self.choices) == 1:
            raise BadSample("grading.choices: one choice is none, give at least two")
        if self.choices and not 0 <= self.correct < len(self.choices):
            raise BadSample(f"grading.correct is {self.correct}, must be from 0 to {len(self.choices) - 1}")
        if self.correct != -1 and not self.choices:
            raise BadSample("grading.correct without grading.choices")
        if self.position != -1 and not (math.isfinite(self.position) and 0 <= self.position <= 1):
            raise BadSample(f"grading.position is {self.position}, must be from 0 to 1")
        if len(self.group) > 200 or not self.group.isprintable():
            raise BadSample("grading.group must be a printable string of at most 200 characters")

    @property
    def letter(self) -> str:
        """Of the right choice."""
        return letter(self.correct) if self.choices else ""

    def plain(self) -> dict[str, Any]:
        """As it stands in JSON: what differs from the defaults."""
        defaults = asdict(Grading())
        return {key: value for key, value in asdict(self).items() if value != defaults[key]}


def letter(place: int) -> str:
    """Of a choice, counted from 0."""
    return chr(ord("A") + place)


def parse_grading(value: Any) -> Grading:
    """Grading of plain values. Raises BadSample, with the place."""
    if not isinstance(value, Mapping):
        raise BadSample('"grading" is not an object')
    unknown = sorted(set(map(str, value)) - set(asdict(Grading())))
    if unknown:
        raise BadSample(f"grading has unknown keys: {', '.join(unknown)}")
    correct, position, group = value.get("correct", -1), value.get("position", -1.0), value.get("group", "")
    if not isinstance(correct, int) or isinstance(correct, bool):
        raise BadSample(f"grading.correct is {correct!r}, must be a whole number")
    if not isinstance(position, int | float) or isinstance(position, bool):
        raise BadSample(f"grading.position is {position!r}, must be a number")
    if not isinstance(group, str):
        raise BadSample(f"grading.group is {group!r}, must be text")
    answers, choices = (_texts(value.get(key, []), key) for key in ("answers", "choices"))
    return Grading(answers, choices, correct, float(position), group)


def _texts(value: Any, key: str) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(text, str) for text in value):
        raise BadSample(f"grading.{key} must be a list of texts")
    return tuple(value)
