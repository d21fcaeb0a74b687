"""Suites one by one, against values worked out by hand, and the names that recipes may use."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import BadSample
from data.grading import Grading, parse_grading
from data.prompts import Prompt
from data.sample import SampleRecord, parse_sample
from train.config import EvalConfig, EvalSet
from train.errors import RecipeError
from train.evaluation_report import make_report
from train.suites import Answered, asr, caption, likelihood, long_qa, minutes, qa, tenth, text, vqa
from train.suites.letters import chosen
from train.suites.registry import SUITES, check_sets, chosen_metric


def asked(reference: str = "", text: str = "", **about) -> Answered:
    parts = {name: about.pop(name) for name in ("minutes", "media", "num_bytes", "language") if name in about}
    scores = {name: about.pop(name) for name in ("logprobs", "nats", "targets") if name in about}
    prompt = Prompt("s:k", parts.pop("language", "en"), reference, "", Grading(**about), **parts)
    return Answered(prompt, text, **scores)


def values(suite, answers: Sequence[Answered]) -> dict[str, float]:
    return make_report("set", suite, 0, answers, []).metrics


def test_every_suite_says_what_it_measures() -> None:
    for name, suite in SUITES.items():
        assert suite.NAME == name and suite.METRICS and suite.ABOUT and suite.ASKS in ("generate", "choose", "read")
        assert suite.refusal(Prompt("k", "en", "", answered=False)), "a sample without anything to grade by is refused"


def test_asr_takes_the_nearest_reference_and_counts_characters() -> None:
    found = values(asr, [asked(answers=("colour me", "color me"), text="Color me!"), asked("ab cd", "ab")])
    assert found["wer"] == pytest.approx(1 / 4) and found["cer"] == pytest.approx(2 / 11)
    assert found["accuracy"] == 0.5


def test_of_silence_nothing_is_said() -> None:
    """An empty answer is a reference to asr, and none to those who ask a question."""
    silence = Prompt("k", "en", "")
    assert not asr.refusal(silence) and qa.refusal(silence) and vqa.refusal(silence)
    assert values(asr, [Answered(silence, "two words"), asked("a b", "a b")])["wer"] == 1.0


@pytest.mark.parametrize(
    ("seconds", "bucket"),
    [(0, ""), (30, "0-1 min"), (60, "0-1 min"), (61, "1-5 min"), (899, "5-15 min"), (2400, "15-40 min"),
     (2401, "40+ min")],
)  # fmt: skip
def test_minute_buckets(seconds: float, bucket: str) -> None:
    assert minutes(asked("a", minutes=seconds / 60).prompt) == bucket


def test_tables_are_in_the_order_of_numbers() -> None:
    report = make_report("set", asr, 0, [asked("a", "a", minutes=m) for m in (20, 0.5, 8, 50, 3)], [])
    assert [row.group for row in report.tables["minutes"]] == [
        "0-1 min", "1-5 min", "5-15 min", "15-40 min", "40+ min"
    ]  # fmt: skip
    assert "15-40 min" in report.table()


@pytest.mark.parametrize(
    ("given", "expected"),
    [("The answer, is: Two dogs!", "answer is 2 dogs"), ("1,000.5 m", "1000.5 m"), ("don't", "dont"), ("a_b", "b"),
     ("10:30", "10:30"), ("none.", "0")],
)  # fmt: skip
def test_vqa_normalisation(given: str, expected: str) -> None:
    assert vqa.normalise(given) == expected


def test_vqa_accuracy_of_ten_annotators() -> None:
    """Of ten answers m are ours: without one that is ours (m - 1) / 3 at most 1, m of ten times; else m / 3."""
    for m, expected in ((0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)):
        found = vqa.accuracy("red", ["red"] * m + ["blue"] * (10 - m))
        assert found == pytest.approx(expected), m
    assert vqa.accuracy("red", ["red", "crimson"]) == 1, "few references are other ways to say it"
    ten = [asked(answers=("red",) * 2 + ("blue",) * 8, text="A red."), asked("seven", "7")]
    assert values(vqa, ten) == {"accuracy": pytest.approx(0.8), "exact": 1.0, "relaxed": 1.0, "no_choice": 0.0}


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [("10.4", "10", True), ("9.5", "10", True), ("10.6", "10", False), ("105", "100", True), ("-10.2", "-10", True),
     ("10", "-10", False), ("1,020", "1000", True), ("$980", "1000.", True), ("52 %", "0.5", True),
     ("52", "50%", False), ("0", "0", True), ("0.01", "0", False), ("2004", "2012", True), ("10.4 or so", "10", False),
     ("Norway", "norway", True), ("Norwegen", "Norway", False), ("two", "2", True), ("9" * 400, "9" * 400, True),
     ("9" * 400, "9" * 399, False), ("nan", "1", False), ("1,0", "10", True), ("1,5", "1.5", False)],
)  # fmt: skip
def test_relaxed_accuracy_of_charts(answer: str, reference: str, right: bool) -> None:
    """A number within 5 % of the reference, years too, as its authors count; all else where it is exact."""
    assert values(vqa, [asked(reference, answer)])["relaxed"] == right


def test_relaxed_accuracy_of_letters_and_of_several_references() -> None:
    letters = [asked(text=text, choices=("3", "4"), correct=1) for text in ("B", "A")]
    assert values(vqa, letters)["relaxed"] == 0.5
    assert values(vqa, [asked(answers=("7", "20"), text="21")])["relaxed"] == 1


@pytest.mark.parametrize(
    ("answer", "place"),
    [("B", 1), ("(b)", 1), ("B. a cat", 1), ("**C**", 2), ("The answer is B.", 1), ("Answer: (C), surely", 2),
     ("a cat", 1), ("It is a cat, I think", 1), ("A dog", 0), ("I see (A) and then (C)", 2), ("Z", -1), ("", -1),
     ("A difficult question", -1), ("a dog or a cat", -1), ("no idea", -1)],
)  # fmt: skip
def test_letters(answer: str, place: int) -> None:
    assert chosen(answer, ["a dog", "a cat", "a horse"]) == place


def test_qa_matches_references_or_letters() -> None:
    cats = {"choices": ("a dog", "a cat"), "correct": 1}
    answers = [asked("Paris", "paris."), asked(answers=("May", "in May"), text="In May!"), asked("x", "y")]
    answers += [asked(text="B", **cats), asked(text="A", **cats), asked(text="?", **cats)]
    assert values(qa, answers) == {"accuracy": 0.5, "no_choice": pytest.approx(1 / 3)}


def test_long_qa_by_tenth() -> None:
    places = (0.0, 0.05, 0.1, 0.99, 1.0)
    answers = [asked("yes", "yes" if at < 0.5 else "no", position=at, minutes=39.0) for at in places]
    report = make_report("set", long_qa, 0, answers, [])
    assert [(row.group, row.num_samples, row.values["accuracy"]) for row in report.tables["position"]] == [
        ("0-10 %", 2, 1.0), ("10-20 %", 1, 1.0), ("90-100 %", 2, 0.0)
    ]  # fmt: skip
    assert "position" in long_qa.refusal(asked("yes").prompt) and not tenth(asked("yes").prompt)


def test_likelihood_summed_and_per_byte() -> None:
    """Summed the short choice wins, per byte the long one: -2 of 2 bytes, -3 of 8."""
    answer = asked(choices=("no", "so it is"), correct=1, logprobs=(-2.0, -3.0))
    assert values(likelihood, [answer]) == {"accuracy": 0.0, "accuracy_norm": 1.0, "choice_loss": 3.0}


def test_perplexity_is_of_all_tokens_together() -> None:
    answers = [asked(nats=2.0, targets=4, num_bytes=16), asked(nats=6.0, targets=4, num_bytes=4)]
    found = values(text, answers)
    assert found["loss"] == 1.0 and found["perplexity"] == pytest.approx(math.e) and found["loss_per_byte"] == 0.4


def test_rouge_l_by_hand() -> None:
    """Common: "police the gunman", or "police kill the", 3 of 4 words on both sides."""
    words = ("police", "kill", "the", "gunman")
    assert caption.rouge_l(words, [("police", "killed", "the", "gunman")]) == pytest.approx(0.75)
    # best precision 2/2, best recall 2/4: (1 + 1.44) * 0.5 / (0.5 + 1.44)
    assert caption.rouge_l(("a", "b"), [("a", "b", "c", "d")]) == pytest.approx(2.44 * 0.5 / 1.94)
    assert caption.rouge_l((), [("a",)]) == 0 == caption.rouge_l(("b",), [("a",)])


def test_bleu_by_hand() -> None:
    """Papineni's clipping: "the" seven times matches twice. Then a caption of five words against one of six."""
    found = caption.bleu_counts(("the",) * 7, [("the", "cat", "is", "on", "the", "mat")])
    assert (found["matches_1"], found["grams_1"], found["matches_2"]) == (2, 7, 0)
    answers = [asked("a man rides a brown horse", "a man rides a horse"), asked("dogs run", "dogs run")]
    # 1-grams 7/7, 2-grams 3+1 of 5 ("a horse" misses), 3-grams 2/3, 4-grams 1/2; 7 words, references 8
    expected = (1 * 4 / 5 * 2 / 3 * 1 / 2) ** 0.25 * math.exp(1 - 8 / 7)
    assert values(caption, answers)["bleu"] == pytest.approx(expected)
    assert values(caption, [asked("a b", "c d")])["bleu"] == 0


def test_cider_by_hand() -> None:
    """Two samples: n-grams of one alone have idf log 2, words of both 0. A caption that is its reference gets 10 on
    those n that exist, none on others; half of the orders exist for two words."""
    answers = [asked("red dog", "red dog"), asked("blue dog", "green cat")]
    first, second = (each["cider"] for each in caption.count(answers))
    # "red" (idf log 2) and "red dog": cosine 1 for n = 1 and 2, no 3- or 4-grams: 10 * 2 / 4
    assert first == pytest.approx(5.0) and second == 0
    longer = [asked("red dog", "red red dog"), asked("blue dog", "x")]
    # 1-grams: clipped min(2, 1) * 1 over norms 2 * 1; 2-grams: "red red", "red dog" against "red dog"; one word longer.
    # "red red" is in no reference: its frequency counts as one, its idf is log 2
    near = math.exp(-1 / (2 * 36))
    assert caption.count(longer)[0]["cider"] == pytest.approx(10 * near * (1 / 2 + 1 / math.sqrt(2)) / 4)
    assert caption.count([asked("red", "red")])[0]["cider"] == 0, "one sample has no document frequencies"


@given(st.lists(st.lists(st.sampled_from("abc"), max_size=6), min_size=2, max_size=4))
def test_caption_scores_stay_in_their_bounds(texts: list[list[str]]) -> None:
    answers = [asked("a b c d", " ".join(words)) for words in texts]
    found = values(caption, answers)
    assert 0 <= found["bleu"] <= 1 and 0 <= found["rouge_l"] <= 1 and 0 <= found["cider"] <= 10 + 1e-9


@pytest.mark.parametrize(
    ("grading", "message"),
    [
        ([], "not an object"),
        ({"answer": "x"}, "unknown keys: answer"),
        ({"answers": "x"}, "grading.answers must be a list"),
        ({"answers": [" "]}, "is empty"),
        ({"choices": ["a", "b"]}, "grading.correct is -1, must be from 0 to 1"),
        ({"choices": ["a", "b"], "correct": 2}, "must be from 0 to 1"),
        ({"choices": ["a"], "correct": 0}, "give at least two"),
        ({"choices": ["a", "b"], "correct": True}, "must be a whole number"),
        ({"correct": 0}, "without grading.choices"),
        ({"position": 1.5}, "must be from 0 to 1"),
        ({"position": float("nan")}, "must be from 0 to 1"),
        ({"position": "half"}, "must be a number"),
        ({"group": 3}, "must be text"),
        ({"group": "a\nb"}, "printable"),
    ],
)
def test_wrong_grading_is_one_line(grading, message: str) -> None:
    with pytest.raises(BadSample, match=message):
        parse_grading(grading)


def test_grading_goes_through_a_sample() -> None:
    grading = Grading(("a", "b"), ("x", "y"), 1, 0.25, "art")
    record = SampleRecord("k", [{"role": "user", "content": "?"}], {}, grading=grading)
    assert parse_sample("k", record.to_json()).grading == grading
    assert b"grading" not in SampleRecord("k", record.messages).to_json()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (EvalConfig(suite="asrr"), "eval.suite=asrr, did you mean 'asr'?"),
        (EvalConfig(sets={"a": EvalSet(["x"], "vqaa")}), "eval.sets.a.suite=vqaa, did you mean 'vqa'?"),
        (EvalConfig(sets={"a": []}), "eval.sets.a names no shards"),
        (EvalConfig(sets={"../a": ["x"]}), "'../a' names files"),
    ],
)
def test_wrong_sets_are_refused_at_the_start(config: EvalConfig, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check_sets(config)
    assert message in str(caught.value)


def test_a_metric_is_chosen_by_set_and_name() -> None:
    config = EvalConfig(sets={"voices": ["x"], "pictures": EvalSet(["y"], "vqa")})
    assert chosen_metric(config, "voices.wer", "eval.best") == ("voices", "wer", False)
    assert chosen_metric(config, "pictures.accuracy", "eval.best") == ("pictures", "accuracy", True)
    for choice, near in (("voices.wr", "voices.wer"), ("picture.accuracy", "pictures.accuracy")):
        with pytest.raises(RecipeError, match=f"eval.best={choice}, did you mean '{near}'"):
            chosen_metric(config, choice, "eval.best")
    with pytest.raises(RecipeError, match="no eval.sets"):
        chosen_metric(EvalConfig(), "a.wer", "eval.best")
