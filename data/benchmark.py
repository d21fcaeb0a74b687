"""Rows of published evaluation sets become samples that a suite can ask and grade.

    published files --open--> rows --make--> Question: parts of what is asked, the answer, how it is graded
      --item_of--> Item of a conversation, or of a document; data.convert_run writes the shards

A benchmark is a row of the table in data/benchmarks.py: where its files lie (`open`), and what a row of them means
(`make`). A row that is not as published, or whose medium is not there, is left out with its reason. Rows are listed in
memory, those of Parquet are read from disk 16 at a time; media are read when they are written.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from data.convert_hf import ParquetTables, extension_of
from data.errors import BadSample, DataError
from data.grading import Grading, letter
from data.sample import EXTENSIONS
from data.sources import Common, Item, Row, Source, Span, clean_key

LETTER = "Answer with the letter."
SHORT = "Answer in a word or a short phrase."
_LETTERED = re.compile(r"\(?([A-Z])[.):]\)?\s*(.*)", re.DOTALL)
_MAX_FILE_BYTES = 1 << 30  # of JSON and CSV, which are read whole


class File(NamedTuple):
    """A medium of a question."""

    kind: str  # "audio", "image" or "video"
    path: str  # in the folder of the set; of bytes, their name
    payload: bytes = b""  # where a table holds it


@dataclass(frozen=True)
class Question:
    """What a row asks, and how its answer is graded."""

    asks: Sequence[str | File]
    answer: str
    name: str = ""  # as its authors call it
    grading: Grading | None = None
    language: str = ""
    speaker: str = ""
    document: bool = False  # a text that is read on, not a turn of a conversation


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for."""

    folder: Path
    splits: tuple[str, ...] = ()  # none: those that are usually reported
    languages: tuple[str, ...] = ()  # none: all
    instruction: str | None = None  # what is asked beside media; None: what suits the set
    shots: int = 5  # answered questions before the one that is asked, where a set is asked so

    def asked(self, usual: str) -> str:
        """The instruction."""
        return usual if self.instruction is None else self.instruction

    def home(self, *names: str) -> Path:
        """The folder of the set: itself, or the one of those names in it."""
        return next((self.folder / name for name in names if (self.folder / name).is_dir()), self.folder)

    def path(self, place: Path) -> str:
        """A file as seen from the folder."""
        return str(place.relative_to(self.folder))


Make = Callable[[Mapping[str, Any], Wanted], Question]
Open = Callable[[Wanted], dict[str, "Rows | TableRows"]]


@dataclass(frozen=True)
class Benchmark:
    """A row of the table of sets."""

    name: str
    suite: str  # as `suite=NAME` of the evaluation calls it
    layout: str  # what is expected on disk
    open: Open  # sources by split; none where nothing of the layout is there
    published: Mapping[str, int] = field(default_factory=dict)  # samples of a split
    told_by: str = ""  # where the published numbers stand
    languages: bool = False  # --languages chooses
    sound: bool = False  # its films are heard


@dataclass
class Rows:
    """A split listed in memory: (place, row)."""

    name: str
    rows: Sequence[tuple[str, Mapping[str, Any]]]
    make: Make
    wanted: Wanted
    common: Common | None = None
    notes: list[str] = field(default_factory=list)
    digest: str = ""

    def spans(self, size: int) -> list[Span]:
        """Jobs of `size` rows."""
        digest = hashlib.sha256(self.name.encode())
        for place, row in self.rows:
            digest.update(f"{place} {json.dumps(row, default=repr)}\n".encode())
        self.digest = digest.hexdigest()
        return [Span(first, min(size, len(self.rows) - first), ()) for first in range(0, len(self.rows), size)]

    def read(self, span: Span, media: bool = True) -> Iterator[Row]:
        """The rows of a job."""
        for number in range(span.first, span.first + span.count):
            place, row = self.rows[number]
            yield Row(place, made(self, number, row))


@dataclass
class TableRows:
    """A split in Parquet: each of its tables has a name of its own, which rows get as "table"."""

    name: str
    tables: Sequence[tuple[str, ParquetTables]]
    columns: Sequence[str]
    make: Make
    wanted: Wanted
    common: Common | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def digest(self) -> str:
        """Of the tables'."""
        return hashlib.sha256("".join(table.digest for _, table in self.tables).encode()).hexdigest()

    def spans(self, size: int) -> list[Span]:
        """Jobs of whole row groups, `size` rows or more."""
        found, first = [], 0
        for place, (_, table) in enumerate(self.tables):
            found += [Span(first + span.first, span.count, (place, *span.start)) for span in table.spans(size)]
            first += table.num_rows
        return found

    def read(self, span: Span, media: bool = True) -> Iterator[Row]:
        """The rows of a job."""
        name, table = self.tables[span.start[0]]
        columns = [column for column in self.columns if column in table.features]
        rows = table.rows(Span(0, span.count, span.start[1:]), columns)
        for number, row in enumerate(rows, span.first):
            yield Row(f"{self.name} row {number}", made(self, number, {"table": name, **row}))


Sources = dict[str, Rows | TableRows]  # of a set, by the name of the shards' source


def made(source: Rows | TableRows, number: int, row: Mapping[str, Any]) -> Item | BadSample:
    """The item of a row, or why there is none."""
    assert source.common is not None
    try:
        return item_of(source.make(row, source.wanted), number, source.common)
    except BadSample as error:
        return error
    except KeyError as error:
        return BadSample(f"row is not as published: it lacks {error}")
    except (ValueError, TypeError, IndexError, AttributeError) as error:
        return BadSample(f"row is not as published: {type(error).__name__} {str(error)[:80]}")


def item_of(question: Question, number: int, common: Common) -> Item:
    """The item of a question. Raises BadSample."""
    media = common.media()
    parts: list[dict[str, Any]] = []
    for ask in question.asks:
        if isinstance(ask, str):
            parts += [{"type": "text", "text": ask}] if ask else []
        elif not ask.payload:
            parts.append(media.part(ask.kind, ask.path))
        else:
            extension = extension_of(ask.kind, ask.path, ask.payload)
            if not extension:
                raise BadSample(f"unknown format of {ask.kind}: it starts with {ask.payload[:8]!r}")
            parts.append(media.add(ask.kind, extension, partial(bytes, ask.payload), ask.path))
    key = clean_key(f"{number:06d}-{question.name}" if question.name else f"{number:06d}")
    about = common.about({"language": question.language, "speaker": question.speaker})
    if question.document:
        item = media.item(key, segments=parts, about=about)
    else:
        turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": question.answer}]
        item = media.item(key, messages=turns, about=about)
    return replace(item, record=replace(item.record, grading=question.grading))


def multiple_choice(
    asks: Sequence[str | File], choices: Sequence[str], correct: int, wanted: Wanted, **about: Any
) -> Question:
    """A question whose choices are shown with letters, and whose answer is a letter.

    `asks` ends with the question's text. Also `name`, `language`, and of the grading `group`, `position`.
    """
    grading = Grading(
        (), tuple(choices), correct, about.pop("position", -1.0), " ".join(about.pop("group", "").split())
    )
    shown = [f"{letter(place)}. {choice}" for place, choice in enumerate(choices)]
    text = "\n".join([*(ask for ask in asks if isinstance(ask, str)), *shown, wanted.asked(LETTER)]).rstrip("\n")
    return Question([*(ask for ask in asks if isinstance(ask, File)), text], grading.letter, grading=grading, **about)


def unlettered(choices: Iterable[str]) -> list[str]:
    """Choices without the letters that some sets write before them: "A. a dog", "(A) a dog"."""
    choices = [str(choice).strip() for choice in choices]
    found = [_LETTERED.fullmatch(choice) for choice in choices]
    if all(match and match[1] == letter(place) for place, match in enumerate(found)):
        return [match[2].strip() for match in found if match]
    return choices


def by_letter(answer: str, choices: Sequence[str]) -> int:
    """The place of the choice of a letter. Raises BadSample where there is none: some answers are not published."""
    match = re.fullmatch(r"\(?([A-Z])[.):]?", str(answer).strip().upper())
    if not match or ord(match[1]) - ord("A") >= len(choices):
        raise BadSample(f"answer is no letter of a choice (not published?): {str(answer)[:40]!r}")
    return ord(match[1]) - ord("A")


def by_text(answer: str, choices: Sequence[str]) -> int:
    """The place of the choice of those words. Raises BadSample where there is none."""
    words = [" ".join(str(choice).split()) for choice in choices]
    if (said := " ".join(str(answer).split())) not in words:
        raise BadSample(f"answer is none of the choices: {said[:40]!r}")
    return words.index(said)


def stored(kind: str, value: Any, column: str) -> File | None:
    """The medium in a cell of a table: bytes, or a mapping with them; None where it is empty."""
    payload = value.get("bytes") if isinstance(value, Mapping) else value
    if not payload:
        return None
    path = str(value.get("path") or "") if isinstance(value, Mapping) else ""
    return File(kind, f"{column} {path}", bytes(payload))


def needed(kind: str, value: Any, column: str) -> File:
    """As `stored`, but raises BadSample where the cell is empty."""
    file = stored(kind, value, column)
    if file is None:
        raise BadSample(f"no media: {column!r} is empty")
    return file


def lying(kind: str, wanted: Wanted, stems: Iterable[str], folders: Sequence[str]) -> File:
    """The file of one of those names without extension, in one of those folders. Raises BadSample where none is."""
    stems = list(stems)
    for folder in folders:
        for stem in stems:
            for extension in EXTENSIONS[kind]:
                if (wanted.folder / folder / f"{stem}.{extension}").is_file():
                    return File(kind, f"{folder}/{stem}.{extension}" if folder else f"{stem}.{extension}")
    where = ", ".join(f"{folder or '.'}/" for folder in folders)
    raise BadSample(f"no such file: {stems[0]} with an extension of {kind} in {where}")


def tables(
    wanted: Wanted,
    files: Sequence[Path],
    split: str,
    columns: Sequence[str],
    make: Make,
    optional: Sequence[str] = (),
    called: str = "",
) -> dict[str, Rows | TableRows]:
    """A split of Parquet files, named as their folders or `called` so. Raises DataError where one lacks `columns`."""
    if not files:
        return {}
    try:
        opened = [(called or path.parent.name, ParquetTables([str(path)])) for path in sorted(files)]
    except ImportError:
        raise DataError('Parquet needs the datasets library: pip install "omniloom[hf]"') from None
    for (_, table), path in zip(opened, sorted(files), strict=True):
        if missing := [name for name in columns if name not in table.features]:
            there = ", ".join(table.features)
            raise DataError(f"{path}: is not as published, it lacks the columns {', '.join(missing)}; it has {there}")
    return {split: TableRows(split, opened, [*columns, *optional], make, wanted)}


def read_json(path: Path) -> Any:
    """The content of a JSON file, or of JSON lines. Raises DataError."""
    text = read_text(path)
    try:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not JSON: {error}") from None


def read_csv(path: Path, delimiter: str = ",", names: Sequence[str] = (), quoted: bool = True) -> list[dict[str, str]]:
    """Rows of a CSV; its first line names the columns unless `names` does. Raises DataError."""
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    lines = io.StringIO(read_text(path), newline="")
    try:
        found = list(csv.DictReader(lines, list(names) or None, delimiter=delimiter, quoting=quoting))
    except csv.Error as error:
        raise DataError(f"{path}: is not CSV: {error}") from None
    return [{key: value or "" for key, value in row.items() if isinstance(key, str)} for row in found]


def read_text(path: Path) -> str:
    """A text file whole. Raises DataError."""
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise DataError(f"{path}: has {path.stat().st_size} bytes, the limit is {_MAX_FILE_BYTES}")
        return path.read_text("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8: byte {error.start}") from None


def listed(
    split: str, path: Path, rows: Iterable[Mapping[str, Any]], make: Make, wanted: Wanted
) -> dict[str, Rows | TableRows]:
    """A split of the rows of a file."""
    return {split: Rows(split, [(f"{path.name} row {n}", row) for n, row in enumerate(rows, 1)], make, wanted)}


def together(found: Iterable[dict[str, Rows | TableRows]]) -> dict[str, Rows | TableRows]:
    """Splits of several files; rows of a split of the same name follow each other."""
    splits: dict[str, Rows | TableRows] = {}
    for name, source in chain.from_iterable(each.items() for each in found):
        before = splits.get(name)
        if isinstance(before, Rows) and isinstance(source, Rows):
            source = replace(before, rows=[*before.rows, *source.rows])
        splits[name] = source
    return splits


def sources(benchmark: Benchmark, wanted: Wanted, common: Common) -> dict[str, Source]:
    """The splits of a set on disk. Raises DataError where they are not there as published."""
    found: dict[str, Source] = {}
    try:
        for name, source in benchmark.open(wanted).items():
            source.common = common
            found[name] = source
    except DataError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        lacks = f"lacks {error}" if isinstance(error, KeyError) else f"{type(error).__name__} {str(error)[:80]}"
        raise DataError(
            f"{wanted.folder}: is not {benchmark.name} as published: {lacks}; expected: {benchmark.layout}"
        ) from None
    if not found:
        which = f" (--split {','.join(wanted.splits)})" if wanted.splits else ""
        which += f" (--languages {','.join(wanted.languages)})" if wanted.languages else ""
        raise DataError(f"{wanted.folder}: is not {benchmark.name} as published{which}; expected: {benchmark.layout}")
    if missing := _missing(wanted, found):
        raise DataError(f"{wanted.folder}: holds no {missing}, but {', '.join(found)}; expected: {benchmark.layout}")
    return found


def _missing(wanted: Wanted, found: Iterable[str]) -> str:
    """The first split or language that was asked for and is not there; "" where all are."""
    names = list(found)  # SPLIT, or SPLIT-LANGUAGE
    for split in wanted.splits:
        if not any(name == split or name.startswith(f"{split}-") for name in names):
            return f"split {split}"
    folders = {name.partition("-")[2] for name in names}
    there = folders | {language_of(folder) for folder in folders}
    return next((f"language {code}" for code in wanted.languages if code not in there), "")


def language_of(folder: str) -> str:
    """The language code of a folder: "en_us" is "en", "cmn_hans_cn" and "zh-CN" are "zh"."""
    code = folder.replace("-", "_").partition("_")[0].lower()
    return {"cmn": "zh"}.get(code, code)
