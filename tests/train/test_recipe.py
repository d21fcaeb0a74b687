"""Recipes compose, are typed, and a mistake gives one line with the nearest valid name."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from data.tokenizer import IMAGE_PAD, VIDEO_PAD, train_tokenizer
from models.config import ThinkerConfig
from models.thinker import Thinker
from train.config import Recipe
from train.errors import RecipeError
from train.opening import model_config
from train.optim import select_trainable
from train.recipe import as_yaml, load_recipe, load_saved, recipe_names

FILL = ["init=null", "data.shards=[a.tar]", "data.tokenizer=t", "data.codec=c"]


@pytest.mark.parametrize("name", [name for name in recipe_names() if not name.startswith("curriculum")])
def test_every_recipe_composes(name: str) -> None:
    recipe = load_recipe([f"recipe={name}", *FILL])
    assert recipe.name == name and recipe.run == f"outputs/{name}"
    assert recipe.model.audio.output_dim == recipe.model.text.hidden_size


def test_off_is_off_though_yaml_reads_false() -> None:
    recipe = load_recipe(["recipe=transcribe", "log.view=off", "log.wandb=off", "phases.all.speech=off"])
    assert (recipe.log.view, recipe.log.wandb, recipe.phases["all"].speech) == ("off", "off", "off")


def test_overrides_reach_their_place_with_their_type() -> None:
    recipe = load_recipe(
        ["recipe=transcribe", "engine=deepspeed", "engine.zero=3", "optim.lr=1e-4", "phases.all.steps=7", "init=null"]
        + ["data.speeds=[0.9,1.0]", "eval.sets.extra=[x/*.tar]", "optim.lr_scale={audio_tower.*: 0.1}"]
    )
    assert recipe.engine.name == "deepspeed" and recipe.engine.zero == 3
    assert recipe.optim.lr == 1e-4 and recipe.phases["all"].steps == 7 and recipe.init is None
    assert recipe.data.speeds == [0.9, 1.0] and recipe.eval.sets["extra"] == ["x/*.tar"]
    assert recipe.optim.lr_scale == {"audio_tower.*": 0.1}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["recipe=dmo"], "unknown recipe 'dmo', did you mean 'demo'?"),
        ([], "give one recipe=NAME"),
        (["recipe=transcribe", "optim.lrr=1"], "unknown setting 'optim.lrr', did you mean 'optim.lr'?"),
        (["recipe=transcribe", "zero=3"], "unknown setting 'zero', did you mean 'engine.zero'?"),
        (["recipe=transcribe", "engine=deepsped"], "unknown engine=deepsped, did you mean 'deepspeed'?"),
        (["recipe=transcribe", "engine.name=megatrom"], "did you mean 'megatron'"),
        (["recipe=transcribe", "phases.all.stps=3"], "unknown setting phases.all.stps, did you mean 'steps'?"),
        (["recipe=demo", "phases.encoder.steps=3"], "unknown phase in phases.encoder.steps, did you mean 'encoders'?"),
        (["recipe=transcribe", "phases.all.steps=0"], "phases.all.steps=0: it must be at least 1"),
        (["recipe=transcribe", "seed=abc"], "seed: expected a whole number, got 'abc'"),
        (["recipe=transcribe", "optim=3"], "optim: expected settings, got 3"),
        (["recipe=transcribe", "data.shards=x"], "data.shards: expected a list"),
        (["recipe=transcribe", "model.text.num_experts_per_tok=99"], "num_experts_per_tok (99) must not exceed"),
        (["recipe=transcribe", "data.too_long=cut"], "data.too_long=cut"),
        (["recipe=transcribe", "log.view=ritch"], "log.view=ritch, did you mean 'rich'?"),
        (["recipe=transcribe", "log.experts_every=-1"], "log.experts_every=-1: it must be 0 (off) or more"),
        (["recipe=transcribe", "lr"], "cannot read 'lr': settings are KEY=VALUE"),
        (["recipe=transcribe", "data.shards=["], "recipe transcribe"),
        (["recipe=stage2"], "is not set: give"),
    ],
)
def test_a_mistake_is_one_clear_line(argv: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(argv)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_recipe_is_frozen_and_survives_its_file(tmp_path: Path) -> None:
    recipe = load_recipe(["recipe=transcribe", "optim.lr=3e-4"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.seed = 3  # type: ignore[misc]
    (tmp_path / "recipe.yaml").write_text(as_yaml(recipe))
    again = load_saved(tmp_path / "recipe.yaml", [])
    assert isinstance(again, Recipe) and again == recipe
    assert load_saved(tmp_path / "recipe.yaml", ["eval.max_samples=5"]).eval.max_samples == 5


def test_nothing_is_instantiated_by_name(tmp_path: Path) -> None:
    """A planted `_target_` is an unknown setting, not a call."""
    canary = tmp_path / "canary"
    with pytest.raises(RecipeError, match="_target_"):
        load_recipe(["recipe=transcribe", "optim._target_=builtins.open", f"optim.file={canary}"])
    saved = tmp_path / "recipe.yaml"
    saved.write_text(
        as_yaml(load_recipe(["recipe=transcribe"])) + f"\nextra: !!python/object/apply:os.mkdir ['{canary}']\n"
    )
    with pytest.raises(Exception, match="(?i)tag|constructor|extra"):
        load_saved(saved, [])
    assert not canary.exists()


@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_real_recipes_build_the_released_thinker(name: str) -> None:
    """On the meta device, with its vision encoder, and phases whose patterns all name parameters."""
    recipe = load_recipe([f"recipe={name}", *FILL])
    config = ThinkerConfig(recipe.model.text, recipe.model.audio, 151675, recipe.model.vision, 151655, 151656)
    with torch.device("meta"):
        thinker = Thinker(config)
    assert sum(parameter.numel() for parameter in thinker.visual.parameters()) == 538_631_408
    assert sum(parameter.numel() for parameter in thinker.parameters()) == 31_719_205_488
    for phase_name, phase in recipe.phases.items():
        select_trainable(thinker, phase, phase_name)


def test_vision_is_a_setting(tmp_path: Path) -> None:
    sizes = "{depth: 2, hidden_size: 16, intermediate_size: 16, num_heads: 2, out_hidden_size: 128,"
    sizes += " deepstack_visual_indexes: [0]}"
    recipe = load_recipe(["recipe=transcribe", f"model.vision={sizes}", *FILL])
    tokenizer = train_tokenizer(["a b c"], 300)
    config = model_config(recipe, tokenizer)
    assert config.vision is not None and config.vision.depth == 2
    assert (config.image_token_id, config.video_token_id) == tuple(map(tokenizer.id, (IMAGE_PAD, VIDEO_PAD)))
    with pytest.raises(RecipeError, match="unknown setting model.vision.dpth, did you mean 'depth'?"):
        load_recipe(["recipe=transcribe", f"model.vision={sizes.replace('depth', 'dpth')}", *FILL])
    with pytest.raises(RecipeError, match="out_hidden_size"):
        load_recipe(["recipe=stage2", "model.vision.out_hidden_sise=3", *FILL])
