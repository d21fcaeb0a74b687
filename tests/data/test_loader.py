"""The loader: same batches whatever the workers, ranks and stops; nothing hangs when processes die."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from data.audio import decode
from data.corpus import Corpus
from data.errors import DataError
from data.loader import stream
from data.mel import log_mel
from data.plan import Plan, PlanSettings
from data.reader import Reader
from data.shards import write_shards
from data.tokenizer import AUDIO_PAD
from tests.data.corpus_kit import mixed, tokenizer, written
from tests.data.layouts import layout_of

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = tokenizer()


@dataclass(frozen=True)
class Rank:
    index: int
    count: int


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(mixed(40), folder, TOKENIZER, 9)
    return folder


def open_run(folder: Path, **settings) -> tuple[Plan, Reader]:
    corpus = Corpus.open([str(folder / "*.tar")], TOKENIZER.fingerprint)
    values = {"sequence_length": 120, "sequences_per_step": 5, "window": 15, "speeds": (0.9, 1.0, 1.1)} | settings
    reader = Reader(corpus, TOKENIZER, seed=3, layout=layout_of(TOKENIZER))
    return Plan(corpus, PlanSettings(**values), seed=3, sizing=reader.sizing), reader


def read(folder: Path, rank: Rank, steps: range, workers: int = 0) -> list[tuple]:
    """Everything that the batches of some steps hold, comparable."""
    plan, reader = open_run(folder)
    batches = stream(plan, reader, rank, steps.start, steps.stop, workers, prefetch=2)
    return [
        (step, batch.keys, batch.doc_lengths, batch.mel_lengths, batch.skipped)
        + tuple(tensor.numpy().tobytes() for tensor in (batch.token_ids_T, batch.labels_T, batch.mel_FM))
        for step, own in batches
        for batch in own
    ]


def test_batches_hold_what_the_samples_say(shards: Path) -> None:
    plan, reader = open_run(shards, speeds=(1.0,))
    records = {record.key: record for record in mixed(40)}
    seen = Counter()
    for _, (batch,) in stream(plan, reader, Rank(0, 5), 0, 12, 0):
        ids, labels = batch.token_ids_T, batch.labels_T
        assert ids.dtype == labels.dtype == torch.int64 and batch.mel_FM.dtype == torch.float32
        assert len(ids) == len(labels) == batch.position_ids_3T.shape[1] == sum(batch.doc_lengths) <= 120
        assert len(batch.mel_FM) == sum(batch.mel_lengths)
        assert (ids == TOKENIZER.id(AUDIO_PAD)).sum() == sum(map(reader.layout.num_audio_tokens, batch.mel_lengths))
        starts = torch.tensor((0, *batch.doc_lengths)).cumsum(0).tolist()
        mels = iter(batch.mel_FM.split(batch.mel_lengths) if batch.mel_lengths else [])
        for key, first, last in zip(batch.keys, starts, starts[1:], strict=False):
            record = records[key.split(":")[1]]
            seen[record.key] += 1
            text = TOKENIZER.decode(labels[first:last][labels[first:last] >= 0].tolist())
            assert text == record.messages[-1]["content"]
            targets = labels[first : last - 1]
            assert torch.equal(targets[targets >= 0], ids[first + 1 : last][targets >= 0])
            assert labels[last - 1] == -100
            assert torch.equal(batch.position_ids_3T[:, first:last], torch.arange(last - first).float().expand(3, -1))
            for payload in record.media.values():
                assert torch.equal(next(mels), log_mel(decode(payload)))
    assert len(seen) > 20


def test_workers_change_nothing(shards: Path) -> None:
    alone = read(shards, Rank(0, 2), range(8))
    assert read(shards, Rank(0, 2), range(8), workers=1) == alone
    assert read(shards, Rank(0, 2), range(8), workers=2) == alone


def test_ranks_and_stops_change_nothing(shards: Path) -> None:
    whole = Counter(batch[1:] for batch in read(shards, Rank(0, 1), range(10)) if batch[1])
    for worlds in ([2, 2], [3, 1], [4, 7]):
        parts = [
            read(shards, Rank(rank, world), steps)
            for world, steps in zip(worlds, (range(4), range(4, 10)), strict=True)
            for rank in range(world)
        ]
        assert Counter(batch[1:] for part in parts for batch in part if batch[1]) == whole


def test_every_rank_gets_as_many_batches(shards: Path) -> None:
    for world, expected in ((1, 5), (2, 3), (3, 2), (7, 1)):
        counts, empty = set(), 0
        for rank in range(world):
            plan, reader = open_run(shards)
            for _, batches in stream(plan, reader, Rank(rank, world), 0, 3, 0):
                counts.add(len(batches))
                empty += sum(len(batch.token_ids_T) == 0 for batch in batches)
        assert counts == {expected} and empty == 3 * (world * expected - 5)


def test_random_state_of_training_is_left_alone(shards: Path) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    read(shards, Rank(0, 1), range(2))
    read(shards, Rank(0, 1), range(2), workers=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_moves_whole(shards: Path) -> None:
    plan, reader = open_run(shards)
    batch = reader.batch(plan.step(0)[0])
    moved = batch.to("meta")
    assert {moved.token_ids_T.device.type, moved.mel_FM.device.type} == {"meta"} and moved.keys == batch.keys


def test_a_shard_that_vanishes_is_one_line(tmp_path: Path) -> None:
    write_shards([written(f"k{i}") for i in range(9)], tmp_path, TOKENIZER, 3)
    plan, reader = open_run(tmp_path)
    plan.step(0)
    (tmp_path / "shard-000001.tar").unlink()
    assert list(stream(plan, reader, Rank(0, 1), 0, 3, 0))  # this process holds it open
    with pytest.raises(DataError) as caught:
        list(stream(plan, reader, Rank(0, 1), 0, 3, 1))
    assert str(caught.value) == f"{tmp_path / 'shard-000001.tar'}: no such file"


def test_a_killed_worker_is_one_line(shards: Path) -> None:
    plan, reader = open_run(shards)
    before = set(worker_pids())
    batches = stream(plan, reader, Rank(0, 1), 0, 10_000, 2, prefetch=2)
    next(batches)
    for pid in set(worker_pids()) - before:
        os.kill(pid, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(DataError) as caught:
        list(batches)
    assert time.monotonic() - start < 30
    line = str(caught.value)
    assert line.startswith("a data worker died or hangs (") and "\n" not in line
    assert line.endswith("the usual cause is memory: lower data.workers or data.prefetch, or give /dev/shm more room")


def test_closing_ends_the_workers(shards: Path) -> None:
    plan, reader = open_run(shards)
    before = set(worker_pids())
    with closing(stream(plan, reader, Rank(0, 1), 0, 10_000, 2)) as batches:
        next(batches)
        workers = set(worker_pids()) - before
        assert len(workers) == 2
    wait_for_end(workers, 10)


def worker_pids() -> list[int]:
    """Processes under this one's forkserver."""
    import multiprocessing

    return [child.pid for child in multiprocessing.active_children() if child.pid is not None]


def wait_for_end(pids: set[int], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while alive := {pid for pid in pids if is_alive(pid)}:
        assert time.monotonic() < deadline, f"still running: {alive}"
        time.sleep(0.1)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


SCRIPT = """
import atexit, multiprocessing, sys, time
from pathlib import Path
from tests.data.test_loader import Rank, open_run
from data.loader import stream

if __name__ == "__main__":
    plan, reader = open_run(Path(sys.argv[1]))
    batches = stream(plan, reader, Rank(0, 1), 0, 10_000, 2)
    next(batches)
    atexit.kept = batches  # so it is closed last of all, when modules are being emptied
    try:
        print(*[child.pid for child in multiprocessing.active_children()], flush=True)  # the signal may come at once
        for _ in batches:
            time.sleep(0.01)
    except KeyboardInterrupt:
        print("stopped", flush=True)
"""


@pytest.mark.parametrize(
    "ending", [signal.SIGKILL, signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_no_worker_outlives_its_parent(shards: Path, tmp_path: Path, ending: signal.Signals) -> None:
    """kill -9 of the parent, and Ctrl-C or a scheduler's SIGTERM to the whole group."""
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(script), str(shards)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    assert process.stdout is not None
    pids = {int(pid) for pid in process.stdout.readline().split()}
    assert len(pids) == 2
    if ending == signal.SIGKILL:
        process.kill()
    else:
        os.killpg(process.pid, ending)
    out, error = process.communicate(timeout=60)
    wait_for_end(pids, 30)
    if ending == signal.SIGINT:
        assert (out, error, process.returncode) == ("stopped\n", "", 0)
