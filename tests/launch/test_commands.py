"""The commands around training, on a run of a few steps, as a user types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.run_kit import ROOT, command, finish, losses, start, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    finish(start(command(corpus, folder, "max_steps=4", f"eval.sets={{heldout: [{corpus}/heldout/*.tar]}}")))
    return folder


def launch(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"launch.{name}", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=250,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_a_run_leaves_what_it_says(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert names >= {"recipe.yaml", "metrics.jsonl", "curves.png", "checkpoints", "eval"}
    assert json.loads((run / "eval" / "heldout-step00000004.json").read_text())["rows"][-1]["language"] == "all"


def test_evaluate_gives_what_training_gave(run: Path, corpus: Path) -> None:
    inside = json.loads((run / "eval" / "heldout-step00000004.json").read_text())
    done = launch("evaluate", f"run={run}", "suite=asr")
    assert done.returncode == 0, done.stderr
    assert "heldout at step 4: word error rate" in done.stdout
    assert json.loads((run / "eval" / "heldout-step00000004.json").read_text()) == inside
    other = launch("evaluate", f"run={run}", f"shards={corpus}/train/*.tar", "eval.max_samples=5")
    assert other.returncode == 0 and (run / "eval" / "shards-step00000004.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["suite=asr"], "give run=..."),
        (["run=nowhere"], "nowhere/recipe.yaml: no such file"),
        (["run=nowhere", "siute=asr"], "unknown argument 'siute', did you mean 'suite'?"),
        (["run=RUN", "suite=translation"], "suite=translation: there is only asr"),
        (["run=RUN", "checkpoint=RUN/checkpoints/step-00000099"], "step-00000099"),
        (["run=RUN", "shards=nowhere.tar"], "nowhere.tar: no such shard"),
    ],
)
def test_wrong_arguments_are_one_line(run: Path, arguments: list[str], message: str) -> None:
    done = launch("evaluate", *[word.replace("RUN", str(run)) for word in arguments])
    assert done.returncode == 2 and message in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_exported_weights_load_in_transformers(run: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from models.hf import released_pieces
    from train.checkpoint import CheckpointReader, candidates, verify

    done = launch("export", f"run={run}", f"out={tmp_path}/weights", "dtype=fp32")
    assert done.returncode == 0, done.stderr
    again = launch("export", f"run={run}", f"out={tmp_path}/weights")
    assert again.returncode == 2 and "exists already" in again.stderr
    model, found = transformers.Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(
        tmp_path / "weights", output_loading_info=True, dtype=torch.float32
    )
    assert not found["unexpected_keys"] and all("visual" in name for name in found["missing_keys"])
    reader = CheckpointReader(verify(candidates(run)[0]), released_pieces)
    head = reader.read("weight", "lm_head.weight", (320, 32), 0, 320 * 32)
    assert torch.equal(model.lm_head.weight.detach().flatten(), head)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "weights")
    assert tokenizer.decode(tokenizer.encode("one two")) == "one two"


def test_weights_of_a_run_start_another(run: Path, corpus: Path, tmp_path: Path) -> None:
    done = launch("export", f"run={run}", f"out={tmp_path}/weights", "dtype=fp32")
    assert done.returncode == 0, done.stderr
    first = []
    for number, init in enumerate((str(run), str(tmp_path / "weights"), "null")):
        finish(start(command(corpus, tmp_path / f"run{number}", f"init={init}", "max_steps=1")))
        first.append(losses(tmp_path / f"run{number}")[1])
    assert first[0] == first[1] != first[2]


def test_damaged_clips_stop_a_run_after_a_save(corpus: Path, tmp_path: Path) -> None:
    """Each is named and left out; above the limit the run saves and stops; a higher limit goes on from there."""
    import shutil

    from data.shard_index import ShardIndex

    mine = tmp_path / "corpus"
    shutil.copytree(corpus, mine)
    for tar in sorted((mine / "train").glob("*.tar")):
        data = bytearray(tar.read_bytes())
        index = ShardIndex.open(tar)
        for at in index.columns["member_start"][::5]:
            data[int(at) + 3] ^= 0xFF
        tar.write_bytes(data)
    process = start(command(mine, tmp_path / "run", "data.max_bad_samples=2"))
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 2 and "more than data.max_bad_samples=2" in output and "Traceback" not in output
    assert "skipped: shard-0" in output and "crc32 differs" in output
    step = int((tmp_path / "run" / "checkpoints" / "latest").read_text().strip().removeprefix("step-"))
    assert step == max(losses(tmp_path / "run"))
    finish(start(command(mine, tmp_path / "run", "data.max_bad_samples=1000")))
    assert len(losses(tmp_path / "run")) == 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.shards=[nowhere.tar]"], "nowhere.tar: no such shard"),
        (["data.shards=[nowhere/*.tar]"], 'no file matches "nowhere/*.tar"'),
        (["data.tokenizer=nowhere"], "nowhere"),
        (["data.sequence_length=16"], "sequence_length"),
        (["model.text.vocab_size=100"], "model.text.vocab_size=100 is less than the tokenizer's"),
        (["phases.all.train=[nothing.*]"], "no parameter fits 'nothing.*'"),
        (["resume=latest"], "checkpoint"),
        (["engine.device=cuda"], "torch sees no GPU"),
        (["init=nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(corpus: Path, tmp_path: Path, settings: list[str], message: str) -> None:
    if settings == ["engine.device=cuda"] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    process = start(command(corpus, tmp_path / "run", *settings))
    output, _ = process.communicate(timeout=200)
    error = [line for line in output.splitlines() if line.startswith("error: ")]
    assert process.returncode == 2 and len(error) == 1 and message in error[0], output
    assert "Traceback" not in output


def test_another_model_or_other_data_is_refused_and_the_run_survives(run: Path, corpus: Path) -> None:
    kept = run / "checkpoints" / "latest", run / "recipe.yaml", run / "metrics.jsonl"
    before = [path.read_text() for path in kept]
    for settings, message in (
        (["model.text.num_experts=8"], "checkpoint of another model: text.num_experts"),
        (["data.sequence_length=128"], "the sequence length"),
        (["seed=3"], "seed"),
    ):
        process = start(command(corpus, run, *settings))
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 2 and message in output and "Traceback" not in output, output
    assert [path.read_text() for path in kept] == before
