"""Recordings of one speaker become a voice of a Talker; the others and the Thinker stay as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from launch import convert, fsdd_talker, generate, voice
from tests.data.audio_bytes import encode
from tests.data.test_fit_codec import voice as sound
from tests.train.test_speech_run import folder as corpus
from tests.train.test_speech_run import settings
from train.main import main as train

__all__ = ["corpus"]  # a fixture


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that speaks in two voices."""
    run = tmp_path_factory.mktemp("runs") / "base"
    assert train(settings(corpus, run, "phases={both: {steps: 2, speech: live}}")) == 0
    return run


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    folder = tmp_path / "recordings"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.wav").write_bytes(encode(sound(0.6, number), 16_000))
        (folder / f"{number}.txt").write_text(f"word {number}\n")
    return folder


def make(run: Path, recordings: Path, out: Path, *more: str, speaker: str = "cat") -> int:
    words = [f"run={run}", f"recordings={recordings}", f"out={out}", f"speaker={speaker}", "steps=2", *more]
    return voice.main(words)


def weights(model: Path) -> dict[str, bytes]:
    with safe_open(model / "model-00001-of-00001.safetensors", "pt") as file:
        return {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}  # noqa: SIM118


def test_a_new_voice(run: Path, recordings: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "cat"
    assert make(run, recordings, out) == 0
    config = json.loads((out / "model" / "config.json").read_text())
    assert config["talker_config"]["speaker_id"] == {"ann": 300, "bob": 301, "cat": 302}
    convert.export([f"from={run}", f"to={tmp_path}/before"])
    before, after = weights(tmp_path / "before"), weights(out / "model")
    changed = {name.split(".")[0] for name in before if before[name] != after[name]}
    assert before.keys() == after.keys() and changed == {"talker"}
    capsys.readouterr()
    assert make(run, recordings, out) == 0  # all parts are there
    assert "done at step 2" in capsys.readouterr().out
    wav = tmp_path / "said.wav"
    words = [
        f"model={out}/model",
        f"codec={corpus}/codec",
        "speaker=cat",
        "text=Say 1",
        "max_seconds=0.5",
        f"out={wav}",
    ]
    assert generate.main([*words, "max_new_tokens=4"]) == 0
    assert "time to first token" in capsys.readouterr().err  # two steps do not teach it when to end: it may say nothing


def test_a_list_of_recordings(run: Path, recordings: Path, tmp_path: Path) -> None:
    rows = [{"audio": f"{number}.wav", "text": f"word {number}"} for number in range(4)]
    (recordings / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert make(run, recordings / "list.jsonl", tmp_path / "cat", "language=en") == 0


def test_half_a_voice_is_not_exported(
    run: Path, recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.voice.train", lambda recipe: False)  # stopped by Ctrl-C
    with pytest.raises(SystemExit) as ended:
        make(run, recordings, tmp_path / "cat")
    assert ended.value.code == 130 and not (tmp_path / "cat" / "model").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("speaker=ann", "has such a voice already"),
        ("speaker=", "a printable name"),
        ("steps=0", "steps must be from 1 to"),
        ("lr=none", "lr must be a number, not 'none'"),
        ("run=NOWHERE", "no such file; give the folder of a run"),
        ("recordings=EMPTY", "holds no recordings"),
        ("recordings=MUTE", "0.wav: no transcript in 0.txt: No such file or directory"),
        ("optim.lrr=1", "unknown setting 'optim.lrr'"),
    ],
)
def test_what_is_refused(
    change: str, message: str, run: Path, recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "mute").mkdir()
    (tmp_path / "mute" / "0.wav").write_bytes((recordings / "0.wav").read_bytes())
    for word, path in (("NOWHERE", "nowhere"), ("EMPTY", "empty"), ("MUTE", "mute")):
        change = change.replace(word, str(tmp_path / path))
    assert make(run, recordings, tmp_path / "out", change) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert not (tmp_path / "out" / "run").exists()


def test_the_digits_need_their_recordings(capsys: pytest.CaptureFixture) -> None:
    assert fsdd_talker.main([]) == 2 and "give the folder or tar" in capsys.readouterr().err
    assert fsdd_talker.main(["nowhere.tar"]) == 0 and "nowhere.tar does not exist" in capsys.readouterr().out
