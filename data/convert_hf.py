"""Datasets of Hugging Face as sources: saved to disk, or Parquet in a folder, a file, a pattern or on the hub.

    FOLDER written by save_to_disk --mapped Arrow tables-->
    *.parquet, hub repository --row groups, the wanted columns only--> rows with stored bytes --> Item

Nothing is decoded and no code of a dataset is run: a folder holds Arrow tables and JSON, and of a hub repository only
its Parquet files are read, or the Parquet that the hub made of it. Memory is a batch of rows. A job is whole row
groups, so none is read twice; a huge one is one job of several shards. `datasets` is an optional extra ("hf"),
imported here alone.
"""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from data import audio, video
from data.errors import BadSample, DataError
from data.sample import EXTENSIONS
from data.sources import INSTRUCTIONS, Common, Item, Media, Row, Source, Span, asked, clean_key
from data.sources_chat import conversation, turns_of

_BATCH = 16  # rows in memory at a time; with films in them that is much
_TEXTS = ("text", "sentence", "transcription", "transcript", "normalized_text", "caption", "label")
_TURNS = ("messages", "conversations", "conversation")
_SPLIT = re.compile(r"(?P<split>[\w.]+)-\d{5}-of-\d{5}(?:-[0-9a-f]+)?\.parquet$")
_IMAGES = {"jpg": rb"\xff\xd8\xff", "png": rb"\x89PNG", "webp": rb"RIFF....WEBP", "gif": rb"GIF8", "bmp": rb"BM"}
_USUAL = ("train", "test", "validation", "valid", "val", "dev", "eval")


class Columns(NamedTuple):
    """Which columns hold what; empty where there is none."""

    media: Mapping[str, Sequence[str]]  # by kind
    text: str = ""
    turns: str = ""

    @property
    def all(self) -> list[str]:
        """Every column that is read."""
        return [name for names in self.media.values() for name in names] + [n for n in (self.text, self.turns) if n]


@dataclass
class TableSource:
    """One split of a dataset."""

    name: str
    tables: Tables
    columns: Columns
    common: Common
    notes: list[str] = field(default_factory=list)

    @property
    def digest(self) -> str:
        """Of the tables' names, sizes and schema."""
        return self.tables.digest

    def spans(self, size: int) -> list[Span]:
        """Jobs of about `size` rows."""
        return self.tables.spans(size)

    def read(self, span: Span, media: bool = True) -> Iterator[Row]:
        """The rows of a job."""
        about = [name for name in ("language", "speaker") if name in self.tables.features]
        names = self.columns.all if media else [name for name in (self.columns.text, self.columns.turns) if name]
        for number, row in enumerate(self.tables.rows(span, list(dict.fromkeys([*names, *about]))), start=span.first):
            try:
                item = self._item(number, row, media)
            except BadSample as error:
                item = error
            yield Row(f"{self.name} row {number}", item)

    def _item(self, number: int, row: dict[str, Any], media: bool) -> Item:
        gathered, columns = self.common.media(), self.columns
        key = clean_key(f"{self.name}-{number:08d}")
        about = self.common.about({n: row[n] for n in ("language", "speaker") if isinstance(row.get(n), str)})
        files = {kind: [f for n in names for f in _files(row.get(n), n)] for kind, names in columns.media.items()}
        place = partial(_part, gathered)
        if columns.turns:
            turns = turns_of({"messages": _plain_turns(row[columns.turns])})
            if not media:  # only the texts are wanted: tags stay where they are
                return Media(self.common.folder).item(key, messages=conversation(_untagged(turns), {}, place))
            return gathered.item(key, messages=conversation(turns, files, place, in_front=True), about=about)
        text = self._text(row[columns.text])
        if not any(columns.media.values()):
            return gathered.item(key, segments=[{"type": "text", "text": text}], about=about)
        parts = [place(kind, file) for kind, given in files.items() for file in given]
        empty = [name for kind, names in columns.media.items() for name in names if not files[kind]]
        if media and empty:
            raise BadSample(f"no media: {empty[0]!r} is empty")
        instruction = self.common.instruction
        if instruction is None:
            instruction = INSTRUCTIONS[next(kind for kind, names in columns.media.items() if names)]
        return gathered.item(key, messages=asked(parts, instruction, text), about=about)

    def _text(self, value: Any) -> str:
        names = getattr(self.tables.features[self.columns.text], "names", None)
        if names and isinstance(value, int) and 0 <= value < len(names):  # a class label is stored as a number
            return names[value]
        if not isinstance(value, str):
            raise BadSample(f"no text: {self.columns.text!r} is empty or not text")
        return value


class Tables:
    """Rows of a dataset on disk as they are stored, from any row on."""

    features: Mapping[str, Any]
    num_rows: int
    digest: str

    def spans(self, size: int) -> list[Span]:
        """Jobs of about `size` rows."""
        return [Span(first, min(size, self.num_rows - first), ()) for first in range(0, self.num_rows, size)]

    def rows(self, span: Span, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """The rows of a job, with those columns."""
        raise NotImplementedError


class SavedTables(Tables):
    """A split that save_to_disk wrote."""

    def __init__(self, folder: Path, split: str | None) -> None:
        self.folder, self.split = folder, split
        rows = self._open()
        self.features, self.num_rows = rows.features, len(rows)
        stored = [f"{Path(file['filename']).name} {Path(file['filename']).stat().st_size}" for file in rows.cache_files]
        self.digest = _digest([str(split), repr(rows.features), str(rows._fingerprint), *stored])

    def _open(self) -> Any:
        loaded = _load_saved(self.folder)
        return loaded if self.split is None else loaded[self.split]

    def rows(self, span: Span, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Rows of the mapped table."""
        table = self._open().select_columns(list(columns)).with_format("arrow")
        last = span.first + span.count
        for start in range(span.first, last, _BATCH):
            yield from table[start : min(start + _BATCH, last)].to_pylist()


class ParquetTables(Tables):
    """Parquet files of one split, on a file system of fsspec or on disk."""

    def __init__(self, files: Sequence[str], filesystem: Any = None) -> None:
        import datasets
        import pyarrow

        self.files, self.filesystem = files, filesystem
        self.groups: list[tuple[int, int, int]] = []  # (file, row group, rows)
        schemas, sizes = [], []
        for number, file in enumerate(files):
            try:
                with self._open(file) as parquet:
                    schemas.append(parquet.schema_arrow)
                    groups = parquet.metadata.num_row_groups
                    counts = [parquet.metadata.row_group(group).num_rows for group in range(groups)]
            except (pyarrow.ArrowException, OSError) as error:
                raise DataError(f"{file}: is no Parquet file that can be read: {str(error)[:200]}") from None
            self.groups += [(number, group, count) for group, count in enumerate(counts)]
            sizes.append(f"{file.rpartition('/')[2]} {counts}")
            if schemas[-1].names != schemas[0].names:
                raise DataError(f"{file}: has other columns than {files[0]}: {', '.join(schemas[-1].names)}")
        self.features = datasets.Features.from_arrow_schema(schemas[0])
        self.num_rows = sum(count for _, _, count in self.groups)
        self.digest = _digest([repr(self.features), *sizes, *map(self._stamp, files)])

    def _open(self, file: str) -> Any:
        import pyarrow.parquet

        return pyarrow.parquet.ParquetFile(file, filesystem=self.filesystem)

    def _stamp(self, file: str) -> str:
        if self.filesystem is not None:
            return str(self.filesystem.size(file))
        found = Path(file).stat()
        return f"{found.st_size} {found.st_mtime_ns}"

    def spans(self, size: int) -> list[Span]:
        """Jobs of whole row groups, `size` rows or more."""
        spans, first, rows, start = [], 0, 0, 0
        for place, (_, _, count) in enumerate(self.groups):
            rows += count
            if rows and (rows >= size or place + 1 == len(self.groups)):
                spans.append(Span(first, rows, (start, place + 1)))
                first, rows, start = first + rows, 0, place + 1
        return spans

    def rows(self, span: Span, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Rows of the row groups of a job."""
        for number, group, _ in self.groups[slice(*span.start)]:
            with self._open(self.files[number]) as parquet:
                for batch in parquet.iter_batches(_BATCH, row_groups=[group], columns=list(columns)):
                    yield from batch.to_pylist()


def hf_dataset(source: str, common: Common, asked_for: Mapping[str, str], hub: bool = False) -> dict[str, Source]:
    """The splits of a dataset. `asked_for` names columns by "audio", "image", "video", "text", "messages".

    Raises DataError where the library is absent, there is no such dataset, or its columns do not tell what to do.
    """
    try:
        import datasets
    except ImportError:
        raise DataError('this needs the datasets library: pip install "omniloom[hf]"') from None
    if int(datasets.__version__.split(".")[0]) < 4:
        raise DataError(f"datasets {datasets.__version__} can run code of a dataset; 4 or later is needed")
    if hub:
        splits = _hub_splits(source)
    elif (Path(source) / "dataset_dict.json").is_file():
        splits = {name: SavedTables(Path(source), name) for name in _load_saved(Path(source))}
    elif (Path(source) / "state.json").is_file():
        splits = {"train": SavedTables(Path(source), None)}
    else:
        splits = {name: ParquetTables(files) for name, files in _parquet_files(source).items()}
    found: dict[str, Source] = {}
    for name, tables in splits.items():
        found[name] = TableSource(name, tables, _columns(source, tables.features, asked_for), common)
        if isinstance(tables, ParquetTables) and any("/partial-" in file for file in tables.files):
            found[name].notes.append(f"{name}: the hub made Parquet of a part of this dataset only")
    return found


def _load_saved(folder: Path) -> Any:
    import datasets

    try:
        return datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: is not a dataset saved with save_to_disk: {error}") from None


def _parquet_files(source: str) -> dict[str, list[str]]:
    """Files of each split, by names such as train-00000-of-00002.parquet or folders such as test/."""
    path = Path(source)
    if path.is_dir():
        files = sorted(str(file) for file in path.rglob("*.parquet"))
    else:
        files = [source] if path.is_file() else sorted(glob.glob(source, recursive=True))
    if not files:
        what = "neither a dataset saved with save_to_disk nor Parquet" if path.is_dir() else "no such file or folder"
        raise DataError(f"{source}: {what}; a name on the hub needs --hub")
    return _by_split(files, str(home_of(source)))


def home_of(source: str) -> Path:
    """The folder of a dataset: itself, that of a file, or what a pattern begins with."""
    path = Path(source)
    while glob.has_magic(str(path)) and not path.exists():
        path = path.parent
    return path if path.is_dir() else path.parent


def _by_split(files: Sequence[str], home: str) -> dict[str, list[str]]:
    """Files by split; only names from `home` on tell."""
    splits: dict[str, list[str]] = {}
    for file in files:
        folders, _, name = file.removeprefix(home).rpartition("/")
        match = _SPLIT.match(name)
        split = match["split"] if match else ""
        for word in (name.removesuffix(".parquet"), folders.rpartition("/")[2].removeprefix("partial-")):
            split = split or next((usual for usual in _USUAL if re.match(rf"{usual}(?![a-z])", word)), "")
        splits.setdefault(re.sub(r"[^\w.-]", "_", split or "train"), []).append(file)
    return splits


def _hub_splits(name: str) -> dict[str, ParquetTables]:
    from huggingface_hub import HfFileSystem

    hub = HfFileSystem()
    owner, _, rest = name.partition("/")
    repository, _, folder = rest.partition("/")
    try:
        for revision in ("", "@~parquet"):
            home = f"datasets/{owner}/{repository}{revision}" + (f"/{folder}" if folder else "")
            files = sorted(str(file) for file in hub.glob(f"{home}/**/*.parquet"))
            if files:
                return {split: ParquetTables(found, hub) for split, found in _by_split(files, home).items()}
    except DataError:
        raise
    except Exception as error:  # the hub's client lets through the errors of whichever HTTP library it is built on
        raise DataError(f"{name}: cannot be read from the hub: {str(error)[:200]}") from None
    raise DataError(f"{name}: has no Parquet files on the hub, and the hub made none of it")


def _columns(source: str, features: Mapping[str, Any], asked_for: Mapping[str, str]) -> Columns:
    """Which columns to read: those asked for, else by their types and usual names."""
    for name in [name for names in asked_for.values() for name in names.split(",") if name]:
        if name not in features:
            raise DataError(f"{source}: no column {name!r}, it has: {', '.join(features)}")
    media: dict[str, list[str]] = {}
    for kind in EXTENSIONS:
        given = [name for name in asked_for.get(kind, "").split(",") if name]
        for name in given:
            if _kind_of(features[name]) != kind and not _holds_bytes(features[name]):
                raise DataError(f"{source}: column {name!r} is not of the {kind.title()} type")
        media[kind] = given or [name for name, feature in features.items() if _kind_of(feature) == kind]
    turns = asked_for.get("messages", "")
    if not turns and not asked_for.get("text"):
        turns = next((name for name in _TURNS if name in features and not _is_text(features[name])), "")
    if turns:
        return Columns(media, turns=turns)
    several = [", ".join(names) for names in media.values() if len(names) > 1]
    if several and not any(asked_for.get(kind) for kind in EXTENSIONS):
        raise DataError(
            f"{source}: several columns of one kind ({several[0]}); name those to take by --audio-column ..."
        )
    texts = [name for name, feature in features.items() if _is_text(feature)]
    text = asked_for.get("text") or next((name for name in _TEXTS if name in texts), "")
    if not text:
        raise DataError(f"{source}: which column holds the text? Name it by --text-column: {', '.join(features)}")
    if not _is_text(features[text]):
        raise DataError(f"{source}: column {text!r} holds no text")
    return Columns(media, text=text)


def _kind_of(feature: Any) -> str:
    """The kind of media that a column holds, also as a list; "" for anything else."""
    inner = getattr(feature, "feature", None)  # of List, LargeList and Sequence
    inner = inner if inner is not None else feature[0] if isinstance(feature, list) and feature else feature
    name = type(inner).__name__.lower()
    return name if name in EXTENSIONS else ""


def _holds_bytes(feature: Any) -> bool:
    return (
        isinstance(feature, Mapping)
        and "bytes" in feature
        or getattr(feature, "dtype", "") in ("binary", "large_binary")
    )


def _is_text(feature: Any) -> bool:
    return hasattr(feature, "names") or getattr(feature, "dtype", "") in ("string", "large_string")


def _files(value: Any, column: str) -> list[dict[str, Any]]:
    """Stored media of one cell: {"bytes", "path"}; empty ones are none."""
    cells = value if isinstance(value, list) else [value]
    stored = [{"bytes": cell} if isinstance(cell, bytes) else cell for cell in cells]
    full = [cell for cell in stored if isinstance(cell, Mapping) and (cell.get("bytes") or cell.get("path"))]
    return [{**cell, "column": column} for cell in full]


def _part(media: Media, kind: str, file: Any) -> dict[str, Any]:
    if not isinstance(file, Mapping) or not file.get("bytes"):
        return media.part(kind, file.get("path") if isinstance(file, Mapping) else file)
    payload = bytes(file["bytes"])
    extension = extension_of(kind, str(file.get("path") or ""), payload)
    if not extension:
        raise BadSample(f"unknown format of {kind}: {file['column']!r} starts with {payload[:8]!r}")
    return media.add(kind, extension, partial(bytes, payload), len(media.reads))


def extension_of(kind: str, path: str, payload: bytes) -> str:
    """The extension that a path or else the first bytes tell; "" where neither is of this kind."""
    extension = path.rpartition(".")[2].lower()
    if extension in EXTENSIONS[kind]:
        return extension
    formats = {"audio": audio.FORMATS, "video": video.FORMATS}.get(kind, ())
    magic = _IMAGES if kind == "image" else {form.extensions[0]: form.magic for form in formats}
    found = (name for name, pattern in magic.items() if re.match(pattern, payload[:64], re.DOTALL))
    return next((name for name in found if name in EXTENSIONS[kind]), "")


def _plain_turns(turns: Any) -> Any:
    """Turns as JSON has them: a table fills fields that a turn lacks with None."""
    if not isinstance(turns, list):
        raise BadSample("no conversation: the cell is empty")
    return [{k: v for k, v in turn.items() if v is not None} if isinstance(turn, Mapping) else turn for turn in turns]


def _untagged(turns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**turn, "content": re.sub("<(image|video|audio)>", "", turn["content"])}
        for turn in turns
        if isinstance(turn.get("content"), str)
    ]


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
