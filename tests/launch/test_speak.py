"""Asking a model about real media and hearing its answer; keeping hidden states: the commands, as a user types them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from data.hidden import hidden_path
from data.kmeans_codec import CodecSettings
from data.shards import write_shards
from launch import cache_hidden, convert, speak
from launch.loading import load_model
from launch.prompt import Medium, conversation
from models.generate import TextDecoding
from models.speak import SpeakSettings
from tests.data.corpus_kit import mixed
from tests.data.test_kmeans_codec import write as write_codec
from tests.launch.tiny_omni import tiny_tokenizer, write_omni

MEDIA = Path(__file__).resolve().parents[2] / "../shared/data/media"
needs_media = pytest.mark.skipif(not MEDIA.is_dir(), reason="the recordings in ../shared/data/media are absent")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_omni(tmp_path_factory.mktemp("model") / "tiny")


def run(folder, *arguments):
    return speak.main([f"model={folder}", "max_new_tokens=5", "max_seconds=0.6", "temperature=0", *arguments])


@needs_media
def test_answers_a_real_recording_by_voice(folder, tmp_path, capsys):
    out = tmp_path / "answer.wav"
    assert run(folder, "text=what is said here?", f"audio={MEDIA / 'jfk.flac'}", f"out={out}") == 0
    said = capsys.readouterr()
    assert "time to first token" in said.err and "to first packet" in said.err
    wave, rate = soundfile.read(out)
    assert rate == 24_000 and 0.4 * rate < len(wave) <= 0.6 * rate and np.abs(wave).max() <= 1
    again = tmp_path / "again.wav"
    run(folder, "text=what is said here?", f"audio={MEDIA / 'jfk.flac'}", f"out={again}")
    assert np.array_equal(soundfile.read(again)[0], wave)


@needs_media
def test_a_real_film_with_its_sound_reaches_the_model_whole(folder):
    """Every second of sound and every frame has its tokens, interleaved by time."""
    config, tokenizer = load_model(folder).config, tiny_tokenizer()
    film = [Medium("video", MEDIA / "nasa_13013.mp4")]
    prompt = conversation(config, tokenizer, "what?", film)
    ids = prompt.token_ids_T
    ((frames, rows, columns),) = prompt.grids
    sound, seen = (
        int((ids == token).sum()) for token in (config.thinker.audio_token_id, config.thinker.video_token_id)
    )
    assert seen == frames * rows * columns // 4 == len(prompt.pixels_PX) // 4
    (mel,) = prompt.mel_lengths
    assert sound == mel // 100 * 13 + -(-(mel % 100) // 8)
    places = (ids == config.thinker.audio_token_id).nonzero().squeeze(1)
    assert prompt.position_ids_3T[0, places[-1]] - prompt.position_ids_3T[0, places[0]] == sound - 1
    assert bool((ids[places[0] : places[-1]] == config.thinker.video_token_id).any())  # interleaved
    silent = conversation(config, tokenizer, "what?", film, video_sound=False)
    assert len(silent.token_ids_T) == len(ids) - sound - 2 and silent.mel_lengths == ()


@needs_media
def test_a_real_film_goes_through_the_model(folder):
    """Two thousand tokens of picture and sound: finite hidden states, and every stretch of the film matters."""
    omni = load_model(folder)
    prompt = conversation(omni.config, tiny_tokenizer(), "what?", [Medium("video", MEDIA / "nasa_13013.mp4")])
    first = TextDecoding(omni.thinker, prompt, 1).logits()
    assert first.isfinite().sum() == first.numel() - 3  # placeholders are never said
    for change in ({"pixels_PX": prompt.pixels_PX.flip(0)}, {"mel_FM": prompt.mel_FM.flip(0)}):
        assert not torch.equal(TextDecoding(omni.thinker, replace(prompt, **change), 1).logits(), first)


def test_a_thinker_alone_answers_by_text(folder, tmp_path, capsys):
    """And ends where its tokenizer says, not at the released model's id."""
    assert convert.main(["export", f"from={folder}", f"to={tmp_path}/thinker", "part=thinker"]) in (0, None)
    omni = load_model(tmp_path / "thinker")
    assert omni.talker is None
    tokenizer = tiny_tokenizer()
    prompt = conversation(omni.config, tokenizer, "hello")
    omni.thinker.lm_head.weight[tokenizer.id("<|im_end|>")] = 100 * TextDecoding(omni.thinker, prompt, 1).hidden_ND[0]
    said, wave = speak.answer(omni, tokenizer, prompt, SpeakSettings("", 9, 9), tmp_path / "a.wav", 0)
    assert said == "" and not len(wave) and "no answer" in capsys.readouterr().err
    assert run(tmp_path / "thinker", "text=hello", f"out={tmp_path}/a.wav") == 0


def test_a_codec_makes_the_sound(folder, tmp_path, capsys):
    """Whole frames of sound; another codec than the Talker's is refused before anything is made."""
    sizes = CodecSettings(codebooks=4, codebook_size=64, dimensions=24, width=24, layers=4)
    codec, out = write_codec(tmp_path / "codec", sizes), tmp_path / "answer.wav"
    assert run(folder, "text=hello", f"codec={codec}", f"out={out}") == 0
    wave, rate = soundfile.read(out)
    assert rate == 24_000 and len(wave) % 1920 == 0 and 0 < len(wave) <= 0.6 * rate and np.abs(wave).max() > 0.001
    assert run(folder, "text=hello", f"codec={codec}", "levels=1", f"out={tmp_path}/first.wav") == 0
    first, _ = soundfile.read(tmp_path / "first.wav")
    assert len(first) == len(wave) and not np.array_equal(first, wave)
    other = write_codec(tmp_path / "other", replace(sizes, codebooks=3))
    capsys.readouterr()
    assert run(folder, "text=hello", f"codec={other}") == 2
    assert "has 3 codebooks of 64 codes, and this Talker says 4 of 64" in capsys.readouterr().err
    assert run(folder, "text=hello", "levels=2") == 2
    assert "levels= is for codec=FOLDER" in capsys.readouterr().err


def test_pictures_and_text(folder, tmp_path, capsys):
    picture = tmp_path / "red.png"
    Image.fromarray(np.full((70, 90, 3), (200, 30, 30), np.uint8)).save(picture)
    out = tmp_path / "answer.wav"
    assert run(folder, f"image={picture}", f"image={picture}", "system=be brief", "text=which?", f"out={out}") == 0
    assert out.exists() and "tokens of prompt" in capsys.readouterr().err
    assert run(folder, "text=hello", f"out={out}", "dtype=bf16", "temperature=1") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give text=..., audio=FILE, image=FILE or video=FILE"),
        (["audio=nowhere.flac"], "nowhere.flac: No such file or directory"),
        (["image=README.md"], "README.md: image is none of"),
        (["video=README.md"], "README.md: "),
        (["text=hi", "speaker=bob"], "speaker 'bob' is unknown: this model has ethan"),
        (["text=hi", "temprature=1"], "unknown argument 'temprature', did you mean 'temperature'?"),
        (["text=hi", "temperature=warm"], "temperature must be a number, not 'warm'"),
        (["text=hi", "temperature=nan"], "temperature must be from 0 to 100, not nan"),
        (["text=hi", "max_seconds=inf"], "max_seconds must be from 0.08 to"),
        (["text=hi", "max_seconds=-5"], "max_seconds must be from 0.08 to"),
        (["text=hi", "max_new_tokens=1e15"], "max_new_tokens must be a whole number"),
        (["text=hi", "max_new_tokens=0"], "max_new_tokens must be from 1 to"),
        (["text=hi", "seed=1.7"], "seed must be a whole number, not '1.7'"),
        (["text=hi", "device=cpu:x"], "device=cpu:x"),
        (["text=hi", "out=nowhere/a.wav"], "out=nowhere/a.wav: its folder does not exist"),
        (["text=hi", "out=a.xyz"], "out=a.xyz: it ends in .wav or .flac"),
        (["text=h\udcff"], "text= and system= must be UTF-8"),
        (["text=hi", "dtype=fp8"], "dtype must be bf16 or fp32"),
        (["text=hi", "device=tpu"], "device=tpu"),
        (["text=hi", "video_sound=maybe"], "video_sound must be true or false"),
        (["text=hi", "model=nowhere"], "nowhere/config.json: no such file"),
    ],
)
def test_says_what_is_wrong(folder, arguments, message, capsys):
    assert run(folder, *arguments) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("error: ") and message in said[-1]


def test_hidden_states_beside_shards(folder, tmp_path, capsys):
    tokenizer = tiny_tokenizer()
    write_shards(mixed(6), tmp_path, tokenizer, 6)
    shards = tmp_path / "shard-000000.tar"
    assert cache_hidden.main([f"model={folder}", f"shards={shards}"]) == 0
    assert hidden_path(shards).is_file() and "6 samples, 0 left out" in capsys.readouterr().out
    assert cache_hidden.main([f"model={folder}", f"shards={shards}"]) == 0
    assert "has its hidden states" in capsys.readouterr().out
    for bad, message in ((["keep=int8"], "keep=int8"), (["max_tokens=0"], "max_tokens"), (["shards=no.tar"], "no.tar")):
        assert cache_hidden.main([f"model={folder}", f"shards={shards}", *bad]) == 2
        assert message in capsys.readouterr().err
