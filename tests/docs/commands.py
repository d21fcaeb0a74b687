"""The commands of a page: lines of its code blocks that begin with a program.

    page --fenced and indented blocks--> lines --continued lines joined, comments cut--> Command(page, line, text)

Every line of a `bash` block is a command. In other blocks a line is one whose first word is a program in PROGRAMS or a
file at the root of the checkout. Blocks of another language (yaml, json, text, python) hold none.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = {
    "python", "python3", "torchrun", "make", "pip", "omniloom", "deepspeed", "mkdocs", "tensorboard", "wandb",
    "sbatch", "srun", "scancel", "scontrol", "bash", "sh", "source", ".", "git", "apt-get", "cd", "export", "cp",
    "mv", "rm", "mkdir", "curl", "wget", "tar", "docker",
}  # fmt: skip
SHELL = ("bash", "sh", "console", "shell")
FENCE = re.compile(r"^\s*```(\w*)")


@dataclass(frozen=True)
class Command:
    """A command as it is written: `page` below the checkout, first `line`, `text` without comments."""

    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line} {self.text}"


def pages() -> list[Path]:
    """Every page that a user reads."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]


def commands(page: Path, name: str = "") -> list[Command]:
    """Commands of a page, in their order."""
    name = name or str(page.relative_to(ROOT))
    found: list[Command] = []
    open_line, parts = 0, []
    for number, line, language in blocks(page.read_text()):
        if not parts and not is_command(line, language):
            continue
        open_line = open_line if parts else number
        text = without_comment(line)
        parts.append(text.removesuffix("\\").strip())
        if not text.endswith("\\"):
            found.append(Command(name, open_line, " ".join(parts)))
            parts = []
    assert not parts, f"{name}:{open_line}: ends in a backslash"
    return found


def blocks(text: str) -> list[tuple[int, str, str]]:
    """(number, line, language) of the lines in code blocks; an indented block has the language "indented"."""
    found, fence = [], None
    before_blank, inside = True, False
    for number, line in enumerate(text.splitlines(), 1):
        if match := FENCE.match(line):
            fence, inside = (match[1] if fence is None else None), False
        elif fence is not None:
            found.append((number, line, fence))
        elif line.startswith("    ") and (inside or before_blank):
            found.append((number, line, "indented"))
            inside = True
        elif line.strip():
            inside = False
        before_blank = not line.strip()
    return found


def is_command(line: str, language: str) -> bool:
    """Whether a line of a block begins a command."""
    words = line.split()
    if not words or words[0].startswith("#"):
        return False
    if language in SHELL:
        return True
    return language in ("", "indented") and (words[0] in PROGRAMS or (ROOT / words[0]).is_file())


def without_comment(line: str) -> str:
    """The line without `# ...`, which begins after a space and outside quotes, and without spaces at its ends."""
    quote = ""
    for place, letter in enumerate(line):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter == "#" and (not place or line[place - 1].isspace()):
            return line[:place].strip()
    return line.strip()


def words(text: str) -> list[str]:
    """The words of a command as a shell would pass them. Optional ones, in brackets, are given: [seed=0] is seed=0."""
    return [word[1:-1] if re.fullmatch(r"\[[\w.-]+=[^\[\]]*\]", word) else word for word in shlex.split(text)]
