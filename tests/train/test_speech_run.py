"""From recordings of answers to a Talker that learns: shards, codes, recipe, resume; and what is refused."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from data.codec import open_codec
from data.codes import encode_shards
from data.corpus import Corpus
from data.kmeans_codec import CodecSettings
from data.sample import SampleRecord
from data.shards import write_shards
from data.tokenizer import train_tokenizer
from tests.data.audio_bytes import encode
from tests.data.corpus_kit import spoken, written
from tests.data.test_fit_codec import voice
from tests.data.test_kmeans_codec import write as write_codec
from train.main import main

SIZES = CodecSettings(codebooks=3, codebook_size=16, dimensions=24, width=24, layers=4)
TALKER = [
    "model.talker.text.num_hidden_layers=1",
    "model.talker.code_predictor.num_hidden_layers=1",
    "model.talker.code_predictor.num_code_groups=3",
    "model.talker.code_predictor.vocab_size=16",
    "model.talker.speaker_id={ann: 300, bob: 301}",
]


ALOUD = "phases={all: {steps: 1, speech: live}}"


def answer(number: int, **speech: str) -> SampleRecord:
    """A question in text or sound, answered aloud."""
    part = {"type": "speech", "speech": "speech.wav", "speaker": ("ann", "bob")[number % 2], **speech}
    reply = {"role": "assistant", "content": [{"type": "text", "text": f"word {number}"}, part]}
    media = {"speech.wav": encode(voice(0.5 + 0.1 * (number % 4), number, 24_000), 24_000)}
    question: list[dict[str, str]] = [{"type": "text", "text": f"Say {number}"}]
    if number % 3 == 0:
        question.insert(0, {"type": "audio", "audio": "wav"})
        media["wav"] = encode(voice(0.6, number), 16_000)
    return SampleRecord(f"a{number:02d}", [{"role": "user", "content": question}, reply], media, source="aloud")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen spoken answers, four samples without speech, a codec and its codes."""
    folder = tmp_path_factory.mktemp("aloud")
    words = train_tokenizer(["Say word 1 2 3", "What is said?"] * 3, 400)
    words.save(folder / "tokenizer")
    mute = [spoken("mute0"), spoken("mute1"), written("mute2"), written("mute3")]
    write_shards([*map(answer, range(16)), *mute], folder / "train", words, 10)
    write_codec(folder / "codec", SIZES)
    encode_shards(Corpus.open([f"{folder}/train/*.tar"]), open_codec(folder / "codec"))
    return folder


def settings(folder: Path, run: Path, *more: str) -> list[str]:
    data = ["sequence_length=192", "sequences_per_step=2", "workers=0", f"codec={folder}/codec"]
    data += [f"shards=[{folder}/train/*.tar]", f"tokenizer={folder}/tokenizer"]
    phases = "phases={text: {steps: 2}, together: {steps: 2, speech: detached}, talker: {steps: 3, speech: frozen}}"
    words = [*TALKER, *(f"data.{word}" for word in data), phases, "save.every=1", "log.every=1", "optim.warmup_steps=0"]
    return ["recipe=transcribe", "model=tiny_talker", f"run={run}", *words, "log.keys=true", *more, "eval={}"]


def lines(run: Path) -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if "loss" in line]


@pytest.fixture(scope="module")
def unbroken(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run") / "unbroken"
    assert main(settings(folder, run)) == 0
    return run


def test_every_phase_reports_its_terms(unbroken: Path) -> None:
    codes = ["code 0", "code 1", "code 2"]
    terms = [sorted(line.get("terms", {"text": 0})) for line in lines(unbroken)]
    assert terms == [["text"]] * 2 + [[*codes, "text"]] * 2 + [codes] * 3
    assert all(line["skipped"] == 0 and line["loss"] > 0 for line in lines(unbroken))
    assert "talker.expert_load" in lines(unbroken)[-1] and "expert_load" not in lines(unbroken)[-1]


def test_speech_phases_read_the_spoken_answers_and_text_goes_on_where_it_was(unbroken: Path) -> None:
    keys = [json.loads(line)["keys"] for line in (unbroken / "keys-rank0.jsonl").read_text().splitlines()]
    assert len(keys) == 7
    aloud = [key for step in keys[2:] for key in step]
    assert aloud and all(":a" in key for key in aloud)


def test_only_what_a_phase_trains_changes(unbroken: Path) -> None:
    from train.checkpoint import CheckpointReader, choose

    manifest = choose(unbroken, "latest", wait_s=0)
    assert manifest is not None
    reader = CheckpointReader(manifest)
    kinds = {name.split(".")[0]: reader.kinds(name) for name in ("talker.model.norm.weight", "thinker.lm_head.weight")}
    assert "exp_avg" in kinds["talker"] and "exp_avg" not in kinds["thinker"]


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_stopped_run_goes_on_exactly(stop: int, folder: Path, unbroken: Path, tmp_path: Path) -> None:
    assert main(settings(folder, tmp_path / "run", f"max_steps={stop}")) == 0
    assert main(settings(folder, tmp_path / "run")) == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # what comes after can be interrupted
    assert [line["loss"] for line in lines(tmp_path / "run")] == [line["loss"] for line in lines(unbroken)]


def test_who_goes_on_after_training_learns_that_it_was_stopped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.main.fit", lambda *_: True)  # as after Ctrl-C
    assert main(settings(folder, tmp_path / "run")) == 0
    assert main(settings(folder, tmp_path / "run"), stopped=130) == 130


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.talker.speaker_id={ann: 300}"], "answers are spoken by bob, but model.talker.speaker_id names ann"),
        (["model.talker.code_predictor.num_code_groups=4"], "has 3 codebooks, and model.talker.code_predictor.num_"),
        (["model.talker.code_predictor.vocab_size=32"], "has 16 codes in a codebook, and model.talker.code_predictor"),
        (
            ["data.sequence_length=12", "data.too_long=drop", ALOUD, "data.mixture={temperature: 2.0}"],
            "data.mixture: no sample is left: all are longer than data.sequence_length, or have no speech codes",
        ),
        (["data.codec=OTHER"], "its codes are those of codec kmeans/"),
        (["data.codec=''"], "phases.together.speech=detached: data.codec is not set"),
        (["data.codec=ABSENT"], "holds no codec: expected codec.json"),
        (["phases={all: {steps: 1, speech: frozn}}"], "phases.all.speech=frozn, did you mean 'frozen'?"),
        (["phases={all: {steps: 1, speech: frozen, train: [thinker.*]}}"], "speech=frozen leaves nothing to train"),
        (["model=tiny"], "phases.together.speech=detached: the model has no talker"),
        (["data.sequence_length=24"], "tokens, above data.sequence_length=24"),
        (
            ["data.sequence_length=12", "data.too_long=drop", ALOUD],
            "no sample is left: all that have speech codes are longer",
        ),
    ],
)
def test_what_is_refused(
    changes: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    if "OTHER" in changes[0]:
        write_codec(tmp_path / "other", SIZES, seed=1)
    words = [word.replace("OTHER", f"{tmp_path}/other").replace("ABSENT", f"{tmp_path}") for word in changes]
    given = settings(folder, tmp_path / "run", *words)
    if "model=tiny" in words:  # which has no talker to set anything of
        given = [word for word in given if not word.startswith(("model.talker", "model=tiny_talker"))]
    assert main(given) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
