"""From recordings of answers to a waveform decoder: shards, codes, recipe, resume, export; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from data.codec import open_codec
from data.codes import encode_shards
from data.corpus import Corpus
from data.shards import write_shards
from data.tokenizer import train_tokenizer
from launch import convert
from launch.loading import load_model
from tests.data.corpus_kit import spoken, written
from tests.data.test_kmeans_codec import write as write_codec
from tests.train.test_speech_run import SIZES, TALKER, answer, lines
from train.checkpoint import CheckpointReader, choose
from train.main import main

DECODER = ["hidden_size=16", "intermediate_size=16", "num_hidden_layers=1", "num_attention_heads=2"]
DECODER += ["num_key_value_heads=2", "decoder_dim=16"]
HOSTILE = "{periods: [2], period_widths: [4], windows: [64], window_width: 2}"
PHASES = "phases={spectral: {steps: 2, speech: waveform}, hostile: {steps: 2, speech: adversarial}}"
SPECTRAL = ["stft_linear", "stft_log", "mel"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve spoken answers, two samples without speech, a codec and its codes."""
    folder = tmp_path_factory.mktemp("aloud")
    words = train_tokenizer(["Say word 1 2 3", "What is said?"] * 3, 400)
    words.save(folder / "tokenizer")
    write_shards([*map(answer, range(12)), spoken("mute0"), written("mute1")], folder / "train", words, 8)
    write_codec(folder / "codec", SIZES)
    encode_shards(Corpus.open([f"{folder}/train/*.tar"]), open_codec(folder / "codec"))
    return folder


def settings(folder: Path, run: Path, *more: str) -> list[str]:
    data = [f"shards=[{folder}/train/*.tar]", f"tokenizer={folder}/tokenizer", f"codec={folder}/codec", "workers=0"]
    words = [*TALKER, *(f"data.{word}" for word in data), "data.sequence_length=16", "data.sequences_per_step=2"]
    words += [f"model.code2wav.{word}" for word in DECODER] + [f"loss.waveform.adversary={HOSTILE}"]
    words += ["loss.waveform.frames=4", "loss.waveform.context=2", PHASES, "save.every=1", "log.every=1"]
    return ["recipe=code2wav", f"run={run}", *words, "log.keys=true", "eval={}", *more]


@pytest.fixture(scope="module")
def unbroken(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run") / "unbroken"
    assert main(settings(folder, run)) == 0
    return run


def test_both_phases_report_their_terms(unbroken: Path) -> None:
    hostile = [*SPECTRAL, "adversarial", "matching", "discriminator"]
    assert [list(line["terms"]) for line in lines(unbroken)] == [SPECTRAL] * 2 + [hostile] * 2
    assert all(line["skipped"] == 0 and line["loss"] > 0 for line in lines(unbroken))
    keys = [json.loads(line)["keys"] for line in (unbroken / "keys-rank0.jsonl").read_text().splitlines()]
    assert all(step and all(":a" in key for key in step) for step in keys)  # those with a spoken answer
    assert (unbroken / "curves.png").is_file()


def test_decoder_and_discriminators_learn_and_exports_hold_the_decoder_alone(unbroken: Path, tmp_path: Path) -> None:
    manifest = choose(unbroken, "latest", wait_s=0)
    assert manifest is not None
    learnt = {name.split(".")[0] for name, kinds in manifest.parameters.items() if "exp_avg" in kinds}
    assert learnt == {"code2wav", "adversary"}
    assert not any(name.startswith("adversary.") for name in CheckpointReader(manifest).names())
    convert.main(["export", f"from={unbroken}", f"to={tmp_path}/model"])
    omni = load_model(tmp_path / "model")
    assert omni.code2wav is not None
    wave_BS = omni.code2wav(torch.zeros(1, 3, 4, dtype=torch.int64))
    assert wave_BS.shape == (1, 4 * 1920 - 555) and wave_BS.isfinite().all()


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_stopped_run_goes_on_exactly(stop: int, folder: Path, unbroken: Path, tmp_path: Path) -> None:
    """Within each phase, and between them, where the discriminators begin."""
    assert main(settings(folder, tmp_path / "run", f"max_steps={stop}")) == 0
    assert main(settings(folder, tmp_path / "run")) == 0
    assert [line["loss"] for line in lines(tmp_path / "run")] == [line["loss"] for line in lines(unbroken)]


def test_a_talkers_run_gets_a_decoder(folder: Path, tmp_path: Path) -> None:
    """`init` of a run without a decoder: Thinker and Talker are that run's, the decoder begins anew."""
    talker = ["model=tiny_talker", "phases={all: {steps: 1, speech: frozen}}", "data.sequence_length=192"]
    given = [word for word in settings(folder, tmp_path / "talker", *talker) if not word.startswith("model.code2wav")]
    assert main(given) == 0
    assert main(settings(folder, tmp_path / "run", f"init={tmp_path}/talker")) == 0
    readers = [
        CheckpointReader(manifest)
        for name in ("talker", "run")
        if (manifest := choose(tmp_path / name, "latest", wait_s=0))
    ]
    shared = readers[0].names()
    assert shared.keys() < readers[1].names().keys()
    for name, shape in shared.items():
        size = torch.Size(shape).numel()
        before, after = (reader.read_released("weight", name, 0, size) for reader in readers)
        assert torch.equal(before, after), name


def one_phase(speech: str) -> str:
    return f"phases={{all: {{steps: 1, speech: {speech}}}}}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.code2wav.upsample_rates=[8,5,4]"], "has 1920 samples a frame, and model.code2wav gives 640"),
        (["model.code2wav.codebook_size=32"], "16 codes in a codebook, and model.code2wav.codebook_size=32"),
        (
            ["model.code2wav.num_quantizers=4"],
            "code2wav num_quantizers (4) must equal the Talker's num_code_groups (3)",
        ),
        (["model.talker.code_predictor.num_code_groups=4"], "has 3 codebooks, and model.talker.code_predictor.num_"),
        (["data.shards=[MUTE/*.tar]"], "has no codec codes; make them with: python -m data.codes"),
        (["model.code2wav=null"], "phases.spectral.speech=waveform: the model has no code2wav; choose one that has"),
        (["model.code2wav=null", one_phase("adversarial")], "phases.all.speech=adversarial: the model has no code2wav"),
        (["data.codec=''"], "phases.spectral.speech=waveform: data.codec is not set"),
        (["data.sequence_length=5"], "loss.waveform.frames and context are 6 frames, above data.sequence_length=5"),
        (["loss.waveform.mel=-1"], "loss.waveform.mel=-1.0: it must not be below 0"),
        (["loss.waveform.adversary.game=poker"], "adversary.game can be least_squares, hinge, not 'poker'"),
        (["loss.waveform.adversry={}"], "unknown setting 'loss.waveform.adversry', did you mean"),
        ([one_phase("waveforms")], "phases.all.speech=waveforms, did you mean 'waveform'?"),
        (["phases={all: {steps: 1, speech: waveform, train: [talker.*]}}"], "speech=waveform leaves nothing to train"),
    ],
)
def test_what_is_refused(
    changes: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = [word.replace("MUTE", f"{tmp_path}/mute") for word in changes]
    if words != changes:
        tokenizer = train_tokenizer(["Say word 1 2 3", "What is said?"] * 3, 400)
        write_shards([answer(0)], tmp_path / "mute", tokenizer, 8)
    given = settings(folder, tmp_path / "run", *words)
    if "model.code2wav=null" in words:
        given = [word for word in given if not word.startswith("model.code2wav.")]
    assert main(given) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
