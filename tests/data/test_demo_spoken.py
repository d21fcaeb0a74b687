"""The demo's spoken answers: few voices in all sets, unheard sentences, the rest of the corpus as it was."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

import data.demo as demo
from data.audio import decode
from data.codes import encode_shards
from data.corpus import Corpus
from data.demo import CHUNK, make_corpus, parse_settings
from data.demo_plan import Planned, Settings, plan
from data.demo_scenes import Picture
from data.demo_small import KNOWN_TASKS, SMALL
from data.demo_spoken import SPOKEN
from data.demo_studio import HELDOUT_VARIANTS, SPEAKERS, TRAIN_VARIANTS, Answer, Sounds, Speech, here
from data.demo_tasks import TASKS
from data.demo_words import LANGUAGES
from data.espeak import Synthesizer
from data.sample import SampleRecord, media_of, speech_of, text_of
from tests.data.convert_kit import samples, tree
from tests.data.test_codes import ToyCodec
from tests.data.test_demo import SMALL as TINY

BOTH = tuple(SPOKEN)
FEW = Settings(samples=CHUNK + 8, heldout=4, languages=("en", "zh"), vocab_size=600, tasks=BOTH)


@pytest.fixture(scope="module")
def planned() -> dict[str, list[Planned]]:
    return plan(Settings(1500, 20, tasks=BOTH))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("espeakng_loader", reason="espeak-ng (the optional extra demo) is absent")
    folder = tmp_path_factory.mktemp("demo") / "corpus"
    assert make_corpus(folder, FEW, quiet=True) == {"train": 72, "voices": 8, "sentences": 8, "scenes": 8}
    return folder


def answer_of(sample: Planned) -> Speech:
    content = sample.media["speech.flac"].content
    assert isinstance(content, Answer)
    return content.speech


def text_answered(record: SampleRecord) -> str:
    return text_of(record.messages[-1]["content"])


def test_other_tasks_are_as_they_were() -> None:
    """Pinned: the plan holds every text, voice, scene and seed that media are made of."""
    text = repr(plan(TINY)).replace(", grading=None", "")  # a field that samples have since, and these leave empty
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert digest == "06b920a634ef53ef1e1e17f716aaaf5ba148d2b56b1454e2852e7ae8e0a36426"
    assert Settings().tasks == tuple(TASKS) and not set(TASKS) & set(SPOKEN)
    assert tuple(KNOWN_TASKS) == (*TASKS, *SPOKEN, *SMALL)


def test_answers_are_what_is_said(planned: dict[str, list[Planned]]) -> None:
    for sample in (sample for rows in planned.values() for sample in rows):
        record, said = sample.record, answer_of(sample)
        speech = speech_of(record)
        assert speech is not None and speech.extension == "speech.flac"
        language, _, name = speech.speaker.partition("_")
        variant, pitch = SPEAKERS[name]
        assert language == record.language and said.text == text_answered(record)
        assert (said.speaker, said.pitch) == (f"{LANGUAGES[language].voice}+{variant}", pitch)
        if record.source == "reading":
            assert list(sample.media) == ["speech.flac"] and record.speaker == speech.speaker
            given, asked = (text_of(message["content"]) for message in record.messages[:2])
            assert [message["role"] for message in record.messages] == ["system", "user", "assistant"]
            assert given == said.text and said.text not in asked, "a Talker would read the question"
        else:
            asked = [medium.content for medium in sample.media.values()]
            assert [type(content) for content in asked][1:] == [Speech, Answer]
            assert isinstance(asked[0], Picture | Sounds) and isinstance(asked[1], Speech)
            assert record.speaker == asked[1].speaker and len(media_of(record)) == 2


def test_the_same_few_voices_answer_in_every_set(planned: dict[str, list[Planned]]) -> None:
    known = {f"{code}_{name}" for code in LANGUAGES for name in SPEAKERS}
    speakers = {split: Counter(_speaker(sample) for sample in rows) for split, rows in planned.items()}
    assert list(speakers) == ["train", "voices", "sentences", "scenes"]
    assert set(speakers["train"]) == known and min(speakers["train"].values()) > 10
    assert all(set(found) <= known for found in speakers.values())
    variants = {variant for variant, _ in SPEAKERS.values()}
    assert len(variants) == len(SPEAKERS) and variants <= set(TRAIN_VARIANTS)
    asking = {sample.record.speaker.partition("+")[2] for sample in planned["voices"]}
    assert asking == set(HELDOUT_VARIANTS)


def _speaker(sample: Planned) -> str:
    speech = speech_of(sample.record)
    assert speech is not None
    return speech.speaker


def sentences_of(sample: Planned) -> set[tuple[str, str]]:
    """What an answer says: of an image that is told, a sentence for each thing."""
    language, text = sample.record.language, answer_of(sample).text
    pictures = [medium.content for medium in sample.media.values() if isinstance(medium.content, Picture)]
    told = [here(place, thing).said(LANGUAGES[language]) for picture in pictures for place, thing in picture.things]
    return {(language, sentence) for sentence in (told if LANGUAGES[language].gap.join(told) == text else [text])}


def test_unheard_sentences_are_never_said_in_training(planned: dict[str, list[Planned]]) -> None:
    said = {split: {sentence for s in rows for sentence in sentences_of(s)} for split, rows in planned.items()}
    assert len(said["sentences"]) > 200 and not said["sentences"] & (said["train"] | said["voices"] | said["scenes"])
    asked = {
        medium.content.text
        for s in planned["train"]
        for medium in s.media.values()
        if isinstance(medium.content, Speech)
    }
    assert not asked & {text for _, text in said["sentences"]}
    seen = {
        split: {m.content.name for s in rows for m in s.media.values() if isinstance(m.content, Picture)}
        for split, rows in planned.items()
    }
    assert seen["scenes"] and not seen["scenes"] & (seen["train"] | seen["voices"] | seen["sentences"])


def test_shares_and_held_out_sets(planned: dict[str, list[Planned]]) -> None:
    tasks = {split: Counter(sample.record.source for sample in rows) for split, rows in planned.items()}
    assert tasks["train"] == {"reading": 900, "spoken_answer": 600}
    assert tasks["voices"] == tasks["scenes"] == {"spoken_answer": 280}
    assert tasks["sentences"] == {"reading": 140, "spoken_answer": 140}
    kinds = Counter(len(text_answered(s.record)) > 24 for s in planned["train"] if s.record.source == "spoken_answer")
    assert kinds[True] > 100 and kinds[False] > 100


def test_written_shards_have_their_speech(corpus: Path) -> None:
    for split in ("train", "voices", "sentences", "scenes"):
        for record in samples(corpus / split).values():
            wave, rate = soundfile.read(io.BytesIO(record.media["speech.flac"]))
            assert rate == 22_050 and 0.05 < abs(wave).max() <= 1 and 0.15 < len(wave) / rate < 15
            assert all(abs(decode(record.media[medium.extension])).max() > 0.05 for medium in heard(record))
    found = encode_shards(Corpus.open([str(corpus / "*/*.tar")]), ToyCodec())
    assert found.utterances == 96 and not found.left_out and not found.silent
    assert set(found.speakers) == {f"{code}_{name}" for code in FEW.languages for name in SPEAKERS}


def heard(record: SampleRecord) -> list:
    return [medium for medium in media_of(record) if medium.kind == "audio"]


def test_workers_and_a_second_time_give_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    make_corpus(tmp_path / "again", FEW, workers=2, quiet=True)
    made = {name: payload for name, payload in tree(corpus).items() if not name.endswith(".codes")}
    assert tree(tmp_path / "again") == made


def test_speakers_of_a_language_differ() -> None:
    pytest.importorskip("espeakng_loader", reason="espeak-ng (the optional extra demo) is absent")
    pitches = []
    with Synthesizer() as espeak:
        for variant, pitch in SPEAKERS.values():
            wave = espeak.speak("a big red circle moves to the left", f"en-us+{variant}", 170, pitch)
            pitches.append(_fundamental(wave / (1 << 15), espeak.sample_rate))
    ordered = sorted(pitches)
    assert all(high / low > 1.08 for low, high in zip(ordered, ordered[1:], strict=False)), pitches
    assert min(pitches[:2]) > 1.3 * max(pitches[2:])  # f and m


def _fundamental(wave: np.ndarray, rate: int) -> float:
    """Median over frames of the lag, from 60 to 400 Hz, of most autocorrelation, as Hz."""
    found = []
    for start in range(0, len(wave) - 1024, 512):
        frame = wave[start : start + 1024] - wave[start : start + 1024].mean()
        alike = np.correlate(frame, frame, "full")[1023:]
        lag = rate // 400 + int(alike[rate // 400 : rate // 60].argmax())
        if abs(frame).max() > 0.05 and alike[lag] > 0.5 * alike[0]:
            found.append(rate / lag)
    return float(np.median(found))


@pytest.mark.parametrize("code", LANGUAGES)
def test_every_answer_can_be_said(code: str) -> None:
    """One-word answers too are spoken and not spelled."""
    pytest.importorskip("espeakng_loader", reason="espeak-ng (the optional extra demo) is absent")
    words = LANGUAGES[code]
    assert len(words.read) > 2 and "{" not in words.read
    rows = plan(Settings(150, 1, (code,), tasks=("spoken_answer",)))["train"]
    with Synthesizer() as espeak:
        for text in {text_answered(sample.record) for sample in rows}:
            phonemes = espeak.phonemes(text, words.voice)
            assert phonemes and "(" not in phonemes, text


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Settings] = []

    def noted(options: object) -> None:
        asked.append(parse_settings(options))  # type: ignore[arg-type]

    monkeypatch.setattr(demo, "_make_and_tell", noted)
    for arguments in ([], ["--speech"], ["--tasks", "reading"], ["--tasks", "reading,match", "--speech"]):
        assert demo.main([str(tmp_path / "demo"), *arguments]) == 0
    assert [settings.tasks for settings in asked] == [
        tuple(TASKS),
        (*TASKS, "reading", "spoken_answer"),
        ("reading",),
        ("reading", "match", "spoken_answer"),
    ]
    assert all(settings.samples == 20_000 and settings.languages == tuple(LANGUAGES) for settings in asked)
    assert asked[0] == Settings()


def test_reading_alone_is_a_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("espeakng_loader", reason="espeak-ng (the optional extra demo) is absent")
    options = ["--tasks", "reading", "--samples", "20", "--heldout", "2", "--languages", "en,de"]
    assert demo.main([str(tmp_path / "demo"), *options, "--vocab-size", "400"]) == 0
    assert "20 samples in train, 4 samples in sentences\n2 languages, 1 tasks" in capsys.readouterr().out
    for record in samples(tmp_path / "demo/train").values():
        assert not media_of(record) and set(record.media) == {"speech.flac"}
