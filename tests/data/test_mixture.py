"""The mixture: shares kept to a sample, epochs and caps exact, the same order whatever the stops and ranks."""

import json
from collections import Counter, defaultdict
from dataclasses import asdict
from hashlib import sha256

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.mixture import Mixture
from data.plan import Plan
from tests.data.corpus_kit import Made, costs_corpus, costs_plan

SOURCES, LANGUAGES = ("web", "speech", "film"), ("en", "de")
SAMPLE = st.builds(
    Made,
    st.integers(1, 60),
    st.lists(st.integers(400, 16_000), max_size=1),
    source=st.sampled_from(SOURCES),
    language=st.sampled_from(LANGUAGES),
)
SHARDS = st.lists(st.lists(SAMPLE, min_size=1, max_size=25), min_size=1, max_size=5)
SIZES = st.fixed_dictionaries(
    {
        "sequence_length": st.integers(90, 200),
        "sequences_per_step": st.integers(1, 5),
        "window": st.integers(4, 60),
        "speeds": st.sampled_from([(1.0,), (0.9, 1.1)]),
    }
)
LIMITS = st.one_of(st.none(), st.sampled_from([0.3, 1.0, 1.5, 3.0]))


@st.composite
def mixtures(draw, sources: list[str]) -> Mixture:
    """Mixtures that fit a corpus of these sources."""
    weights = draw(st.one_of(st.just({}), st.fixed_dictionaries({name: st.integers(0, 9) for name in sources})))
    assume(not weights or any(weights.values()))
    return Mixture(
        weights=weights,
        temperature=draw(st.sampled_from([1.0, 3.0])),
        language_temperature=draw(st.sampled_from([1.0, 2.0, 100.0])),
        epochs={name: most for name in sources if (most := draw(LIMITS))},
        caps={name: 500.0 * most for name in sources if (most := draw(LIMITS))},
    )


def sources_of(shards: list[list[Made]]) -> list[str]:
    """Names of the sources that occur."""
    return sorted({str(sample.source) for shard in shards for sample in shard})


def drawn(plan: Plan, most_steps: int) -> tuple[list[tuple[int, int, int]], int]:
    """(sample, epoch, tokens) in order up to the end of the data, at most `most_steps`; and the steps it lasted."""
    rows: list[tuple[int, int, int]] = []
    for step in range(most_steps):
        try:
            packs = plan.step(step)
        except DataError as error:
            assert f"the data ends at step {step}" in str(error)
            return rows, step
        for pack in packs:
            assert pack.tokens.sum() <= plan.settings.sequence_length
            rows += zip(pack.samples.tolist(), pack.epochs.tolist(), pack.tokens.tolist(), strict=True)
    return rows, most_steps


def groups_of(shards: list[list[Made]]) -> list[tuple[str, str]]:
    """(source, language) of each sample id."""
    return [(str(sample.source), sample.language) for shard in shards for sample in shard]


@settings(max_examples=30, deadline=None)
@given(SHARDS, SIZES, st.data())
def test_each_group_runs_through_its_samples_before_any_comes_again(shards, sizes, data) -> None:
    mixture = data.draw(mixtures(sources_of(shards)))
    plan = costs_plan(costs_corpus(shards), mixture=mixture, **sizes)
    group_of = groups_of(shards)
    counts = Counter(group_of)
    steps = drawn(plan, 12)[1]
    assume(steps)
    state = plan.cursor(steps).state
    seen: dict[tuple[str, str], Counter] = defaultdict(Counter)
    end = plan.cursor(steps).first_pack
    packs = [pack for step in range(steps) for pack in plan.step(step)][:end]
    for pack in packs:
        for sample, epoch in zip(pack.samples.tolist(), pack.epochs.tolist(), strict=True):
            assert mixture.weights.get(group_of[sample][0], 1) > 0
            assert not seen[group_of[sample]][sample, epoch]
            seen[group_of[sample]][sample, epoch] += 1
    for name, position in zip(plan.groups, state.positions, strict=True):
        whole, rest = divmod(position, counts[name])
        per_epoch = Counter(epoch for _, epoch in seen[name])
        assert per_epoch == Counter({epoch: counts[name] for epoch in range(whole)} | ({whole: rest} if rest else {}))
        assert position <= int(mixture.epochs.get(name[0], 1e9) * counts[name] + 1e-6)


@settings(max_examples=30, deadline=None)
@given(SHARDS, SIZES, st.data())
def test_shares_hold_to_a_sample_at_every_window(shards, sizes, data) -> None:
    sources = sources_of(shards)
    weights = {name: data.draw(st.integers(1, 9)) for name in sources}
    mixture = Mixture(weights, language_temperature=data.draw(st.sampled_from([1.0, 100.0])))
    plan = costs_plan(costs_corpus(shards), mixture=mixture, **sizes)
    per_language: dict[tuple[str, str], int] = dict(zip(plan.groups, plan.tally.tokens, strict=True))
    asked = {}
    for name in plan.groups:
        same = [other for other in plan.groups if other[0] == name[0]]
        power = {other: per_language[other] ** (1 / mixture.language_temperature) for other in same}
        asked[name] = weights[name[0]] / sum(weights.values()) * power[name] / sum(power.values())
    longest = 60 + 13 * 16_000 / 16_000 / 0.9 + 2
    for step in range(0, 40, 3):
        state = plan.cursor(step).state
        total = sum(state.targets)
        for name, tokens in zip(plan.groups, state.tokens, strict=True):
            assert asked[name] * total - longest < tokens <= asked[name] * total * (1 + 1e-9) + 1e-2


@settings(max_examples=30, deadline=None)
@given(SHARDS, SIZES, st.data())
def test_caps_and_epochs_are_exact(shards, sizes, data) -> None:
    """All sources are limited: run to the end, and count what each has given."""
    sources = sources_of(shards)
    epochs = {name: data.draw(st.sampled_from([0.5, 1.0, 2.0])) for name in sources}
    caps = {name: float(data.draw(st.integers(200, 900))) for name in sources if data.draw(st.booleans())}
    mixture = Mixture({name: data.draw(st.integers(1, 5)) for name in sources}, epochs=epochs, caps=caps)
    corpus, sizes = costs_corpus(shards), sizes | {"sequences_per_step": 1}
    plan = costs_plan(corpus, mixture=mixture, **sizes)
    counts = Counter(groups_of(shards))
    assume(any(int(epochs[name[0]] * count + 1e-6) for name, count in counts.items()))
    rows, steps = drawn(plan, 10_000)
    assume(steps)
    group_of = groups_of(shards)
    given_samples, tokens = Counter(group_of[sample] for sample, _, _ in rows), Counter()
    for sample, _, length in rows:
        tokens[group_of[sample][0]] += length
    languages = Counter(source for source, _ in counts)
    for source in sources:
        most = {name: int(epochs[source] * count + 1e-6) for name, count in counts.items() if name[0] == source}
        assert all(given_samples[name] <= limit for name, limit in most.items())
        assert tokens[source] <= caps.get(source, 1e9)
        if any(given_samples[name] < limit for name, limit in most.items()):
            assert tokens[source] > caps[source] - languages[source] * 80
    realised = Counter()
    for (source, _), given_tokens in plan.realised(steps).items():
        realised[source] += given_tokens
    assert +realised == +tokens
    assert plan.cursor(steps).first_pack <= steps
    plan.require(steps)
    with pytest.raises(DataError, match=f"the data ends at step {steps:,} of data.mixture: every source has given"):
        plan.require(steps + 1)


@settings(max_examples=25, deadline=None)
@given(SHARDS, SIZES, st.lists(st.tuples(st.integers(1, 6), st.integers(1, 4), st.booleans()), max_size=5), st.data())
def test_any_stops_and_ranks_consume_what_an_unbroken_run_does(shards, sizes, runs, data) -> None:
    corpus, mixture = costs_corpus(shards), data.draw(mixtures(sources_of(shards)))
    unbroken = costs_plan(corpus, mixture=mixture, **sizes)
    lasts = drawn(unbroken, sum(steps for _, steps, _ in runs))[1]
    step = 0
    for ranks, steps, with_cursor in runs:
        plan = costs_plan(corpus, mixture=mixture, **sizes)
        if with_cursor and lasts:
            plan.seek(json.loads(json.dumps(asdict(unbroken.cursor(step)))))
        for _ in range(min(steps, lasts - step)):
            shares = [pack for rank in range(ranks) for pack in plan.share(step, rank, ranks)]
            expected = unbroken.step(step)
            assert sorted(map(describe, shares)) == sorted(map(describe, expected))
            assert list(map(describe, plan.step(step))) == list(map(describe, expected))
            step += 1
        if lasts:
            assert plan.cursor(step) == unbroken.cursor(step)
            assert plan.realised(step) == unbroken.realised(step)


def describe(pack) -> tuple:
    """All of a pack, comparable."""
    columns = (pack.samples, pack.epochs, pack.pieces, pack.groups, pack.speeds, pack.tokens)
    return (*(tuple(column.tolist()) for column in columns), pack.work, pack.audio_work, pack.vision_work)


def long_tailed(shards: int = 12, count: int = 500) -> list[list[Made]]:
    """Shards of two sources in two languages, every other shard of one source alone."""
    rng = np.random.default_rng(0)
    return [
        [
            Made(
                int(np.clip(rng.lognormal(4, 1), 2, 900)),
                source="speech" if shard % 2 and rng.random() < 0.7 else "web",
                language="de" if rng.random() < 0.2 else "en",
            )
            for _ in range(count)
        ]
        for shard in range(shards)
    ]


def test_realised_shares_are_within_a_tenth_of_a_percent_of_the_asked() -> None:
    mixture = Mixture({"web": 3, "speech": 1}, language_temperature=2.0)
    plan = costs_plan(costs_corpus(long_tailed()), mixture=mixture, window=2_000, sequence_length=1_000)
    asked = plan.asked(1_500)
    assert asked["web", "en"] + asked["web", "de"] == pytest.approx(0.75)
    de, en = (tokens**0.5 for tokens in plan.tally.tokens[:2])
    assert plan.groups[0] == ("speech", "de") and asked["speech", "de"] == pytest.approx(0.25 * de / (de + en))
    realised = plan.realised(1_500)
    total = sum(realised.values())
    assert total > 4_000_000
    assert all(abs(realised[name] / total - share) < 0.001 for name, share in asked.items())
    lines = plan.mixture_report(1_500)
    assert lines[0].split() == ["source", "language", "asked", "realised", "tokens", "epochs"]
    assert lines[1].split()[:3] == ["speech", "de", f"{asked['speech', 'de']:.3%}"]
    assert float(lines[1].split()[5]) == pytest.approx(realised["speech", "de"] / plan.tally.tokens[0], abs=0.01)


def test_realised_counts_the_packs_of_the_steps_before() -> None:
    plan = costs_plan(costs_corpus(long_tailed(4, 60)), mixture=Mixture(), window=50, sequence_length=1_000)
    counted: Counter = Counter()
    for step in range(30):
        assert plan.realised(step) == {name: counted[name] for name in plan.groups}
        for pack in plan.step(step):
            for group, tokens in zip(pack.groups.tolist(), pack.tokens.tolist(), strict=True):
                counted[plan.groups[group]] += tokens


def test_without_weights_shares_follow_size_by_temperature() -> None:
    shards = [[Made(10, source="big")] * 90, [Made(10, source="small")] * 10]
    for temperature, share in ((1.0, 0.1), (2.0, 0.25), (1e9, 0.5)):
        plan = costs_plan(costs_corpus(shards), mixture=Mixture(temperature=temperature), window=400)
        realised = plan.realised(300)
        assert realised["small", "(no language)"] / sum(realised.values()) == pytest.approx(share, abs=0.02)


def test_a_language_whose_share_is_nothing_is_named() -> None:
    shards = [[Made(10, source="a", language="en")] * 50 + [Made(1, source="a", language="de")]]
    with pytest.raises(DataError, match="the share of a/de is too small to count; leave it out"):
        costs_plan(costs_corpus(shards), mixture=Mixture(language_temperature=0.001)).step(0)
    plan = costs_plan(costs_corpus(shards), mixture=Mixture(epochs={"a": 0.001}))
    with pytest.raises(DataError, match="the data ends at step 0"):
        plan.require(1)


def test_languages_are_weighed_and_left_out() -> None:
    shards = [[Made(10, source="a", language=language) for language in ("en", "de", "fr", "fr")] * 20]
    mixture = Mixture(languages={"fr": 0, "de": 3})
    plan = costs_plan(costs_corpus(shards), mixture=mixture, window=400)
    realised = plan.realised(400)
    assert set(realised) == {("a", "de"), ("a", "en")} and plan.left_out == {"a": 40}
    assert realised["a", "de"] / sum(realised.values()) == pytest.approx(0.75, abs=0.02)


def test_a_source_that_has_given_enough_leaves_its_place_to_the_others() -> None:
    shards = [[Made(10, source=name)] * 50 for name in ("a", "b", "c")]
    mixture = Mixture({"a": 2, "b": 1, "c": 1}, epochs={"a": 2})
    plan = costs_plan(costs_corpus(shards), mixture=mixture, window=30, sequences_per_step=1)
    realised = {source: tokens for (source, _), tokens in plan.realised(500).items()}
    assert realised["a"] == 2 * 50 * 10
    assert abs(realised["b"] - realised["c"]) <= 300
    share = 1000 / sum(realised.values())
    assert plan.mixture_report(500)[1].split()[3:] == ["0.000%", f"{share:.3%}", "1,000", "2.00"]


def test_what_is_left_out_need_not_fit() -> None:
    shards = [[Made(10, source="a")] * 9, [Made(101, source="b"), Made(9, images=[(64, 64)], source="b")]]
    plan = costs_plan(costs_corpus(shards), mixture=Mixture({"a": 1, "b": 0}))
    assert plan.left_out == {"b": 2} and plan.dropped == {}
    assert {sample for sample, _, _ in drawn(plan, 5)[0]} <= set(range(9))
    with pytest.raises(DataError, match="^shard-1.tar:k1: has images or videos"):
        costs_plan(costs_corpus(shards), mixture=Mixture({"a": 1, "b": 1}), too_long="drop").step(0)


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        (Mixture({"webb": 1, "speech": 1}), 'data.mixture.weights: no sample is of "webb"; did you mean "web"?'),
        (Mixture({"web": 1}), 'data.mixture.weights: source "speech" has none (of 1 such); 0 leaves a source out'),
        (Mixture(caps={"zzz": 1}), 'data.mixture.caps: no sample is of "zzz"; there are speech, web'),
        (Mixture(epochs={"spech": 1}), 'data.mixture.epochs: no sample is of "spech"; did you mean "speech"?'),
        (Mixture(languages={"eng": 1}), 'data.mixture.languages: no sample is of "eng"; did you mean "en"?'),
        (Mixture(temperature=0), "data.mixture.temperature=0: must be above 0"),
        (Mixture({"web": -1}), "data.mixture.weights.web=-1: must be 0 or more"),
        (Mixture({"web": float("nan")}), "data.mixture.weights.web=nan: must be 0 or more"),
        (Mixture(caps={"web": 0}), "data.mixture.caps.web=0: must be above 0"),
        (Mixture({"web": 0, "speech": 0}), "data.mixture.weights: all are 0; give one source at least a share"),
        (
            Mixture(languages={"en": 0, "de": 0}),
            "data.mixture leaves out every sample; raise a weight or a factor of a language",
        ),
    ],
)
def test_a_mixture_that_does_not_fit_is_refused_in_one_line(mixture, message) -> None:
    corpus = costs_corpus(long_tailed(2, 50))
    with pytest.raises(DataError) as caught:
        costs_plan(corpus, mixture=mixture)
    assert str(caught.value) == message


def test_a_source_without_a_sample_that_fits() -> None:
    """Dropped and counted like any sample that is too long; refused where a share was asked of it."""
    corpus = costs_corpus([[Made(10, source="a"), Made(101, source="b")] * 9])
    plan = costs_plan(corpus, mixture=Mixture(), too_long="drop")
    assert plan.dropped == {"b": 9} and {int(sample) % 2 for pack in plan.step(0) for sample in pack.samples} == {0}
    with pytest.raises(DataError, match='^data.mixture: every sample of source "b" is too long; raise'):
        costs_plan(corpus, mixture=Mixture({"a": 1, "b": 1}), too_long="drop").dropped  # noqa: B018


def test_samples_without_a_source_have_a_name_to_be_asked_by() -> None:
    corpus = costs_corpus([[Made(10, source=""), Made(10, source="a", language="en")] * 10])
    plan = costs_plan(corpus, mixture=Mixture({"(no source)": 1, "a": 1}))
    assert plan.groups == [("(no source)", "(no language)"), ("a", "en")]


def test_order_of_a_mixture_is_what_it_always_was() -> None:
    """A golden value. A change here means that running jobs cannot resume exactly."""
    mixture = Mixture({"web": 2, "speech": 1}, language_temperature=2.0, epochs={"speech": 1.5})
    plan = costs_plan(costs_corpus(long_tailed(5, 80)), seed=7, mixture=mixture, window=60, sequence_length=1_000)
    rows = drawn(plan, 15)[0]
    assert sha256(repr(rows).encode()).hexdigest()[:16] == "284f20e1166084c8"
