"""Saving and reading back: any cut, any rank count; failures; who may write; what is kept."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from models.hf import released_pieces
from tests.train.checkpoint_helpers import (
    FROZEN,
    IDENTITY,
    INFO,
    KINDS,
    SHARE,
    assert_holds,
    cut,
    make_state,
    save_all,
    savers,
    shape_of,
    write_steps,
)
from train.checkpoint import CheckpointReader, Saver, candidates, choose, verify
from train.engines import VALUE, WEIGHT, Fragment
from train.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]


def names_in(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(world=st.integers(1, 4), seed=st.integers(0, 10**6))
def test_what_is_saved_cut_one_way_is_read_cut_another_way(tmp_path_factory, world: int, seed: int):
    run, state, chooser = tmp_path_factory.mktemp("run"), make_state(seed), random.Random(seed)
    all_savers = savers(run, world, "a")
    save_all(all_savers, 5, cut(state, world, chooser))
    for saver in all_savers:
        saver.close()
    manifest = choose(run, "latest")
    assert manifest is not None and manifest.step == 5
    assert manifest.info == INFO
    reader = CheckpointReader(manifest, released_pieces, IDENTITY)
    for fragments in cut(state, chooser.randrange(1, 5), chooser):
        for f in fragments:
            assert reader.kinds(f.name) == set(f.tensors)
            for kind, values in f.tensors.items():
                assert torch.equal(reader.read(kind, f.name, f.shape, f.start, f.length), values)


def test_files_are_plain_safetensors_under_released_names(tmp_path: Path):
    write_steps(tmp_path, [1], world=1)
    with safe_open(str(tmp_path / "checkpoints/step-00000001/rank0.safetensors"), "pt") as file:
        names = {key.split("|")[1] for key in file.keys()}
        total = sum(file.get_tensor(key).numel() for key in file.keys())
    assert "thinker.model.layers.0.mlp.experts.2.up_proj.weight" in names
    assert not any("gate_up_proj" in name for name in names)
    assert total == sum(values.numel() for values in make_state(1).values())
    subprocess.run(["sha256sum", "-c", "manifest.sha256"], cwd=tmp_path / "checkpoints/step-00000001", check=True)


def test_keeps_the_newest_and_points_latest_at_the_last(tmp_path: Path):
    write_steps(tmp_path, [1, 2, 3, 5], keep=2)
    assert names_in(tmp_path) == [".lock-rank0", ".lock-rank1", "latest", "step-00000003", "step-00000005"]
    assert (tmp_path / "checkpoints/latest").read_text() == "step-00000005\n"
    assert_holds(choose(tmp_path, "auto"), make_state(5))


def test_the_buffer_is_free_again_at_once_and_grows(tmp_path: Path):
    values = torch.arange(8.0)
    with Saver(tmp_path, rank=0, world=1, launch_id="a", keep=3) as saver:
        saver.save(1, [Fragment("w", (4,), 0, 4, {WEIGHT: values[:4]})], INFO)
        values += 100  # training goes on
        saver.save(2, [Fragment("w", (8,), 0, 8, {WEIGHT: values})], INFO)
        assert saver.save(2, [], INFO) < 5  # the same step again is no second save
    first, second = (CheckpointReader(verify(path)) for path in reversed(candidates(tmp_path)))
    assert first.read(WEIGHT, "w", (4,), 0, 4).tolist() == [0, 1, 2, 3]
    assert second.read(WEIGHT, "w", (8,), 6, 2).tolist() == [106, 107]


def test_resuming_an_older_step_sets_newer_ones_aside(tmp_path: Path):
    write_steps(tmp_path, [1, 2, 3], keep=3)
    write_steps(tmp_path, [2], start_step=1, keep=2)
    assert [path.name for path in candidates(tmp_path)] == ["step-00000002", "step-00000001"]
    assert "aside-step-00000003.run2" in names_in(tmp_path)
    assert_holds(choose(tmp_path, "auto"), make_state(2))


def test_incomplete_state_is_never_published(tmp_path: Path):
    saver = Saver(tmp_path, rank=0, world=1, launch_id="a", warn=lambda text: None)
    saver.save(1, [Fragment("w", (10,), 0, 6, {WEIGHT: torch.zeros(6)})], INFO)
    with pytest.raises(CheckpointError, match="'w': 6 of 10 elements are stored"):
        saver.close()
    assert candidates(tmp_path) == []


def test_missing_ranges_and_wrong_shapes_are_named(tmp_path: Path):
    write_steps(tmp_path, [1])
    reader = CheckpointReader(verify(candidates(tmp_path)[0]), released_pieces)
    with pytest.raises(CheckpointError, match="no exp_avg of thinker.model.norm.weight"):
        reader.read("exp_avg", FROZEN, (4,), 0, 4)
    with pytest.raises(CheckpointError, match=r"has shape \[4\], the model wants \[5\]"):
        reader.read(WEIGHT, FROZEN, (5,), 0, 5)
    with pytest.raises(CheckpointError, match="has 3 elements; 2 to 4 was asked for"):
        reader.read(VALUE, SHARE, (1, 3), 2, 2)
    assert reader.kinds("nothing") == frozenset()


def test_checkpoint_of_another_model(tmp_path: Path):
    write_steps(tmp_path, [1])
    manifest = verify(candidates(tmp_path)[0])
    other = {**IDENTITY, "text": {"hidden_size": 8, "num_experts": 3}}
    with pytest.raises(CheckpointError, match="another model: text.hidden_size is 4 there and 8 in this recipe"):
        CheckpointReader(manifest, released_pieces, other)
    with pytest.raises(CheckpointError, match="precision is fp32 there and absent"):
        CheckpointReader(manifest, released_pieces, {"text": IDENTITY["text"]})


def test_a_full_disk_is_a_warning_and_the_last_checkpoint_stays(tmp_path: Path):
    warned: list[str] = []
    all_savers = savers(tmp_path, 2, "a", warn=warned.append)
    state = make_state(1)
    save_all(all_savers, 1, cut(state, 2, random.Random(1)))
    assert [saver.save(1, [], INFO) >= 0 for saver in all_savers] == [True, True]  # waits for the first
    pid, unlimited = all_savers[1]._writer.pid, resource.prlimit(all_savers[1]._writer.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (1200, unlimited[1]))  # rank 1's disk is full
    save_all(all_savers, 2, cut(make_state(2), 2, random.Random(1)))
    while all_savers[0].poll() is None or len(warned) < 2:
        all_savers[1].poll()
        time.sleep(0.01)
    assert all("File too large" in text and "last good one of this run: step-00000001" in text for text in warned)
    assert_holds(choose(tmp_path, "auto", wait_s=0), state)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, unlimited)  # somebody made room
    save_all(all_savers, 3, cut(make_state(3), 2, random.Random(1)))
    for saver in all_savers:
        saver.close()
    assert_holds(choose(tmp_path, "auto"), make_state(3))
    assert not any(name.startswith(".step-") for name in names_in(tmp_path))  # the space is reclaimed


def test_three_failed_saves_in_a_row_are_an_error(tmp_path: Path):
    saver = Saver(tmp_path, rank=0, world=1, launch_id="a", warn=lambda text: None)
    (tmp_path / "checkpoints").rename(tmp_path / "gone")
    fragments = [Fragment("w", (4,), 0, 4, {WEIGHT: torch.zeros(4)})]
    for step in (1, 2, 3):
        saver.save(step, fragments, INFO)
    with pytest.raises(CheckpointError, match="3 saves in a row failed, the last one: step 3: .*No such file"):
        saver.save(4, fragments, INFO)
    with pytest.raises(CheckpointError, match="the last save failed"):
        saver.close()


def test_a_killed_writer_is_replaced(tmp_path: Path):
    warned: list[str] = []
    saver = Saver(tmp_path, rank=0, world=1, launch_id="a", warn=warned.append)
    fragments = [Fragment("w", (4,), 0, 4, {WEIGHT: torch.arange(4.0)})]
    saver.save(1, fragments, INFO)
    saver.save(1, fragments, INFO)
    saver._writer.send_signal(signal.SIGSTOP)
    saver.save(2, fragments, INFO)
    saver._writer.kill()
    saver.save(3, fragments, INFO)
    saver.close()
    assert len(warned) == 1 and "step 2: the checkpoint writer ended with status -9" in warned[0]
    assert [path.name for path in candidates(tmp_path)] == ["step-00000003", "step-00000001"]


def test_signals_meant_for_the_trainer_do_not_stop_the_writer(tmp_path: Path):
    with Saver(tmp_path, rank=0, world=1, launch_id="a") as saver:
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            saver._writer.send_signal(name)
        saver.save(1, [Fragment("w", (4,), 0, 4, {WEIGHT: torch.zeros(4)})], INFO)
    assert len(candidates(tmp_path)) == 1


def test_two_runs_cannot_write_into_one_folder(tmp_path: Path):
    with Saver(tmp_path, rank=0, world=1, launch_id="a"):
        with pytest.raises(CheckpointError, match="process [0-9]+ on .* still writes here.*another run folder"):
            Saver(tmp_path, rank=0, world=1, launch_id="b", timeout_s=0.3)
        with pytest.raises(CheckpointError, match="still writes here"):  # also when the other run has more ranks
            choose(tmp_path, "auto", wait_s=0.3)
        assert choose(tmp_path, "auto", wait_s=0) is None


def test_the_writer_starts_without_torch_and_from_any_folder(tmp_path: Path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train/__init__.py").write_text("raise SystemExit('the wrong package')\n")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from train.checkpoint import Saver\n"
        "with Saver('run', rank=0, world=1, launch_id='a') as saver:\n"
        "    maps = open(f'/proc/{saver._writer.pid}/maps').read()\n"
        "    assert 'libpython' in maps or 'python' in maps\n"
        "    assert 'libtorch' not in maps and 'numpy' not in maps\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-P", "-c", code, str(ROOT)]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=60)


def test_versions_say_how_it_was_made(tmp_path: Path):
    write_steps(tmp_path, [1], world=1)
    versions = verify(candidates(tmp_path)[0]).versions
    assert versions["torch"] == torch.__version__ and {"python", "omniloom", "commit"} <= versions.keys()
    tree = json.loads((candidates(tmp_path)[0] / "manifest.json").read_text())
    numel = {name: math.prod(entry["shape"]) for name, entry in tree["tensors"].items()}
    ours = {name for _, name in make_state(1)}
    assert sum(numel.values()) == sum(math.prod(shape_of(name)) for name in ours)
    assert set(tree["parameters"]) == ours and len(KINDS) == 3
