"""`launch.evaluate compare`: paired bootstrap, what it refuses, and what it writes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from data.grading import Grading
from data.prompts import Prompt
from launch.arguments import guarded
from launch.bootstrap import paired
from launch.evaluate import evaluate
from launch.evaluation_page import page, worst_first
from train.evaluation_report import Report, make_report
from train.suites import Answered, asr, qa

HOSTILE = "</td><script>alert(1)</script> & \"'"


def report(rights: Sequence[bool], name: str = "heldout", skip: str = "") -> Report:
    answers = [
        Answered(Prompt(f"s.tar:k{n}", "en", "red dog", "src"), "red dog" if right else "blue dog")
        for n, right in enumerate(rights)
    ]
    return make_report(name, asr, 7, answers, [skip] * bool(skip))


def write(folder: Path, rights: Sequence[bool], name: str = "heldout") -> Path:
    return report(rights, name).write(folder / "eval", 7)


def compare(*words: object) -> int:
    return guarded(evaluate, ["compare", *map(str, words)])


def test_paired_agrees_with_a_plain_loop() -> None:
    """Means of differences, resampled one at a time by numpy; and the normal approximation of the interval."""
    rng = np.random.default_rng(3)
    a, b = rng.random(200) < 0.5, rng.random(200) < 0.6
    counts = [[{"num_right": float(x), "num_choices": 0.0, "num_unclear": 0.0} for x in side] for side in (a, b)]
    found = {each.metric: each for each in paired(qa, *counts)}["accuracy"]
    less = b.astype(float) - a
    assert found.difference == pytest.approx(less.mean())
    draws = [less[rng.integers(0, 200, 200)].mean() for _ in range(4000)]
    assert found.low == pytest.approx(np.percentile(draws, 2.5), abs=0.01)
    assert found.high == pytest.approx(np.percentile(draws, 97.5), abs=0.01)
    assert found.high - found.low == pytest.approx(2 * 1.96 * less.std() / math.sqrt(200), rel=0.1)
    assert found == {each.metric: each for each in paired(qa, *counts)}["accuracy"], "the same seed, the same numbers"
    other = {each.metric: each for each in paired(qa, *counts, seed=1)}["accuracy"]
    assert other.low != found.low or other.high != found.high or other.p != found.p


def test_a_difference_is_found_and_none_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = tmp_path / "before", tmp_path / "after"
    write(a, [n % 2 == 0 for n in range(60)])
    write(b, [n % 2 == 0 or n % 3 == 0 for n in range(60)])
    assert compare(a, b) == 0
    said = capsys.readouterr().out
    assert "heldout (asr), 60 samples" in said and "B: better" in said
    body = json.loads((b / "eval" / "compare" / "before-to-after.json").read_text())
    (found,) = body["sets"]
    wer = found["metrics"][0]
    assert wer["metric"] == "wer" and wer["difference"] == pytest.approx(-1 / 12) and wer["p"] < 0.01
    assert wer["low"] < wer["difference"] < wer["high"] < 0 and wer["verdict"] == "better"
    html = (b / "eval" / "compare" / "before-to-after.html").read_text()
    assert "better" in html and "<script" not in html
    first = (b / "eval" / "compare" / "before-to-after.json").read_bytes()
    assert compare(a, b) == 0 and (b / "eval" / "compare" / "before-to-after.json").read_bytes() == first
    assert compare(a, a, f"out={tmp_path}/same") == 0
    (same,) = json.loads((tmp_path / "same" / "before-to-before.json").read_text())["sets"]
    assert all(each["p"] == 1 and each["verdict"] == "no difference shown" for each in same["metrics"])


def test_files_are_compared_too_and_lonely_sets_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = write(tmp_path / "a", [True] * 5), write(tmp_path / "b", [True, False] * 2 + [True])
    write(tmp_path / "b", [True], "more")
    assert compare(one, other, "resamples=200") == 0 and "B: worse" not in capsys.readouterr().out.replace("wer", "")
    assert compare(tmp_path / "a", tmp_path / "b", "resamples=200") == 0
    assert "more is in B alone" in capsys.readouterr().out


def test_what_cannot_be_compared_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a", [True] * 5)
    b = write(tmp_path / "b", [True] * 6)
    other = write(tmp_path / "c", [True] * 5, "other")
    old = tmp_path / "old.json"
    old.write_text(json.dumps({"set": "heldout", "examples": [{"key": "k"}]}))
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    twice = json.loads(a.read_text())
    twice["examples"][0]["key"] = twice["examples"][1]["key"]
    (tmp_path / "twice.json").write_text(json.dumps(twice))
    suite = json.loads(a.read_text()) | {"suite": "qa"}
    (tmp_path / "suite.json").write_text(json.dumps(suite))
    poor = json.loads(a.read_text())
    for example in poor["examples"]:
        del example["counts"]["num_words"]
    (tmp_path / "poor.json").write_text(json.dumps(poor))
    cases = [
        ((a, b), "heldout: the samples differ: 1 are in one result alone, the first 's.tar:k5' in"),
        ((a, other), "no set is in both: A has heldout, B has other"),
        ((a, tmp_path / "nowhere"), "nowhere: no results"),
        ((a, old), "is no result of an evaluation of this version"),
        ((a, broken), "broken.json: cannot be read"),
        ((a, tmp_path / "twice.json"), "two of its samples have the same key"),
        ((a, tmp_path / "suite.json"), "of suite=qa"),
        ((tmp_path / "poor.json", tmp_path / "poor.json"), "it lacks the count 'num_words'"),
        ((a,), "give two runs or two results"),
        ((a, a, "sed=1"), "unknown argument 'sed', did you mean 'seed'?"),
        ((a, a, "resamples=3"), "resamples must be from 100"),
    ]
    for words, message in cases:
        assert compare(*words) == 2
        said = capsys.readouterr().err
        assert message in said and len(said.strip().splitlines()) == 1, (words, said)
    assert not (tmp_path / "a" / "eval" / "compare").exists()


def test_the_page_escapes_and_shows_the_worst_first() -> None:
    prompts = [Prompt(f"s:{HOSTILE}{n}", "en", HOSTILE, grading=Grading((HOSTILE,), group=HOSTILE)) for n in range(3)]
    answers = [Answered(prompt, text) for prompt, text in zip(prompts, (HOSTILE, f"no {HOSTILE}", "x y"), strict=True)]
    found = make_report("set", asr, 0, answers, [HOSTILE])
    html = page(found, HOSTILE).decode()
    assert "<script" not in html and "&lt;script&gt;" in html and "default-src &" not in html
    assert "default-src 'none'" in html and "http" not in html.replace("http-equiv", "")
    order = [each["key"][-1] for each in worst_first(found)]
    assert order == ["2", "1", "0"]
