"""docs/troubleshooting.md quotes what the program prints: each line is in the source, but for what a run fills in."""

from __future__ import annotations

import re

import pytest

from tests.docs.commands import ROOT, blocks

PAGE = (ROOT / "docs/troubleshooting.md").read_text()
# What stands for things that a run fills in.
FILLED = re.compile(r"\b[A-Z]+\d?\b|\.\.\.|spike for|steps: loss|deviations\)|'optim\.lrr'|\"\.\.\.\"|\b2\b")
LEAST = 9  # letters of a piece that is looked for


def source() -> str:
    """All strings of the program, those that are written in several pieces joined, without what is filled in."""
    text = "".join(path.read_text() for part in ("train", "data") for path in sorted((ROOT / part).rglob("*.py")))
    return re.sub(r"\{[^{}]*\}", "{}", re.sub(r"\"\s*\n\s*f?\"", "", text))


def quoted() -> list[str]:
    """First cells of tables headed "the line", and lines of blocks that begin with an error or are one."""
    rows = re.findall(r"^\| (`.+?`) \|", PAGE, re.MULTILINE)
    lines = [each for row in rows for each in re.findall(r"`([^`]+)`", row) if " " in each]
    return lines + [line.strip() for _, line, language in blocks(PAGE) if language == "indented"]


@pytest.fixture(scope="module")
def printed() -> str:
    return source()


@pytest.mark.parametrize("line", quoted())
def test_the_program_prints_it(line: str, printed: str) -> None:
    pieces = [piece.strip(" :;,()[]'\"") for piece in FILLED.split(line.removeprefix("error: "))]
    missing = [piece for piece in pieces if len(piece) >= LEAST and piece not in printed]
    assert not missing


def test_enough_is_quoted() -> None:
    assert len(quoted()) > 25
