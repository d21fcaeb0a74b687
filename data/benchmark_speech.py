"""Speech recognition: LibriSpeech, FLEURS, Common Voice, AISHELL-1; questions about sound: GTZAN, VoiceBench, MMAU;
captions of sound: Clotho, AudioCaps.

    recording + transcript --> "Transcribe." --> asr          recording + question --> qa          --> caption

Transcripts are stored as published; how they are compared is the suite's (docs/datasets.md says where that differs).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data.benchmark import (
    File,
    Question,
    Sources,
    Wanted,
    by_letter,
    by_text,
    language_of,
    listed,
    lying,
    multiple_choice,
    needed,
    read_csv,
    read_json,
    read_text,
    tables,
    together,
    unlettered,
)
from data.errors import BadSample
from data.grading import Grading
from data.sources import INSTRUCTIONS

_FLEURS = ("id", "file", "raw", "transcription", "letters", "samples", "gender")
_GENRES = ("blues", "classical", "country", "disco", "hiphop", "jazz", "metal", "pop", "reggae", "rock")
_HEARD = "Describe the sound."
_MAX_CAPTIONS = 5


def transcribed(file: File, text: str, wanted: Wanted, **about: Any) -> Question:
    """A recording and its transcript. Raises BadSample where there is none."""
    if not text.strip():
        raise BadSample("no transcript: its text is empty")
    return Question([file, wanted.asked(INSTRUCTIONS["audio"])], text.strip(), **about)


def spoken(row: Mapping[str, Any], wanted: Wanted) -> Question:
    """A row of "path", "text", "name", "language", "speaker"."""
    if row["text"] is None:
        raise BadSample(f"no transcript: {row['name']}")
    about = {name: row[name] for name in ("name", "language", "speaker")}
    return transcribed(File("audio", row["path"]), row["text"], wanted, **about)


def librispeech(wanted: Wanted) -> Sources:
    """SPLIT/SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt, its lines "ID TEXT"; beside it ID.flac."""
    home, usual = wanted.home("LibriSpeech"), ("dev-clean", "dev-other", "test-clean", "test-other")
    return together(
        listed(split, path, _trans(path, wanted), spoken, wanted)
        for split in wanted.splits or usual
        for path in sorted((home / split).glob("*/*/*.trans.txt"))
    )


def _trans(path: Path, wanted: Wanted) -> Iterator[dict[str, Any]]:
    for line in read_text(path).split("\n"):
        if not line.strip():
            continue
        name, _, text = line.strip().partition(" ")
        place = f"{wanted.path(path.parent)}/{name}.flac"
        yield {"name": name, "text": text, "path": place, "language": "en", "speaker": name.partition("-")[0]}


def _languages(home: Path, wanted: Wanted) -> list[Path]:
    """Folders of the wanted languages."""
    folders = sorted(path for path in home.iterdir() if path.is_dir()) if home.is_dir() else []
    return [
        path for path in folders if not wanted.languages or {path.name, language_of(path.name)} & set(wanted.languages)
    ]


def fleurs(wanted: Wanted) -> Sources:
    """LANGUAGE/SPLIT.tsv and LANGUAGE/audio/SPLIT/*.wav; or LANGUAGE/SPLIT*.parquet, LANGUAGE/SPLIT/*.parquet."""
    found: Sources = {}
    for folder in _languages(wanted.home("data", "parquet-data"), wanted):
        for split in wanted.splits or ("test",):
            name, tsv = f"{split}-{folder.name}", folder / f"{split}.tsv"
            if tsv.is_file():
                rows = read_csv(tsv, "\t", _FLEURS, quoted=False)
                sounds = wanted.path(folder / "audio" / split)
                lines = [
                    {"path": f"{sounds}/{row['file']}", "text": row["transcription"], "name": row["file"][:-4]}
                    | {"language": language_of(folder.name), "speaker": ""}
                    for row in rows
                ]
                found |= listed(name, tsv, lines, spoken, wanted)
            else:
                files = [*folder.glob(f"{split}*.parquet"), *folder.glob(f"{split}/*.parquet")]
                found |= tables(wanted, files, name, ("audio", "transcription"), _fleurs_row, (), folder.name)
    return found


def _fleurs_row(row: Mapping[str, Any], wanted: Wanted) -> Question:
    language = language_of(str(row["table"]))
    return transcribed(needed("audio", row["audio"], "audio"), row["transcription"] or "", wanted, language=language)


def common_voice(wanted: Wanted) -> Sources:
    """LANGUAGE/SPLIT.tsv and LANGUAGE/clips/*.mp3, perhaps in cv-corpus-*/."""
    homes = [wanted.folder, *sorted(path for path in wanted.folder.glob("cv-corpus-*") if path.is_dir())]
    found: Sources = {}
    for folder in [path for home in homes for path in _languages(home, wanted)]:
        for split in wanted.splits or ("test",):
            if not (tsv := folder / f"{split}.tsv").is_file() or not (folder / "clips").is_dir():
                continue
            rows = [
                {"path": f"{wanted.path(folder)}/clips/{row['path']}", "text": row["sentence"], "name": row["path"]}
                | {"language": language_of(folder.name), "speaker": row.get("client_id", "")[:16]}
                for row in read_csv(tsv, "\t", quoted=False)
                if row.get("path")
            ]
            found |= listed(f"{split}-{folder.name}", tsv, rows, spoken, wanted)
    return found


def aishell1(wanted: Wanted) -> Sources:
    """wav/SPLIT/SPEAKER/ID.wav and transcript/aishell_transcript_v0.8.txt, its lines "ID WORDS"."""
    home = wanted.home("data_aishell")
    text = home / "transcript" / "aishell_transcript_v0.8.txt"
    if not text.is_file():
        return {}
    lines = (line.strip().partition(" ") for line in read_text(text).split("\n"))
    said = {name: "".join(words.split()) for name, _, words in lines}
    found: Sources = {}
    for split in wanted.splits or ("test",):
        rows = [
            {"path": wanted.path(path), "text": said.get(path.stem), "name": path.stem, "language": "zh"}
            | {"speaker": path.parent.name}
            for path in sorted((home / "wav" / split).glob("*/*.wav"))
        ]
        found |= listed(split, text, rows, spoken, wanted) if rows else {}
    return found


def gtzan(wanted: Wanted) -> Sources:
    """GENRE/GENRE.00000.wav of ten genres, in genres/ or genres_original/; .au too."""
    home = wanted.home("genres_original", "genres", "Data/genres_original")
    paths = [path for genre in _GENRES for path in sorted((home / genre).glob(f"{genre}.*"))]
    rows = [{"path": wanted.path(path), "genre": path.parent.name, "name": path.stem} for path in paths]
    return listed("all", home, rows, _genre, wanted) if rows else {}


def _genre(row: Mapping[str, Any], wanted: Wanted) -> Question:
    asks = [File("audio", row["path"]), "Which genre is this music?"]
    return multiple_choice(asks, _GENRES, by_text(row["genre"], _GENRES), wanted, name=row["name"], group=row["genre"])


def voicebench(wanted: Wanted) -> Sources:
    """SUBSET/SPLIT-*.parquet of the subsets that have references: openbookqa, mmsu, sd-qa."""
    found: Sources = {}
    for subset in wanted.splits or ("openbookqa", "mmsu", "sd-qa"):
        folder = wanted.home("data") / subset
        for split in sorted({path.name.partition("-0")[0] for path in folder.glob("*.parquet")}):
            files = [*folder.glob(f"{split}-0*.parquet"), *folder.glob(f"{split}.parquet")]
            found |= tables(wanted, files, f"{subset}-{split}", ("audio", "reference"), _voice)
    return found


def _voice(row: Mapping[str, Any], wanted: Wanted) -> Question:
    """A spoken question; its choices, where it has some, are spoken too."""
    asks, reference = [needed("audio", row["audio"], "audio"), wanted.asked("")], str(row["reference"]).strip()
    if row["table"] == "sd-qa":
        return Question(asks, reference, language="en")
    letters = ("A", "B", "C", "D")
    correct = by_letter(reference, letters)
    return Question(asks, letters[correct], grading=Grading((), letters, correct), language="en")


def mmau(wanted: Wanted) -> Sources:
    """mmau-SPLIT.json: [{"id", "audio_id", "question", "choices", "answer", "task"}] and the recordings it names."""
    found: Sources = {}
    for split in wanted.splits or ("test-mini",):
        path = wanted.folder / f"mmau-{split}.json"
        if path.is_file():
            found |= listed(split, path, read_json(path), _mmau, wanted)
    return found


def _mmau(row: Mapping[str, Any], wanted: Wanted) -> Question:
    if not row.get("answer"):
        raise BadSample("no answer: it is not published")
    correct = by_text(row["answer"], row["choices"])
    choices = unlettered(row["choices"])
    asks = [File("audio", str(row["audio_id"])), row["question"]]
    return multiple_choice(asks, choices, correct, wanted, name=str(row["id"]), group=str(row.get("task") or ""))


def captioned(file: File, captions: list[str], wanted: Wanted, name: str, usual: str) -> Question:
    """A medium and its captions. Raises BadSample where there are none."""
    captions = [" ".join(text.split()) for text in captions if text.strip()]
    if not captions:
        raise BadSample("no caption: all are empty")
    return Question([file, wanted.asked(usual)], captions[0], name=name, grading=Grading(tuple(captions)))


def clotho(wanted: Wanted) -> Sources:
    """clotho_captions_SPLIT.csv: file_name, caption_1 to caption_5; SPLIT/*.wav."""
    found: Sources = {}
    for split in wanted.splits or ("evaluation",):
        path = wanted.folder / f"clotho_captions_{split}.csv"
        if path.is_file():
            rows = [{**row, "split": split} for row in read_csv(path)]
            found |= listed(split, path, rows, _clotho, wanted)
    return found


def _clotho(row: Mapping[str, Any], wanted: Wanted) -> Question:
    captions = [row[f"caption_{number}"] for number in range(1, _MAX_CAPTIONS + 1)]
    folders = (row["split"], f"clotho_audio_{row['split']}/{row['split']}")
    file = lying("audio", wanted, [str(Path(row["file_name"]).with_suffix(""))], folders)
    return captioned(file, captions, wanted, row["file_name"].removesuffix(".wav"), _HEARD)


def audiocaps(wanted: Wanted) -> Sources:
    """[dataset/]SPLIT.csv: audiocap_id, youtube_id, start_time, caption, five rows a clip; clips in [audio/]SPLIT/."""
    found: Sources = {}
    for split in wanted.splits or ("test",):
        path = wanted.home("dataset") / f"{split}.csv"
        if not path.is_file():
            continue
        clips: dict[tuple[str, str], dict[str, Any]] = {}
        for row in read_csv(path):
            place = (row.get("youtube_id", ""), row.get("start_time", ""))
            clip = clips.setdefault(place, {"id": place[0], "start": place[1], "split": split, "captions": []})
            clip["captions"].append(row.get("caption", ""))
        found |= listed(split, path, clips.values(), _audiocaps, wanted)
    return found


def _audiocaps(row: Mapping[str, Any], wanted: Wanted) -> Question:
    names = [row["id"], f"Y{row['id']}", f"{row['id']}_{row['start']}", f"Y{row['id']}_{row['start']}"]
    file = lying("audio", wanted, names, (f"audio/{row['split']}", row["split"], "audio"))
    return captioned(file, list(row["captions"]), wanted, f"{row['id']}_{row['start']}", _HEARD)
