"""The commands around training, on a run of a few steps, as a user types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data.tokenizer import load_tokenizer
from launch.weights import open_folder
from models.hf import released_pieces
from models.positions import text_audio_positions
from models.thinker import Thinker
from tests.run_kit import ROOT, command, finish, losses, start, write_corpus
from train.checkpoint import CheckpointReader, candidates, verify
from train.opening import model_config
from train.recipe import load_saved


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
    assert json.loads((run / "eval" / "heldout-step00000004.json").read_text())["rows"][-1]["group"] == "all"


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
        (["run=RUN", "suite=asrr"], "suite=asrr, did you mean 'asr'?; there is only asr, vqa, "),
        (["run=RUN", "checkpoint=RUN/checkpoints/step-00000099"], "step-00000099"),
        (["run=RUN", "shards=nowhere.tar"], "nowhere.tar: no such shard"),
    ],
)
def test_wrong_arguments_are_one_line(run: Path, arguments: list[str], message: str) -> None:
    done = launch("evaluate", *[word.replace("RUN", str(run)) for word in arguments])
    assert done.returncode == 2 and message in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1


def export(run: Path, to: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return launch("convert", "export", f"from={run}", f"to={to}", *arguments)


@torch.no_grad()
def test_transformers_loads_what_a_run_exports(run: Path, tmp_path: Path) -> None:
    """Fed the same ids it gives the logits of the run's checkpoint."""
    transformers = pytest.importorskip("transformers")
    recipe = load_saved(run / "recipe.yaml", [])
    words = load_tokenizer(Path(recipe.data.tokenizer))
    ours = Thinker(model_config(recipe, words)).eval()
    reader = CheckpointReader(verify(candidates(run)[0]), released_pieces)
    for name, parameter in ours.named_parameters():
        parameter.view(-1).copy_(reader.read("weight", name, parameter.shape, 0, parameter.numel()))

    done = export(run, tmp_path / "weights")
    assert done.returncode == 0, done.stderr
    assert f"step 4 of {run}" in done.stdout and f"written to {tmp_path}/weights, float32" in done.stdout
    theirs, found = transformers.Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(
        tmp_path / "weights", output_loading_info=True
    )
    assert theirs.dtype == torch.float32
    assert not found["unexpected_keys"] and all("visual" in name for name in found["missing_keys"])
    ids = torch.tensor(words.encode("one two three four five") + [words.id("<|im_end|>")])
    hidden_TD, _ = ours(ids, text_audio_positions([len(ids)]), (len(ids),), torch.zeros(0, 128), ())
    logits_TV = theirs(input_ids=ids[None], attention_mask=torch.ones_like(ids[None])).logits[0]
    torch.testing.assert_close(ours.lm_head(hidden_TD), logits_TV, atol=1e-5, rtol=1e-5)

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "weights")
    assert tokenizer.decode(tokenizer.encode("one two")) == "one two"
    assert theirs.generation_config.eos_token_id == words.id("<|im_end|>") == tokenizer.eos_token_id


def test_export_in_bfloat16_of_the_step_asked_for(run: Path, tmp_path: Path) -> None:
    first = candidates(run)[-1]
    done = export(run, tmp_path / "half", "part=thinker", "dtype=bf16", f"checkpoint={first}")
    assert done.returncode == 0 and f"step 3 of {run}" in done.stdout, done.stderr
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    reader = CheckpointReader(verify(first), released_pieces)
    halves = open_folder(tmp_path / "half")
    assert halves.keys() == reader.names().keys()
    for name, half in halves.items():
        assert half.dtype == torch.bfloat16
        assert torch.equal(half.read(0, half.numel), reader.read_released("weight", name, 0, half.numel).bfloat16())
    assert launch("convert", "check", f"model={tmp_path}/half").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["to=RUN"], "RUN: exists already; remove it or choose another folder"),
        (["to=RUN/out", "part=talker"], "RUN: holds the Thinker alone, no talker"),
        (["to=RUN/out", "checkpoint=RUN/checkpoints/step-00000099"], "step-00000099"),
        (["to=RUN/out", "dtype=fp16"], "dtype=fp16: it is bf16 or fp32"),
    ],
)
def test_an_export_that_cannot_be_is_one_line(run: Path, arguments: list[str], message: str) -> None:
    done = launch("convert", "export", *[word.replace("RUN", str(run)) for word in ["from=RUN", *arguments]])
    assert done.returncode == 2 and message.replace("RUN", str(run)) in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not (run / "out").exists()


def test_weights_of_a_run_start_another(run: Path, corpus: Path, tmp_path: Path) -> None:
    done = export(run, tmp_path / "weights")
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
