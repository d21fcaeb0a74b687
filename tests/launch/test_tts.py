"""`launch.evaluate suite=tts` and `suite=regression` as a user types them, on tiny random models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import soundfile
import torch
from PIL import Image

from data.codec import open_codec
from data.codes import encode_shards
from data.corpus import Corpus
from data.kmeans_codec import CodecSettings
from data.shards import write_shards
from launch.arguments import guarded
from launch.evaluate import evaluate
from tests.data.corpus_kit import written
from tests.data.test_kmeans_codec import write
from tests.launch.tts_kit import SPEAKERS, TEXTS, TOKENIZER, said, write_run, write_sets
from train.config import EvalConfig
from train.recogniser import Recogniser


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs in run, other and ear; shards, codec and tokenizer in sets."""
    folder = tmp_path_factory.mktemp("tts")
    sets = write_sets(folder / "sets")
    write_run(folder / "run", sets, True)
    write_run(folder / "other", sets, True, seed=5)
    write_run(folder / "ear", sets, False, seed=1)
    return folder


def launch(made: Path, *arguments: str, suite: str = "tts") -> int:
    given = {"run": f"{made}/run", "suite": suite, "recogniser": f"{made}/ear", "max_seconds": "0.5"}
    given |= dict(word.split("=", 1) for word in arguments)
    return guarded(evaluate, [f"{key}={value}" for key, value in given.items() if value != "-"])


def test_report_sound_and_pictures(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(made, f"out={tmp_path}/out") == 0
    shown = capsys.readouterr().out
    assert "heldout at step 3: word error rate of what a recogniser hears" in shown and "likeness" in shown
    paths = [Path(line.strip()) for line in shown.splitlines() if line.endswith("-speech.wav")]
    assert len(paths) == 5 and all(soundfile.info(path).samplerate == 24_000 for path in paths)
    assert len(list((tmp_path / "out").glob("*-codec.wav"))) == len(list((tmp_path / "out").glob("*.png"))) == 5
    with Image.open(next((tmp_path / "out").glob("*.png"))) as picture:
        assert picture.size == (800, 700)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (found,) = report["sets"]
    assert report["codec"].startswith("kmeans/") and report["levels"] == 4 and found["step"] == 3
    assert len(found["examples"]) == 6 and len(found["code_accuracy"]) == 4 and found["code_frames"] > 30
    assert {example["text"] for example in found["examples"]} == set(TEXTS)
    assert [row["group"] for row in found["rows"]["speech"]] == ["de", "en", "all"]
    assert not list(tmp_path.glob(".*"))

    assert launch(made, f"out={tmp_path}/out") == 0, "an earlier report is replaced"
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert launch(made, "seed=1", f"out={tmp_path}/seed") == 0
    first, second = (soundfile.read(tmp_path / name / paths[0].name)[0] for name in ("out", "seed"))
    assert len(first) != len(second) or (first != second).any()


def test_settings_reach_what_they_are_for(made: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"key": "k1", "text": "four"}\n\n{"key": "k2", "text": "one three"}\n')
    words = ["levels=2", "speaker=anna", "system=speak up", "temperature=0", "instruction=write", f"out={tmp_path}/out"]
    assert launch(made, *words, f"rewrite={tmp_path}/texts.jsonl", f"shards={made}/sets/spoken/*.tar") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (found,) = report["sets"]
    assert report["levels"] == 2 and found["set"] == "shards"
    assert report["requests"][""][0]["content"][1] == {"type": "text", "text": "write"}
    assert [(e["speaker"], e["text"]) for e in found["examples"]] == [("anna", "four"), ("anna", "one three")]
    assert found["rows"]["speech"][-1]["num_words"] == 3 and found["wer_of_rewritten_texts"] is not None
    assert launch(made, f"out={tmp_path}/few", "max_samples=2") == 0
    (found,) = json.loads((tmp_path / "few" / "report.json").read_text())["sets"]
    assert len(found["examples"]) == 2


def test_rewrites_may_be_of_some_sets_only(made: Path, tmp_path: Path) -> None:
    write_shards([said(5)], tmp_path / "more", TOKENIZER)
    (tmp_path / "texts.jsonl").write_text('{"key": "k1", "text": "four"}')
    sets = f"eval.sets={{more: [{tmp_path}/more/*.tar], heldout: [{made}/sets/spoken/*.tar]}}"
    assert launch(made, sets, f"rewrite={tmp_path}/texts.jsonl", f"out={tmp_path}/out") == 0
    (found,) = json.loads((tmp_path / "out" / "report.json").read_text())["sets"]
    assert found["set"] == "heldout" and len(found["examples"]) == 1
    assert launch(made, sets, f"out={tmp_path}/both") == 0
    found = json.loads((tmp_path / "both" / "report.json").read_text())["sets"]
    assert [(each["set"], len(each["examples"])) for each in found] == [("more", 1), ("heldout", 6)]


def test_the_talkers_system_prompt_changes_no_sound(made: Path, tmp_path: Path) -> None:
    """The released layout leaves system prompts out of what the Talker reads."""
    for name, system in (("plain", ""), ("told", "speak slowly")):
        assert launch(made, f"out={tmp_path}/{name}", f"system={system}", "temperature=0") == 0
    sounds = sorted((tmp_path / "plain").glob("*.wav"))
    assert len(sounds) == 15
    assert all(path.read_bytes() == (tmp_path / "told" / path.name).read_bytes() for path in sounds)


def test_samples_that_cannot_be_used_are_counted(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [said(0), said(1, speaker="carla"), said(2, speaker=""), written("text")]
    write_shards(records, tmp_path / "set", TOKENIZER)
    assert launch(made, f"shards={tmp_path}/set/*.tar", f"out={tmp_path}/out") == 0
    (found,) = json.loads((tmp_path / "out" / "report.json").read_text())["sets"]
    assert len(found["examples"]) == 1 and len(found["skipped"]) == 2
    assert "its answer is spoken by 'carla', and the model has anna, berta" in found["skipped"][0]
    assert "spoken by nobody that is named" in found["skipped"][1]
    assert "2 samples could not be used" in capsys.readouterr().out
    assert launch(made, f"shards={tmp_path}/set/*.tar", f"out={tmp_path}/anna", "speaker=anna") == 0
    (found,) = json.loads((tmp_path / "anna" / "report.json").read_text())["sets"]
    assert (len(found["examples"]), found["unscored"], found["skipped"]) == (3, 2, [])


def test_silence_has_its_files_too(made: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("train.synthesis.say", lambda omni, batch, speakers, *_, **__: [torch.zeros(4, 0).long()] * 6)
    assert launch(made, f"out={tmp_path}/out") == 0
    (found,) = json.loads((tmp_path / "out" / "report.json").read_text())["sets"]
    assert found["silent"] == 6 and found["wer"]["speech"] == 1 and found["likeness"]["speech"]["same"] is None
    assert soundfile.info(next((tmp_path / "out").glob("*-speech.wav"))).frames == 0


def test_no_voice_that_can_be_used(made: Path, tmp_path: Path, capsys) -> None:
    write_shards([said(0, speaker="carla")], tmp_path / "set", TOKENIZER)
    line = fails(made, capsys, f"shards={tmp_path}/set/*.tar", f"out={tmp_path}/out")
    assert "no sample can be used (speaker=NAME is one voice for all)" in line and "spoken by 'carla'" in line
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def fails(made: Path, capsys: pytest.CaptureFixture[str], *arguments: str, suite: str = "tts") -> str:
    """The one line of an error."""
    assert launch(made, *arguments, suite=suite) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speaker=carla"], f"speaker 'carla' is unknown: this model has {', '.join(SPEAKERS)}"),
        (["run=MADE/ear"], "ear/recipe.yaml has no model.talker: this run cannot speak"),
        (["run=MADE/nobody"], "nobody/recipe.yaml: no such file; give the folder of a run"),
        (["recogniser=MADE/nobody"], "recogniser=MADE/nobody: MADE/nobody/recipe.yaml: no such file"),
        (["recogniser=-"], "give recogniser=..."),
        (["shards=MADE/sets/asked/*.tar"], "no answer in shards has speech: give other shards=PATTERN"),
        (["shards=nowhere.tar"], "nowhere.tar"),
        (["levels=5"], "levels must be from 1 to 4"),
        (["levels=0"], "levels must be from 1 to"),
        (["levels=two"], "levels must be a whole number, not 'two'"),
        (["max_samples=-1"], "max_samples must be from 1"),
        (["temperature=nan"], "temperature must be from 0 to 100, not nan"),
        (["max_seconds=0"], "max_seconds must be from 0.08 to 600"),
        (["seed=-1"], "seed must be from 0"),
        (["out=MADE"], "exists and holds something else; choose another folder"),
        (["rewrite=nowhere"], "rewrite=nowhere: cannot be read"),
        (["checkpoint=MADE/run/checkpoints/step-00000009"], "step-00000009"),
        (["levles=2"], "unknown argument 'levles', did you mean 'levels'?"),
        (["baseline=MADE/run"], "unknown argument 'baseline'"),
        (["data.codec=''"], "run/recipe.yaml has no data.codec: give data.codec=FOLDER"),
        (["data.codec=MADE"], "MADE holds no codec"),
        (["model.talker.code_predictor.num_code_groups=3"], "num_code_groups=3; they must be equal"),
    ],
)
def test_wrong_arguments_are_one_line(made: Path, capsys, arguments: list[str], message: str) -> None:
    line = fails(made, capsys, *[word.replace("MADE", str(made)) for word in arguments])
    assert line.startswith("error: ") and message.replace("MADE", str(made)) in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no texts"),
        ("{", "line 1 must be"),
        ('{"key": "k1", "text": "one"}\n{"key": "k1", "text": " "}', "line 2 must be"),
        ('{"key": "k1", "text": "\\ud800"}', "line 1 must be"),
        ('["k1"]', "line 1 must be"),
        ('{"key": "k1", "text": "one"}\n{"key": "k1", "text": "two"}', "line 2: the key 'k1' is there already"),
        ('{"key": "k77", "text": "one"}', "no sample with speech has the key 'k77'"),
    ],
)
def test_wrong_rewrites(made: Path, tmp_path: Path, capsys, text: str, message: str) -> None:
    (tmp_path / "texts.jsonl").write_text(text)
    assert message in fails(made, capsys, f"rewrite={tmp_path}/texts.jsonl", f"out={tmp_path}/out")
    assert [path.name for path in tmp_path.iterdir()] == ["texts.jsonl"], "nothing is left behind"


def test_codes_of_another_codec_are_refused(made: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(made / "sets" / "spoken", tmp_path / "set")
    other = open_codec(write(tmp_path / "codec", CodecSettings(4, 32, 24, 24, 4), seed=1))
    encode_shards(Corpus.open([f"{tmp_path}/set/*.tar"]), other)
    line = fails(made, capsys, f"shards={tmp_path}/set/*.tar")
    assert f"its codes are those of codec {other.identity}, needed is kmeans/" in line


def test_a_recogniser_that_is_never_asked(made: Path, tmp_path: Path, capsys) -> None:
    write_shards([written("a")], tmp_path / "text", TOKENIZER)
    write_run(tmp_path / "deaf", made / "sets", False, eval=EvalConfig(sets={"mine": [f"{tmp_path}/text/*.tar"]}))
    line = fails(made, capsys, f"recogniser={tmp_path}/deaf")
    assert "no sample of its eval.sets asks about one clip of sound: give instruction=TEXT" in line


# regression


def test_no_regression_of_a_run_against_itself(made: Path, tmp_path: Path, capsys) -> None:
    assert launch(made, f"baseline={made}/run", f"out={tmp_path}/out", suite="regression") == 0
    shown = capsys.readouterr()
    assert "no regression" in shown.out and "+0.0%" in shown.out and not shown.err
    found = json.loads((tmp_path / "out" / "regression.json").read_text())
    assert found == {"tolerance": 0.05, "rises": {"heldout": 0.0}}
    run, baseline = (json.loads((tmp_path / "out" / n / "report.json").read_text()) for n in ("run", "baseline"))
    assert run == baseline and len(list((tmp_path / "out" / "run").glob("*-speech.wav"))) == 5


def test_the_baseline_says_the_same_samples(made: Path, tmp_path: Path) -> None:
    few = EvalConfig(sets={"theirs": [f"{made}/sets/asked/*.tar"]}, max_samples=2)
    write_run(tmp_path / "before", made / "sets", True, eval=few)
    assert launch(made, f"baseline={tmp_path}/before", f"out={tmp_path}/out", "tolerance=9", suite="regression") == 0
    reports = [json.loads((tmp_path / "out" / name / "report.json").read_text()) for name in ("run", "baseline")]
    keys = [[(each["set"], [e["key"] for e in each["examples"]]) for each in report["sets"]] for report in reports]
    assert keys[0] == keys[1] and len(keys[0][0][1]) == 6


def test_regression_ends_with_status_1(made: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """The baseline is understood in part, the run not at all."""
    calls = []

    def hear(self, waves, languages):
        calls.append(len(waves))
        return ["two" if len(calls) == 1 else ""] * len(waves)  # the baseline's speech comes first

    monkeypatch.setattr(Recogniser, "hear", hear)
    arguments = [f"baseline={made}/other", f"out={tmp_path}/out"]
    with pytest.raises(SystemExit) as end:
        launch(made, *arguments, suite="regression")
    shown = capsys.readouterr()
    assert end.value.code == 1 and calls == [6] * 6
    assert shown.err == (
        "regression: on heldout the word error rate of the speech rose by 16.7%, more than tolerance=0.05\n"
    )
    assert json.loads((tmp_path / "out" / "regression.json").read_text())["rises"]["heldout"] == pytest.approx(2 / 12)
    calls.clear()
    assert launch(made, *arguments, "tolerance=0.2", suite="regression") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give baseline=..."),
        (["baseline=MADE/nobody"], "nobody/recipe.yaml: no such file"),
        (["baseline=MADE/ear"], "ear/recipe.yaml has no model.talker"),
        (["baseline=MADE/run", "tolerance=much"], "tolerance must be a number"),
    ],
)
def test_wrong_arguments_of_regression(made: Path, capsys, arguments: list[str], message: str) -> None:
    assert message in fails(made, capsys, *[word.replace("MADE", str(made)) for word in arguments], suite="regression")


def test_other_suites(made: Path, capsys) -> None:
    line = fails(made, capsys, suite="translation")
    assert "suite=translation" in line
    assert "there is only asr, vqa, caption, qa, long_qa, likelihood, text, tts, regression, lm_eval" in line
    assert guarded(evaluate, [f"run={made}/ear"]) == 0
    assert "heldout at step 3: word error rate, answers that are right" in capsys.readouterr().out
