"""Where a run stands in its data: kept by a checkpoint, refused where the data changed, found at once."""

from __future__ import annotations

import json

import pytest

from data.errors import DataError
from data.mixture import Mixture
from tests.data.corpus_kit import Made, costs_corpus, costs_plan
from train.feed import Course, Feed
from train.recipe import Phase, Span

SHARDS = [[Made(10, source="a"), Made(7, source="b")] * 40]


def feed(**settings) -> Feed:
    """Phases of two and three steps, the first with a mixture of its own."""
    corpus = costs_corpus(SHARDS)
    own = costs_plan(corpus, mixture=Mixture({"a": 1, "b": 3}), **settings)
    spans = [Span("own", Phase(2), 0, 2), Span("shared", Phase(3), 2, 5)]
    courses = {"own": Course(own, 0), "shared": Course(costs_plan(corpus, **settings), 2)}
    return Feed(None, spans, courses)  # type: ignore[arg-type]


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
