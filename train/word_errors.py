"""Word errors of answers: the normalisation of text and the counts of jiwer, by group.

    reference, answer --normalise--> words --jiwer--> substitutions, deletions, insertions --> Row of a group

Text is compared in lower case without punctuation; Chinese and Japanese characters count as words of their own, so that
their rate is the character error rate, as is usual.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jiwer

from data.prompts import Prompt


@dataclass(frozen=True)
class Row:
    """Word errors and right answers of one language, of one source, or of all."""

    group: str
    num_samples: int
    num_right: int  # answers that are the reference, compared as words are
    num_words: int
    substitutions: int
    deletions: int
    insertions: int

    @property
    def wer(self) -> float:
        """Errors per reference word."""
        return (self.substitutions + self.deletions + self.insertions) / max(1, self.num_words)

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.num_right / max(1, self.num_samples)


class Errors(NamedTuple):
    """Of one answer, in words or in characters."""

    length: int  # of the reference
    substitutions: int
    deletions: int
    insertions: int

    @property
    def total(self) -> int:
        """All errors."""
        return self.substitutions + self.deletions + self.insertions


def normalise(text: str) -> str:
    """Lower case, no punctuation, single spaces, CJK characters apart."""
    out = []
    for char in unicodedata.normalize("NFKC", text).lower():
        if unicodedata.category(char)[0] in "PS":
            out.append(" " if char != "'" else "")
        elif unicodedata.east_asian_width(char) in "WF":
            out.append(f" {char} ")
        else:
            out.append(char)
    return " ".join("".join(out).split())


def word_errors(reference: str, answer: str) -> Errors:
    """Of normalised texts. Where nothing was said every word of the answer is inserted."""
    if not reference:
        return Errors(0, 0, 0, len(answer.split()))
    found = jiwer.process_words(reference, answer)
    return Errors(len(reference.split()), found.substitutions, found.deletions, found.insertions)


def character_errors(reference: str, answer: str) -> Errors:
    """Of normalised texts, spaces not counted: languages differ in what they part by spaces."""
    reference, answer = reference.replace(" ", ""), answer.replace(" ", "")
    if not reference:
        return Errors(0, 0, 0, len(answer))
    found = jiwer.process_characters(reference, answer)
    return Errors(len(reference), found.substitutions, found.deletions, found.insertions)


def error_rows(pairs: Sequence[tuple[Prompt, str]]) -> tuple[Row, ...]:
    """Errors of answers: a row for each language, then one for all."""
    return (*grouped_rows(pairs, lambda prompt: prompt.language), _row("all", pairs))


def grouped_rows(pairs: Sequence[tuple[Prompt, str]], group: Callable[[Prompt], str]) -> tuple[Row, ...]:
    """Errors of answers: a row for each group of questions, in the order of their names."""
    groups: dict[str, list[tuple[Prompt, str]]] = {}
    for pair in pairs:
        groups.setdefault(group(pair[0]), []).append(pair)
    return tuple(_row(name, groups[name]) for name in sorted(groups))


def _row(group: str, pairs: Sequence[tuple[Prompt, str]]) -> Row:
    texts = [(normalise(prompt.reference), normalise(answer)) for prompt, answer in pairs]
    found = [word_errors(*both) for both in texts]
    words, *errors = (sum(column) for column in zip(*found, strict=True)) if found else (0, 0, 0, 0)
    return Row(group, len(pairs), sum(a == b for a, b in texts), words, *errors)
