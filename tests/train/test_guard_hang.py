"""A rank that hangs is named, and the run ends with status 70; a rank that takes long for a reason is left alone."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from data.types import Batch
from tests.run_kit import free_port
from tests.train import hang_cases
from train import hang
from train.heartbeat import Heart, beating, media_of

FIELDS = {"host": "n", "part": "forward", "media": "text", "slow": False, "still": 10.0}


def pulses(*lines: dict[str, Any]) -> dict[int, hang.Pulse]:
    given = [FIELDS | {"host": f"n{rank}", "step": 9, "beats": 2} | line for rank, line in enumerate(lines)]
    return {rank: hang.Pulse(line, 0.0, line.get("answers", True)) for rank, line in enumerate(given)}


WAITS = {"where": "a collective at train/loop.py:3"}


@pytest.mark.parametrize(
    ("lines", "behind", "text"),
    [
        (
            [{}, {"answers": False, "media": "audio, video"}, {}],
            [1],
            "rank 1 on host n1 has been in forward of step 9 (audio, video) since it last answered; its process is "
            "stopped or holds the interpreter's lock; the others are in forward of step 9",
        ),
        (
            [WAITS, {"where": "train/speech.py:7", "media": "audio"}],
            [1],
            "rank 1 on host n1 has been in forward of step 9 (audio) for 10 s, at train/speech.py:7; the others wait "
            "in a collective in forward of step 9",
        ),
        (
            [WAITS | {"part": "backward", "beats": 3}, {}, WAITS | {"part": "backward", "beats": 3}],
            [1],
            "rank 1 on host n1 has been in forward of step 9 (text) for 10 s; the others wait in a collective in "
            "backward of step 9",
        ),
        (
            [{"step": 10, "part": "data", "beats": 0}, WAITS],
            [1],
            "rank 1 on host n1 has been in forward of step 9 (text) for 10 s, at a collective at train/loop.py:3; the "
            "others are in data of step 10; they have passed the collective that it waits in, or never entered it",
        ),
        ([WAITS, WAITS], [0, 1], "rank 0 on host n0 has been in forward of step 9 (text) for 10 s, at a collective"),
    ],
)
def test_who_is_behind(lines: list[dict[str, Any]], behind: list[int], text: str) -> None:
    found = hang.verdict(pulses(*lines), 0, len(lines), 9.0, 4.0)
    assert found is not None and found.behind == behind and found.text.startswith(text), found


def test_patience() -> None:
    """A part that may take long has longer, whoever is in it; so have ranks that do not see the others."""
    judge = hang.verdict
    assert judge(pulses({}, {}), 0, 2, 9.0, 4.0) and not judge(pulses({}, {}), 0, 2, 11.0, 4.0)
    saves = {"slow": True, "beats": 1, "still": 30.0}
    assert not judge(pulses(WAITS, saves), 0, 2, 9.0, 4.0), "rank 1 is behind in a part that may take long"
    assert judge(pulses(WAITS | {"still": 40.0}, saves | {"still": 40.0}), 0, 2, 9.0, 4.0)
    late = {"beats": 1, "still": 0.1}
    assert not judge(pulses(WAITS | {"still": 40.0}, late), 0, 2, 9.0, 4.0), "rank 1 has just gone on"
    assert judge(pulses({"still": 20.0}, {"slow": True, "beats": 5}), 0, 2, 9.0, 4.0), "the slow one is ahead"
    alone = pulses({})
    assert not judge(alone, 0, 2, 9.0, 4.0)
    found = judge(pulses({"still": 40.0}), 0, 2, 9.0, 4.0)
    assert found and found.text.endswith("1 of 2 ranks have no heartbeat in this folder, which may not be shared")


def test_files_of_another_launch_damaged_or_ended_are_not_read(tmp_path: Path) -> None:
    lines = ['{"launch": "a", "part": "data", "alive": 1}', '{"launch": "b", "part": "data", "alive": 1}', '{"laun']
    lines.append('{"launch": "a", "part": "end", "alive": 1}')
    for rank, line in enumerate(lines):
        (tmp_path / f"rank{rank:05d}.json").write_text(line)
    known: dict[int, hang.Pulse] = {}
    for _ in range(4):
        hang.read(tmp_path, "a", 6, known, 1.0, 10.0)
    assert list(known) == [0] and known[0].silent_s == 3.0 and not known[0].answers


@pytest.mark.parametrize(
    ("how", "status", "words"),
    [
        ("sleep", 70, "rank 1 on host .* has been in forward of step 3 .audio, video. for 3 s, at .*hang_cases.py"),
        ("stop", 70, "rank 1 on host .* in forward of step 3 .audio, video. since it last answered; its process is st"),
        ("lock", 70, "rank 1 on host .* in forward of step 3 .audio, video. since it last answered"),
        (
            "missed",
            70,
            "rank 1 on host .* has been in optimizer of step 3 .audio, video.*a collective.*passed the coll",
        ),
        ("evaluation", 0, ""),
        ("apart", 0, ""),
    ],
)
@pytest.mark.timeout(120)
def test_two_ranks(tmp_path: Path, how: str, status: int, words: str) -> None:
    processes = hang_cases.start(tmp_path, how, free_port())
    try:
        output = processes[0].communicate(timeout=90)[1]
    finally:
        if how in ("stop", "lock"):
            processes[1].kill()
        second = processes[1].communicate(timeout=30)[1]
    assert processes[0].returncode == status, output + second
    if not status:
        assert processes[1].returncode == 0 and "error" not in output + second
        return
    lines = [line for line in (output + second).splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    (event,) = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert event["event"] == "hang" and event["step"] == 3 and event["ranks"] == [1]
    assert re.search(words, lines[0]), lines[0]
    assert "rank 0: stacks of all threads" in output and "hang_cases.py" in output
    if how == "lock":
        assert "Timeout" in second and "misbehave" in second, "its stacks, though nothing of Python ran"


def test_the_file_and_what_a_beat_costs(tmp_path: Path) -> None:
    heart = Heart(tmp_path / "heartbeats", rank=3, world=8, launch="a", hang_s=4.0, slow=4.0)
    heart.begin(120, hang_cases.BATCHES)
    path = tmp_path / "heartbeats/rank00003.json"
    deadline = time.monotonic() + 30
    while not path.exists() or json.loads(path.read_text())["step"] != 120:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    line = json.loads(path.read_text())
    assert {key: line[key] for key in ("rank", "step", "part", "media")} == {
        "rank": 3, "step": 120, "part": "forward", "media": "audio, video",
    }  # fmt: skip
    assert abs(line["at"] - time.time()) < 30 and line["pid"] and line["host"]
    began = time.thread_time()
    for _ in range(10_000):
        heart.beat("backward")
    assert (time.thread_time() - began) / 10_000 < 20e-6
    heart.close()
    assert json.loads(path.read_text())["part"] == "end"
    assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat"]


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "heartbeats").write_text("in the way")
    left: list[int] = []
    heart = Heart(tmp_path / "heartbeats", rank=0, world=1, launch="a", hang_s=0.4, slow=1.0, leave=left.append)
    time.sleep(1.5)
    heart.close()
    assert not left


def test_evaluation_is_progress() -> None:
    class Counts:
        beats = 0

        def beat(self, part: str) -> None:
            self.beats += 1

    class Engine:
        shard = "s"

        def generate(self, *arguments: int) -> int:
            return sum(arguments)

        eval_step = generate

    heart = Counts()
    engine: Any = beating(Engine(), heart)  # type: ignore[arg-type]
    assert engine.generate(1, 2) == 3 and engine.eval_step(4) == 4 and engine.shard == "s" and heart.beats == 2


def test_media() -> None:
    assert media_of([Batch.empty(4)]) == "nothing" and media_of(hang_cases.BATCHES) == "audio, video"
