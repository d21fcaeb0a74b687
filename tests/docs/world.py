"""A small world with everything that the pages name: corpora, runs, weights, files, built once by our own commands.

    espeak-ng, tones --data.demo, data.convert, data.fit_codec--> outputs/demo_data, corpus, fsdd_dev.tar
      --train.py, one step--> outputs/demo/stage3, outputs/demo/sft, outputs/fsdd*  --copies--> RUN, outputs/talker, ...
      --launch.convert export--> FOLDER, WEIGHTS, weights, HF_FOLDER, QWEN3

The code lies in it as links, so that `python train.py` and `launch/local.sh` are what they are in a checkout.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from tests.data.audio_bytes import encode

ROOT = Path(__file__).resolve().parents[2]
LINKS = (
    "train.py",
    "train",
    "data",
    "models",
    "launch",
    "recipes",
    "bench",
    "tests",
    "pyproject.toml",
    "docs",
    "README.md",
)
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TASKS = ("transcription,animals_aloud,words_aloud,picture_told,picture_text,picture_voice,picture_aloud,sound_text,"
         "sound_voice,film_text,film_voice,words")  # fmt: skip
SMALL = "data.workers=0 save.every=100 log.view=off eval.max_samples=4 eval.max_new_tokens=4".split()
TOLD = ["eval.sets={voices: [outputs/demo_data/voices/*.tar], sentences: [outputs/demo_data/sentences/*.tar]}"]
ONE_STEP = {
    "demo": ["run=outputs/demo/stage3", "phases={pretraining: {steps: 1}}"],
    "demo_talker": ["run=outputs/demo/sft", "init=outputs/demo/stage3", "phases.speech.steps=1", *TOLD],
    "fsdd": ["phases.all.steps=1"],
    "fsdd_talker": ["phases.speech.steps=1"],
}
COPIES = {  # what the pages call a run -> what it is here
    "outputs/demo/stage3": ("RUN2", "outputs/before", "outputs/after", "a", "b", "outputs/RECOGNISER"),
    "outputs/demo/sft": ("RUN", "outputs/talker", "outputs/THINKER", "outputs/finetuned", "outputs/RUN"),
}

Run = Callable[..., None]


def build(folder: Path, run: Run) -> Path:
    """The world in `folder`; run(*words) runs `python WORDS` there and must end well."""
    for name in LINKS:
        (folder / name).symlink_to(ROOT / name)
    (folder / "outputs").mkdir()
    corpora(folder, run)
    for recipe, steps in ONE_STEP.items():
        run("train.py", f"recipe={recipe}", *steps, *SMALL, "optim.warmup_steps=1")
    weights(folder, run)
    lineage(folder / "outputs/demo")
    for run_folder, names in COPIES.items():
        for name in names:
            linked(folder / run_folder, folder / name)
    files(folder)
    run("-m", "data.convert", "openai", "chats.jsonl", "outputs/chats", "--tokenizer", "FOLDER")
    return folder


def corpora(folder: Path, run: Run) -> None:
    """outputs/demo_data, corpus and outputs/fsdd_data, with codecs and codes."""
    made = folder / "outputs/demo_data"
    sizes = ["--samples", "160", "--heldout", "6", "--languages", "en,de,zh", "--vocab-size", "640"]
    run("-m", "data.demo", "outputs/demo_data", *sizes, "--tasks", TASKS)
    codec = ["codebooks=6", "codebook_size=256", "vocoder_steps=1", "blocks=1100", "max_seconds=200"]
    run("-m", "launch.own_codec", "outputs/demo_data", *codec, "answers=0")
    recordings(folder / "fsdd_dev.tar")
    for name, more in (("fsdd", ()), ("fsdd_talker", ("--speak",))):
        out = f"outputs/{name}_data"
        run("-m", "data.convert", "wavs", "fsdd_dev.tar", out, "--names", ",".join(DIGITS), "--eval-speaker", "nicolas",
            "--holdout", "0.1", "--language", "en", *more)  # fmt: skip
        (folder / out / ".done").touch()
    shutil.copytree(made / "codec", folder / "outputs/fsdd_talker_data/codec")
    run("-m", "data.codes", "codec=outputs/fsdd_talker_data/codec", "shards=outputs/fsdd_talker_data/*/*.tar")
    for kind, source in {"train": "train", "heldout": "sentences", "voices": "scenes", "pictures": "scenes"}.items():
        shutil.copytree(made / source, folder / "corpus" / kind)
    for name in ("tokenizer", "codec"):
        shutil.copytree(made / name, folder / "corpus" / name)
    for path in (made / "train").iterdir():  # corpus/*.tar
        shutil.copy(path, folder / "corpus" / path.name)
    shutil.copytree(made / "codec", folder / "CODEC")
    shutil.copytree(made / "tokenizer", folder / "TOKENIZER")


def weights(folder: Path, run: Run) -> None:
    """The demo's model in the released layout, under each name that a page gives it."""
    run("-m", "launch.convert", "export", "from=outputs/demo/sft", "to=FOLDER")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        source = folder / "outputs/demo_data/tokenizer" / name
        if source.is_file() and not (folder / "FOLDER" / name).exists():
            shutil.copy(source, folder / "FOLDER" / name)
    for name in ("HF_FOLDER", "WEIGHTS", "weights", "QWEN3"):
        linked(folder / "FOLDER", folder / name)


def lineage(folder: Path) -> None:
    """What a curriculum of two stages leaves beside them."""
    done = {"state": "done", "checkpoint": "step-00000001", "step": 1, "tokens": 1024, "engine": "local", "world": 1}
    done |= {"began": "2026-01-01T00:00:00", "ended": "2026-01-01T00:01:00"}
    stages = {
        name: done | {"after": after, "init": [f"outputs/demo/{each}" for each in after], "run": f"outputs/demo/{name}"}
        for name, after in (("stage3", []), ("sft", ["stage3"]))
    }
    (folder / "lineage.json").write_text(json.dumps({"name": "curriculum_demo", "stages": stages}))


def linked(source: Path, to: Path) -> None:
    """A copy whose large files are the same on disk: programs here replace files, and append to small ones alone."""
    shutil.copytree(source, to, symlinks=True, copy_function=_link)


def _link(source: str, to: str) -> None:
    if os.path.getsize(source) > 1 << 16:
        os.link(source, to)
    else:
        shutil.copy2(source, to, follow_symlinks=False)


def tone(seconds: float, pitch: float) -> bytes:
    """A wav of a tone, 8 kHz."""
    time_S = np.arange(int(8000 * seconds)) / 8000
    data = io.BytesIO()
    wave_S = 0.3 * np.sin(2 * np.pi * pitch * time_S) * (1 + 0.5 * np.sin(9 * time_S))
    soundfile.write(data, wave_S.astype(np.float32), 8000, format="wav")
    return data.getvalue()


def recordings(path: Path) -> None:
    """A tar in the layout of the Free Spoken Digit Dataset."""
    with tarfile.open(path, "w") as tar:
        for voice, speaker in enumerate(("george", "jackson", "lucas", "nicolas")):
            for digit in range(10):
                for take in range(2):
                    data = tone(0.5, 150 + 60 * voice + 37 * digit + take)
                    member = tarfile.TarInfo(f"recordings/{digit}_{speaker}_{take}.wav")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def files(folder: Path) -> None:
    """Questions, manifests and recordings that a user would bring."""
    wave_S = (0.1 * np.sin(np.arange(16000) / 20)).astype(np.float32)
    for name in ("question.wav", "question.flac"):
        (folder / name).write_bytes(encode(wave_S, 16_000, name.rpartition(".")[2]))
    (folder / "images").mkdir()
    for name in ("a.png", "images/one.jpg", "images/two.jpg"):
        Image.new("RGB", (96, 96), (200, 30, 30)).save(folder / name)
    film = next((folder / "outputs/demo_data/train").glob("*.tar"))
    with tarfile.open(film) as tar:
        member = next(member for member in tar if member.name.endswith(".mp4"))
        (folder / "b.mp4").write_bytes(tar.extractfile(member).read())  # type: ignore[union-attr]
    data = folder / "my_data"
    for name, count in (("speech", 12), ("pictures", 12)):
        (data / name).mkdir(parents=True)
        for number in range(count):
            (data / name / f"{number}.{'wav' if name == 'speech' else 'jpg'}").write_bytes(
                tone(0.6, 200 + 50 * number) if name == "speech" else (folder / "images/one.jpg").read_bytes()
            )
    lines = [
        {"audio": f"speech/{n}.wav", "text": f"this is number {DIGITS[n % 10]}", "language": "en"} for n in range(12)
    ]
    lines += [
        {"image": f"pictures/{n}.jpg", "text": f"picture {DIGITS[n % 10]} is red", "language": "en"} for n in range(12)
    ]
    jsonl(data / "train.jsonl", lines[2:])
    jsonl(data / "heldout.jsonl", [*lines[:2], lines[-1]])
    jsonl(
        folder / "corpus.jsonl",
        [{**row, **{k: f"my_data/{v}" for k, v in row.items() if k in ("audio", "image")}} for row in lines],
    )
    turns = [{"from": "human", "value": "<image>\nWhat is there?"}, {"from": "gpt", "value": "a red square"}]
    (folder / "instruct.json").write_text(json.dumps([{"image": "one.jpg", "conversations": turns}] * 3))
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"what is {word}?"},
                {"role": "assistant", "content": f"{word} it is"},
            ]
        }
        for word in DIGITS
    ]
    jsonl(folder / "chats.jsonl", chats)
    chapter = folder / "LibriSpeech/test-clean/1089/134686"
    chapter.mkdir(parents=True)
    for number in range(3):
        (chapter / f"1089-134686-{number:04d}.flac").write_bytes((folder / "question.flac").read_bytes())
    (chapter / "1089-134686.trans.txt").write_text(
        "".join(f"1089-134686-{number:04d} HELLO WORLD\n" for number in range(3))
    )
    with tarfile.open(next((folder / "corpus/voices").glob("*.tar"))) as tar:
        key = next(name for name in tar.getnames() if name.endswith("speech.flac")).partition(".")[0]
    jsonl(folder / "texts.jsonl", [{"key": key, "text": "two"}])
    (folder / "mary").mkdir()
    for number in range(6):
        (folder / f"mary/{number}.wav").write_bytes(tone(0.7, 180 + 20 * number))
        (folder / f"mary/{number}.txt").write_text("one two")


def jsonl(path: Path, rows: list[dict]) -> None:
    """A JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
