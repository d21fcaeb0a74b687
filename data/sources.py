"""Where a converter's samples come from: one list of light items for each split, audio read only when written.

    folder or tar of {label}_{speaker}_{n}.wav | manifest.jsonl | datasets on disk --> {split: Source} -->
    SampleRecord...

Cost: the texts stay in memory, the audio never does. Nothing is extracted from a tar: members are read by
byte range, and links, devices and paths that leave the tar are refused.
"""

import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data.audio import Limits
from data.chat import check_messages, rendered_texts, transcription
from data.errors import BadSample, DataError
from data.sample import AUDIO_EXTENSIONS, SampleRecord
from data.tar import read_members, read_range

MAX_LINE_BYTES = 16 << 20


@dataclass(frozen=True)
class Item:
    """A sample whose audio is yet to be read."""

    key: str
    messages: Sequence[Mapping[str, Any]]
    audio: Mapping[str, Callable[[], bytes]]  # by member extension
    language: str = ""
    source: str = ""
    speaker: str = ""


class Source(Protocol):
    """The samples of one split."""

    left_out: list[str]  # a line for each sample that cannot be used, complete once `records` has ended

    def texts(self) -> Iterator[str]:
        """Every text of the split, to train a tokenizer on."""
        ...

    def records(self) -> Iterator[SampleRecord]:
        """Samples with their audio read, in order."""
        ...


@dataclass
class ListedSource:
    """A split listed in memory."""

    items: list[Item] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def texts(self) -> Iterator[str]:
        """Every text of the split."""
        return itertools.chain.from_iterable(rendered_texts(item.messages) for item in self.items)

    def records(self) -> Iterator[SampleRecord]:
        """Samples with their audio read, in order."""
        for item in self.items:
            try:
                audio = {extension: read() for extension, read in item.audio.items()}
            except BadSample as error:
                self.left_out.append(f"{item.key}: {error}")
                continue
            yield SampleRecord(item.key, item.messages, audio, item.language, item.source, item.speaker)


def labelled_clips(
    path: Path,
    texts: Mapping[str, str],
    *,
    heldout_speakers: Sequence[str] = (),
    holdout: float = 0.0,
    instruction: str,
    language: str = "",
    seed: int = 0,
) -> dict[str, ListedSource]:
    """Splits train, heldout and speaker of files named {label}_{speaker}_{n}.wav in a folder or a tar.

    `texts` maps labels to what is said; a label without an entry is said as it is written, unless `texts` has
    entries at all. `holdout` is the share of the training speakers' takes that goes to heldout, chosen by
    `seed`.
    """
    if not 0.0 <= holdout < 1.0:
        raise DataError(f"--holdout {holdout}: must be 0 or more and below 1")
    files = _tar_files(path) if path.is_file() else _folder_files(path)
    train = ListedSource()
    speakers: set[str] = set()
    pending = []
    for name, read in files:
        label, speaker, stem = _parse_name(name)
        if not speaker:
            train.left_out.append(f"{name}: is not named label_speaker_number.wav")
        elif texts and label not in texts:
            train.left_out.append(f"{name}: label {label!r} is not among --names")
        else:
            messages = transcription("wav", instruction, texts.get(label, label))
            pending.append(Item(stem, messages, {"wav": read}, language, path.stem, speaker))
            speakers.add(speaker)
    unknown = sorted(set(heldout_speakers) - speakers)
    if unknown and pending:
        raise DataError(f"--eval-speaker {', '.join(unknown)}: not in {path}; there are {', '.join(sorted(speakers))}")
    own = [item for item in pending if item.speaker not in heldout_speakers]
    chosen = set(np.random.default_rng(seed).permutation(len(own))[: round(holdout * len(own))].tolist())
    train.items = [item for i, item in enumerate(own) if i not in chosen]
    splits = {
        "train": train,
        "heldout": ListedSource([item for i, item in enumerate(own) if i in chosen]),
        "speaker": ListedSource([item for item in pending if item.speaker in heldout_speakers]),
    }
    return {name: source for name, source in splits.items() if source.items or name == "train"}


def manifest(path: Path, instruction: str, language: str = "") -> dict[str, ListedSource]:
    """Split train of a JSONL manifest. Raises DataError that names the line for one that is not as it should be."""
    source = ListedSource()
    with open(path, "rb") as file:
        for number, line in enumerate(iter(partial(file.readline, MAX_LINE_BYTES + 1), b""), start=1):
            if not line.strip():
                continue
            try:
                source.items.append(_manifest_item(line, number, path, instruction, language))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}:{number}: {error}") from None
    return {"train": source}


def _manifest_item(line: bytes, number: int, path: Path, instruction: str, language: str) -> Item:
    if len(line) > MAX_LINE_BYTES:
        raise BadSample(f"longer than {MAX_LINE_BYTES} bytes")
    entry = json.loads(line)
    if not isinstance(entry, dict):
        raise BadSample("must be a JSON object")
    known = {"audio", "text", "messages", "language", "speaker", "key", "source"}
    if set(entry) - known:
        raise BadSample(f"unknown field {', '.join(sorted(set(entry) - known))}; known are {', '.join(sorted(known))}")
    for name in known - {"messages"}:
        if not isinstance(entry.get(name, ""), str):
            raise BadSample(f'"{name}" must be a string')
    if "messages" in entry:
        if "audio" in entry or "text" in entry:
            raise BadSample('give "messages", or "audio" and "text", not both')
        messages = entry["messages"]
    elif entry.get("audio") and "text" in entry:
        messages = transcription(entry["audio"], instruction, entry["text"])
    else:
        raise BadSample('needs "audio" and "text", or "messages"')
    check_messages(messages)
    messages, audio = _with_members(messages, path.parent)
    return Item(
        key=entry.get("key") or f"{path.stem.replace('.', '_')}-{number:08d}",
        messages=messages,
        audio=audio,
        language=entry.get("language") or language,
        source=entry.get("source") or path.stem,
        speaker=entry.get("speaker", ""),
    )


def _with_members(
    messages: Sequence[Mapping[str, Any]], folder: Path
) -> tuple[list[dict[str, Any]], dict[str, Callable[[], bytes]]]:
    """Messages whose audio parts name members ("0.wav") instead of paths, and how to read each member."""
    audio: dict[str, Callable[[], bytes]] = {}
    renamed = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [dict(part) for part in content]
            for part in content:
                if part["type"] == "audio":
                    extension = known_extension(part["audio"])
                    if not extension:
                        raise BadSample(f"{part['audio']}: is none of {', '.join(AUDIO_EXTENSIONS)}")
                    member = f"{len(audio)}.{extension}"
                    audio[member] = partial(read_file, folder / part["audio"])
                    part["audio"] = member
        renamed.append({**message, "content": content})
    return renamed, audio


def _parse_name(name: str) -> tuple[str, str, str]:
    """(label, speaker, stem) of "label_speaker_number.wav"; an empty speaker where the name is of another kind.

    A label may hold underscores, a speaker may not.
    """
    match = re.fullmatch(r"((?P<label>[^.]+)_(?P<speaker>[^_.]+)_\d+)\.(?:wav|WAV)", name)
    return (match["label"], match["speaker"], match[1]) if match else ("", "", "")


def known_extension(path: str) -> str:
    """The extension of `path` in lower case if it is one of audio, else ""."""
    extension = path.rpartition(".")[2].lower()
    return extension if extension in AUDIO_EXTENSIONS else ""


def _folder_files(folder: Path) -> Iterable[tuple[str, Callable[[], bytes]]]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder or tar")
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    return [(path.name, partial(read_file, path)) for path in paths]


def _tar_files(tar: Path) -> Iterable[tuple[str, Callable[[], bytes]]]:
    members = sorted(read_members(tar), key=lambda member: (member.key, member.extension))
    names = [f"{member.key.rpartition('/')[2]}.{member.extension}" for member in members]
    reads = [partial(_read_member, tar, member.start, member.size) for member in members]
    return zip(names, reads, strict=True)


def _read_member(tar: Path, start: int, size: int) -> bytes:
    _check_size(size)
    with open(tar, "rb") as file:
        return read_range(file.fileno(), start, size)


def read_file(path: Path) -> bytes:
    """The bytes of a file within the limit. Raises BadSample."""
    try:
        _check_size(os.path.getsize(path))
        return path.read_bytes()
    except OSError as error:
        raise BadSample(f"{path}: {error.strerror}") from None


def _check_size(size: int) -> None:
    if size > Limits().max_bytes:
        raise BadSample(f"has {size} bytes, the limit is {Limits().max_bytes}")
