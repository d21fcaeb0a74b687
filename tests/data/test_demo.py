"""The demo's corpus: held-out voices and sentences kept apart, espeak-ng's return codes heeded."""

import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data.audio import decode
from data.demo import (
    GRAMMARS,
    HELDOUT_VARIANTS,
    TRAIN_VARIANTS,
    Settings,
    Utterance,
    main,
    make_corpus,
    plan_utterances,
)
from data.errors import DataError
from data.espeak import Synthesizer
from data.sample import parse_sample
from data.tokenizer import load_tokenizer

SMALL = Settings(clips=30, heldout=2)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("espeakng_loader", reason="espeak-ng (the optional extra demo) is absent")
    folder = tmp_path_factory.mktemp("demo") / "corpus"
    assert make_corpus(folder, SMALL, quiet=True) == {"train": 30, "voices": 10, "sentences": 10}
    return folder


def members(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                file = tar.extractfile(info)
                assert file is not None
                found[info.name] = file.read()
    return found


def test_plan_keeps_voices_and_sentences_apart() -> None:
    plan = plan_utterances(Settings(clips=2000, heldout=24))
    rows = {split: [u for u in plan if u.split == split] for split in ("train", "voices", "sentences")}
    assert {split: len(found) for split, found in rows.items()} == {"train": 2000, "voices": 120, "sentences": 120}
    assert not set(TRAIN_VARIANTS) & set(HELDOUT_VARIANTS)
    assert {u.variant for u in rows["voices"]} == set(HELDOUT_VARIANTS)
    assert {u.variant for u in rows["train"]} == {u.variant for u in rows["sentences"]} == set(TRAIN_VARIANTS)
    heard = {u.text for u in rows["train"]}
    assert not heard & {u.text for u in rows["sentences"]}
    for language in GRAMMARS:
        own = {word for u in rows["train"] if u.language == language for word in _words(u)}
        tested = {word for u in rows["sentences"] if u.language == language for word in _words(u)}
        assert tested <= own and len(own) <= 14
    assert len({u.key for u in plan}) == len(plan)
    assert {u.language for u in plan[:10]} == set(GRAMMARS)


def _words(utterance: Utterance) -> list[str]:
    return list(utterance.text) if utterance.language == "zh" else utterance.text.split()


def test_plan_is_a_pure_function_of_its_settings() -> None:
    assert plan_utterances(SMALL) == plan_utterances(SMALL)
    assert plan_utterances(SMALL) != plan_utterances(Settings(clips=30, heldout=2, seed=1))


def test_corpus(corpus: Path) -> None:
    tokenizer = load_tokenizer(corpus / "tokenizer")
    planned = {u.key: u for u in plan_utterances(SMALL)}
    for split in ("train", "voices", "sentences"):
        found = members(corpus / split)
        for name in [name for name in found if name.endswith(".json")]:
            key = name.removesuffix(".json")
            record, clips = parse_sample(key, found[name])
            assert record.language == planned[key].language and record.source == f"demo-{split}"
            assert record.messages[1]["content"][0]["text"] == planned[key].text
            assert tokenizer.decode(tokenizer.encode(planned[key].text)) == planned[key].text
            assert clips == ["flac"]
            wave = decode(found[f"{key}.flac"])
            assert 0.2 < len(wave) / 16_000 < 6.0
            assert 0.1 < np.abs(wave).max() <= 1.0
    assert json.loads((corpus / "corpus.json").read_text())["clips"]["train"] == 30


def test_made_once(corpus: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    assert make_corpus(corpus, SMALL, quiet=True)["train"] == 30
    assert {path: path.stat().st_mtime_ns for path in corpus.rglob("*")} == before
    with pytest.raises(DataError, match="exists and holds something else"):
        make_corpus(corpus, Settings(clips=31, heldout=2), quiet=True)


def test_command_line_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["--languages", "en,xx"],
        ["--clips", "0"],
        ["--heldout", "0"],
        ["--heldout", "80"],
        ["--vocab-size", "9"],
    ):
        assert main([str(tmp_path / "demo"), *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "demo").exists()


def test_without_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(DataError, match=r'pip install "omniloom\[demo\]"'):
        Synthesizer()


def test_espeak_speaks_and_refuses_what_it_lacks() -> None:
    pytest.importorskip("espeakng_loader", reason="espeak-ng (the optional extra demo) is absent")
    with Synthesizer() as espeak:
        assert espeak.sample_rate == 22_050
        slow, fast = (espeak.speak("three red dogs", "en-us+f2", rate=rate) for rate in (120, 240))
        assert slow.dtype == np.int16 and len(slow) > 1.5 * len(fast)
        german = espeak.speak("drei", "de")
        for voice in ("fr-fr", "xx", "en-us+nobody", "en-us+../../en_dict"):
            with pytest.raises(DataError, match="espeak-ng has no voice"):
                espeak.speak("trois", voice)
        assert abs(len(espeak.speak("drei", "de")) - len(german)) < 2_000
        with pytest.raises(DataError, match="no sound"):
            espeak.speak("", "en-us")
    with Synthesizer() as again:
        assert len(again.speak("red", "en-us")) > 1_000


def test_languages_sound_different() -> None:
    pytest.importorskip("espeakng_loader", reason="espeak-ng (the optional extra demo) is absent")
    with Synthesizer() as espeak:
        lengths = {g.voice: len(espeak.speak(g.sentences()[0], g.voice)) for g in GRAMMARS.values()}
    assert len(lengths) == 5 and all(0.5 < length / 22_050 < 4.0 for length in lengths.values())
