"""What a conversion has finished so far, so that the same command goes on after any stop.

    OUT/convert.jsonl    {"format": ..., "options": ..., "sources": ...}    what it was begun with
                         {"tokenizer": fingerprint}                         once it lies in OUT/tokenizer
                         {"split": "train", "number": 12, "shards": ...}    a line for each finished job, as they end

A line is written when all files that it speaks of are on disk; half a line at the end is a job not finished. The file
is locked while a conversion runs, and the lock ends with the process. At the end its lines are put in order of jobs.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from data.convert_jobs import Outcome, is_whole
from data.errors import DataError
from data.files import write_atomically

FORMAT = "omniloom-convert-1"
NAME = "convert.jsonl"
_SHARD = re.compile(r"(shard-\d{6}(?:_\d{4})?\.tar)(?:\.index)?")
_HALF = re.compile(r"\.shard-\d{6}.*\.tmp")


class Journal:
    """The journal of one folder, locked for this process."""

    def __init__(self, out: Path, plan: Mapping[str, Any]) -> None:
        """Begin, or go on. `plan` holds "options" and "sources" (digests by split).

        Raises DataError where the folder holds something else, was begun otherwise, or is being written to.
        """
        self.out, self.tokenizer, self._splits = out, "", list(plan["sources"])
        self.done: dict[tuple[str, int], tuple[int, int]] = {}  # (split, job) -> place of its line
        path = out / NAME
        if not path.exists() and any(out.glob("*/*.tar")):
            raise DataError(f"{out}: already holds shards; delete them or write elsewhere")
        self._created = not out.exists()
        out.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = open(path, "a+b")  # noqa: SIM115 (open as long as the lock is held)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{out}: another conversion is writing here") from None
        self._read({"format": FORMAT, **plan})
        self.sweep(shards=True)

    def _read(self, plan: Mapping[str, Any]) -> None:
        self._file.seek(0)
        place = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            try:
                content = json.loads(line)
            except ValueError:
                raise DataError(
                    f"{self.out / NAME}: damaged at byte {place}; delete {self.out} and begin anew"
                ) from None
            if place == 0:
                self._compare(content, plan)
            elif "tokenizer" in content:
                self.tokenizer = content["tokenizer"]
            elif is_whole(self.out / content["split"], content["shards"]):
                self.done[content["split"], content["number"]] = place, len(line)
            place += len(line)
        self._file.truncate(place)
        if place == 0:
            self._append(plan)

    def _compare(self, begun: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
        if begun.get("format") != FORMAT:
            raise DataError(f"{self.out}: was begun by another version of the converter; write to another folder")
        old, new = begun["options"], plan["options"]
        # an option that another version did not have yet is one that was not given
        changed = [name for name in new if (old.get(name) or None) != (new[name] or None)]
        if changed:
            was = ", ".join(f"{name} was {old.get(name)}, is {new[name]}" for name in changed)
            raise DataError(f"{self.out}: was begun with other options: {was}; give the same or another folder")
        if begun["sources"] != plan["sources"]:
            raise DataError(f"{self.out}: the source has changed since it was begun; write to another folder")

    def sweep(self, shards: bool = False) -> None:
        """Remove files half-written by interrupted jobs, and also whole `shards` of jobs that are not noted."""
        known = {(outcome.split, name) for outcome in self.outcomes() for name in outcome.shards} if shards else ()
        for split in self._splits:
            for path in (self.out / split).glob("*"):
                whole = _SHARD.fullmatch(path.name)
                if _HALF.fullmatch(path.name) or whole and shards and (split, whole[1]) not in known:
                    path.unlink()
        for path in self.out.glob(f".{NAME}.*.tmp"):
            path.unlink()

    def note_tokenizer(self, fingerprint: str) -> None:
        """The tokenizer is saved."""
        self._append({"tokenizer": fingerprint})
        self.tokenizer = fingerprint

    def note(self, outcome: Outcome) -> None:
        """A job is finished."""
        self.done[outcome.split, outcome.number] = self._append(asdict(outcome))

    def outcomes(self) -> Iterator[Outcome]:
        """What became of the finished jobs, in order of splits and jobs."""
        for _, place in sorted(self.done.items()):
            yield Outcome.from_json(json.loads(self._line(place)))

    def finish(self) -> None:
        """Put the lines in order, so that the folder is the same whichever job ended first."""
        self._remove_empty(self._splits)
        self._file.seek(0)
        head = [self._file.readline()]
        if self.tokenizer:
            head.append(_line_of({"tokenizer": self.tokenizer}))
        lines = (self._line(place) for _, place in sorted(self.done.items()))
        write_atomically(self.out / NAME, b"".join([*head, *lines]))

    def abandon(self) -> None:
        """Remove what was begun: no sample came of it."""
        for path in (self.out / "tokenizer").glob("tokenizer*.json"):
            path.unlink()
        (self.out / NAME).unlink(missing_ok=True)
        self._remove_empty(["tokenizer", *self._splits, *([""] if self._created else [])])

    def _remove_empty(self, folders: Iterable[str]) -> None:
        for folder in (self.out / name for name in folders):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def close(self) -> None:
        """Give the lock back."""
        self._file.close()

    def _append(self, content: Mapping[str, Any]) -> tuple[int, int]:
        self._file.seek(0, os.SEEK_END)
        place, line = self._file.tell(), _line_of(content)
        self._file.write(line)
        self._file.flush()
        os.fsync(self._file.fileno())
        return place, len(line)

    def _line(self, place: tuple[int, int]) -> bytes:
        self._file.seek(place[0])
        return self._file.read(place[1])


def _line_of(content: Mapping[str, Any]) -> bytes:
    text = json.dumps(content, ensure_ascii=False)
    return text.encode(errors="backslashreplace") + b"\n"  # half a character (of a file name, say) becomes its escape
