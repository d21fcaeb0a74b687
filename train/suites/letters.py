"""Which choice a generated answer means.

"B", "(b)", "B. a cat", "The answer is B.", "a cat"  -->  1
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from train.word_errors import normalise

_ALONE = re.compile(r"[(\[*\s]*([A-Za-z])[)\]*.:,\s]*$")  # nothing but a letter
_FIRST = re.compile(r"[(\[*\s]*([A-Z])(?:[)\].:,]|\*\*)")  # a letter with its mark, then more
_SAID = re.compile(r"(?:answer|option|choice)\s*(?:is|:)?\s*[:(\[*\s]*([A-Z])\b", re.IGNORECASE)
_BRACKETED = re.compile(r"\(([A-Z])\)")


def chosen(answer: str, choices: Sequence[str]) -> int:
    """Place of the choice that an answer names by its letter or word for word, -1 where it names none.

    Looked for in this order: the whole answer; a letter alone; a letter with a mark at the beginning; "answer is B";
    the last letter in brackets; the words of one choice.
    """
    words = [normalise(choice) for choice in choices]
    if (said := normalise(answer)) in words:
        return words.index(said)
    found = [_ALONE.match(answer), _FIRST.match(answer), _SAID.search(answer), *list(_BRACKETED.finditer(answer))[-1:]]
    for match in found:
        if match and 0 <= (place := ord(match[1].upper()) - ord("A")) < len(choices):
            return place
    within = [place for place, text in enumerate(words) if text and f" {text} " in f" {said} "]
    return within[0] if len(within) == 1 else -1
