"""The plan: every sample once an epoch, the same order whatever the ranks, stops and ways of asking."""

from collections import Counter
from hashlib import sha256

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.balance import deal
from data.errors import DataError
from data.hashing import hashed, permutation
from data.plan import Cursor, Pack, Plan
from tests.data.corpus_kit import costs_corpus, costs_plan, num_audio_tokens

SAMPLE = st.tuples(st.integers(1, 60), st.lists(st.integers(400, 40_000), max_size=2))
SHARDS = st.lists(st.lists(SAMPLE, min_size=1, max_size=15), min_size=1, max_size=6)
SETTINGS = st.fixed_dictionaries(
    {
        "sequence_length": st.integers(150, 400),
        "sequences_per_step": st.integers(1, 9),
        "window": st.integers(1, 40),
        "speeds": st.sampled_from([(1.0,), (0.9, 1.0, 1.1), (1.25,)]),
    }
)


def flat(packs: list[Pack]) -> list[tuple[int, int, float]]:
    """(epoch, sample, speed) of all samples in order."""
    return [
        (pack.epoch, int(sample), float(speed))
        for pack in packs
        for sample, speed in zip(pack.samples, pack.speeds, strict=True)
    ]


def true_tokens(corpus, sample: int, speed: float) -> int:
    """The length of a sample, one clip at a time and without numpy."""
    shard, row = corpus.locate(sample)
    index = corpus.index(shard)
    frames = [round(clip / speed) // 160 for clip in index.clip_samples(row)]
    return int(index.columns["text_tokens"][row]) + sum(num_audio_tokens(frame) for frame in frames)


def whole_epochs(plan: Plan, epochs: int) -> list[Pack]:
    """All packs of the first epochs."""
    packs: list[Pack] = []
    step = 0
    while not packs or packs[-1].epoch < epochs:
        packs += plan.step(step)
        step += 1
    return [pack for pack in packs if pack.epoch < epochs]


@settings(max_examples=100, deadline=None)
@given(SHARDS, SETTINGS, st.integers(0, 2**64))
def test_every_sample_once_an_epoch_and_no_pack_too_long(shards, asked, seed) -> None:
    corpus = costs_corpus(shards)
    plan = costs_plan(corpus, seed, **asked)
    packs = whole_epochs(plan, 3)
    for epoch in range(3):
        samples = [sample for at, sample, _ in flat(packs) if at == epoch]
        assert sorted(samples) == list(range(corpus.num_samples))
    for pack in packs:
        tokens = [true_tokens(corpus, int(s), float(v)) for s, v in zip(pack.samples, pack.speeds, strict=True)]
        assert tokens == pack.tokens.tolist()
        assert 0 < sum(tokens) <= asked["sequence_length"]
        assert set(pack.speeds.tolist()) <= {*asked["speeds"], 1.0}


@settings(max_examples=60, deadline=None)
@given(SHARDS, SETTINGS, st.lists(st.integers(1, 7), min_size=1, max_size=6), st.data())
def test_any_stops_and_ranks_consume_what_an_unbroken_run_does(shards, asked, worlds, data) -> None:
    corpus = costs_corpus(shards)
    unbroken = costs_plan(corpus, **asked)
    step = 0
    for world in worlds:  # each a run that resumes with another number of ranks
        plan = costs_plan(corpus, **asked)
        if data.draw(st.booleans()):
            plan.seek(vars(unbroken.cursor(step)))
        for step in range(step, step + data.draw(st.integers(1, 5))):  # noqa: B020
            shares = [plan.share(step, rank, world) for rank in range(world)]
            assert max(map(len, shares)) <= -(-asked["sequences_per_step"] // world)
            expected = unbroken.step(step)
            assert Counter(map(str, map(vars, sum(shares, [])))) == Counter(map(str, map(vars, expected)))
            assert flat(plan.step(step)) == flat(expected)
        step += 1


@settings(max_examples=60, deadline=None)
@given(SHARDS, SETTINGS, st.integers(0, 30), st.integers(0, 30))
def test_cursor_equals_walk(shards, asked, stop, asked_step) -> None:
    corpus = costs_corpus(shards)
    walked, resumed = costs_plan(corpus, **asked), costs_plan(corpus, **asked)
    resumed.seek(walked.cursor(stop))
    for step in (stop, stop + 1, asked_step, stop):  # forth, and back before the cursor
        assert flat(resumed.step(step)) == flat(walked.step(step))
    assert resumed.cursor(asked_step) == walked.cursor(asked_step)


def test_resume_from_a_cursor_packs_two_windows_at_most(monkeypatch) -> None:
    corpus = costs_corpus([[(10, [])] * 50] * 10)
    far = costs_plan(corpus, window=50)
    cursor = far.cursor(500)
    plan, packed = costs_plan(corpus, window=50), []
    monkeypatch.setattr(Plan, "_pack_window", _counting(Plan._pack_window, packed))
    plan.seek(cursor)
    assert flat(plan.step(500)) == flat(far.step(500))
    assert len(set(packed)) <= 2


def _counting(method, calls: list):
    def counted(self, *arguments):
        calls.append(arguments)
        return method(self, *arguments)

    return counted


def test_order_of_samples_is_what_it_always_was() -> None:
    """A golden value. A change here means that running jobs cannot resume exactly."""
    rng = np.random.default_rng(0)
    shards = [
        [(int(rng.integers(5, 60)), rng.integers(400, 40_000, rng.integers(0, 3)).tolist()) for _ in range(25)]
        for _ in range(4)
    ]
    plan = costs_plan(costs_corpus(shards), seed=7, speeds=(0.9, 1.0, 1.1), window=30, sequence_length=300)
    order = [flat(plan.step(step)) for step in range(40)]
    assert sha256(repr(order).encode()).hexdigest()[:16] == "40ba13278648f661"


def test_epochs_seeds_and_windows_differ() -> None:
    corpus = costs_corpus([[(10, [])] * 40] * 3)
    first = [sample for _, sample, _ in flat(whole_epochs(costs_plan(corpus, window=30), 2))]
    assert first[:120] != first[120:]
    other = [sample for _, sample, _ in flat(whole_epochs(costs_plan(corpus, seed=1, window=30), 2))]
    assert first != other
    assert first[:40] != sorted(first[:40])


def test_speeds_are_drawn_evenly_and_anew_each_epoch() -> None:
    plan = costs_plan(costs_corpus([[(5, [16_000])] * 300]), speeds=(0.9, 1.0, 1.1), window=300)
    drawn = {(epoch, sample): speed for epoch, sample, speed in flat(whole_epochs(plan, 2))}
    counts = Counter(drawn.values())
    assert set(counts) == {0.9, 1.0, 1.1} and min(counts.values()) > 150
    assert sum(drawn[0, sample] != drawn[1, sample] for sample in range(300)) > 150


def test_a_clip_near_the_shortest_keeps_its_speed() -> None:
    plan = costs_plan(costs_corpus([[(5, [410]), (5, [16_000, 410])] * 10]), speeds=(1.1,))
    assert {speed for _, _, speed in flat(whole_epochs(plan, 1))} == {1.0}


def test_too_long_stops_with_one_line() -> None:
    corpus = costs_corpus([[(10, []), (90, [16_000])], [(10, []), (101, [])]])
    with pytest.raises(DataError) as caught:
        costs_plan(corpus)
    assert str(caught.value) == (
        "shard-0.tar:k1: 103 tokens, above data.sequence_length=100 (as are 2 samples of 4); "
        "raise data.sequence_length or set data.too_long=drop"
    )


def test_too_long_is_dropped_and_counted_by_source() -> None:
    corpus = costs_corpus([[(10, []), (90, [16_000])], [(10, []), (101, [])]])
    plan = costs_plan(corpus, too_long="drop")
    assert plan.dropped == {"speech": 1, "text": 1}
    assert sorted(sample for _, sample, _ in flat(whole_epochs(plan, 1))) == [0, 2]
    with pytest.raises(DataError, match="^no sample is left: all are longer than sequence_length=9$"):
        costs_plan(corpus, too_long="drop", sequence_length=9)


def test_too_long_does_not_depend_on_the_speed_drawn() -> None:
    corpus = costs_corpus([[(90, [12_000])] * 20])  # 100 tokens, 101 at 0.9
    assert costs_plan(corpus, too_long="error").dropped == {}
    plan = costs_plan(costs_corpus([[(90, [12_000])] * 20 + [(5, [])]]), too_long="drop", speeds=(0.9, 1.0))
    assert plan.dropped == {"speech": 20}


def test_cursor_of_another_plan_is_refused() -> None:
    corpus = costs_corpus([[(10, [])] * 9])
    cursor = costs_plan(corpus, seed=1).cursor(2)
    with pytest.raises(
        DataError, match="or seed are not those of the checkpoint, so its place in the data means nothing"
    ):
        costs_plan(corpus, seed=2).seek(cursor)
    with pytest.raises(
        DataError, match="or seed are not those of the checkpoint, so its place in the data means nothing"
    ):
        costs_plan(corpus, seed=1, sequences_per_step=4).seek(cursor)
    assert isinstance(cursor, Cursor)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60), st.integers(1, 20))
def test_deal_gives_every_pack_to_one_rank(works, num_ranks) -> None:
    ranks = deal(works, num_ranks)
    assert sorted(pack for rank in ranks for pack in rank) == list(range(len(works)))
    assert max(map(len, ranks)) <= -(-len(works) // num_ranks)
    assert all([works[p] for p in rank] == sorted((works[p] for p in rank), reverse=True) for rank in ranks)


def test_deal_balances() -> None:
    works = np.random.default_rng(0).lognormal(0, 0.5, 64 * 16)
    loads = [sum(works[pack] for pack in rank) for rank in deal(works.tolist(), 64)]
    assert max(loads) / np.mean(loads) < 1.02


def test_hash_is_splitmix64() -> None:
    """First outputs of the published generator for seed 0."""
    assert hashed(np.array([0], np.uint64))[0] == 0xE220A8397B1DCDAF
    assert hashed(np.array([0x9E3779B97F4A7C15], np.uint64))[0] == 0x6E789E6AA1B965F4
    assert sorted(permutation(100, 1, 2).tolist()) == list(range(100))
    assert permutation(100, 1, 2).tolist() != permutation(100, 2, 1).tolist()
