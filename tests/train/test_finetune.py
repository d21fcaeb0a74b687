"""The Talker finetuned from a released folder, alone and by adapters; settings that a folder decides."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.hf import released_state
from models.hf_config import omni_to_released
from models.init import init_weights
from models.lora import is_lora
from models.omni import Omni
from tests.train import speech_cases as cases
from train.config import Phase
from train.engines import MOMENTS, WEIGHT, Engine
from train.engines.build import build_engine
from train.errors import CheckpointError, RecipeError
from train.finetune import settle
from train.lora import LoraState
from train.lora_config import LoraConfig
from train.recipe import as_yaml, load_recipe
from train.released import ReleasedState, open_released


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("released")
    omni = Omni(cases.config())
    init_weights(omni, seed=7)
    weights = {name: tensor.contiguous().clone() for name, tensor in released_state(omni)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(omni_to_released(cases.config())))
    return folder


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    return {each.name: each.tensors[WEIGHT].clone() for each in engine.fragments() if WEIGHT in each.tensors}


@pytest.mark.parametrize(
    ("way", "train", "targets", "learns"),
    [
        ("frozen", ["talker.*"], None, lambda name: name.startswith("talker.")),
        (
            "live",
            ["talker.model.layers.*.mlp.experts.*"],
            None,
            lambda name: "talker.model" in name and ".experts." in name,
        ),
        ("frozen", ["*"], ["talker.*"], is_lora),
        ("live", ["*"], ["talker.model.*", "thinker.model.layers.*.self_attn.*"], is_lora),
    ],
)
def test_the_talker_learns_from_a_released_folder(
    folder: Path, way: str, train: list[str], targets: list[str] | None, learns: Callable[[str], bool]
) -> None:
    """What the phase names moves and has moments; everything else is the folder's, bit for bit."""
    lora = LoraConfig(rank=2, alpha=4.0, targets=targets) if targets else None
    setup = replace(cases.setup("local", way), phase=Phase(steps=3, speech=way, train=train), lora=lora)
    engine, released = build_engine(setup), open_released(folder)
    start = ReleasedState(released)
    engine.restore(LoraState(start, lora, seed=0) if lora else start, optimizer_step=0)
    before = weights(engine)
    for name, weight in before.items():
        if not is_lora(name) and ".experts." not in name:
            assert torch.equal(weight, released.weights[name].read(0, weight.numel())), name
    cases.train(engine)
    after = weights(engine)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved and all(learns(name) for name in moved)
    for each in engine.fragments():
        if WEIGHT in each.tensors:
            assert (set(MOMENTS) <= each.tensors.keys()) == learns(each.name), each.name


def test_weights_of_another_shape_are_named(folder: Path) -> None:
    state = ReleasedState(open_released(folder))
    with pytest.raises(CheckpointError, match=r"thinker.lm_head.weight has shape \[64, 32\], the model wants"):
        state.read(WEIGHT, "thinker.lm_head.weight", (64, 16), 0, 4)
    with pytest.raises(CheckpointError, match="hold no exp_avg of"):
        state.read("exp_avg", "thinker.lm_head.weight", (64, 32), 0, 4)
    assert (
        state.kinds("thinker.model.layers.0.mlp.experts.down_proj")
        == {WEIGHT}
        == state.kinds("talker.model.norm.weight")
    )
    assert not state.kinds("code2wav.code_embedding.weight")


@pytest.mark.parametrize("name", ["sft", "sft_lora"])
def test_recipes_take_the_sizes_of_a_folder(folder: Path, tmp_path: Path, name: str) -> None:
    words = [f"recipe={name}", f"model.weights={folder}", "data.shards=[a.tar]", f"run={tmp_path}/run"]
    recipe = load_recipe([*words, "data.tokenizer=there"])
    assert recipe.model.text.hidden_size == 32 and recipe.model.vision is None and recipe.init == str(folder)
    assert recipe.model.talker is not None and recipe.model.talker.speaker_id["two"] == 27
    assert recipe.data.tokenizer == "there" and (recipe.lora is not None) == (name == "sft_lora")
    with pytest.raises(RecipeError, match="data.tokenizer is not set, and .* has no tokenizer.json"):
        load_recipe(words)
    with pytest.raises(RecipeError, match="init is not set: give init=VALUE"):
        load_recipe([words[0], *words[2:], "data.tokenizer=there"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.yaml").write_text(as_yaml(recipe))
    assert load_recipe(words).data.tokenizer == "there", "the run's own is taken, whatever became of the folder"


def test_recipes_of_the_released_size_compose() -> None:
    for name in ("sft", "sft_lora"):
        recipe = load_recipe([f"recipe={name}", "data.shards=[a.tar]", "data.tokenizer=t", "init=run"])
        assert recipe.model.text.num_experts == 128 and recipe.model.weights is None
    assert recipe.lora is not None and recipe.lora.scale == 2.0 and recipe.engine.ep == 1


def test_cached_states_and_adapters_do_not_go_together() -> None:
    words = ["recipe=sft_lora", "data.shards=[a.tar]", "data.tokenizer=t", "init=run", "data.codec=c"]
    with pytest.raises(RecipeError, match="phases.all.speech=cached: hidden states are those of a Thinker without"):
        load_recipe([*words, "phases.all.speech=cached"])


def test_an_adapter_needs_something_to_be_added_to() -> None:
    with pytest.raises(RecipeError, match="there is nothing to add it to; give model.weights or init"):
        settle({"run": "nowhere", "model": {}, "lora": {"adapter": "a"}})
