"""The demo's tour: its table says what the evaluations say, and every part of it runs one after another."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from data.errors import DataError
from launch import tour
from launch.tour_report import report
from tests.run_kit import ROOT


def example(source: str, language: str, reference: str, answer: str) -> dict[str, str]:
    return {"key": "k", "source": source, "language": language, "reference": reference, "answer": answer}


def make_runs(folder: Path, answer: str, said: str) -> tuple[Path, Path]:
    thinker, talker = folder / "demo", folder / "demo_talker"
    (thinker / "eval").mkdir(parents=True)
    sounds = talker / "eval" / "tts-step00000009"
    sounds.mkdir(parents=True)
    for name in ("voices", "sentences", "scenes"):
        examples = [example("transcription", code, "two dogs", "two dogs") for code in ("en", "de")]
        examples += [example("picture_text", "en", "red", "Red."), example("sound_text", "en", "a bell", answer)]
        for step, shown in ((1, []), (2, examples)):
            (thinker / "eval" / f"{name}-step{step:08d}.json").write_text(json.dumps({"examples": shown}))
    heard = {"speech": said, "codec": "red", "recording": "red"}
    spoken = [
        {"key": f"scenes/s.tar:scenes-{source}-en-000001", "language": "en", "text": "red", "heard": heard}
        for source in ("picture_aloud", "words_aloud", "animals_aloud")
    ]
    (sounds / "report.json").write_text(json.dumps({"sets": [{"set": "scenes", "examples": spoken}]}))
    for language in ("de", "en", "en"):
        for number in range(3):
            (sounds / f"scenes-scenes-picture_aloud-{language}-00000{number}-7-speech.wav").touch()
    return thinker, talker


def test_the_table_says_what_was_measured(tmp_path: Path) -> None:
    text = report(*make_runs(tmp_path / "good", "a bell", "Red."))
    assert ": missed" not in text and text.count(": met") == 4
    assert "picture + text" in text and "sound + text" in text and "film" not in text.replace("films", "")
    files = [line for line in text.splitlines() if line.endswith("-speech.wav")]
    assert len(files) == 5 and {Path(line).name.split("-")[3] for line in files[:2]} == {"de", "en"}


def test_a_bar_that_is_missed_is_said(tmp_path: Path) -> None:
    text = report(*make_runs(tmp_path / "bad", "a knock", "blue"))
    assert text.count(": missed") == 2
    assert "worst 0.0%; the bar is above 90%: missed" in text
    assert "  worst 100.0%; the bar is below 20%: missed" in text


def test_without_an_evaluation_it_says_which(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"voices-step\*\.json"):
        report(tmp_path, tmp_path)


def made(monkeypatch: pytest.MonkeyPatch, status: int) -> list[str]:
    """A tour whose corpus is there, whose codec ends with a status, and whose training was stopped; what it ran."""
    ran: list[str] = []
    monkeypatch.setattr(tour.corpus, "main", lambda argv: 0)
    monkeypatch.setattr(tour, "codec_beside", lambda: nullcontext(SimpleNamespace(wait=lambda: status)))
    monkeypatch.setattr(tour, "train", lambda argv, stopped: ran.append(argv[0]) or stopped * (status == 0))
    return ran


def test_it_ends_where_training_was_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = made(monkeypatch, 0)
    assert tour.main([]) == 130 and ran == ["recipe=curriculum_demo"], "no Talker is taught by half a Thinker"


def test_a_codec_that_failed_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ran = made(monkeypatch, 2)
    assert tour.main([]) == 2 and ran == ["recipe=curriculum_demo"]
    assert (
        capsys.readouterr().err == "error: the speech codec could not be made: outputs/demo_data/codec.log says why\n"
    )


def test_a_misspelt_setting_is_told_first(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tour.corpus, "main", lambda argv: pytest.fail("a corpus was made"))
    assert tour.main(["optim.lrr=1"]) == 2
    assert (
        capsys.readouterr().err == "error: stage audio_encoder: unknown setting 'optim.lrr', did you mean 'optim.lr'?\n"
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_whole_tour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every part with its real settings but for their sizes; a second call finds everything done."""
    pytest.importorskip("espeakng_loader", reason="espeak-ng (the optional extra demo) is absent")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    corpus = [
        str(tour.DATA),
        "--samples",
        "400",
        "--heldout",
        "8",
        "--languages",
        tour.LANGUAGES,
        "--vocab-size",
        "640",
    ]
    monkeypatch.setattr(tour, "CORPUS", [*corpus, "--tasks", tour.CORPUS[-3]])
    monkeypatch.setattr(
        tour, "CODEC", ["codebooks=6", "codebook_size=256", "vocoder_steps=3", "max_seconds=150", "answers=1"]
    )

    def few(stage: str, **phases: int) -> list[str]:
        return [f"{stage}.phases.{name}.steps={steps}" for name, steps in phases.items()]

    settings = [*few("audio_encoder", all=2), *few("foundation", sight=2), *few("stage2", all=2), *few("stage3", all=2)]
    settings += few("stage1", audio_adapter=1, audio_encoder=1, vision_adapter=1, vision_encoder=1)
    settings += [*few("talker", context=2, continued=1), *few("sft", both=1)]
    assert tour.main(settings) == 0
    said = capsys.readouterr().out
    assert "understanding: word error rate" in said and said.count("-speech.wav") >= 5 and "took" in said
    assert "report.html" in said and (tour.RUN / "report.html").is_file()
    assert tour.main(settings) == 0
