"""Multiple choice about films, silent or heard: Video-MME, MLVU, LVBench, WorldSense, Daily-Omni.

    film + question + lettered choices --> a letter, grouped as its authors do: by length, by task
    LVBench: the time that a question is about / length of the film --> grading.position

Films are looked for by the name that a row gives; those that are not there (many may no longer be fetched) are left out
and counted. With --sound they are heard too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from data.benchmark import (
    File,
    Question,
    Sources,
    Wanted,
    by_letter,
    by_text,
    listed,
    lying,
    multiple_choice,
    read_json,
    tables,
    together,
    unlettered,
)

_MLVU = ("1_plotQA", "2_needle", "3_ego", "4_count", "5_order", "6_anomaly_reco", "7_topic_reasoning")
_OPTION = re.compile(r"\n\s*\(([A-Z])\)\s*")
_CLOCK = re.compile(r"(?:(\d+):)?(\d+):(\d+)")


def videomme(wanted: Wanted) -> Sources:
    """videomme/test-*.parquet, and videos/ID.mp4 or data/ID.mp4."""
    files = sorted(wanted.folder.glob("videomme/test-*.parquet")) or sorted(wanted.folder.glob("test-*.parquet"))
    columns = ("videoID", "question_id", "question", "options", "answer", "duration")
    return tables(wanted, files, "test", columns, _videomme)


def _videomme(row: Mapping[str, Any], wanted: Wanted) -> Question:
    asks = [lying("video", wanted, [row["videoID"]], ("videos", "data", "video")), row["question"]]
    choices = unlettered(row["options"])
    correct = by_letter(row["answer"], choices)
    return multiple_choice(asks, choices, correct, wanted, name=row["question_id"], group=row["duration"])


def mlvu(wanted: Wanted) -> Sources:
    """json/TASK.json and video/TASK/*.mp4 of the seven tasks with choices, perhaps in MLVU/."""
    home = wanted.home("MLVU")
    return together(
        listed(
            "dev", path, [{**row, "task": task, "home": wanted.path(home)} for row in read_json(path)], _mlvu, wanted
        )
        for task in _MLVU
        if (path := home / "json" / f"{task}.json").is_file()
    )


def _mlvu(row: Mapping[str, Any], wanted: Wanted) -> Question:
    film = File("video", f"{row['home']}/video/{row['task']}/{row['video']}")
    choices, task = [str(each) for each in row["candidates"]], row["task"].partition("_")[2]
    correct = by_text(row["answer"], choices)
    name = f"{task}-{row['video'].rpartition('.')[0]}"
    return multiple_choice([film, row["question"]], choices, correct, wanted, name=name, group=task)


def lvbench(wanted: Wanted) -> Sources:
    """video_info.meta.jsonl, perhaps in data/: a film and its questions a line; all_videos/KEY.mp4, videos/KEY.mp4."""
    path = wanted.home("data") / "video_info.meta.jsonl"
    if not path.is_file():
        path = wanted.folder / "video_info.meta.jsonl"
    if not path.is_file():
        return {}
    rows = [
        {**asked, "key": film["key"], "minutes": (film.get("video_info") or {}).get("duration_minutes")}
        for film in read_json(path)
        for asked in film["qa"]
    ]
    return listed("test", path, rows, _lvbench, wanted)


def _lvbench(row: Mapping[str, Any], wanted: Wanted) -> Question:
    folders = ("all_videos", "videos", "data/all_videos", "data/videos")
    text, *options = _OPTION.split(row["question"])
    asks = [lying("video", wanted, [row["key"]], folders), text.strip()]
    choices = [option.strip() for option in options[1::2]]
    kinds = row.get("question_type") or []
    return multiple_choice(
        asks,
        choices,
        by_letter(row["answer"], choices),
        wanted,
        name=str(row["uid"]),
        group=", ".join(kinds) if isinstance(kinds, list) else str(kinds),
        position=_position(str(row.get("time_reference") or ""), row.get("minutes")),
    )


def _position(reference: str, minutes: Any) -> float:
    """Where in the film, from 0 to 1, the middle of "01:10-01:25" lies; -1 where that is unknown."""
    marks = [int(h or 0) * 3600 + int(m) * 60 + int(s) for h, m, s in _CLOCK.findall(reference)]
    if not marks or not isinstance(minutes, int | float) or minutes <= 0:
        return -1.0
    return min(1.0, sum(marks[:2]) / len(marks[:2]) / (60 * minutes))  # lengths are whole minutes, rounded


def worldsense(wanted: Wanted) -> Sources:
    """worldsense_qa.json: {ID: {"task0": {"question", "candidates", "answer"}, ...}}; videos/ID.mp4."""
    path = wanted.folder / "worldsense_qa.json"
    if not path.is_file():
        return {}
    rows = [
        {**task, "id": film, "number": number, "duration": about.get("duration", "")}
        for film, about in read_json(path).items()
        for number, task in about.items()
        if number.startswith("task") and isinstance(task, dict)
    ]
    return listed("test", path, rows, _worldsense, wanted)


def _worldsense(row: Mapping[str, Any], wanted: Wanted) -> Question:
    choices = unlettered(row["candidates"])
    asks = [lying("video", wanted, [row["id"]], ("videos", "data", "video")), row["question"]]
    group, name = str(row.get("task_type") or ""), f"{row['id']}-{row['number']}"
    return multiple_choice(asks, choices, by_letter(row["answer"], choices), wanted, name=name, group=group)


def dailyomni(wanted: Wanted) -> Sources:
    """qa.json: [{"video_id", "Question", "Choice", "Answer", "Type"}]; Videos/ID/ID_video.mp4."""
    path = wanted.folder / "qa.json"
    return listed("test", path, read_json(path), _dailyomni, wanted) if path.is_file() else {}


def _dailyomni(row: Mapping[str, Any], wanted: Wanted) -> Question:
    film = str(row["video_id"])
    choices = unlettered(row["Choice"])
    asks = [lying("video", wanted, [f"{film}_video", film], (f"Videos/{film}", "Videos")), row["Question"]]
    correct = by_letter(str(row["Answer"])[:1], choices)
    return multiple_choice(asks, choices, correct, wanted, name=film, group=str(row.get("Type") or ""))
