"""`launch.evaluate` as a user types it, on a released-layout folder and on a run: every suite of answers in text."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image

from data.grading import Grading
from data.sample import SampleRecord
from data.shards import write_shards
from launch import lm_eval_suite
from launch.arguments import guarded
from launch.evaluate import evaluate
from tests.data.corpus_kit import spoken, written
from tests.launch.tiny_omni import tiny_tokenizer, write_omni
from tests.launch.tts_kit import write_run, write_sets
from train.config import EvalConfig, EvalSet
from train.recipe import load_saved

WORDS = tiny_tokenizer()


def picture() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(out, "png")
    return out.getvalue()


def records() -> list[SampleRecord]:
    found = []
    for number in range(6):
        grading = Grading(("one two", "two"), ("one", "three four"), number % 2, number / 6)
        make = spoken(f"a{number}", 0.3 + number / 5, "one two") if number % 2 else written(f"a{number}", "one two")
        found.append(SampleRecord(make.key, make.messages, make.media, "en", "asked", grading=grading))
    seen = [{"type": "image", "image": "png"}, {"type": "text", "text": "what is said here?"}]
    messages = [{"role": "user", "content": seen}, {"role": "assistant", "content": "hello world"}]
    found.append(SampleRecord("seen", messages, {"png": picture()}, grading=Grading(position=1.0)))
    return [*found, SampleRecord("d", segments=[{"type": "text", "text": "one two three"}])]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_omni(folder / "model")
    write_shards(records(), folder / "shards", WORDS)
    return folder


def run(*words: str) -> int:
    return guarded(evaluate, words)


@pytest.mark.parametrize("suite", ["asr", "vqa", "caption", "qa", "long_qa", "likelihood", "text"])
def test_every_suite_on_a_folder(made: Path, suite: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"model={made}/model", f"shards={made}/shards/*.tar", f"suite={suite}", "eval.max_new_tokens=4"
    assert run(*words, f"out={made}/{suite}") == 0, capsys.readouterr().err
    path = made / suite / "shards-step00000000.json"
    body, said = json.loads(path.read_text()), capsys.readouterr().out
    assert body["suite"] == suite and set(body["metrics"]) >= set(body["higher_is_better"])
    assert body["rows"][-1]["num_samples"] == {"text": 1, "likelihood": 6}.get(suite, 7)
    assert f"written to {path}" in said and "all" in said and path.with_suffix(".html").is_file()
    assert ("could not be used" in said) == (suite == "likelihood")
    first = path.read_bytes()
    assert run(*words, f"out={made}/{suite}") == 0 and path.read_bytes() == first, "the same command, the same numbers"
    assert {each.suffix for each in path.parent.iterdir()} == {".json", ".html"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    sets = write_sets(folder / "sets")
    asked: dict[str, list[str] | EvalSet] = {"heard": [f"{sets}/asked/*.tar"]}
    asked["graded"] = EvalSet([f"{sets}/asked/*.tar"], "qa")
    return write_run(folder / "run", sets, False, eval=EvalConfig(sets=asked, max_new_tokens=5))


def test_sets_of_a_run_have_suites_of_their_own(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert load_saved(trained / "recipe.yaml", []).eval.sets["graded"] == EvalSet(
        [f"{trained.parent}/sets/asked/*.tar"], "qa"
    )
    assert run(f"run={trained}") == 0, capsys.readouterr().err
    suites = {path.name: json.loads(path.read_text())["suite"] for path in (trained / "eval").glob("*.json")}
    assert suites == {"heard-step00000003.json": "asr", "graded-step00000003.json": "qa"}
    assert run(f"run={trained}", "suite=vqa") == 0
    assert {json.loads(path.read_text())["suite"] for path in (trained / "eval").glob("*.json")} == {"vqa"}
    assert run("compare", str(trained), str(trained), "resamples=100") == 0
    override = f"eval.sets={{other: {{shards: [{trained.parent}/sets/asked/*.tar], suite: caption}}}}"
    assert run(f"run={trained}", override) == 0 and (trained / "eval" / "other-step00000003.json").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run=RUN", "suite=vqq"], "suite=vqq, did you mean 'vqa'?; there is only asr, vqa, caption"),
        (["run=RUN", "suite=likelihood"], "none of its samples can be asked by suite=likelihood; the first: "),
        (["run=RUN", "suite=text"], "its shards have no documents"),
        (["run=RUN", "eval.suite=vqq"], "eval.suite=vqq, did you mean 'vqa'?"),
        (["run=RUN", "eval.sets={a: {shards: [x.tar], suit: qa}}"], "unknown setting eval.sets.a.suit"),
        (["run=RUN", "eval.sets={a: 3}"], "eval.sets.a: expected a list"),
        (["model=MODEL"], "give shards=PATTERN"),
        (["model=MODEL", "shards=SHARDS", "data.seed=1"], "data.seed is for run=FOLDER"),
        (["model=MODEL", "shards=SHARDS", "eval.max_sample=1"], "unknown setting eval.max_sample"),
        (["model=MODEL", "shards=SHARDS", "eval.batch_tokens=0"], "eval.batch_tokens=0: it must be at least 1"),
        (["model=MODEL", "shards=nowhere.tar"], "nowhere.tar: no such shard"),
        (["model=nowhere", "shards=SHARDS"], "nowhere"),
        (["model=MODEL", "suite=lm_eval"], "give tasks=..."),
        (["suite=lm_eval", "tasks=x"], "give run=RUN, or model=FOLDER"),
        ([], "give run=..."),
    ],
)
def test_wrong_words_are_one_line(
    words: list[str], message: str, trained: Path, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"RUN": str(trained), "MODEL": f"{made}/model", "SHARDS": f"{made}/shards/*.tar"}
    given = [f"{key}={places.get(value, value)}" for key, _, value in (word.partition("=") for word in words)]
    assert run(*given) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.strip().splitlines()) == 1, said


def test_ctrl_c_leaves_nothing_half_written(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("data.files.os.fsync", interrupted)
    assert run(f"model={made}/model", f"shards={made}/shards/*.tar", "suite=text", f"out={made}/stopped") == 130
    assert not list((made / "stopped").iterdir())


def test_without_lm_eval_it_says_how_to_install_it(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if lm_eval_suite.find_spec("lm_eval"):
        pytest.skip("lm_eval is installed")
    assert run(f"model={made}/model", "suite=lm_eval", "tasks=arc_easy") == 2
    assert capsys.readouterr().err == f"error: {lm_eval_suite.INSTALL}\n"


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """As much of the package lm_eval as the suite calls; what its model answered."""
    found: list[object] = []

    class LM:
        pass

    def simple_evaluate(model, tasks, num_fewshot, limit, task_manager, log_samples):
        assert isinstance(model, LM) and limit == 2 and num_fewshot is None
        if tasks != ["known"]:
            raise KeyError(tasks[0])
        ask = [SimpleNamespace(args=pair) for pair in (("one two", " three"), ("", "one"), ("one two", " four"))]
        found.append(model.loglikelihood(ask))
        found.append(model.loglikelihood_rolling([SimpleNamespace(args=("one",))]))
        how = {"max_gen_toks": 3, "until": ["zzz"]}
        found.append(model.generate_until([SimpleNamespace(args=("one two", how))]))
        return {"results": {"known": {"acc": 0.5}}}

    top = {"simple_evaluate": simple_evaluate}
    parts = {"": top, ".tasks": {"TaskManager": lambda include_path: None}, ".api": {}, ".api.model": {"LM": LM}}
    for name, values in (parts | {".utils": {"make_table": str}}).items():
        module = ModuleType(f"lm_eval{name}")
        module.__dict__.update(values)
        monkeypatch.setitem(sys.modules, f"lm_eval{name}", module)
    monkeypatch.setattr(lm_eval_suite, "find_spec", lambda name: name)
    yield found


def test_tasks_of_the_harness_are_asked_of_our_model(
    made: Path, harness: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"model={made}/model", "suite=lm_eval", "limit=2"
    assert run(*words, "tasks=known") == 0, capsys.readouterr().err
    scores, rolling, answers = harness
    assert isinstance(scores, list) and len(scores) == 3 and all(logprob < 0 for logprob, _ in scores)
    assert scores[0] != scores[2] and rolling == [pytest.approx(scores[1][0])]
    assert isinstance(answers, list) and isinstance(answers[0], str)
    saved = json.loads((made / "model" / "eval" / "lm_eval-step00000000-results.json").read_text())
    assert saved["results"] == {"known": {"acc": 0.5}} and "acc" in capsys.readouterr().out
    assert run(*words, "tasks=unknown") == 2
    assert "tasks=unknown: lm_eval says: 'unknown'" in capsys.readouterr().err
