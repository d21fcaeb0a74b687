"""Files of rows: JSONL, a JSON array, plain text by lines, each also gzipped, read from any job's first row on.

    file --first pass: where each job starts, SHA-256, repeated keys--> spans
    span --seek--> line or array element --JSON--> Parser.item --> Row

The first pass keeps one offset for each job, and 16 bytes for each row where rows name their own keys. A broken line is
one row left out; a broken array is refused, since nothing behind the break can be found. A gzipped file has no places
to seek to: each worker unpacks it once, front to back. Cost of the first pass: 3 s for a gigabyte of lines, 9 s for one
of an array, 20 s for one of lines that name keys; then 0.1 ms a row in the workers.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import numpy as np

from data.errors import BadSample, DataError
from data.sources import Item, Row, Span, clean_key

MAX_LINE_BYTES = 16 << 20
_SPACE = " \t\r\n"
_BOM = codecs.BOM_UTF8


class Parser(Protocol):
    """What a format makes of a row."""

    @property
    def plain(self) -> bool:
        """Whether rows are text and not JSON."""
        ...

    def item(self, row: Any, key: str) -> Item:
        """The item of a row, which is an object of JSON or a line of text. `key` serves where it names none.

        Raises BadSample.
        """
        ...

    def key_of(self, line: bytes | Any) -> str:
        """The key that a line, or an element of an array, names itself; "" for none. Need not check anything."""
        ...


@dataclass
class LineSource:
    """Rows of one or more files, in order."""

    name: str
    files: Sequence[Path]
    prefixes: Sequence[str]  # of each file: its rows' keys begin so
    parser: Parser
    keyed: bool = False  # rows may name their own keys
    notes: list[str] = field(default_factory=list)
    digest: str = ""  # before `spans`: of other files that belong to the source
    repeated: frozenset[int] = frozenset()  # rows whose key an earlier one has
    _arrays: dict[int, bool] = field(default_factory=dict)
    _open: dict[int, BinaryIO] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        """Travel without open files."""
        return vars(self) | {"_open": {}}

    def spans(self, size: int) -> list[Span]:
        """Jobs of `size` rows."""
        starts: list[tuple[int, int, int]] = []
        keys, rows, digest = bytearray(), 0, hashlib.sha256(self.digest.encode())
        for place, path in enumerate(self.files):
            self._arrays[place] = _is_array(path)
            digest.update(f"{path.name}\n".encode())
            for offset, number, raw in self._raw(place, 0, 1, digest):
                if rows % size == 0:
                    starts.append((place, offset, number))
                if self.keyed:
                    name = self.parser.key_of(raw) or self._key(place, number)
                    keys += hashlib.blake2b(name.encode(errors="replace"), digest_size=16).digest()
                rows += 1
        self.digest = digest.hexdigest()
        self.repeated = _repeated(keys)
        return [Span(i * size, min(size, rows - i * size), start) for i, start in enumerate(starts)]

    def read(self, span: Span, media: bool = True) -> Iterator[Row]:
        """The rows of a job."""
        place, offset, start = span.start
        row = span.first
        while True:
            for _, number, raw in self._raw(place, offset, start):
                yield self._row(place, number, raw, row in self.repeated)
                row += 1
                if row == span.first + span.count:
                    return
            place, offset, start = place + 1, 0, 1
            if place == len(self.files):
                raise DataError(f"{self.files[-1]}: has fewer rows than before; it must not change while it is read")

    def _raw(self, place: int, offset: int, number: int, digest: Any = None) -> Iterator[tuple[int, int, Any]]:
        """(offset, number, line or element) from a place in a file on; blank lines are passed over.

        A line that is too long is None; an element of an array is parsed already.
        """
        path = self.files[place]
        try:
            file = self._file(place)
            if self._arrays[place]:
                yield from _elements(file, path, offset, number, digest)
            else:
                yield from _lines(file, offset, number, digest)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None

    def _file(self, place: int) -> BinaryIO:
        """The file, kept open: a gzipped one is unpacked from where the last job ended, not from its start."""
        if place not in self._open:
            for other in self._open.values():
                other.close()
            self._open = {place: _opened(self.files[place])}
        return self._open[place]

    def _row(self, place: int, number: int, raw: Any, repeated: bool) -> Row:
        path = self.files[place]
        where = f"{path.name}, entry {number}" if self._arrays[place] else f"{path.name}:{number}"
        try:
            row = raw if self._arrays[place] else _decoded(raw, self.parser.plain)
            if not self.parser.plain and not isinstance(row, dict):
                raise BadSample(f"not a JSON object: {str(row)[:40]}")
            item = self.parser.item(row, self._key(place, number))
            if repeated:
                raise BadSample(f"key occurs twice: {item.record.key}")
        except BadSample as error:
            item = error
        return Row(where, item)

    def _key(self, place: int, number: int) -> str:
        return clean_key(f"{self.prefixes[place]}-{number:08d}")


def lines_of(path: Path, digest: Any = None) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of every line that is not blank and not too long. Raises DataError where they cannot be read."""
    try:
        with _opened(path) as file:
            yield from ((offset, line) for offset, _, line in _lines(file, 0, 1, digest) if line is not None)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _opened(path: Path) -> BinaryIO:
    if path.name.endswith(".gz"):
        return cast(BinaryIO, gzip.open(path, "rb"))
    return open(path, "rb")


def _is_array(path: Path) -> bool:
    """Whether the file is one JSON array and not lines. Raises DataError where it cannot be read."""
    try:
        with _opened(path) as file:
            start = file.read(4096).removeprefix(_BOM).lstrip()
            return start.startswith(b"[") and path.name.removesuffix(".gz").endswith(".json")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _lines(file: BinaryIO, offset: int, number: int, digest: Any) -> Iterator[tuple[int, int, bytes | None]]:
    file.seek(offset)
    while line := file.readline(MAX_LINE_BYTES + 1):
        length, whole = len(line), line
        while not whole.endswith(b"\n") and length > MAX_LINE_BYTES:  # pass over the rest of a line that is too long
            if digest:
                digest.update(whole)
            whole = file.readline(MAX_LINE_BYTES)
            length += len(whole)
            line = b""
            if not whole:
                break
        if digest:
            digest.update(whole)
        if length > MAX_LINE_BYTES:
            yield offset, number, None
        elif line.strip():
            yield offset, number, line if offset else line.removeprefix(_BOM)
        offset, number = offset + length, number + 1


def _decoded(line: bytes | None, plain: bool) -> Any:
    if line is None:
        raise BadSample(f"line too long: over {MAX_LINE_BYTES} bytes")
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise BadSample(f"not UTF-8: byte {error.start} is 0x{line[error.start]:02x}") from None
    if plain:
        return text.rstrip("\r\n")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadSample(f"not JSON: {error}") from None


def _elements(file: BinaryIO, path: Path, offset: int, number: int, digest: Any) -> Iterator[tuple[int, int, Any]]:
    """(byte offset, number, value) of the elements of an array from one on, or from its bracket where offset is 0."""
    window = _Window(file, path, offset, digest)
    if offset == 0:
        window.fill("")
        window.skip("\ufeff" + _SPACE)
        window.drop(1)  # the bracket
    parse = json.JSONDecoder().raw_decode
    while True:
        window.skip(_SPACE + ",")
        if window.text.startswith("]"):
            break
        problem = "it ends within the array"
        try:
            value, end = parse(window.text)
            behind = window.text[end:].lstrip(_SPACE)[:1]
            if behind in (",", "]") and behind:
                yield window.offset, number, value
                window.drop(end)
                number += 1
                continue
            if behind:
                raise DataError(f"{path}: broken JSON: no comma behind entry {number}")
        except RecursionError:
            raise DataError(f"{path}: entry {number} is nested too deeply") from None
        except json.JSONDecodeError as error:
            problem = str(error)
        if len(window.text) > MAX_LINE_BYTES:
            raise DataError(f"{path}: entry {number} is broken, or longer than {MAX_LINE_BYTES} bytes: {problem}")
        if not window.fill(f"entry {number}"):
            raise DataError(f"{path}: broken JSON in entry {number}: {problem}")
    window.drop(1)
    window.skip(_SPACE)
    while digest and not window.text and window.fill("what is behind the array"):
        window.skip(_SPACE)
    if digest and window.text.strip(_SPACE):
        raise DataError(f"{path}: broken JSON: there is more behind the array")


class _Window:
    """The stretch of a file of UTF-8 text that is being looked at, and where it starts."""

    def __init__(self, file: BinaryIO, path: Path, offset: int, digest: Any) -> None:
        self.file, self.path, self.offset, self.digest = file, path, offset, digest
        self.text = ""
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        file.seek(offset)

    def drop(self, count: int) -> None:
        """Pass over characters."""
        self.offset += len(self.text[:count].encode())
        self.text = self.text[count:]

    def skip(self, letters: str) -> None:
        """Pass over those letters, as many as come."""
        self.drop(len(self.text) - len(self.text.lstrip(letters)))

    def fill(self, where: str) -> bool:
        """Read on, twice as far; False at the end of the file. Raises DataError where it is not UTF-8."""
        block = self.file.read(max(1 << 16, len(self.text)))
        if self.digest:
            self.digest.update(block)
        try:
            self.text += self._decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path}: not UTF-8: {error.reason}, in or behind {where}") from None
        return bool(block)


def _repeated(keys: bytearray) -> frozenset[int]:
    """Rows whose key, by its digest of 16 bytes, an earlier row has."""
    if not keys:
        return frozenset()
    digests = np.frombuffer(bytes(keys), "S16")
    order = np.argsort(digests, kind="stable")
    again = digests[order][1:] == digests[order][:-1]
    return frozenset(order[1:][again].tolist())
