"""A curriculum trained for real, on a small corpus: what is handed on, kills, what may not change, ends by a metric."""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from tests.run_kit import ROOT, TINY, finish, kill, start, write_corpus
from train.checkpoint import candidates, verify
from train.errors import CheckpointError
from train.lineage import checkpoint_of
from train.main import main
from train.progress import Record

STEPS = {"ears": 4, "all_of_it": 5, "more": 4}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def write(folder: Path, corpus: Path, **stages: dict) -> str:
    """A recipe file of three stages; settings of a stage may be changed."""
    every = {
        "model": TINY,
        "data": {
            "shards": [f"{corpus}/train/*.tar"],
            "tokenizer": f"{corpus}/tokenizer",
            "sequence_length": 96,
            "sequences_per_step": 3,
            "window": 32,
            "workers": 0,
        },
        "optim": {"warmup_steps": 1, "lr": 1e-2},
        "save": {"every": 2},
        "log": {"every": 1},
        "eval": {"every": 0, "sets": {}},
    }
    graph = {
        "ears": {"recipe": "transcribe", "set": {"phases": {"ears": {"steps": 4, "train": ["audio_tower.*"]}}}},
        "all_of_it": {"recipe": "transcribe", "after": ["ears"], "set": {"phases": {"all": {"steps": 5}}}},
        "more": {
            "recipe": "transcribe",
            "after": ["all_of_it"],
            "carry": "optimizer",
            "set": {"phases": {"all": {"steps": 4}}},
        },
    }
    for name, change in stages.items():
        graph[name] = graph.get(name, {}) | change
    path = folder / "school.yaml"
    path.write_text(
        yaml.safe_dump({"name": "school", "run": f"{folder}/run", "set": every, "stages": graph}, sort_keys=False)
    )
    return f"recipe={path}"


def lineage(folder: Path) -> dict:
    return json.loads((folder / "run" / "lineage.json").read_text())["stages"]


def weights(run: Path) -> str:
    """Digest of every tensor of a run's last checkpoint."""
    (newest, *_) = candidates(run)
    return hashlib.sha256((newest / "rank0.safetensors").read_bytes()).hexdigest()


def test_stages_hand_on_what_they_learnt(corpus: Path, tmp_path: Path) -> None:
    recipe = write(tmp_path, corpus)
    assert main([recipe]) == 0
    found = lineage(tmp_path)
    assert [(name, entry["state"], entry["step"]) for name, entry in found.items()] == [
        (name, "done", steps) for name, steps in STEPS.items()
    ]
    assert found["all_of_it"]["ancestors"].keys() == {"ears"} and found["ears"]["tokens"] > 0
    by_hand = [word for word in (f"recipe={tmp_path}/school.yaml", f"run={tmp_path}/again") if word]
    assert main([*by_hand, "to=ears"]) == 0 and main([*by_hand, "from=all_of_it", "to=all_of_it"]) == 0
    assert lineage(tmp_path)["more"]["state"] == "done"  # another folder's
    assert weights(tmp_path / "again" / "all_of_it") == weights(tmp_path / "run" / "all_of_it")
    # the optimizer went on: nine updates are behind it
    assert verify(candidates(tmp_path / "run" / "more")[0]).info["optimizer_step"] == 9
    assert verify(candidates(tmp_path / "run" / "all_of_it")[0]).info["optimizer_step"] == 5


def test_what_is_done_is_passed_over_and_may_not_change(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write(tmp_path, corpus)
    assert main([recipe, "to=all_of_it"]) == 0
    before = weights(tmp_path / "run" / "all_of_it")
    capsys.readouterr()
    assert main([recipe, "to=all_of_it", "log.every=2", "save.every=3"]) == 0  # harmless
    assert capsys.readouterr().out.count("done at step") == 2
    assert main([recipe, "ears.optim.lr=0.5", "all_of_it.optim.clip=2"]) == 2
    assert "stage ears is done, and was trained with other settings: optim.lr: 0.01 -> 0.5. " in capsys.readouterr().err
    assert weights(tmp_path / "run" / "all_of_it") == before
    assert lineage(tmp_path)["more"]["state"] == "waiting"
    shutil.rmtree(tmp_path / "run" / "ears")
    assert main([recipe]) == 2
    assert "ears is done, but" in capsys.readouterr().err
    tree = json.loads((tmp_path / "run" / "lineage.json").read_text())
    tree["stages"].pop("ears")
    (tmp_path / "run" / "lineage.json").write_text(json.dumps(tree))
    assert main([recipe, "ears.seed=3", "to=ears"]) == 0
    assert main([recipe, "ears.seed=3"]) == 2
    assert "stage all_of_it has begun from another ears" in capsys.readouterr().err


def test_a_stage_in_the_middle_wants_the_one_before(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write(tmp_path, corpus)
    assert main([recipe, "from=all_of_it"]) == 2
    assert "stage all_of_it starts from stage ears, which is not done" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_moments_of_other_parameters_are_refused(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([write(tmp_path, corpus, all_of_it={"carry": "optimizer"}), "to=all_of_it"]) == 2
    assert "holds no exp_avg of" in capsys.readouterr().err
    assert lineage(tmp_path)["all_of_it"]["state"] == "stopped"


def test_weights_from_two_places_and_fresh_ones(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The encoder of one run, the language model of another; what nobody has is named."""
    recipe = write(tmp_path, corpus)
    assert main([recipe, "to=ears"]) == 0
    whole = tmp_path / "run" / "ears"
    settings = [recipe, f"run={tmp_path}/other", "to=ears", "ears.save.every=1", "max_steps=1"]
    assert main([*settings, f"ears.init={whole},{whole}"]) == 0
    capsys.readouterr()
    wider = ["ears.model.text.num_hidden_layers=3", f"run={tmp_path}/wider"]
    assert main([*settings, *wider, f"ears.init={whole},{whole}"]) == 2
    assert "none holds model.layers.2." in capsys.readouterr().err
    assert main([*settings, *wider, f"ears.init={whole}", "ears.fresh=[model.layers.2.*]"]) == 0
    # a stage in the middle without those before it, from weights of its own
    alone = [recipe, f"run={tmp_path}/alone", "from=all_of_it", "to=all_of_it", "all_of_it.max_steps=1"]
    assert main([*alone, f"all_of_it.init={whole}"]) == 0
    assert json.loads((tmp_path / "alone" / "lineage.json").read_text())["stages"]["all_of_it"]["init"] == [str(whole)]


def killed(arguments: Sequence[str], folder: Path, draw: random.Random) -> bool:
    """Start, and kill after a random number of lines of metrics; whether it was still running then."""
    process = start([sys.executable, str(ROOT / "train.py"), *arguments])
    written, wanted = 0, draw.randint(1, 3)
    logs = [folder / "run" / name / "metrics.jsonl" for name in STEPS]
    first = sum(len(log.read_text().splitlines()) for log in logs if log.exists())
    while process.poll() is None and written < wanted:
        try:
            process.wait(0.05)
        except subprocess.TimeoutExpired:
            written = sum(len(log.read_text().splitlines()) for log in logs if log.exists()) - first
    alive = process.poll() is None
    if alive:
        kill(process)
    return alive


@pytest.mark.parametrize("kills", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_killed_and_started_again_it_ends_with_the_same_weights(kills: int, corpus: Path, tmp_path: Path) -> None:
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    whole, broken = (write(tmp_path / name, corpus) for name in ("whole", "broken"))
    finish(start([sys.executable, str(ROOT / "train.py"), whole]))
    draw = random.Random(kills)
    assert sum(killed([broken], tmp_path / "broken", draw) for _ in range(kills)) >= kills - 1
    finish(start([sys.executable, str(ROOT / "train.py"), broken]))
    for name in STEPS:
        assert weights(tmp_path / "broken" / "run" / name) == weights(tmp_path / "whole" / "run" / name), name
    assert {entry["state"] for entry in lineage(tmp_path / "broken").values()} == {"done"}


def test_a_value_that_is_not_finite_is_never_the_best() -> None:
    record = Record().after(math.nan, 1, higher=True)
    assert record == Record(stale=1)
    record = record.after(0.5, 2, higher=True).after(math.nan, 3, higher=True).after(math.inf, 4, higher=True)
    assert record == Record(0.5, 2, stale=2)


def test_the_best_is_handed_on_or_there_is_none(tmp_path: Path) -> None:
    assert checkpoint_of(tmp_path, "best") is None  # nothing is there yet
    for step in (2, 4):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
    assert (latest := checkpoint_of(tmp_path, "latest")) is not None and latest.name == "step-00000004"
    with pytest.raises(CheckpointError, match=r"has no best checkpoint: eval\.best"):
        checkpoint_of(tmp_path, "best")
    (tmp_path / "checkpoints" / "best").write_text("step-00000002\n")
    assert checkpoint_of(tmp_path, "best") == tmp_path / "checkpoints" / "step-00000002"


def test_killed_before_its_last_evaluation_it_makes_that_up(corpus: Path, tmp_path: Path) -> None:
    sets = {"sets": {"heldout": [f"{corpus}/heldout/*.tar"]}, "max_new_tokens": 2}
    words = [write(tmp_path, corpus, ears={"set": {"phases": {"ears": {"steps": 4}}, "eval": sets}}), "to=ears"]
    assert main(words) == 0
    heard = tmp_path / "run" / "ears" / "eval" / "heldout-step00000004.json"
    before = heard.read_bytes()
    heard.unlink()
    tree = json.loads((tmp_path / "run" / "lineage.json").read_text())
    tree["stages"]["ears"]["state"] = "stopped"
    (tmp_path / "run" / "lineage.json").write_text(json.dumps(tree))
    assert main(words) == 0
    assert heard.read_bytes() == before


def test_a_metric_that_gets_no_better_ends_the_run_and_the_best_is_kept(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change = {
        "set": {
            "phases": {"warm": {"steps": 2}, "all": {"steps": 40}},
            "optim": {"lr": 1e-9},  # nothing is learnt
            "eval": {
                "every": 2,
                "sets": {"heldout": [f"{corpus}/heldout/*.tar"]},
                "max_new_tokens": 2,
                "best": "heldout.wer",
            },
            "end": {"metric": "heldout.wer", "patience": 2},
            "save": {"every": 100, "keep": 1},
        }
    }
    recipe = write(tmp_path, corpus, ears=change)
    assert main([recipe, "to=ears"]) == 0
    run = tmp_path / "run" / "ears"
    # evaluations at 4 (of this phase the first), 6 and 8
    assert lineage(tmp_path)["ears"]["step"] == 8
    best = (run / "checkpoints" / "best").read_text().strip()
    assert best == "step-00000002" or int(best.removeprefix("step-")) < 8
    assert {path.name for path in candidates(run)} == {best, "step-00000008"}
    assert "got no better in 2 evaluations: the end" in capsys.readouterr().out
    tree = json.loads((tmp_path / "run" / "lineage.json").read_text())
    tree["stages"]["ears"]["state"] = "stopped"  # killed before it was written down
    (tmp_path / "run" / "lineage.json").write_text(json.dumps(tree))
    assert main([recipe, "to=ears"]) == 0
    assert lineage(tmp_path)["ears"]["step"] == 8
