"""A conversion that is stopped at any moment goes on by the same command: no sample is lost, doubled or changed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import pytest

from data.convert import main
from data.convert_journal import NAME, Journal
from data.errors import DataError
from tests.data.convert_kit import clip, converts, counts, fails, samples, tree, write_lines

ROOT = Path(__file__).resolve().parents[2]


def source(folder: Path, rows: int = 8, seconds: float = 0.1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.wav").write_bytes(clip(seconds))
    (folder / "bad.wav").write_bytes(b"RIFF no sound")
    lines = [{"audio": "bad.wav" if i % 5 == 3 else "a.wav", "text": f"number {i}"} for i in range(rows)]
    return write_lines(folder / "list.jsonl", *lines, {"audio": "gone.wav", "text": "x"})


def forked(arguments: list[str], moment: int = 0) -> int:
    """Convert in a process of its own that dies by SIGKILL at the `moment`-th flush, rename or removal of a file.

    Returns its exit status, negative for a signal.
    """
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    calls = 0

    def counted(function: Callable) -> Callable:
        def call(*args, **options):
            nonlocal calls
            calls += 1
            if calls == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return call

    os.fsync, os.replace, os.unlink = counted(os.fsync), counted(os.replace), counted(os.unlink)
    status = 99
    try:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        status = main(arguments)
    finally:
        os._exit(status)


def stop_everywhere(path: Path, folder: Path, options: list[str]) -> None:
    """Convert into folder/1, folder/2, ..., killed one moment later each time and then run again, until one ends."""
    for moment in range(1, 1000):  # this process never has threads, so it may fork
        arguments = ["manifest", str(path), str(folder / str(moment)), *options]
        status = forked(arguments, moment)
        (folder / f"{moment}.status").write_text(f"{status} {forked(arguments)}")
        if status != -signal.SIGKILL:
            break


def test_killed_at_every_moment(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path, options = source(tmp_path / "in"), ["--samples-per-shard", "3"]
    assert counts(converts(capsys, "manifest", path, tmp_path / "whole", *options)) == (7, 3, 2)
    whole = tree(tmp_path / "whole")
    (tmp_path / "runs").mkdir()
    process = get_context("forkserver").Process(target=stop_everywhere, args=(path, tmp_path / "runs", options))
    process.start()
    process.join()
    statuses = [(tmp_path / f"runs/{moment}.status") for moment in range(1, 1000)]
    texts = [file.read_text() for file in statuses if file.exists()]
    assert len(texts) > 20 and texts == ["-9 0"] * (len(texts) - 1) + ["0 0"]
    for moment in range(1, len(texts) + 1):
        assert tree(tmp_path / "runs" / str(moment)) == whole, f"killed at moment {moment}"


def start(*arguments: object) -> subprocess.Popen:
    """The command as a user starts it, in a session of its own; it gives way to the test, which must see it go on."""
    command = ["nice", "-n", "19", sys.executable, "-m", "data.convert", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_jobs(process: subprocess.Popen, out: Path, jobs: int) -> None:
    """Until so many jobs are in the journal."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (out / NAME).exists() and (out / NAME).read_bytes().count(b'\n{"split"') >= jobs:
            return
        time.sleep(0.005)
    raise AssertionError(f"no {jobs} jobs: {process.communicate()}")


def session(leader: int) -> list[int]:
    """Live processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def wait_until_gone(leader: int) -> None:
    """Until no process of a session is left."""
    deadline = time.monotonic() + 20
    while session(leader):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_as_a_process_again_and_again(capsys: pytest.CaptureFixture[str], tmp_path: Path, workers: int) -> None:
    path = source(tmp_path / "in", 400, 3.0)  # enough, as below
    out, options = tmp_path / "out", ("--samples-per-shard", 4)
    converts(capsys, "manifest", path, tmp_path / "whole", *options)
    for jobs in (1, 10, 20, 30):
        process = start("manifest", path, out, *options, "--workers", workers)
        wait_for_jobs(process, out, jobs)
        process.kill()
        process.communicate()
        wait_until_gone(process.pid)
        assert (out / NAME).read_bytes().count(b'\n{"split"') >= jobs
    done = {path: path.stat().st_mtime_ns for path in out.glob("train/*.tar")}
    finished = [json.loads(line) for line in (out / NAME).read_bytes().splitlines()[2:]]
    converts(capsys, "manifest", path, out, *options, "--workers", workers)
    kept = [name for job in finished for name in job["shards"]]
    assert len(kept) >= 20 and all(
        (out / "train" / name).stat().st_mtime_ns == done[out / "train" / name] for name in kept
    )
    assert tree(out) == tree(tmp_path / "whole") and len(samples(out / "train")) == 320


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ctrl_c(capsys: pytest.CaptureFixture[str], tmp_path: Path, workers: int) -> None:
    path = source(tmp_path / "in", 400, 3.0)  # enough that a test process kept waiting still comes in time
    out, options = tmp_path / "out", ("--samples-per-shard", 4)
    process = start("manifest", path, out, *options, "--workers", workers)
    wait_for_jobs(process, out, 3)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    printed, error = process.communicate(timeout=60)
    assert process.returncode == 130 and error.endswith("stopped: the same command goes on where it stopped\n")
    assert "Traceback" not in error and not printed
    assert not list(out.rglob(".*.tmp"))
    wait_until_gone(process.pid)
    shards = {path.name for path in out.glob("train/*.tar")}
    listed = [json.loads(line) for line in (out / NAME).read_bytes().splitlines()[2:]]
    assert len(listed) >= 3 and shards >= {name for job in listed for name in job["shards"]}
    went_on = counts(converts(capsys, "manifest", path, out, *options))
    assert went_on == counts(converts(capsys, "manifest", path, tmp_path / "whole", *options))
    assert tree(out) == tree(tmp_path / "whole")


@pytest.mark.slow
def test_a_worker_that_dies_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = source(tmp_path / "in", 400, 3.0)
    out, options = tmp_path / "out", ("--samples-per-shard", 4, "--workers", 2)
    process = start("manifest", path, out, *options)
    wait_for_jobs(process, out, 2)
    workers = [pid for pid in session(process.pid) if pid != process.pid]
    victim = max(workers)  # helpers of multiprocessing are started before the workers
    os.kill(victim, signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2 and error.splitlines()[-1].startswith("error: a worker process ended")


def test_one_conversion_at_a_time(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = source(tmp_path / "in")
    converts(capsys, "manifest", path, tmp_path / "out")
    plan = json.loads((tmp_path / "out" / NAME).read_bytes().splitlines()[0])
    journal = Journal(tmp_path / "out", plan)
    assert "another conversion is writing here" in fails(capsys, "manifest", path, tmp_path / "out")
    journal.close()
    converts(capsys, "manifest", path, tmp_path / "out")


def test_files_that_went_missing_are_made_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = source(tmp_path / "in")
    arguments = ("manifest", path, tmp_path / "out", "--samples-per-shard", 3)
    converts(capsys, *arguments)
    whole = tree(tmp_path / "out")
    (tmp_path / "out/train/shard-000001.tar.index").unlink()
    with open(tmp_path / "out/train/shard-000002.tar", "ab") as file:
        file.write(b"more")
    (tmp_path / "out/train/shard-000007.tar").write_bytes(b"of nobody")
    (tmp_path / "out/train/.shard-000001.tar.1.tmp").write_bytes(b"half")
    (tmp_path / "out/train/notes.txt").write_bytes(b"the user's own")
    converts(capsys, *arguments)
    assert tree(tmp_path / "out") == whole | {"train/notes.txt": b"the user's own"}


def test_a_journal_or_tokenizer_that_was_changed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path, out = source(tmp_path / "in"), tmp_path / "out"
    converts(capsys, "manifest", path, out)
    journal = (out / NAME).read_bytes()
    (out / NAME).write_bytes(journal.replace(b'"split"', b'"split', 1))
    assert "convert.jsonl: damaged at byte" in fails(capsys, "manifest", path, out)
    (out / NAME).write_bytes(journal.replace(b"omniloom-convert-1", b"omniloom-convert-0", 1))
    assert "another version of the converter" in fails(capsys, "manifest", path, out)
    (out / NAME).write_bytes(journal)
    text = (out / "tokenizer/tokenizer.json").read_text()
    (out / "tokenizer/tokenizer.json").write_text(text.replace('"NFC"', '"NFKC"'))
    assert "has changed since the conversion was begun" in fails(capsys, "manifest", path, out)
    assert tree(out)[NAME] == journal


def test_journal_lines_are_what_they_say(tmp_path: Path) -> None:
    plan = {"options": {"a": 1}, "sources": {"train": "x"}}
    journal = Journal(tmp_path, plan)
    journal.note_tokenizer("f")
    journal.close()
    (tmp_path / NAME).write_bytes((tmp_path / NAME).read_bytes() + b'{"split": "train", "numb')
    journal = Journal(tmp_path, plan)  # half a line is no line
    assert journal.tokenizer == "f" and not journal.done
    journal.close()
    with pytest.raises(DataError, match="a was 1, is 2"):
        Journal(tmp_path, {**plan, "options": {"a": 2}})
