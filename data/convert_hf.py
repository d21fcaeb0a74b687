"""A dataset that the `datasets` library saved to disk, as a source of samples.

    FOLDER/{split} --load_from_disk, Audio(decode=False)--> rows --> SampleRecord with the stored bytes

Nothing is decoded and no code is loaded: such a folder holds Arrow tables and JSON. Rows are read as they are
written, so memory does not grow. `datasets` is an optional extra ("hf"), imported here alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.chat import rendered_texts, transcription
from data.errors import BadSample, DataError
from data.sample import SampleRecord
from data.sources import known_extension, read_file

_MAGIC = {b"RIFF": "wav", b"fLaC": "flac", b"OggS": "ogg", b"ID3": "mp3", b"\xff": "mp3"}


@dataclass
class HfSplit:
    """One split: an audio column, a text column, perhaps columns "language" and "speaker"."""

    rows: Any  # datasets.Dataset with undecoded audio
    name: str
    source: str
    instruction: str
    language: str
    audio_column: str
    text_column: str
    left_out: list[str] = field(default_factory=list)

    def texts(self) -> Iterator[str]:
        """Every text of the split; the audio is not touched."""
        for row in self.rows.remove_columns([self.audio_column]):
            yield from rendered_texts(transcription("", self.instruction, self._text(row) or ""))

    def records(self) -> Iterator[SampleRecord]:
        """Samples in order; a row without text or audio is left out."""
        for number, row in enumerate(self.rows):
            try:
                yield self._record(number, row)
            except BadSample as error:
                self.left_out.append(f"{self.name} row {number}: {error}")

    def _record(self, number: int, row: dict[str, Any]) -> SampleRecord:
        text = self._text(row)
        if text is None:
            raise BadSample(f"{self.text_column!r} is empty or not text")
        stored = row[self.audio_column] or {}
        payload, path = stored.get("bytes"), stored.get("path") or ""
        if not payload and not path:
            raise BadSample(f"{self.audio_column!r} is empty")
        payload = payload or read_file(Path(path))
        sniffed = next((known for magic, known in _MAGIC.items() if payload.startswith(magic)), "")
        extension = known_extension(path) or sniffed
        if not extension:
            raise BadSample(f"{self.audio_column!r} is neither wav, flac, mp3 nor ogg")
        return SampleRecord(
            key=f"{self.name.replace('.', '_')}-{number:08d}",
            messages=transcription(extension, self.instruction, text),
            audio={extension: payload},
            language=str(row.get("language") or self.language),
            source=self.source,
            speaker=str(row.get("speaker") or ""),
        )

    def _text(self, row: dict[str, Any]) -> str | None:
        text = row[self.text_column]
        names = getattr(self.rows.features[self.text_column], "names", None)
        if names and isinstance(text, int):  # a class label is stored as a number
            return names[text]
        return text if isinstance(text, str) else None


def hf_dataset(
    folder: Path, instruction: str, *, audio_column: str, text_column: str, language: str = ""
) -> dict[str, HfSplit]:
    """The splits of a saved dataset ("train" where it has none).

    Raises DataError where the library is absent, the folder is of another kind, or a column is missing.
    """
    try:
        import datasets
    except ImportError:
        raise DataError('this needs the datasets library: pip install "omniloom[hf]"') from None
    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: is not a dataset saved with save_to_disk: {error}") from None
    splits = {}
    for name, rows in loaded.items() if isinstance(loaded, datasets.DatasetDict) else [("train", loaded)]:
        for column in (audio_column, text_column):
            if column not in rows.column_names:
                has = ", ".join(rows.column_names)
                raise DataError(f"{folder}: no column {column!r}, name it by --audio-column, --text-column: {has}")
        if not isinstance(rows.features[audio_column], datasets.Audio):
            raise DataError(f"{folder}: column {audio_column!r} is not of the Audio type")
        rows = rows.cast_column(audio_column, datasets.Audio(decode=False))
        about = (instruction, language, audio_column, text_column)
        splits[str(name)] = HfSplit(rows, str(name), folder.name, *about)
    return splits
