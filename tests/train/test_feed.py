"""Where a run stands in its data: kept by a checkpoint, refused where the data changed, found at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data.errors import DataError
from data.mixture import Mixture
from data.shards import write_shards
from data.tokenizer import load_tokenizer
from tests.data.corpus_kit import Made, costs_corpus, costs_plan, mixed, tokenizer, written
from train.config import Phase
from train.feed import Course, Feed, open_feed
from train.opening import model_config
from train.recipe import Span, load_recipe

READER: Any = None  # nothing is read here
SHARDS = [[Made(10, source="a"), Made(7, source="b")] * 40]


def feed(**settings) -> Feed:
    """Phases of two and three steps, the first with a mixture of its own."""
    corpus = costs_corpus(SHARDS)
    own = costs_plan(corpus, mixture=Mixture({"a": 1, "b": 3}), **settings)
    spans = [Span("own", Phase(2), 0, 2), Span("shared", Phase(3), 2, 5)]
    courses = {"own": Course(own, 0, READER), "shared": Course(costs_plan(corpus, **settings), 2, READER)}
    return Feed(spans, courses)


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_resumed_run_finds_its_place_without_a_look_at_the_corpus(step: int, monkeypatch) -> None:
    before = feed()
    position = json.loads(json.dumps(before.position(step)))
    name = "own" if step < 2 else "shared"
    expected = [pack.samples.tolist() for pack in before.courses[name].plan.step(step - before.courses[name].origin)]
    after = feed()
    if step != 2:  # there the phase's own plan begins, which nobody has looked at yet
        monkeypatch.setattr("data.plan.scan", lambda *_: pytest.fail("the corpus was looked at again"))
    after.seek(step, position)
    course = after.courses[name]
    assert [pack.samples.tolist() for pack in course.plan.step(step - course.origin)] == expected


def test_what_was_read_is_compared() -> None:
    position = feed().position(3)
    for other in (feed(window=16), feed(sequences_per_step=2)):
        with pytest.raises(DataError, match="the data up to here is not the checkpoint's"):
            other.seek(3, position)
    with pytest.raises(DataError, match="the data up to here"):
        feed().seek(4, position)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of three sources, one of them too long, one in two languages."""
    folder, words = tmp_path_factory.mktemp("corpus"), tokenizer()
    odd = [written("long", "x" * 200, source="long"), written("de", source="text", language="de")]
    write_shards([*mixed(20), *odd], folder / "train", words)
    words.save(folder / "tokenizer")
    return folder


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        (
            "{weights: {speach: 1, text: 1, long: 0}}",
            'MIXTURE.weights: no sample is of "speach"; did you mean "speech"',
        ),
        ("{weights: {text: 1, long: 0}}", 'MIXTURE.weights: source "speech" has none'),
        ("{weights: {speech: 1, text: 1, long: 1}}", 'MIXTURE: every sample of source "long" is too long; raise'),
        ("{languages: {en: 0, de: 0, (no language): 0}}", "MIXTURE leaves out every sample"),
        ("{language_temperature: 1e-4}", "MIXTURE: the share of text/de is too small to count"),
        ("{epochs: {speech: 1, text: 1, long: 1}}", "of MIXTURE: every source has given its epochs or caps"),
    ],
)
@pytest.mark.parametrize("own", [True, False])
def test_errors_name_the_mixture_as_the_recipe_does(own: bool, mixture: str, message: str, corpus: Path) -> None:
    data = [f"shards=[{corpus}/train/*.tar]", f"tokenizer={corpus}/tokenizer", "sequence_length=96", "too_long=drop"]
    phases = f"phases={{start: {{steps: 2}}, end: {{steps: 500, mixture: {mixture}}}}}"
    place = [phases] if own else ["phases={all: {steps: 500}}", f"data.mixture={mixture}"]
    recipe = load_recipe(["recipe=transcribe", *(f"data.{word}" for word in data), *place])
    words = load_tokenizer(corpus / "tokenizer")
    with pytest.raises(DataError) as caught:
        open_feed(recipe, words, model_config(recipe, words)).require(500)
    name, other = ("phases.end.mixture", "data.mixture")[:: 1 if own else -1]
    assert message.replace("MIXTURE", name) in str(caught.value) and other not in str(caught.value)
