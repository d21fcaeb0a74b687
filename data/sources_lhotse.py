"""Lhotse's manifests: cuts, or recordings with their supervisions, JSONL or JSONL.gz.

    cuts_{split}.jsonl.gz                                          a cut is a row; texts of its supervisions are joined
    {corpus}_recordings_{split}.jsonl + {corpus}_supervisions_{split}.jsonl     a supervision is a row

A cut of one recording is taken, with the channel that it names. Mixed and padded cuts, and recordings that a command,
an address or a transform makes, are left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import BadSample, DataError
from data.sources import Common, Item, clean_key
from data.sources_lines import LineSource
from data.sources_speech import Lookup, number_of, recorded

_SAME = 0.01  # seconds within which a cut is the whole recording
_SUFFIXES = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class Cuts:
    """Rows of cuts, or of supervisions whose recordings are looked up."""

    common: Common
    recordings: Lookup | None = None
    plain: bool = False

    def key_of(self, line: bytes | Any) -> str:
        """The id of a row."""
        return clean_key(id_of(line or b"").decode(errors="replace"))

    def item(self, row: Any, key: str) -> Item:
        """The item of a row."""
        if self.recordings is None:
            recording, supervisions = row.get("recording"), row.get("supervisions")
            if row.get("type", "MonoCut") not in ("MonoCut", "MultiCut", "Cut"):
                raise BadSample(f"cut is not of one recording: its type is {str(row['type'])[:40]}")
        else:
            recording, supervisions = self._recording(row), [row]
        if not isinstance(recording, Mapping):
            raise BadSample("no recording: features cannot be turned back into sound")
        if not isinstance(supervisions, Sequence) or not all(isinstance(each, Mapping) for each in supervisions):
            raise BadSample("no text: supervisions are missing")
        supervisions = sorted(supervisions, key=lambda each: number_of(each, "start", 0.0) or 0.0)
        texts = [each["text"] for each in supervisions if isinstance(each.get("text"), str) and each["text"].strip()]
        if not texts:
            raise BadSample("no text: no supervision has one")
        media = self.common.media()
        part = recorded(media, self.common.recording, *_stretch(row, recording))
        names = {
            name: {value for each in supervisions if isinstance(value := each.get(name), str)}
            for name in ("language", "speaker")
        }
        about = self.common.about({name: values.pop() for name, values in names.items() if len(values) == 1})
        messages = self.common.transcribed(part, " ".join(texts), about)
        return media.item(clean_key(str(row.get("id") or key)), messages=messages, about=about)

    def _recording(self, row: Mapping[str, Any]) -> Any:
        assert self.recordings is not None
        line = self.recordings.get(str(row.get("recording_id")))
        if line is None:
            raise BadSample(f"not in {self.recordings.path.name}: {str(row.get('recording_id'))[:80]}")
        try:
            return json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadSample(f"recording is not JSON: {error}") from None


def lhotse(source: Path, common: Common) -> dict[str, LineSource]:
    """Splits of a file of cuts, or of a folder. Raises DataError for a folder of something else."""
    if source.is_file():
        return {"train": _cuts("train", source, common)}
    if not source.is_dir():
        raise DataError(f"{source}: no such file or folder")
    files = sorted(path for path in source.iterdir() if path.name.endswith(_SUFFIXES))
    splits = {}
    for path in files:
        for word in ("cuts", "supervisions"):
            if word not in path.name:
                continue
            split = path.name.partition(word)[2].partition(".")[0].strip("-_") or "train"
            if split in splits:
                raise DataError(f"{path}: {splits[split].files[0].name} has the same split {split}; give one file")
            splits[split] = _cuts(split, path, common) if word == "cuts" else _supervisions(split, path, common)
    if not splits:
        raise DataError(f"{source}: holds no cuts*.jsonl and no supervisions*.jsonl, also none with .gz")
    return splits


def id_of(line: bytes | Any) -> bytes:
    """The id of a line of JSON, or of an object; empty where it has none."""
    if isinstance(line, bytes):
        try:
            line = json.loads(line)
        except (ValueError, RecursionError):
            return b""
    name = line.get("id") if isinstance(line, dict) else None
    return str(name).encode(errors="replace") if name is not None else b""


def _cuts(split: str, path: Path, common: Common) -> LineSource:
    return LineSource(split, [path], [path.name.partition(".")[0]], Cuts(common), keyed=True)


def _supervisions(split: str, path: Path, common: Common) -> LineSource:
    stem = path.name.removesuffix(".gz").removesuffix(".jsonl").replace("supervisions", "recordings")
    found = [path.with_name(stem + suffix) for suffix in _SUFFIXES if path.with_name(stem + suffix).is_file()]
    if not found:
        raise DataError(f"{path}: beside it is no {stem}.jsonl, also none with .gz")
    recordings = Lookup(found[0], id_of)
    parser = Cuts(common, recordings)
    return LineSource(split, [path], [path.name.partition(".")[0]], parser, keyed=True, digest=recordings.digest)


def _stretch(row: Mapping[str, Any], recording: Mapping[str, Any]) -> tuple[Any, float, float | None, int | None]:
    """(path, start, seconds, channel); a whole recording of one channel is (path, 0, None, None)."""
    if recording.get("transforms"):
        raise BadSample("recording is transformed: write the transformed audio to files first")
    sources = recording.get("sources")
    if not isinstance(sources, Sequence) or not all(isinstance(each, Mapping) for each in sources) or not sources:
        raise BadSample("no recording: it has no sources")
    wanted = row.get("channel", 0)
    channels = wanted if isinstance(wanted, list) else [wanted]
    if not all(isinstance(channel, int) for channel in channels):
        raise BadSample(f"channel is not a number: {str(wanted)[:40]}")
    source = next((each for each in sources if set(channels) <= set(_channels(each))), None)
    if source is None:
        raise BadSample(f"channel is not there: {str(wanted)[:40]} in no source of the recording")
    kind = source.get("type")
    if kind == "command":
        raise BadSample(f"audio is a command, which is never run: {str(source.get('source'))[:80]}")
    if kind != "file":
        raise BadSample(f"recording is no file: its type is {str(kind)[:40]}")
    held = _channels(source)
    every = len(channels) == len(held)
    if not every and len(channels) != 1:
        raise BadSample(f"channels: a cut of {len(channels)} of {len(held)} channels; take one or all")
    start, seconds = number_of(row, "start", 0.0) or 0.0, number_of(row, "duration", None)
    whole = number_of(recording, "duration", None)
    if start == 0 and (seconds is None or whole is not None and abs(whole - seconds) < _SAME):
        seconds = None
    return source.get("source"), start, seconds, None if every else held.index(channels[0])


def _channels(source: Mapping[str, Any]) -> list[int]:
    channels = source.get("channels")
    return [channel for channel in channels if isinstance(channel, int)] if isinstance(channels, list) else [0]
