"""Recipes compose, are typed, and a mistake gives one line with the nearest valid name."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from train.errors import RecipeError
from train.recipe import Recipe, as_yaml, load_recipe, load_saved, recipe_names

FILL = ["init=null", "data.shards=[a.tar]", "data.tokenizer=t"]


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_composes(name: str) -> None:
    recipe = load_recipe([f"recipe={name}", *FILL])
    assert recipe.name == name and recipe.run == f"outputs/{name}"
    assert recipe.model.audio.output_dim == recipe.model.text.hidden_size


def test_overrides_reach_their_place_with_their_type() -> None:
    recipe = load_recipe(
        ["recipe=demo", "engine=deepspeed", "engine.zero=3", "optim.lr=1e-4", "phases.all.steps=7", "init=null"]
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
        (["recipe=demo", "optim.lrr=1"], "unknown setting 'optim.lrr', did you mean 'optim.lr'?"),
        (["recipe=demo", "zero=3"], "unknown setting 'zero', did you mean 'engine.zero'?"),
        (["recipe=demo", "engine=deepsped"], "unknown engine=deepsped, did you mean 'deepspeed'?"),
        (["recipe=demo", "engine.name=megatron"], "engine.name=megatron"),
        (["recipe=demo", "phases.all.stps=3"], "unknown setting phases.all.stps, did you mean 'steps'?"),
        (["recipe=demo", "phases.all.steps=0"], "phases.all.steps=0: it must be at least 1"),
        (["recipe=demo", "seed=abc"], "seed: expected a whole number, got 'abc'"),
        (["recipe=demo", "optim=3"], "optim: expected settings, got 3"),
        (["recipe=demo", "data.shards=x"], "data.shards: expected a list"),
        (["recipe=demo", "model.text.num_experts_per_tok=99"], "num_experts_per_tok (99) must not exceed"),
        (["recipe=demo", "data.too_long=cut"], "data.too_long=cut"),
        (["recipe=demo", "lr"], "cannot read 'lr': settings are KEY=VALUE"),
        (["recipe=demo", "data.shards=["], "recipe demo"),
        (["recipe=stage2"], "is not set: give"),
    ],
)
def test_a_mistake_is_one_clear_line(argv: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(argv)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_recipe_is_frozen_and_survives_its_file(tmp_path: Path) -> None:
    recipe = load_recipe(["recipe=demo", "optim.lr=3e-4"])
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
        load_recipe(["recipe=demo", "optim._target_=builtins.open", f"optim.file={canary}"])
    saved = tmp_path / "recipe.yaml"
    saved.write_text(as_yaml(load_recipe(["recipe=demo"])) + f"\nextra: !!python/object/apply:os.mkdir ['{canary}']\n")
    with pytest.raises(Exception, match="(?i)tag|constructor|extra"):
        load_saved(saved, [])
    assert not canary.exists()
