"""Damaged and hostile checkpoints: found before a tensor is used, and the one before is taken, on all ranks."""

from __future__ import annotations

import hashlib
import json
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.train.checkpoint_helpers import assert_holds, make_state, write_steps
from train.checkpoint import choose, verify
from train.checkpoint.format import checksum_line
from train.errors import CheckpointError

NEWEST = "checkpoints/step-00000002"
FILES = ["rank0.safetensors", "rank1.safetensors", "manifest.json", "manifest.sha256"]


@pytest.fixture()
def run(tmp_path: Path) -> Path:
    write_steps(tmp_path, [1, 2])
    return tmp_path


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.parametrize("file", FILES)
def test_a_flipped_bit_anywhere_is_found_and_the_checkpoint_before_is_taken(run: Path, file: str):
    path, chooser = run / NEWEST / file, random.Random(file)
    for bit in {0, 8 * path.stat().st_size - 1, *(chooser.randrange(8 * path.stat().st_size) for _ in range(30))}:
        flip(path, bit)
        warned: list[str] = []
        assert_holds(choose(run, "auto", warn=warned.append), make_state(1))
        assert len(warned) == 1 and str(path.parent) in warned[0] and "going back" in warned[0]
        assert file.split(".")[0] in warned[0]  # manifest.sha256 and manifest.json do not agree: either may be damaged
        flip(path, bit)
    assert_holds(choose(run, "auto"), make_state(2))


@pytest.mark.parametrize("file", FILES)
def test_a_truncated_or_missing_file_is_named(run: Path, file: str):
    path = run / NEWEST / file
    data = path.read_bytes()
    for length in (0, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match="manifest" if "manifest" in file else file):
            verify(path.parent)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{file}: No such file"):
        verify(path.parent)
    assert_holds(choose(run, "latest", warn=lambda text: None), make_state(1))


def test_a_path_is_taken_as_told_or_refused_with_the_good_one_named(run: Path):
    assert_holds(choose(run, str(run / "checkpoints/step-00000001")), make_state(1))
    flip(run / NEWEST / "rank1.safetensors", 5000)
    with pytest.raises(CheckpointError, match=r"step-00000002/rank1.safetensors: damaged.*step-00000001 is good"):
        choose(run, str(run / NEWEST))
    flip(run / "checkpoints/step-00000001/rank0.safetensors", 5000)
    with pytest.raises(CheckpointError, match="no older checkpoint beside it is good"):
        choose(run, str(run / NEWEST))
    with pytest.raises(CheckpointError, match="all 2 checkpoints are damaged"):
        choose(run, "auto", warn=lambda text: None)
    with pytest.raises(CheckpointError, match="resume=nowhere: no checkpoint there"):
        choose(run, "nowhere")


def test_auto_latest_and_never_without_and_with_a_checkpoint(tmp_path: Path):
    assert choose(tmp_path, "auto") is None and choose(tmp_path, "never") is None
    with pytest.raises(CheckpointError, match="resume=latest, but there is no checkpoint"):
        choose(tmp_path, "latest")
    write_steps(tmp_path, [1])
    with pytest.raises(CheckpointError, match="has step-00000001 already"):
        choose(tmp_path, "never")


def test_all_ranks_take_the_same_one_when_one_of_them_finds_damage(run: Path):
    flip(run / NEWEST / "rank1.safetensors", 9000)
    world, barrier, votes, warned = 3, threading.Barrier(3), [False] * 3, [[], [], []]
    steps: list[int | None] = [None] * world

    def choose_as(rank: int) -> None:
        def agree(flag: bool) -> bool:
            votes[rank] = flag
            barrier.wait(20)
            result = any(votes)
            barrier.wait(20)
            return result

        manifest = choose(run, "auto", agree=agree, rank=rank, world=world, warn=warned[rank].append)
        steps[rank] = manifest.step if manifest else None

    threads = [threading.Thread(target=choose_as, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert steps == [1, 1, 1]
    assert [len(lines) for lines in warned] == [1, 0, 0] and "rank1.safetensors" in warned[0][0]


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """A manifest that somebody made on purpose: its checksum is right."""
    tree = json.loads((folder / "manifest.json").read_text())
    change(tree)
    text = json.dumps(tree).encode()
    (folder / "manifest.json").write_bytes(text)
    (folder / "manifest.sha256").write_text(checksum_line(text))


def put(*path: Any) -> Callable[[dict[str, Any]], None]:
    """Set a value deep in the manifest: put(key, key, ..., value)."""

    def change(tree: Any) -> None:
        for key in path[:-2]:
            tree = tree[key]
        tree[path[-2]] = path[-1]

    return change


NORM = "thinker.model.norm.weight"
HOSTILE = {
    "outside": (put("files", 0, "name", "../../secret.safetensors"), "refused"),
    "absolute": (put("files", 0, "name", "/etc/passwd"), "refused"),
    "no string": (put("files", 0, "name", 7), "refused"),
    "another rank twice": (put("files", 0, "name", "rank1.safetensors"), "listed twice"),
    "no files": (put("files", []), "listed twice, or none"),
    "huge": (put("tensors", NORM, "shape", [1 << 40, 1 << 40]), "the limit is"),
    "negative": (put("tensors", NORM, "shape", [-4]), "shape of"),
    "no such file": (put("tensors", NORM, "ranges", "weight", [[0, 4, 9]]), "file number 9 of 2"),
    "a gap": (put("tensors", NORM, "ranges", "weight", [[0, 2, 0]]), "2 of 4 elements"),
    "twice": (put("tensors", NORM, "ranges", "weight", [[0, 4, 0], [2, 4, 0]]), "stored twice or never"),
    "not a range": (put("tensors", NORM, "ranges", "weight", [["0", 4, 0]]), "a range of weight"),
    "a bool": (put("tensors", NORM, "ranges", "weight", [[False, 4, 0]]), "a range of weight"),
    "other step": (put("step", 77), "is of step 77"),
    "newer format": (put("version", 2), "format version 2, this program reads 1"),
    "other format": (put("format", "zip"), "is no omniloom-checkpoint manifest"),
    "no info": (put("info", None), "key 'info' is missing or no dict"),
    "kinds": (put("parameters", "model.norm.weight", [1]), "kinds of"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_manifest_is_refused_in_one_line(run: Path, case: str):
    change, message = HOSTILE[case]
    rewrite(run / NEWEST, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        verify(run / NEWEST)
    assert "manifest.json" in str(caught.value) and "\n" not in str(caught.value)


def test_links_and_deep_json_are_refused(run: Path):
    folder = run / NEWEST
    data, secret = (folder / "rank0.safetensors").read_bytes(), run / "elsewhere"
    secret.write_bytes(data)
    (folder / "rank0.safetensors").unlink()
    os.symlink(secret, folder / "rank0.safetensors")
    with pytest.raises(CheckpointError, match="rank0.safetensors: not a regular file"):
        verify(folder)
    text = b"[" * 10**6
    (folder / "manifest.json").write_bytes(text)
    (folder / "manifest.sha256").write_text(f"{hashlib.sha256(text).hexdigest()}  manifest.json\n")
    with pytest.raises(CheckpointError, match="manifest.json: not JSON"):
        verify(folder)
