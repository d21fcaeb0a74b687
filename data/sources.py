"""What every converter has in common: rows of a source become items, whose media are read only when written.

    source --spans--> rows of one job --read--> Item: JSON of a sample + how to read its media --load--> SampleRecord

A source is one split. Its first pass finds where each job's rows start, so any process can read any job's rows alone,
and memory does not grow with the source. Media are files in one folder: a path that leaves it, a link, an address or
a device is not opened. A row that cannot be used says why, as "reason: details", and where it stands.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from data.errors import BadSample, DataError
from data.sample import EXTENSIONS, MAX_JSON_BYTES, SPEECH, SampleRecord, check_record

MAX_MEDIA_BYTES = 1 << 30
MAX_KEY = 200
INSTRUCTIONS = {"audio": "Transcribe.", "image": "Describe the image.", "video": "Describe the video."}
# What is asked where the answer is a recording. It does not hold the text, or a Talker learns to read the question.
SAY = "Say it."
_KEY = re.compile(r"[^./\\\s][^./\\\n\r\0]{0,199}")  # a dot would end the key, a slash would open a folder
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:")

Read = Callable[[], bytes]


class Span(NamedTuple):
    """The rows of one job."""

    first: int  # number of the first row in the split
    count: int
    start: tuple[int, ...]  # where the source finds the first row, in its own terms


@dataclass(frozen=True)
class Item:
    """A sample whose media are yet to be read."""

    record: SampleRecord  # without media
    media: Mapping[str, Read] = field(default_factory=dict)  # by member extension
    unread: tuple[str, ...] = ()  # fields of the row that nothing was made of

    def load(self) -> SampleRecord:
        """The whole sample. Raises BadSample where a medium cannot be read."""
        return replace(self.record, media={extension: read() for extension, read in self.media.items()})


class Row(NamedTuple):
    """A row of a source: an item, or why there is none."""

    place: str  # "list.jsonl:12"
    item: Item | BadSample


class Source(Protocol):
    """One split of what is to be converted. It travels to worker processes."""

    name: str
    notes: list[str]  # what a user should know besides the counts

    @property
    def digest(self) -> str:
        """Changes when the source does; known after `spans`."""
        ...

    def spans(self, size: int) -> list[Span]:
        """Jobs of `size` rows; the first pass over the source. Raises DataError where it is unusable as a whole."""
        ...

    def read(self, span: Span, media: bool = True) -> Iterator[Row]:
        """The rows of a job, in order. Without `media` only the texts of the items are wanted."""
        ...


@dataclass
class ListedSource:
    """A split listed in memory."""

    name: str
    rows: list[Row] = field(default_factory=list)
    digest: str = ""
    notes: list[str] = field(default_factory=list)

    def spans(self, size: int) -> list[Span]:
        """Jobs of `size` rows."""
        return [Span(first, min(size, len(self.rows) - first), ()) for first in range(0, len(self.rows), size)]

    def read(self, span: Span, media: bool = True) -> Iterator[Row]:
        """The rows of a job."""
        yield from self.rows[span.first : span.first + span.count]


@dataclass(frozen=True)
class MediaFolder:
    """Where media files are looked for. They must lie inside unless `outside` allows otherwise."""

    folder: Path
    outside: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", self.folder.resolve())

    def find(self, kind: str, path: Any) -> tuple[str, Path]:
        """(extension, place) of a medium of a kind. Raises BadSample; whether the file is there is seen when read."""
        if not isinstance(path, str) or not path or "\0" in path:
            raise BadSample(f"{kind} without a path: {str(path)[:60]!r}")
        if path.rstrip().endswith("|"):
            raise BadSample(f"{kind} is a command, which is never run: {path[:80]}")
        if _ADDRESS.match(path):
            raise BadSample(f"{kind} is an address, not a file: {path[:80]}")
        extension = path.rpartition(".")[2].lower()
        if extension not in EXTENSIONS["audio" if kind == "speech" else kind]:
            raise BadSample(f"unknown extension of {kind}: {path[-80:]}")
        return extension, self.inside(path)

    def inside(self, path: str) -> Path:
        """The place of a path, links followed. Raises BadSample where it lies outside."""
        try:
            place = (self.folder / path).resolve()
        except (OSError, RuntimeError, ValueError) as error:
            raise BadSample(f"path cannot be followed: {path[:80]}: {error}") from None
        if not self.outside and not place.is_relative_to(self.folder):
            home = f"{self.folder} (--allow-outside lets it)"
            raise BadSample(f"path leaves the media folder: {path[:80]} is not in {home}")
        return place


class Media:
    """The media of one sample while it is put together; parts hold their numbers until `item` names the members.

    Speech of an answer is apart from them: its member is named at once, and does not count.
    """

    def __init__(self, folder: MediaFolder, sound: bool = False) -> None:
        self.folder, self.sound = folder, sound
        self.reads: list[tuple[str, Read]] = []
        self.speech: dict[str, Read] = {}
        self._known: dict[tuple, int] = {}

    def part(self, kind: str, path: Any) -> dict[str, Any]:
        """A part for a file. The same file twice is one member."""
        extension, place = self.folder.find(kind, path)
        return self.add(kind, extension, partial(read_file, place, path), place)

    def add(self, kind: str, extension: str, read: Read, name: Any) -> dict[str, Any]:
        """A part for bytes that `read` gives; equal names are the same bytes."""
        if kind == "speech":
            self.speech[SPEECH + extension] = read  # a second one is refused by `item`
            return {"type": kind, kind: SPEECH + extension}
        number = self._known.setdefault((kind, name), len(self.reads))
        if number == len(self.reads):
            self.reads.append((extension, read))
        sound = {"sound": True} if kind == "video" and self.sound else {}
        return {"type": kind, kind: number} | sound

    def item(
        self,
        key: str,
        *,
        messages: Sequence[Mapping[str, Any]] = (),
        segments: Sequence[Mapping[str, Any]] = (),
        about: Mapping[str, str] | None = None,
        unread: Sequence[str] = (),
    ) -> Item:
        """The item, checked, with members named "flac", or "0.jpg", "1.jpg" where there are several.

        Raises BadSample.
        """
        alone = len(self.reads) == 1
        names = [extension if alone else f"{i}.{extension}" for i, (extension, _) in enumerate(self.reads)]
        named = []
        for message in messages:
            content = message["content"]
            named.append({**message, "content": content if isinstance(content, str) else _named(content, names)})
        about = {"language": "", "source": "", "speaker": "", **(about or {})}
        record = SampleRecord(key, named, {}, about["language"], about["source"], about["speaker"])
        record = replace(record, segments=_named(segments, names))
        check_key(key)
        check_record(record)
        if segments and not self.reads and not any(part["text"].strip() for part in record.segments):
            raise BadSample("no text: there are only spaces")
        try:
            size = len(record.to_json())
        except UnicodeEncodeError:
            raise BadSample("text holds half a character (a lone surrogate)") from None
        if size > MAX_JSON_BYTES:
            raise BadSample(f"text too long: {size} bytes with what goes with it, the limit is {MAX_JSON_BYTES}")
        reads = {name: read for name, (_, read) in zip(names, self.reads, strict=True)}
        return Item(record, reads | self.speech, tuple(sorted(unread)))


@dataclass(frozen=True)
class Common:
    """What the command line says for every kind of source."""

    folder: MediaFolder
    source: str  # name of the source of rows that name none
    language: str = ""
    instruction: str | None = None  # what is asked beside media; None: what suits their kind
    sound: bool = False  # films are heard as well as seen
    speaker: str = ""  # of rows that name none
    speak: bool = False  # a recording is what the answer is to sound like, not what is heard

    @property
    def recording(self) -> str:
        """The kind of part that a row's recording becomes."""
        return "speech" if self.speak else "audio"

    def transcribed(self, part: Mapping[str, Any], text: str, about: Mapping[str, str]) -> list[dict[str, Any]]:
        """The conversation about a recording, a part of the kind `recording`, whose transcript is `text`.

        Raises BadSample where it is to be spoken and has no transcript or no speaker.
        """
        if not self.speak:
            return asked([part], self.instruction, text)
        if not text.strip():
            raise BadSample("no transcript: its text is empty")
        if not about["speaker"]:
            raise BadSample("no speaker: --speaker NAME is that of rows that name none")
        wanted = (SAY if self.instruction is None else self.instruction).replace("{text}", text)
        answer = [{"type": "text", "text": text}, {**part, "speaker": about["speaker"]}]
        return [{"role": "user", "content": wanted}, {"role": "assistant", "content": answer}]

    def media(self) -> Media:
        """To put together one sample."""
        return Media(self.folder, self.sound)

    def about(self, row: Mapping[str, Any]) -> dict[str, str]:
        """Language, source and speaker of a row. Raises BadSample where one is no string."""
        found = {"language": self.language, "source": self.source, "speaker": self.speaker}
        for name in found:
            value = row.get(name)
            if value is not None and not isinstance(value, str):
                raise BadSample(f'"{name}" must be a string')
            found[name] = value or found[name]
        return found


def _named(parts: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Parts with names of members in place of numbers."""
    return [
        {**part, part["type"]: names[part[part["type"]]]} if isinstance(part[part["type"]], int) else dict(part)
        for part in parts
    ]


def asked(parts: Sequence[Mapping[str, Any]], instruction: str | None, answer: str) -> list[dict[str, Any]]:
    """A conversation: media and an instruction (that of the first medium's kind where it is None), then the answer."""
    if instruction is None:
        instruction = INSTRUCTIONS[parts[0]["type"]]
    question = [*parts, {"type": "text", "text": instruction}] if instruction else list(parts)
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


def check_key(key: str) -> None:
    """Raise BadSample unless a tar may hold members of this key."""
    if not _KEY.fullmatch(key):
        raise BadSample(f"key needs 1 to {MAX_KEY} characters without dots, slashes, line ends: {key[:80]!r}")


def clean_key(name: str) -> str:
    """A key made of any name: what a key may not hold becomes "_"."""
    text = "".join(letter if letter.isprintable() and letter not in "./\\ " else "_" for letter in name)
    return text[-MAX_KEY:] or "_"


def read_file(place: Path, name: str | None = None) -> bytes:
    """The bytes of a regular file within the limit; `name` is what messages call it. Raises BadSample."""
    check_file(place, name)
    try:
        return place.read_bytes()
    except OSError as error:
        raise BadSample(f"file cannot be read: {str(name or place)[:120]}: {error.strerror}") from None


def check_file(place: Path, name: str | None = None) -> None:
    """Raise BadSample unless `place` is a regular file with bytes, within the limit."""
    name = str(name or place)[:120]
    try:
        found = os.stat(place)
    except FileNotFoundError:
        raise BadSample(f"no such file: {name}") from None
    except (OSError, ValueError) as error:
        raise BadSample(f"file cannot be read: {name}: {getattr(error, 'strerror', error)}") from None
    if not stat.S_ISREG(found.st_mode):
        raise BadSample(f"not a regular file: {name}")
    check_size(found.st_size, name)


def check_size(size: int, name: str) -> None:
    """Raise BadSample for a medium without bytes or with too many."""
    if size == 0:
        raise BadSample(f"empty file: {name} has 0 bytes")
    if size > MAX_MEDIA_BYTES:
        raise BadSample(f"file too large: {name} has {size} bytes, the limit is {MAX_MEDIA_BYTES}")


def distinct(paths: Sequence[Path], root: Path) -> list[str]:
    """A short name for each file, to begin its rows' keys: "a_b" for a/b.jsonl, a number behind where two agree."""
    names = []
    for path in paths:
        relative = path.relative_to(root) if path.is_relative_to(root) and path != root else Path(path.name)
        names.append(clean_key(str(relative.with_name(relative.name.partition(".")[0])))[-150:])
    repeated = len(set(names)) < len(names)
    return [f"{name}-{number}" for number, name in enumerate(names)] if repeated else names


def files_in(source: Path, suffixes: Sequence[str], what: str) -> list[Path]:
    """The file `source`, or those of a folder and its subfolders whose names end so. Raises DataError for none."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise DataError(f"{source}: no such file or folder")
    found = (Path(folder, name) for folder, _, names in os.walk(source) for name in names)
    paths = sorted(path for path in found if path.name.endswith(tuple(suffixes)) and path.is_file())
    if not paths:
        raise DataError(f"{source}: holds no {what}")
    return paths
