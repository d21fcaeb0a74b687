"""Runs of an audio encoder with its text decoder: windows, resume, what is handed on, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.augment import draw_windows
from data.tokenizer import load_tokenizer
from launch import answering, convert, evaluate
from models.config import ThinkerConfig, TranscriberConfig
from models.transcriber import Transcriber
from tests.run_kit import TINY, write_corpus
from train.checkpoint import CheckpointReader, choose
from train.encoders import audio_cuts
from train.engines import WEIGHT
from train.errors import CheckpointError, RecipeError
from train.feed import open_evaluator, open_feed, work_for
from train.layout import work_of
from train.main import main
from train.opening import model_config
from train.recipe import load_recipe

DECODER = "{hidden_size: 24, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32}"
COLUMNS = ("samples", "epochs", "pieces", "groups", "speeds", "tokens")  # of a data.plan.Pack


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), 24)


def settings(corpus: Path, run: Path, *more: str) -> list[str]:
    sizes = [f"model.{part}.{key}={json.dumps(value)}" for part in TINY for key, value in TINY[part].items()]
    data = [f"shards=[{corpus}/train/*.tar]", f"tokenizer={corpus}/tokenizer", "sequence_length=96", "window=16"]
    data += ["sequences_per_step=2", "workers=0", "speeds=[0.9,1.0,1.1]"]
    words = [*sizes, *(f"data.{word}" for word in data), "phases.all.steps=4", "optim.warmup_steps=1", "optim.lr=1e-2"]
    return ["recipe=transcribe", f"run={run}", *words, "save.every=2", "log.every=1", "eval.sets={}", *more]


def hearing(corpus: Path, run: Path, *more: str) -> list[str]:
    return settings(corpus, run, f"model.audio_decoder={DECODER}", *more)


@pytest.fixture(scope="module")
def unbroken(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run") / "unbroken"
    assert main(hearing(corpus, run, f"eval.sets={{heldout: [{corpus}/heldout/*.tar]}}", "eval.max_new_tokens=4")) == 0
    return run


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in lines(run) if "loss" in line and "eval" not in line]


def weights(run: Path) -> dict[str, torch.Tensor]:
    manifest = choose(run, "latest", wait_s=0)
    assert manifest is not None
    reader, found = CheckpointReader(manifest), manifest.tensors
    sizes = {name: torch.Size(entry.shape).numel() for name, entry in found.items() if WEIGHT in entry.ranges}
    return {name: reader.read_released(WEIGHT, name, 0, size) for name, size in sizes.items()}


# -- windows -----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 8), st.integers(0, 7), st.integers(0, 9), st.integers(0, 99), st.integers(-1, 3))
def test_windows_are_whole_seconds_of_the_range(least: int, more: int, epoch: int, sample: int, piece: int) -> None:
    drawn = draw_windows((least, least + more), 3, epoch, sample, piece, 5)
    assert drawn == draw_windows((least, least + more), 3, epoch, sample, piece, 5)
    assert all(window % 100 == 0 and least <= window // 100 <= least + more for window in drawn)


def test_every_length_is_drawn_alike_and_no_other_draw_is_disturbed() -> None:
    state = np.random.get_state()[1].copy()  # type: ignore[union-attr, index]
    drawn = [draw_windows((1, 8), 0, epoch, sample, -1, 2) for epoch in range(20) for sample in range(100)]
    counts = np.bincount(np.array(drawn).ravel() // 100, minlength=9)
    assert counts[0] == 0 and (abs(counts[1:] - 500) < 90).all()
    assert (np.random.get_state()[1] == state).all()  # type: ignore[index]
    assert len({draw_windows((1, 8), 0, epoch, 0, -1, 4) for epoch in range(9)}) > 5
    assert len({draw_windows((1, 8), seed, 0, 0, -1, 4) for seed in range(9)}) > 5


def test_a_reader_draws_by_epoch_and_sample_whatever_the_pack(corpus: Path, tmp_path: Path) -> None:
    recipe = load_recipe(hearing(corpus, tmp_path, "loss.transcribe.windows=[2,6]"))
    tokenizer = load_tokenizer(corpus / "tokenizer")
    model = model_config(recipe, tokenizer)
    plan, reader = (course := open_feed(recipe, tokenizer, model).courses["all"]).plan, course.reader
    packs = [pack for step in range(4) for pack in plan.step(step)]
    assert len(packs) > 3
    seen: dict[tuple[int, int], tuple[int, ...]] = {}
    for pack in packs:
        batch = reader.batch(pack)
        assert len(batch.windows) == len(batch.mel_lengths) and not batch.skipped
        assert all(200 <= window <= 600 for window in batch.windows)
        for place in range(len(pack.samples)):
            one = {name: getattr(pack, name)[place : place + 1] for name in COLUMNS}
            alone = reader.batch(replace(pack, **one))
            seen[int(pack.samples[place]), int(pack.epochs[place])] = alone.windows
        assert batch.windows == tuple(w for s, e in zip(pack.samples, pack.epochs, strict=True) for w in seen[s, e])
    assert len({window for windows in seen.values() for window in windows}) > 2
    evaluator = open_evaluator(load_recipe(hearing(corpus, tmp_path, f"eval.sets={{a: [{corpus}/heldout/*.tar]}}")),
                               tokenizer, model)  # fmt: skip
    assert evaluator.sets["a"].load([0])[0].windows == ()


def test_a_thinkers_reader_draws_none(corpus: Path, tmp_path: Path) -> None:
    recipe, tokenizer = load_recipe(settings(corpus, tmp_path)), load_tokenizer(corpus / "tokenizer")
    course = open_feed(recipe, tokenizer, model_config(recipe, tokenizer)).courses["all"]
    assert course.reader.batch(course.plan.step(0)[0]).windows == ()


def test_clips_are_cut_for_other_ranks_at_their_own_windows() -> None:
    cuts = audio_cuts(np.array([1000, 1000, 340]), np.array([300, 800, 100]))
    assert cuts.per_atom_M.tolist() == [300, 800, 100] and cuts.atoms_M.tolist() == [4, 2, 3]


def test_work_weighs_sound_more_than_words(corpus: Path, tmp_path: Path) -> None:
    recipe, tokenizer = load_recipe(hearing(corpus, tmp_path)), load_tokenizer(corpus / "tokenizer")
    model = model_config(recipe, tokenizer)
    assert work_for(model).per_frame > 0 and work_for(model).per_token == 1
    plain = model_config(load_recipe(settings(corpus, tmp_path)), tokenizer)
    assert work_for(plain) == work_of(plain)  # type: ignore[arg-type]


# -- runs --------------------------------------------------------------------------------------------------------------


def test_a_run_learns_evaluates_and_keeps_encoder_and_decoder(unbroken: Path) -> None:
    found = losses(unbroken)
    assert len(found) == 4 and found[-1] < found[0]
    assert all(line["skipped"] == 0 for line in lines(unbroken) if "skipped" in line)
    (seen,) = [line for line in lines(unbroken) if "eval" in line]
    assert seen["eval"] == "heldout" and seen["words"] > 0
    assert {name.split(".")[0] for name in weights(unbroken)} == {"thinker", "audio_decoder"}
    assert all(name.startswith(("thinker.audio_tower.", "audio_decoder.")) for name in weights(unbroken))
    manifest = choose(unbroken, "latest", wait_s=0)
    assert manifest is not None and all("exp_avg" in kinds for kinds in manifest.parameters.values())
    assert all(name.startswith("thinker.audio_tower.") for name in CheckpointReader(manifest).names())


@pytest.mark.parametrize("stop", [1, 3])
def test_a_stopped_run_goes_on_exactly(stop: int, corpus: Path, unbroken: Path, tmp_path: Path) -> None:
    assert main(hearing(corpus, tmp_path / "run", f"max_steps={stop}")) == 0
    assert main(hearing(corpus, tmp_path / "run")) == 0
    assert losses(tmp_path / "run") == losses(unbroken)
    before, after = weights(unbroken), weights(tmp_path / "run")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_windows_make_another_run(corpus: Path, unbroken: Path, tmp_path: Path) -> None:
    """Where clips are longer than a second, or else nothing would be tested."""
    assert main(hearing(corpus, tmp_path / "run", "loss.transcribe.windows=[8,8]")) == 0
    longest = max(line["tokens"] for line in lines(tmp_path / "run") if "tokens" in line)
    assert longest and (losses(tmp_path / "run") != losses(unbroken)) == has_long_clips(corpus, tmp_path)


def has_long_clips(corpus: Path, tmp_path: Path) -> bool:
    recipe, tokenizer = load_recipe(hearing(corpus, tmp_path)), load_tokenizer(corpus / "tokenizer")
    course = open_feed(recipe, tokenizer, model_config(recipe, tokenizer)).courses["all"]
    return any(max(course.reader.batch(pack).mel_lengths, default=0) > 100 for pack in course.plan.step(0))


def test_a_thinker_takes_the_encoder_and_begins_the_rest_anew(
    corpus: Path, unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A step with a learning rate of 0 leaves what the Thinker began with."""
    still = ("phases.all.steps=1", "optim.lr=0", "optim.weight_decay=0")
    assert main(settings(corpus, tmp_path / "fresh", *still)) == 0
    capsys.readouterr()
    assert main(settings(corpus, tmp_path / "run", *still, f"init={unbroken}")) == 0
    assert "has an audio encoder alone: what else learns begins anew" in capsys.readouterr().out
    fresh, taken, source = weights(tmp_path / "fresh"), weights(tmp_path / "run"), weights(unbroken)
    assert taken.keys() == fresh.keys()
    for name, tensor in taken.items():
        assert torch.equal(tensor, (source if "audio_tower" in name else fresh)[name]), name
    assert not torch.equal(fresh["thinker.audio_tower.proj1.weight"], source["thinker.audio_tower.proj1.weight"])


def test_beside_a_talker_that_stands_still(corpus: Path, unbroken: Path, tmp_path: Path) -> None:
    """Which is frozen in such a phase, and begins anew all the same."""
    still = ("phases.all.steps=1", "optim.lr=0", "optim.weight_decay=0", "model=tiny_talker")
    assert main(settings(corpus, tmp_path / "fresh", *still)) == 0
    assert main(settings(corpus, tmp_path / "run", *still, f"init={unbroken}")) == 0
    fresh, taken, source = weights(tmp_path / "fresh"), weights(tmp_path / "run"), weights(unbroken)
    assert taken.keys() == fresh.keys() and any(name.startswith("talker.") for name in taken)
    for name, tensor in taken.items():
        assert torch.equal(tensor, (source if "audio_tower" in name else fresh)[name]), name


def test_a_frozen_thinker_cannot_begin_anew(
    corpus: Path, unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    given = settings(corpus, tmp_path / "run", f"init={unbroken}", "phases.all.train=[audio_tower.*]")
    assert main(given) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and "holds no weight of thinker.model.embed_tokens.weight" in err
    assert err.count("\n") == 1


def test_an_encoder_of_a_thinker_is_gone_on_with(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(settings(corpus, tmp_path / "thinker", "phases.all.steps=1")) == 0
    still = ("phases.all.steps=1", "optim.lr=0", "optim.weight_decay=0")
    assert main(hearing(corpus, tmp_path / "run", *still, f"init={tmp_path}/thinker")) == 0
    assert "has no audio_decoder: it begins anew, the encoder is taken" in capsys.readouterr().out
    source, taken = weights(tmp_path / "thinker"), weights(tmp_path / "run")
    assert all(torch.equal(taken[name], source[name]) for name in taken if "audio_tower" in name)


def test_commands_know_such_a_run(unbroken: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    evaluate.evaluate([f"run={unbroken}", f"shards={corpus}/heldout/*.tar"])
    assert "word error rate" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="a run of an audio encoder alone"):
        convert.main(["export", f"from={unbroken}", f"to={tmp_path}/model"])
    with pytest.raises(RecipeError, match="of an audio encoder alone: python -m launch.evaluate"):
        answering.open_model(dict.fromkeys(answering.MODEL, "") | {"run": str(unbroken)}, [])


SPEAKS = "phases.all.speech=live"
VISION = "{depth: 1, hidden_size: 16, intermediate_size: 16, num_heads: 2, out_hidden_size: 32, "
VISION += "deepstack_visual_indexes: [0]}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([f"model.audio_decoder={DECODER}", "loss.transcribe.windows=[0,8]"], "windows=[0, 8]: it is two numbers"),
        ([f"model.audio_decoder={DECODER}", "loss.transcribe.windows=[8,1]"], "windows=[8, 1]: it is two numbers"),
        ([f"model.audio_decoder={DECODER}", "loss.transcribe.windows=[4]"], "windows=[4]: it is two numbers"),
        ([f"model.audio_decoder={DECODER}", "loss.transcribe.windows=[1.5,8]"], "expected a whole number, got 1.5"),
        (["loss.transcribe.windows=[1,4]"], "loss.transcribe: the model has no audio_decoder"),
        ([f"model.audio_decoder={DECODER}", SPEAKS], "phases.all.speech=live has nobody to speak"),
        ([f"model.audio_decoder={DECODER}", f"model.vision={VISION}"], "alone are trained: set model.vision=null"),
        (["model.audio_decoder={hidden_size: 24}"], "model.audio_decoder.num_hidden_layers is not set"),
        ([f"model.audio_decoder={DECODER}", "model.audio_decoder.num_attention_heads=5"], "even multiple of num_att"),
        ([f"model.audio_decoder={DECODER}", "model.audio_decodr=3"], "unknown setting 'model.audio_decodr', did you"),
        ([f"model.audio_decoder={DECODER}", "phases.all.train=[model.*]"], "phases.all.train: no parameter fits"),
    ],
)
def test_what_is_refused(
    changes: list[str], message: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(settings(corpus, tmp_path / "run", *changes)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


def test_another_kind_of_run_in_the_folder_is_refused(
    corpus: Path, unbroken: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(settings(corpus, unbroken, "phases.all.steps=5")) == 2
    assert "checkpoint of another model" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["audio_encoder", "audio_encoder_demo", "audio_encoder_fsdd"])
def test_recipes_compose(name: str) -> None:
    given = ["data.shards=[x]", "data.tokenizer=x"] if name == "audio_encoder" else []
    recipe = load_recipe([f"recipe={name}", *given])
    assert recipe.model.audio_decoder is not None and recipe.model.vision is None
    assert recipe.model.audio.output_dim == recipe.model.text.hidden_size
    thinker = ThinkerConfig(recipe.model.text, recipe.model.audio, 7)
    with torch.device("meta"):
        made = Transcriber(TranscriberConfig(thinker, recipe.model.audio_decoder))
    parts = [sum(p.numel() for p in part.parameters()) for part in (made.audio_tower, made.audio_decoder)]
    if name == "audio_encoder":
        assert parts == [647_927_168, 534_826_240]  # the released encoder's, and the decoder of the recipe's comment
