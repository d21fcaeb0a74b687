"""Asking a model about real media and hearing its answer; keeping hidden states: the commands, as a user types them."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from data.audio import decode
from data.hidden import hidden_path
from data.kmeans_codec import CodecSettings
from data.shards import write_shards
from launch import cache_hidden, convert, generate
from launch.answering import MODEL, answer, open_model
from launch.conversation import Medium, Turn, conversation
from launch.sound_file import UNKNOWN, GrowingFile, pcm16, wav_header
from models.generate import TextDecoding
from models.omni_config import Code2WavConfig
from models.speak import SpeakSettings
from tests.data.audio_bytes import encode, tone
from tests.data.corpus_kit import mixed
from tests.data.test_kmeans_codec import write as write_codec
from tests.launch import tts_kit
from tests.launch.tiny_omni import tiny_tokenizer, write_omni

ROOT = Path(__file__).resolve().parents[2]
MEDIA = ROOT / "../shared/data/media"
needs_media = pytest.mark.skipif(not MEDIA.is_dir(), reason="the recordings in ../shared/data/media are absent")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_omni(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    return tts_kit.write_sets(tmp_path_factory.mktemp("sets"))


@pytest.fixture(scope="module")
def talker_run(sets, tmp_path_factory):
    return tts_kit.write_run(tmp_path_factory.mktemp("runs") / "talker", sets, talks=True)


def run(folder, *arguments):
    return generate.main([f"model={folder}", "max_new_tokens=5", "max_seconds=0.6", "temperature=0", *arguments])


def asked(loaded, text, *media, sound=True):
    turn = Turn("user", [*media, text])
    return conversation(loaded.layout, loaded.limits, loaded.tokenizer, [turn], sound)


def opened(folder):
    return open_model(MODEL | {"model": str(folder)}, [])


def film():
    return Medium("video", "film.mp4", (MEDIA / "nasa_13013.mp4").read_bytes())


@needs_media
def test_answers_a_real_recording_by_voice(folder, tmp_path, capsys):
    out = tmp_path / "answer.wav"
    question = ("--audio", f"{MEDIA / 'jfk.flac'}", "--text", "what is said here?")
    assert run(folder, *question, f"--out={out}") == 0
    said = capsys.readouterr()
    assert "time to first token" in said.err and "to first packet" in said.err and "real-time factor" in said.err
    wave, rate = soundfile.read(out)
    assert rate == 24_000 and 0.4 * rate < len(wave) <= 0.6 * rate and np.abs(wave).max() <= 1
    again = tmp_path / "again.wav"
    assert run(folder, *question, f"out={again}", "--stream") == 0
    assert again.read_bytes() == out.read_bytes() and capsys.readouterr().out == said.out  # the stream is the whole


@needs_media
def test_a_real_film_with_its_sound_reaches_the_model_whole(folder):
    """Every second of sound and every frame has its tokens, interleaved by time."""
    loaded = opened(folder)
    config = loaded.omni.config
    prompt = asked(loaded, "what?", film())
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
    silent = asked(loaded, "what?", film(), sound=False)
    assert len(silent.token_ids_T) == len(ids) - sound - 2 and silent.mel_lengths == ()


@needs_media
def test_a_real_film_goes_through_the_model(folder):
    """Two thousand tokens of picture and sound: finite hidden states, and every stretch of the film matters."""
    loaded = opened(folder)
    prompt = asked(loaded, "what?", film())
    first = TextDecoding(loaded.omni.thinker, prompt, 1).logits()
    assert first.isfinite().sum() == first.numel() - 3  # placeholders are never said
    for change in ({"pixels_PX": prompt.pixels_PX.flip(0)}, {"mel_FM": prompt.mel_FM.flip(0)}):
        assert not torch.equal(TextDecoding(loaded.omni.thinker, replace(prompt, **change), 1).logits(), first)


def test_a_thinker_alone_answers_by_text(folder, tmp_path, capsys):
    """And ends where its tokenizer says, not at the released model's id."""
    assert convert.main(["export", f"from={folder}", f"to={tmp_path}/thinker", "part=thinker"]) in (0, None)
    loaded = opened(tmp_path / "thinker")
    assert loaded.omni.talker is None and not loaded.speakers and not loaded.sounds
    prompt = asked(loaded, "hello")
    thinker = loaded.omni.thinker
    thinker.lm_head.weight[loaded.tokenizer.id("<|im_end|>")] = 100 * TextDecoding(thinker, prompt, 1).hidden_ND[0]
    assert list(answer(loaded, prompt, SpeakSettings("", 9, 9), 0)) == []
    assert run(tmp_path / "thinker", "text=hello", f"out={tmp_path}/a.wav") == 0
    assert not (tmp_path / "a.wav").exists()


def test_a_run_speaks_by_its_codec(talker_run, sets, tmp_path, capsys):
    """With the codec of its recipe, unless told otherwise; and with the settings of its recipe."""
    words = ["max_new_tokens=5", "max_seconds=0.6", "temperature=0", "text=hello"]
    assert generate.main([f"run={talker_run}", *words, f"out={tmp_path}/run.wav", "--speaker", "berta"]) == 0
    assert generate.main([f"run={talker_run}", *words, f"out={tmp_path}/stream.wav", "speaker=berta", "--stream"]) == 0
    export = ["export", f"from={talker_run}", f"to={tmp_path}/model"]
    assert convert.main(export) in (0, None)
    folder = [f"model={tmp_path}/model", f"codec={sets}/codec", "speaker=berta"]
    assert generate.main([*folder, *words, f"out={tmp_path}/folder.wav"]) == 0
    waves = [(tmp_path / f"{name}.wav").read_bytes() for name in ("run", "stream", "folder")]
    assert waves[0] == waves[1] == waves[2] and len(waves[0]) > 44
    capsys.readouterr()
    assert generate.main([f"run={talker_run}", *words, "checkpoint=nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert generate.main([f"run={talker_run}", *words, "data.codec=nowhere"]) == 2
    assert "nowhere holds no codec" in capsys.readouterr().err
    assert generate.main([f"run={talker_run}", f"model={tmp_path}", *words]) == 2
    assert "give run=FOLDER of a training run, or model=FOLDER" in capsys.readouterr().err


def test_a_run_without_a_talker_answers_by_text(sets, tmp_path, capsys):
    listener = tts_kit.write_run(tmp_path / "listener", sets, talks=False)
    question = tmp_path / "q.wav"
    question.write_bytes(encode(tone(16_000, 0.3), 16_000))
    words = [f"run={listener}", "--audio", f"{question}", "text=hello", f"out={tmp_path}/a.wav", "temperature=0"]
    assert generate.main([*words, "max_new_tokens=3"]) == 0
    said = capsys.readouterr().err
    assert "time to first token" in said and not (tmp_path / "a.wav").exists()


def test_the_decoder_that_was_trained_makes_the_sound(sets, tmp_path):
    """A decoder of random weights gives way to the recipe's codec."""
    wave = Code2WavConfig(tts_kit.CODES, tts_kit.GROUPS, 32, 64, 2, 2, 2, decoder_dim=32, sliding_window=8)
    model = replace(tts_kit.model(True), code2wav=wave)
    folder = tts_kit.write_run(tmp_path / "run", sets, talks=True, model=model)
    loaded = open_model(MODEL | {"run": str(folder)}, [])
    assert loaded.omni.code2wav is None and loaded.codec is not None
    trained = open_model(MODEL | {"run": str(folder)}, ["seed=7"])  # so the weights are not the initial ones
    assert trained.omni.code2wav is not None and trained.codec is None and trained.sounds
    other = open_model(MODEL | {"run": str(folder), "codec": f"{sets}/codec"}, ["seed=7"])
    assert other.codec is not None


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


def test_parts_keep_their_order(folder):
    loaded = opened(folder)
    clip = Medium("audio", "q.wav", encode(tone(16_000, 0.3), 16_000))
    before, after = (
        conversation(loaded.layout, loaded.limits, loaded.tokenizer, [Turn("user", parts)]).token_ids_T.tolist()
        for parts in (["hello", clip], [clip, "hello"])
    )
    assert before != after and sorted(before) == sorted(after)


def test_earlier_turns_are_read(folder):
    loaded = opened(folder)
    turns = [Turn("user", ["one"]), Turn("assistant", ["two"]), Turn("user", ["three"])]
    prompt = conversation(loaded.layout, loaded.limits, loaded.tokenizer, turns)
    text = loaded.tokenizer.decode(prompt.token_ids_T.tolist())
    assert len(prompt.doc_lengths) == 1 and text.index("one") < text.index("two") < text.index("three")
    assert prompt.token_ids_T.tolist()[-2:] == [*loaded.tokenizer.encode("assistant"), *loaded.tokenizer.encode("\n")]


def test_spellings():
    words = ["--max-seconds", "5", "--stream", "--out=a=b.wav", "text=--raw", "--text", "--hello", "--raw=false"]
    assert generate.spelled(words) == [
        "max_seconds=5", "stream=true", "out=a=b.wav", "text=--raw", "text=--hello", "raw=false"
    ]  # fmt: skip


def test_a_growing_file_is_whole_at_every_moment(tmp_path):
    wave = torch.linspace(-1.2, 1.2, 5000)
    path = tmp_path / "a.wav"
    file = GrowingFile(path)
    file.write(wave[:0])
    assert not path.exists()
    for start in range(0, 5000, 1250):
        file.write(wave[start : start + 1250])
        sound, rate = soundfile.read(path, dtype="int16")
        assert rate == 24_000 and sound.tobytes() == pcm16(wave[: start + 1250])
    soundfile.write(tmp_path / "b.wav", sound, rate)
    assert path.read_bytes() == (tmp_path / "b.wav").read_bytes()


def test_standard_output(folder, tmp_path, capfdbinary):
    """The same sound, as a wav whose length is unknown, which our own decoder reads, or as bare samples."""
    out = tmp_path / "answer.wav"
    assert run(folder, "text=hello", f"out={out}", "--stream") == 0
    text = capfdbinary.readouterr().out.strip()
    assert run(folder, "text=hello", "--out", "-") == 0
    streamed, messages = capfdbinary.readouterr()
    samples = out.read_bytes()[44:]
    assert streamed == wav_header(UNKNOWN) + samples and text in messages
    assert len(decode(streamed, rate=24_000)) == len(samples) // 2 == len(soundfile.read(io.BytesIO(streamed))[0])
    assert run(folder, "text=hello", "out=-", "--raw") == 0
    assert capfdbinary.readouterr().out == samples
    assert run(folder, "text=hello", f"out={tmp_path}/a.pcm", "--raw", "--stream") == 0
    assert (tmp_path / "a.pcm").read_bytes() == samples


def test_ctrl_c_leaves_a_valid_wav(folder, tmp_path):
    """What was made until then; without --stream an older file stays as it is."""
    out = tmp_path / "answer.wav"
    words = [sys.executable, "-m", "launch.generate", f"model={folder}", "text=hello", "max_seconds=600", "--stream"]
    process = subprocess.Popen(
        [*words, "max_new_tokens=4", f"out={out}"], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not out.exists() or out.stat().st_size < 20_000:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted: time to first token" in messages and "Traceback" not in messages
    wave, rate = soundfile.read(out)
    assert 2 * len(wave) == out.stat().st_size - 44 and rate == 24_000 and len(wave) >= 9_000
    assert f"{len(wave) / rate:.1f} s of sound" in messages


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
        (["text=hi", "out=a.flac", "--stream"], "out=a.flac: it ends in .wav, because stream=true"),
        (["text=hi", "out=a.wav", "--raw"], "out=a.wav: raw=true is for out=-"),
        (["text=hi", "--speaker"], "--speaker: give its value behind it"),
        (["text=hi", "--speeker", "bob"], "unknown argument 'speeker', did you mean 'speaker'?"),
        (["text=hi", "packet_frames=0"], "packet_frames must be from 1 to"),
        (["text=hi", "engine.device=cpu"], "engine.device=cpu is for run=FOLDER"),
        (["text=hi", "checkpoint=latest"], "checkpoint=... is for run=FOLDER"),
        (["text=hi", "codec=nowhere"], "nowhere holds no codec"),
        (["text="], "give text=..."),
        (["audio=SILENCE"], "silence.wav: is silent: its loudest sample is 0 of full scale"),
        (["audio=SHORT"], "short.wav: audio is too short"),
        (["text=h\udcff"], "text=, system= and names of files must be UTF-8"),
        (["text=hi", "dtype=fp8"], "dtype must be bf16 or fp32"),
        (["text=hi", "device=tpu"], "device=tpu"),
        (["text=hi", "video_sound=maybe"], "video_sound must be true or false"),
        (["text=hi", "model=nowhere"], "nowhere/config.json: no such file"),
    ],
)
def test_says_what_is_wrong(folder, arguments, message, capsys, tmp_path):
    clips = {"SILENCE": tone(16_000, 0.3) * 0, "SHORT": tone(16_000, 0.02)}
    for name, wave in clips.items():
        (tmp_path / f"{name.lower()}.wav").write_bytes(encode(wave, 16_000))
        arguments = [word.replace(name, f"{tmp_path}/{name.lower()}.wav") for word in arguments]
    assert run(folder, f"out={tmp_path}/a.wav", *arguments) == 2
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
