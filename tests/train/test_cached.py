"""From a trained Thinker to a Talker that learns from its kept hidden states, by the commands that a user types."""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import data.reader
from data.codec import open_codec
from data.codes import encode_shards
from data.corpus import Corpus
from data.sample import SampleRecord
from data.shards import write_shards
from data.tokenizer import train_tokenizer
from launch import cache_hidden, convert
from models.thinker import Thinker
from tests.data import media_kit
from tests.data.test_kmeans_codec import write as write_codec
from tests.train.test_speech_run import SIZES, answer, lines, settings
from train.checkpoint import CheckpointReader, choose
from train.main import main

VISION = "model.vision={depth: 1, hidden_size: 16, intermediate_size: 16, num_heads: 2, out_hidden_size: 128"
SMALL = [
    VISION + ", deepstack_visual_indexes: [0], num_position_embeddings: 16}",
    *("data.image.max_pixels=4096", "data.image.min_pixels=1024", "data.video.max_pixels=4096"),
    *("data.video.min_pixels=1024", "data.sequence_length=256", "data.speeds=[1.0]", "data.augment={}"),
]
TEXT, CACHED = "phases={text: {steps: 2}}", "phases={talker: {steps: 4, speech: cached}}"
STATES = "train/shard-000000.tar.hidden"


def asked(number: int) -> SampleRecord:
    """A question with sound, a picture, a film with sound whose frames are not evenly spaced, or text alone."""
    record, media = answer(number), {}
    question = list(record.messages[0]["content"])
    if number % 4 == 1:
        file = io.BytesIO()
        Image.fromarray(media_kit.picture(number, (64 + 16 * (number % 3), 48))).save(file, "PNG")
        question.insert(0, {"type": "image", "image": "png"})
        media["png"] = file.getvalue()
    if number % 4 == 2:
        times = [0.0, 0.1, 0.15, 0.6, 0.9, 1.0]
        question.append({"type": "video", "video": "mp4", "sound": True})
        media["mp4"] = media_kit.film(times=times, size=(64, 48), sound=media_kit.sounding(0.9))
    messages = [{"role": "user", "content": question}, record.messages[1]]
    return replace(record, messages=messages, media={**record.media, **media})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Spoken answers, a codec and its codes."""
    folder = tmp_path_factory.mktemp("heard")
    words = train_tokenizer(["Say word 1 2 3", "What is said?"] * 3, 400)
    words.save(folder / "tokenizer")
    assert write_shards(map(asked, range(14)), folder / "train", words, 8).left_out == []
    write_codec(folder / "codec", SIZES)
    encode_shards(Corpus.open([f"{folder}/train/*.tar"]), open_codec(folder / "codec"))
    return folder


@pytest.fixture(scope="module")
def thinker(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the Thinker alone, whose hidden states are kept."""
    run = tmp_path_factory.mktemp("thinker") / "run"
    assert main(settings(folder, run, *SMALL, TEXT)) == 0
    assert cache_hidden.main([f"run={run}", "keep=fp32", "max_tokens=200"]) == 0
    return run


def train(folder: Path, thinker: Path, run: Path, *more: str) -> int:
    return main(settings(folder, run, *SMALL, f"init={thinker}", CACHED, *more))


@pytest.fixture(scope="module")
def unbroken(folder: Path, thinker: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("cached") / "run"
    assert train(folder, thinker, run) == 0
    return run


def moments(run: Path) -> dict[str, torch.Tensor]:
    """Every moment and weight of a run's last checkpoint, by kind and released name."""
    manifest = choose(run, "latest", wait_s=0)
    assert manifest is not None
    reader = CheckpointReader(manifest)
    return {
        f"{kind} {name}": reader.read_released(kind, name, 0, torch.Size(shape).numel())
        for name, shape in reader.names().items()
        for kind in reader.kinds(name)
    }


def test_cached_is_frozen(folder: Path, thinker: Path, unbroken: Path, tmp_path: Path) -> None:
    """Losses, gradient norms, and the moments that the gradients leave, over images, sound, films and text."""
    frozen = tmp_path / "frozen"
    assert train(folder, thinker, frozen, CACHED.replace("cached", "frozen")) == 0
    pairs = list(zip(lines(unbroken), lines(frozen), strict=True))
    assert len(pairs) == 4 and all(one["skipped"] == 0 for one, _ in pairs)
    for one, other in pairs:
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
        assert one["terms"] == pytest.approx(other["terms"], rel=1e-5)
    ours, theirs = moments(unbroken), moments(frozen)
    assert ours.keys() == theirs.keys() and any(name.startswith("exp_avg talker") for name in ours)
    for name, values in theirs.items():
        assert (ours[name] - values).norm() <= 1e-5 * values.norm() + 1e-9, name
    keys = [(run / "keys-rank0.jsonl").read_text() for run in (unbroken, frozen)]
    assert keys[0] == keys[1]


def test_nothing_is_read_decoded_or_thought(
    folder: Path, thinker: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a cached phase came here")

    monkeypatch.setattr(data.reader, "open_sample", never)
    monkeypatch.setattr(Thinker, "forward", never)
    monkeypatch.setattr(Thinker, "encode", never)
    assert train(folder, thinker, tmp_path / "run") == 0
    assert [line["loss"] for line in lines(tmp_path / "run")] == [line["loss"] for line in lines(unbroken)]


@pytest.mark.parametrize("more", [(), ("data.workers=1",)])
def test_a_stopped_run_goes_on_exactly(
    more: Sequence[str], folder: Path, thinker: Path, unbroken: Path, tmp_path: Path
) -> None:
    assert train(folder, thinker, tmp_path / "run", "max_steps=2", *more) == 0
    assert train(folder, thinker, tmp_path / "run", *more) == 0
    assert [line["loss"] for line in lines(tmp_path / "run")] == [line["loss"] for line in lines(unbroken)]


def test_phases_of_one_run(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """It stops where the states of its own Thinker are wanted, and goes on when they are there."""
    shutil.copytree(folder, tmp_path / "data", ignore=shutil.ignore_patterns("*.hidden"))
    run = tmp_path / "run"
    phases = "phases={text: {steps: 2}, talker: {steps: 2, speech: cached}}"
    words = settings(tmp_path / "data", run, *SMALL, phases, "seed=1")
    assert main(words) == 2 and len(lines(run)) == 2
    assert "shard-000000.tar: has no hidden states of the Thinker; make them with" in capsys.readouterr().err
    assert cache_hidden.main([f"run={run}"]) == 0
    assert main(words) == 0 and len(lines(run)) == 4
    assert cache_hidden.main([f"run={run}"]) == 0  # the Thinker is what it was
    assert "shard-000001.tar: has its hidden states" in capsys.readouterr().out


def test_an_exported_folder_is_its_run(
    thinker: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for dtype, status in (("fp32", 0), ("bf16", 2)):
        convert.main(["export", f"from={thinker}", f"to={tmp_path}/{dtype}", f"dtype={dtype}"])
        words = [f"model={tmp_path}/{dtype}", f"shards={folder}/train/*.tar"]
        sizes = [word for word in SMALL if word.startswith(("data.image", "data.video"))]
        assert cache_hidden.main([*words, *sizes]) == status
        said = capsys.readouterr()
        wanted = (
            "shard-000000.tar: has its hidden states" if status == 0 else "shard-000000.tar.hidden: made with model"
        )
        assert wanted in said.out + said.err
    assert cache_hidden.main([f"model={tmp_path}/fp32", f"shards={folder}/train/*.tar"]) == 2
    assert "made with sizes images of 1024 to 4096 pixels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.speeds=[0.9, 1.0]"], "phases.talker.speech=cached: hidden states are of recordings as they are: set"),
        (["data.augment.gain_probability=0.5"], "phases.talker.speech=cached: hidden states are of recordings"),
        (["init=null"], "phases.talker.speech=cached: hidden states are those of trained weights: set init"),
        (["model.talker.accept_hidden_layer=2"], "made with layer 1, needed is 2; delete it and make it again"),
        (["data.image.max_pixels=9000"], "made with sizes images of 1024 to 4096 pixels, videos of"),
        (["model.text.rope_theta=5000.0"], "made with model "),
        (["init=OTHER"], "made with model "),
    ],
)
def test_what_is_refused(
    changes: list[str],
    message: str,
    folder: Path,
    thinker: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    if changes == ["init=OTHER"]:
        assert main(settings(folder, tmp_path / "other", *SMALL, TEXT, "optim.lr=1e-5")) == 0
        changes = [f"init={tmp_path}/other"]
    assert train(folder, thinker, tmp_path / "run", *changes) == 2
    err = capsys.readouterr().err
    line = err[err.index("error: ") :]
    assert message in line and line.count("\n") == 1
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_damaged_record_is_left_out_and_counted(
    folder: Path, thinker: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(folder, tmp_path / "data")
    path = tmp_path / "data" / STATES
    payload = path.read_bytes()
    path.write_bytes(payload[:-1] + bytes([payload[-1] ^ 1]))
    assert train(tmp_path / "data", thinker, tmp_path / "run") == 0
    assert lines(tmp_path / "run")[-1]["skipped"] == 2  # once an epoch
    assert "shard-000000.tar:a07: its hidden states have changed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give run=RUN, or model=FOLDER"),
        (["run=RUN", "model=RUN"], "give run=RUN, or model=FOLDER"),
        (["run=ABSENT"], "no such file; give the folder of a run"),
        (["run=RUN", "keep=fp8"], "keep=fp8: it is bf16 or fp32"),
        (["run=RUN", "dtype=fp8"], "dtype=fp8: it is bf16 or fp32"),
        (["run=RUN", "max_tokens=0"], "max_tokens must be from 1"),
        (["run=RUN", "checkpoint=ABSENT"], "no checkpoint there"),
        (["run=RUN", "shards=ABSENT/*.tar"], "no file matches"),
        (["run=RUN", "model.talker=null"], "has no Talker, so nothing says which hidden states to keep"),
        (["model=RUN"], "model=FOLDER needs shards="),
        (["model=RUN", "shards=x", "checkpoint=1"], "model=FOLDER has no checkpoint="),
        (["model=RUN", "shards=x", "optim.lr=1"], "unknown argument 'optim'"),
        (["model=RUN", "shards=x", "data.image.max_pixel=1"], "unknown setting data.image.max_pixel, did you mean"),
        (["model=RUN", "shards=x"], "config.json: no such file"),
    ],
)
def test_commands_that_are_refused(
    words: list[str], message: str, thinker: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    places = {"RUN": str(thinker), "ABSENT": str(tmp_path / "absent")}
    for name, place in places.items():
        words = [word.replace(f"={name}", f"={place}") for word in words]
    assert cache_hidden.main(words) == 2
    err = capsys.readouterr().err
    line = err[err.index("error: ") :]
    assert message in line and line.count("\n") == 1
