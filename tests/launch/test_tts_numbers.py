"""What `suite=tts` counts: exact figures for a Talker that repeats the recording's codes, and likeness of voices."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soxr
import torch

from data.codec import open_codec
from data.codes import encode_shards
from data.corpus import Corpus
from data.document import MediaLimits
from data.errors import DataError
from data.tokenizer import IM_END, IM_START
from models.say import SaySettings
from tests.launch.tts_kit import CODES, GROUPS, SPEAKERS, TEXTS, TOKENIZER, tiny_omni, write_sets
from train.feed import model_layout
from train.recogniser import ANY, plain_request, usual_requests
from train.speaker_similarity import Voices, embed
from train.speech_eval import Asked, SpeechEvaluator
from train.speech_set import SpeechSet, talker_ids
from train.synthesis import Guesses, OmniSpeaking

START, END = TOKENIZER.id(IM_START), TOKENIZER.id(IM_END)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sets(tmp_path_factory.mktemp("sets"))


def speech_set(sets: Path) -> SpeechSet:
    config = tiny_omni().config
    corpus = Corpus.open([f"{sets}/spoken/*.tar"], TOKENIZER.fingerprint)
    return SpeechSet(corpus, open_codec(sets / "codec"), TOKENIZER, model_layout(config, TOKENIZER), MediaLimits())


class Parrot:
    """Says and guesses the recording's codes."""

    speakers, max_frames = SPEAKERS, 100

    def __init__(self, speech: SpeechSet) -> None:
        read = [speech.read(sample) for sample in speech.samples]
        self.codes = {each.key: each.codes_GF for each in read}
        self.said: dict[str, list[int]] = {}
        self.asked: list[str] = []

    def score(self, prompts, ids, speakers, codes):
        codes_GF = torch.cat([self.codes[key] for key in prompts.keys], dim=1)
        assert torch.equal(codes_GF, torch.cat(list(codes), dim=1))
        return Guesses.of(list(torch.nn.functional.one_hot(codes_GF, CODES) * 50.0), codes_GF)

    def say(self, prompts, ids, speakers):
        self.asked += speakers
        self.said |= {key: ids_T.tolist() for key, ids_T in zip(prompts.keys, ids, strict=True)}
        return [self.codes[key] for key in prompts.keys]


class Ear:
    """Writes a word for each half of a sound by how loud it is: the same of the same sound."""

    def hear(self, waves, languages):
        return [
            " ".join("two" if abs(piece).mean() > 0.03 else "one" for piece in np.array_split(w, 2) if len(w))
            for w in waves
        ]


def evaluator(sets: Path, speaking=None, **asked) -> SpeechEvaluator:
    speech = speech_set(sets)
    speaking = speaking or Parrot(speech)
    return SpeechEvaluator(speech, speaking, speech.codec, Ear(), TOKENIZER, tiny_omni().config, Asked(**asked))


def test_perfect_codes(sets: Path) -> None:
    heard = []
    report = evaluator(sets).report("set", 7, heard.append)
    assert report.rows["speech"] == report.rows["codec"] and report.wer == report.rows["codec"][-1].wer
    frames = sum(each.utterance.codes_GF.shape[1] for each in heard)
    assert report.guesses.frames == frames and torch.equal(
        report.guesses.correct_G, torch.full((GROUPS,), frames * 1.0)
    )
    assert report.guesses.nll_G.tolist() == pytest.approx([frames * math.log(1 + (CODES - 1) * math.exp(-50))] * GROUPS)
    assert report.voices["speech"] == report.voices["codec"] and report.voices["recording"].num_clips == 6
    assert (report.num_silent, report.num_endless, report.num_unscored, list(report.skipped)) == (0, 0, 0, [])
    codec = speech_set(sets).codec
    for each in heard:
        np.testing.assert_array_equal(each.waves["codec"], codec.decode(each.utterance.codes_GF).numpy())
    assert [row.group for row in report.rows["speech"]] == ["de", "en", "all"]
    assert [example["key"].partition(":")[2] for example in report.examples] == [f"k{n}" for n in range(6)]


class Knowing:
    """Knows the recordings by heart, and takes all else for "two"."""

    def __init__(self, speech: SpeechSet) -> None:
        read = [speech.read(sample) for sample in speech.samples]
        self.texts = {soxr.resample(each.wave_S, 24_000, 16_000).tobytes(): each.text for each in read}

    def hear(self, waves, languages):
        return [self.texts.get(wave_S.tobytes(), "two") for wave_S in waves]


def test_exact_error_rates(sets: Path) -> None:
    run = evaluator(sets)
    report = replace(run, listening=Knowing(run.speech)).report("set", 0)
    words = sum(len(text.split()) for text in TEXTS)
    right = sum("two" in text.split() for text in TEXTS)
    assert (words, right) == (12, 2) and report.rows["recording"][-1].wer == 0
    assert report.wer == report.rows["codec"][-1].wer == pytest.approx(10 / 12)


def test_a_real_talker_is_scored_as_its_likelihoods_say(sets: Path) -> None:
    omni = tiny_omni()
    speaking = OmniSpeaking(omni, SaySettings(6), 0, torch.device("cpu"))
    report = evaluator(sets, speaking).report("set", 0)
    mean = report.guesses.nll_G / report.guesses.frames
    assert mean[0].item() == pytest.approx(math.log(CODES + 20), rel=0.05)
    assert mean[1:].tolist() == pytest.approx([math.log(CODES)] * (GROUPS - 1), rel=0.05)
    assert report.num_endless > 0 and all(0 < e["seconds"] <= 0.48 for e in report.examples)
    again = evaluator(sets, OmniSpeaking(omni, SaySettings(6), 0, torch.device("cpu"))).report("set", 0)
    assert again.rows == report.rows and again.examples == report.examples and again.voices == report.voices
    other = evaluator(sets, OmniSpeaking(omni, SaySettings(6), 1, torch.device("cpu")))
    waves, others = [], []
    evaluator(sets, OmniSpeaking(omni, SaySettings(6), 0, torch.device("cpu"))).report("set", 0, waves.append)
    other.report("set", 0, others.append)
    assert any(not np.array_equal(a.waves["speech"], b.waves["speech"]) for a, b in zip(waves, others, strict=True))


def test_stored_codes_are_those_made_now(sets: Path, tmp_path: Path) -> None:
    fresh = speech_set(sets)
    made = [fresh.read(sample).codes_GF for sample in fresh.samples]
    for path in (sets / "spoken").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    encode_shards(Corpus.open([f"{tmp_path}/*.tar"]), fresh.codec)
    corpus = Corpus.open([f"{tmp_path}/*.tar"], TOKENIZER.fingerprint)
    layout = model_layout(tiny_omni().config, TOKENIZER)
    stored = SpeechSet(corpus, fresh.codec, TOKENIZER, layout, MediaLimits())
    stored.codec.encode = lambda _: pytest.fail("encoded again")  # type: ignore[method-assign]
    assert all(torch.equal(stored.read(n).codes_GF, codes) for n, codes in zip(stored.samples, made, strict=True))


def test_rewritten_text_and_another_system_prompt(sets: Path) -> None:
    run = evaluator(sets, rewrites={"k1": "four three", "k4": "hello"}, system="speak up")
    report = run.report("set", 0)
    assert [(e["key"].partition(":")[2], e["text"]) for e in report.examples] == [("k1", "four three"), ("k4", "hello")]
    assert report.rows["speech"][-1].num_words == 3 and report.rows["recording"][-1].num_words == 3
    assert report.original is not None and evaluator(sets).report("set", 0).original is None
    said = {key.partition(":")[2]: ids for key, ids in run.speaking.said.items()}
    asked = run.speech.read(4).prompt.ids_T.tolist()
    assert said["k4"] == [*turn("system", "speak up"), *asked, *TOKENIZER.encode("hello"), END]


def turn(role: str, text: str) -> list[int]:
    return [START, *TOKENIZER.encode(f"{role}\n{text}"), END, *TOKENIZER.encode("\n")]


def test_the_talkers_system_prompt_takes_the_place_of_the_thinkers() -> None:
    config, asked = tiny_omni().config, [*turn("user", "hi"), START, *TOKENIZER.encode("assistant\n")]
    own, one = torch.tensor([*turn("system", "old"), *asked]), TOKENIZER.encode("one")
    assert talker_ids(own, "one", TOKENIZER, config).tolist() == [*own.tolist(), *one, END]
    told = talker_ids(own, "one", TOKENIZER, config, "new")
    assert told.tolist() == [*turn("system", "new"), *asked, *one, END]
    with pytest.raises(DataError, match="nothing to say in ''"):
        talker_ids(own, "", TOKENIZER, config)


def test_one_voice_for_all(sets: Path) -> None:
    run = evaluator(sets, speaker="berta", max_samples=4)
    report = run.report("set", 0)
    assert run.speaking.asked == ["berta"] * 4 and len(report.examples) == 4
    assert {example["speaker"] for example in report.examples} == {"berta"}
    with pytest.raises(DataError, match="speaker=carla: this model has anna, berta"):
        evaluator(sets, speaker="carla").report("set", 0)


def test_silence_and_codes_that_there_are_not(sets: Path) -> None:
    speaking = Parrot(speech_set(sets))
    keys = list(speaking.codes)
    full = dict(speaking.codes)
    speaking.say = lambda prompts, ids, speakers: [
        full[key][:, :0] if key == keys[0] else full[key] + CODES if key == keys[1] else full[key]
        for key in prompts.keys
    ]
    report = evaluator(sets, speaking).report("set", 0)
    assert report.num_silent == 2 and report.voices["speech"].num_clips == 4


# voices


def voice(pitch: float, seed: int) -> np.ndarray:
    time_S = np.arange(8000) / 16_000
    noise_S = np.random.default_rng(seed).normal(0, 0.01, len(time_S))
    tones_S = sum(np.sin(2 * np.pi * k * pitch * time_S + seed) / k for k in range(1, 12))
    return (0.1 * tones_S + noise_S).astype(np.float32)


def test_likeness_tells_voices_apart() -> None:
    speakers = ["low", "high", "low", "high", "low", "high"]
    clips = [embed(voice(110 if name == "low" else 210, seed)) for seed, name in enumerate(speakers)]
    voices = Voices(clips, speakers)
    mine, swapped = voices.likeness(clips, speakers), voices.likeness(clips, speakers[::-1])
    assert mine.nearest == 1 and swapped.nearest == 0 and mine.num_clips == 6
    assert mine.same > 0.5 > 0 > mine.different and swapped.same == pytest.approx(mine.different, abs=0.1)
    assert voices.likeness([None] * 6, speakers).same is None
    assert voices.likeness(clips, ["nobody"] * 6).num_clips == 0
    alone = Voices(clips[::2], ["low"] * 3).likeness(clips[::2], ["low"] * 3)
    assert (alone.same, alone.different, alone.nearest, alone.num_clips) == (None, None, None, 0)


def test_likeness_is_of_the_voice_not_of_the_level() -> None:
    wave = voice(150, 0)
    torch.testing.assert_close(embed(wave), embed(wave / 8), atol=1e-3, rtol=0)


# requests


def test_requests_are_those_of_the_recognisers_own_sets(sets: Path) -> None:
    requests = usual_requests([Corpus.open([f"{sets}/asked/*.tar"])])
    content = [{"type": "audio", "audio": "wav"}, {"type": "text", "text": "?"}]
    assert requests == {"en": [{"role": "user", "content": content}], ANY: [{"role": "user", "content": content}]}
    assert plain_request("write")[ANY][0]["content"][1]["text"] == "write"
