"""The graph of stages: order, overrides, what starts from what, and one line for what cannot be."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch

from data.tokenizer import train_tokenizer
from train.curriculum import in_order, is_curriculum, load_curriculum
from train.errors import RecipeError
from train.opening import engine_setup, model_config
from train.parallel import Degrees, Layout, check_layout, check_long, check_sequence
from train.recipe import spans

STAGE = "{recipe: transcribe}"


def write(folder: Path, stages: str, more: str = "") -> str:
    path = folder / "mine.yaml"
    path.write_text(f"name: mine\nrun: {folder}/run\n{more}\nstages:\n{stages}\n")
    return f"recipe={path}"


@pytest.fixture
def three(tmp_path: Path) -> str:
    body = """
  last: {recipe: transcribe, after: [middle, first], set: {init: elsewhere}}
  first: {recipe: transcribe, set: {phases: {one: {steps: 3}}}}
  middle: {recipe: transcribe, after: [first], carry: optimizer, set: {optim: {lr: 0.25}}}
"""
    return write(tmp_path, body, "set: {data: {sequence_length: 64}, phases: {all: {steps: 9}}}")


def test_stages_run_after_what_they_need(three: str, tmp_path: Path) -> None:
    found = load_curriculum([three])
    assert [stage.name for stage in found.stages] == ["first", "middle", "last"]
    first, middle, last = (stage.recipe for stage in found.stages)
    assert first.init is None
    assert middle.init == f"{tmp_path}/run/first" and middle.carry == "optimizer"
    assert last.init == f"{tmp_path}/run/first,{tmp_path}/run/middle,elsewhere"  # later ones in `after` count first
    assert [recipe.run for recipe in (first, middle, last)] == [
        f"{tmp_path}/run/{name}" for name in ("first", "middle", "last")
    ]


def test_settings_of_all_then_of_the_stage_then_of_the_command_line(three: str) -> None:
    found = load_curriculum([three, "save.every=7", "middle.optim.lr=0.5", "last.data.sequence_length=128"])
    first, middle, last = (stage.recipe for stage in found.stages)
    assert [*first.phases] == ["one"]  # phases that are given replace those of the recipe
    assert [*middle.phases] == ["all"] and middle.phases["all"].steps == 9
    assert (first.optim.lr, middle.optim.lr) == (1.5e-3, 0.5)
    assert {recipe.save.every for recipe in (first, middle, last)} == {7}
    assert (first.data.sequence_length, last.data.sequence_length) == (64, 128)


def test_from_and_to(three: str) -> None:
    found = load_curriculum([three, "from=middle", "to=middle"])
    assert [stage.name for stage in found.stages[found.first : found.stop]] == ["middle"]


def test_groups_of_all_and_of_one(three: str) -> None:
    found = load_curriculum([three, "engine=deepspeed", "middle.engine=megatron"])
    assert [stage.recipe.engine.name for stage in found.stages] == ["deepspeed", "megatron", "deepspeed"]


def test_a_recipe_is_no_curriculum(three: str) -> None:
    assert is_curriculum([three])
    assert not is_curriculum(["recipe=transcribe"])


def test_order_is_the_given_one_where_it_can_be() -> None:
    assert in_order({"c": [], "a": ["b"], "b": []}) == ["c", "b", "a"]


@pytest.mark.parametrize(
    ("stages", "words", "line"),
    [
        (
            "  a: {recipe: transcribe, after: [stge]}\n  stage: " + STAGE,
            [],
            "unknown stage 'stge', did you mean 'stage'?",
        ),
        ("  a: {recipe: transcribe, after: [b]}\n  b: {recipe: transcribe, after: [a]}", [], "a -> b -> a is a cycle"),
        ("  a: {recipe: transcribe, after: [a]}", [], "a -> a is a cycle"),
        ("  a: {recipe: transcrib}", [], "stage a: unknown recipe 'transcrib', did you mean 'transcribe'?"),
        ("  a: {recipe: transcribe, afer: [b]}", [], "unknown setting stages.a.afer, did you mean 'after'?"),
        ("  a: {recipe: transcribe, carry: all}", [], "stages.a.carry=all"),
        ("  a: {recipe: transcribe, carry: optimizer}", [], "it takes one stage in `after`, not 0"),
        ("  a: {recipe: transcribe, hand_on: best}", [], "set eval.best=SET.METRIC"),
        ("  a: {recipe: transcribe, set: {optim: {lrr: 1}}}", [], "stage a: unknown setting optim.lrr"),
        ("  'a/b': " + STAGE, [], "letters, digits and underscores"),
        ("  a: " + STAGE, ["b.optim.lr=1"], "stage a: unknown setting 'b.optim.lr'"),
        ("  a: " + STAGE, ["from=b"], "from=b: unknown stage"),
        ("  a: " + STAGE + "\n  b: " + STAGE, ["from=b", "to=a"], "from=b comes after to=a"),
        ("  a: {recipe: stage2}", [], "stage a: init is not set"),
        (
            "  a: {recipe: transcribe, set: {end: {metric: voices.wer}, eval: {every: 0}}}",
            [],
            "stage a: end.metric=voices.wer can never end the run: eval.every is 0",
        ),
        (
            "  a: {recipe: transcribe, set: {end: {metric: voices.wer, patience: 9}}}",
            [],
            "can never end the run: its last phase has 1,500 steps",
        ),
        (
            "  a: {recipe: transcribe, set: {end: {metric: voices.wr}}}",
            [],
            "end.metric=voices.wr, did you mean 'voices.wer'?",
        ),
        (
            "  a: {recipe: transcribe, set: {eval: {best: voice.wer}}}",
            [],
            "eval.best=voice.wer, did you mean 'voices.wer'?",
        ),
        (
            "  a: {recipe: transcribe, set: {phases: {x: {steps: 5, tokens: 9000}}}}",
            [],
            "give steps or tokens, not both",
        ),
    ],
)
def test_one_line_for_what_cannot_be(stages: str, words: list[str], line: str, tmp_path: Path) -> None:
    fill = ["data.shards=[a]", "data.tokenizer=t"] if "stage2" in stages else []
    with pytest.raises(RecipeError) as caught:
        load_curriculum([write(tmp_path, stages), *fill, *words])
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_tokens_become_steps(tmp_path: Path) -> None:
    stages = "  a: {recipe: transcribe, set: {phases: {x: {tokens: 100000}, y: {tokens: 100, sequence_length: 60}}}}"
    phases = load_curriculum([write(tmp_path, stages)]).stages[0].recipe.phases
    assert phases["x"].steps == 131  # of 768 tokens
    assert phases["y"].steps == 2


CURRICULA = {"curriculum": 64, "curriculum_1b": 8, "curriculum_demo": 1}
FILL = ["data.tokenizer=t", "data.codec=c"]


@pytest.mark.parametrize("name", CURRICULA)
def test_every_stage_builds_and_its_layout_can_be(name: str) -> None:
    """On the meta device, with phases whose patterns all name parameters, and the layout for so many processes."""
    words = train_tokenizer(["a b c"], 300)
    more = [] if name == "curriculum_demo" else ["stage1.init=weights"]
    for stage in load_curriculum([f"recipe={name}", *FILL, *more]).stages:
        recipe = stage.recipe
        model = model_config(recipe, words)
        degrees = {each.name: getattr(recipe.engine, each.name) for each in fields(Degrees)}
        layout = Layout(**degrees, world=CURRICULA[name])
        check_layout(model, layout)
        check_long(model, layout)
        for span in spans(recipe):
            setup = engine_setup(recipe, model, span, torch.device("cpu"))
            objective = setup.build_objective(drawn=False)
            assert any(parameter.requires_grad for parameter in objective.model.parameters()), (stage.name, span.name)
            check_sequence(layout, setup.sequence_length)
