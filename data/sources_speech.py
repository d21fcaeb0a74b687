"""Lists of recordings as speech toolkits keep them: folders of Kaldi, manifests of Lhotse and of NeMo.

    Kaldi    text + wav.scp (+ segments, utt2spk, utt2lang)    a line of text is a row, the other files are looked up
    Lhotse   cuts.jsonl, or recordings.jsonl + supervisions.jsonl, also .gz
    NeMo     {"audio_filepath": ..., "text": ..., "offset": ..., "duration": ...} a line

A whole recording keeps its bytes, a stretch of one is cut out as flac. Where a recording is given by a command, the row
is left out: no command is ever run. Looking up takes 16 bytes of memory a line; recordings.jsonl.gz is kept in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from data.errors import BadSample, DataError
from data.sources import Common, Item, Media, clean_key
from data.sources_cut import read_cut
from data.sources_lines import LineSource, lines_of


class Lookup:
    """Lines of a file by name: the first word, or what `name_of` finds. Raises DataError where there is no file."""

    def __init__(self, path: Path, name_of: Callable[[bytes], bytes] | None = None) -> None:
        self.path, self._name_of = path, name_of or _first_word
        self._kept: dict[bytes, bytes] | None = {} if path.name.endswith(".gz") else None
        self._file: IO[bytes] | None = None
        hashes, offsets, digest = [], [], hashlib.sha256()
        for offset, line in lines_of(path, digest):
            name = self._name_of(line)
            if self._kept is not None:
                self._kept.setdefault(name, line)
            hashes.append(_hash(name))
            offsets.append(offset)
        order = np.argsort(np.array(hashes, np.uint64), kind="stable")
        self.hashes = np.array(hashes, np.uint64)[order]
        self._offsets = np.array(offsets, np.int64)[order]
        self.digest = digest.hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        """Travel without the open file."""
        return vars(self) | {"_file": None}

    def get(self, name: str) -> str | None:
        """The first line of this name, None where there is none."""
        wanted = name.encode(errors="replace")
        if self._kept is not None:
            line = self._kept.get(wanted)
            return None if line is None else line.decode(errors="replace").strip()
        self._file = self._file or open(self.path, "rb")
        place = int(np.searchsorted(self.hashes, np.uint64(_hash(wanted))))
        while place < len(self.hashes) and self.hashes[place] == _hash(wanted):
            self._file.seek(self._offsets[place])
            line = self._file.readline()
            if self._name_of(line) == wanted:
                return line.decode(errors="replace").strip()
            place += 1
        return None


@dataclass(frozen=True)
class KaldiText:
    """Lines of a Kaldi folder's `text`."""

    common: Common
    recordings: Lookup
    segments: Lookup | None
    speakers: Lookup | None
    languages: Lookup | None
    plain: bool = True

    def key_of(self, line: bytes | Any) -> str:
        """The name of the utterance."""
        return clean_key(_first_word(line or b"").decode(errors="replace"))

    def item(self, row: Any, key: str) -> Item:
        """The item of a line "utterance words..."."""
        name, _, text = row.strip().replace("\t", " ", 1).partition(" ")
        if not text.strip():
            raise BadSample(f"no text: {name}")
        recording, start, seconds = self._segment(name)
        line = self.recordings.get(recording)
        if line is None:
            raise BadSample(f"not in wav.scp: {recording}")
        media = self.common.media()
        part = recorded(media, self.common.recording, _rest(line), start, seconds)
        found = {
            "speaker": self.speakers and self.speakers.get(name),
            "language": self.languages and self.languages.get(name),
        }
        about = self.common.about({kind: _rest(line) for kind, line in found.items() if line})
        messages = self.common.transcribed(part, text.strip(), about)
        return media.item(clean_key(name), messages=messages, about=about)

    def _segment(self, name: str) -> tuple[str, float, float | None]:
        """(recording, start, seconds) of an utterance; it is the whole recording where there are no segments."""
        if self.segments is None:
            return name, 0.0, None
        line = self.segments.get(name)
        if line is None:
            raise BadSample(f"not in segments: {name}")
        words = line.split()
        try:
            start, end = float(words[2]), float(words[3])
        except (IndexError, ValueError):
            raise BadSample(f"segment is not 'utterance recording start end': {line[:80]}") from None
        return words[1], start, None if end == -1 else end - start


@dataclass(frozen=True)
class Nemo:
    """Rows of a NeMo manifest."""

    common: Common
    plain: bool = False

    def key_of(self, line: bytes | Any) -> str:
        """Rows name no keys."""
        return ""

    def item(self, row: Any, key: str) -> Item:
        """The item of a row."""
        media = self.common.media()
        if not isinstance(row.get("text"), str):
            raise BadSample('no text: "text" is missing or not a string')
        start = number_of(row, "offset", 0.0)
        cut = "offset" in row and row["offset"] is not None
        seconds = number_of(row, "duration", None) if cut else None
        part = recorded(media, self.common.recording, row.get("audio_filepath"), start or 0.0, seconds)
        language = row.get("lang") or row.get("language")
        about = self.common.about({"language": language, "speaker": row.get("speaker")})
        known = {"audio_filepath", "text", "offset", "duration", "lang", "language", "speaker"}
        messages = self.common.transcribed(part, row["text"], about)
        return media.item(key, messages=messages, about=about, unread=sorted(set(row) - known))


def recorded(
    media: Media, kind: str, path: Any, start: float, seconds: float | None, channel: int | None = None
) -> dict[str, Any]:
    """A part of `kind` ("audio" or "speech") for a recording, or for a stretch of one."""
    if start == 0 and seconds is None and channel is None:
        return media.part(kind, path)
    _, place = media.folder.find(kind, path)
    read = partial(read_cut, place, path, start, seconds, channel)
    return media.add(kind, "flac", read, (place, start, seconds, channel))


def kaldi(folder: Path, common: Common) -> dict[str, LineSource]:
    """The split of a Kaldi folder. Raises DataError where it lacks `text` or `wav.scp`."""
    for name in ("text", "wav.scp"):
        if not (folder / name).is_file():
            raise DataError(f"{folder}: is no Kaldi folder with transcripts, it lacks the file {name}")
    optional = {
        name: Lookup(folder / name) for name in ("segments", "utt2spk", "utt2lang") if (folder / name).is_file()
    }
    recordings, texts = Lookup(folder / "wav.scp"), Lookup(folder / "text")
    segments = optional.get("segments")
    parser = KaldiText(common, recordings, segments, optional.get("utt2spk"), optional.get("utt2lang"))
    digest = "".join(lookup.digest for lookup in (recordings, *optional.values()))
    source = LineSource("train", [folder / "text"], [folder.name], parser, keyed=True, digest=digest)
    silent = len(np.setdiff1d((segments or recordings).hashes, texts.hashes))
    if silent:
        listed = (segments or recordings).path.name
        source.notes.append(f"{silent} utterances of {listed} have no line in text: nothing was made of them")
    return {"train": source}


def number_of(row: Mapping[str, Any], name: str, default: float | None) -> float | None:
    """A number of seconds that a row holds. Raises BadSample for anything else than a number of 0 or more."""
    value = row.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
        raise BadSample(f"{name} is not a number of seconds: {str(value)[:40]}")
    return float(value)


def _first_word(line: bytes) -> bytes:
    return line.split(maxsplit=1)[0] if line.strip() else b""


def _rest(line: str) -> str:
    """What follows the first word."""
    return line.split(maxsplit=1)[-1].strip() if len(line.split(maxsplit=1)) > 1 else ""


def _hash(name: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")
