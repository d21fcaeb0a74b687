"""Folders of files: clips named {label}_{speaker}_{n}.wav, also in a tar, and plain text.

    labelled_clips --> train, heldout, speaker        texts --> train: one document a file, a line or a row of JSONL

Nothing is extracted from a tar: members are read by byte range; links, devices and paths that leave it are refused.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import BadSample, DataError
from data.sources import (
    Common,
    Item,
    ListedSource,
    Read,
    Row,
    Source,
    Span,
    check_size,
    clean_key,
    distinct,
    files_in,
    read_file,
)
from data.sources_lines import LineSource
from data.tar import read_members, read_range

_GZ = ("", ".gz")


def labelled_clips(
    path: Path,
    texts: Mapping[str, str],
    common: Common,
    *,
    heldout_speakers: Sequence[str] = (),
    holdout: float = 0.0,
    seed: int = 0,
) -> dict[str, ListedSource]:
    """Splits train, heldout and speaker of files named {label}_{speaker}_{n}.wav in a folder or a tar.

    `texts` maps labels to what is said; a label without an entry is said as it is written, unless `texts` has
    entries at all. `holdout` is the share of the training speakers' takes that goes to heldout, chosen by
    `seed`.
    """
    if not 0.0 <= holdout < 1.0:
        raise DataError(f"--holdout {holdout}: must be 0 or more and below 1")
    rows, keys, digest = [], set(), hashlib.sha256()
    for name, size, read in _tar_files(path) if path.is_file() else _folder_files(path):
        digest.update(f"{name} {size}\n".encode())
        item = _clip(name, read, texts, common)
        if isinstance(item, Item):
            item = BadSample(f"key occurs twice: {item.record.key}") if item.record.key in keys else item
            keys.update([item.record.key] if isinstance(item, Item) else [])
        rows.append(Row(name, item))
    usable = [row for row in rows if isinstance(row.item, Item)]
    speakers = {_speaker(row) for row in usable}
    unknown = sorted(set(heldout_speakers) - speakers)
    if unknown and usable:
        raise DataError(f"--eval-speaker {', '.join(unknown)}: not in {path}; there are {', '.join(sorted(speakers))}")
    own = [row for row in usable if _speaker(row) not in heldout_speakers]
    chosen = set(np.random.default_rng(seed).permutation(len(own))[: round(holdout * len(own))].tolist())
    bad = [row for row in rows if not isinstance(row.item, Item)]
    splits = {
        "train": bad + [row for i, row in enumerate(own) if i not in chosen],
        "heldout": [row for i, row in enumerate(own) if i in chosen],
        "speaker": [row for row in usable if _speaker(row) in heldout_speakers],
    }
    return {
        name: ListedSource(name, chosen_rows, digest.hexdigest()) for name, chosen_rows in splits.items() if chosen_rows
    }


def _clip(name: str, read: Read, texts: Mapping[str, str], common: Common) -> Item | BadSample:
    match = re.fullmatch(r"((?P<label>[^.]+)_(?P<speaker>[^_.]+)_\d+)\.(?:wav|WAV)", name)
    try:
        if not match:
            raise BadSample("not named label_speaker_number.wav")
        label, speaker, stem = match["label"], match["speaker"], match[1]
        if texts and label not in texts:
            raise BadSample(f"label is not among --names: {label}")
        media = common.media()
        about = common.about({"speaker": speaker})
        part = media.add(common.recording, "wav", read, name)
        messages = common.transcribed(part, texts.get(label, label), about)
        return media.item(clean_key(stem), messages=messages, about=about)
    except BadSample as error:
        return error


def _speaker(row: Row) -> str:
    return row.item.record.speaker if isinstance(row.item, Item) else ""


def _folder_files(folder: Path) -> Iterable[tuple[str, int, Read]]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder or tar")
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    return [(path.name, path.stat().st_size, partial(read_file, path, path.name)) for path in paths]


def _tar_files(tar: Path) -> Iterable[tuple[str, int, Read]]:
    found, seen = [], set()
    for member in sorted(read_members(tar), key=lambda member: (member.key, member.extension)):
        name = f"{member.key.rpartition('/')[2]}.{member.extension}"
        if name in seen:
            raise DataError(f"{tar}: holds {name} twice; names of clips must differ")
        seen.add(name)
        found.append((name, member.size, partial(_read_member, tar, name, member.start, member.size)))
    return found


def _read_member(tar: Path, name: str, start: int, size: int) -> bytes:
    check_size(size, name)
    with open(tar, "rb") as file:
        return read_range(file.fileno(), start, size)


@dataclass
class TextFiles:
    """Documents, one a file."""

    name: str
    files: Sequence[Path]
    prefixes: Sequence[str]
    common: Common
    notes: list[str] = field(default_factory=list)

    @property
    def digest(self) -> str:
        """Of names, sizes and times of change."""
        digest = hashlib.sha256()
        for path in self.files:
            found = path.stat()
            digest.update(f"{path.name} {found.st_size} {found.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def spans(self, size: int) -> list[Span]:
        """Jobs of `size` files."""
        return [Span(first, min(size, len(self.files) - first), ()) for first in range(0, len(self.files), size)]

    def read(self, span: Span, media: bool = True) -> Iterator[Row]:
        """The documents of a job."""
        for place in range(span.first, span.first + span.count):
            path = self.files[place]
            try:
                text = read_file(path, path.name).decode("utf-8-sig")
                item = _document(text, self.prefixes[place], self.common, {})
            except UnicodeDecodeError as error:
                item = BadSample(f"not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}")
            except BadSample as error:
                item = error
            yield Row(path.name, item)


@dataclass(frozen=True)
class TextRow:
    """Lines of text, or rows of JSON with a field "text"."""

    common: Common
    plain: bool

    def key_of(self, line: bytes | Any) -> str:
        """Rows name no keys."""
        return ""

    def item(self, row: Any, key: str) -> Item:
        """The document of a row."""
        if self.plain:
            return _document(row, key, self.common, {})
        if not isinstance(row.get("text"), str):
            raise BadSample('no text: "text" is missing or not a string')
        about = {name: row[name] for name in ("language", "speaker") if isinstance(row.get(name), str)}
        return _document(row["text"], key, self.common, about, sorted(set(row) - {"text", *about}))


def _document(text: str, key: str, common: Common, about: Mapping[str, str], unread: Sequence[str] = ()) -> Item:
    return common.media().item(key, segments=[{"type": "text", "text": text}], about=common.about(about), unread=unread)


def texts(source: Path, common: Common, lines: bool = False) -> dict[str, Source]:
    """The split of a file or folder of .txt or .jsonl, also .gz; with `lines` a line of .txt is a document."""
    files = files_in(source, [suffix + gz for suffix in (".txt", ".jsonl") for gz in _GZ], ".txt and no .jsonl")
    rows = [path for path in files if path.name.removesuffix(".gz").endswith(".jsonl")]
    if rows and len(rows) < len(files):
        raise DataError(f"{source}: holds both .txt and .jsonl; convert them one after the other")
    prefixes = distinct(files, source)
    if rows or lines:
        return {"train": LineSource("train", files, prefixes, TextRow(common, plain=not rows))}
    packed = next((path for path in files if path.name.endswith(".gz")), None)
    if packed:
        raise DataError(f"{packed}: a gzipped text is read by lines only: give --lines")
    return {"train": TextFiles("train", files, prefixes, common)}
