"""Run folders as training leaves them, made of arithmetic: every kind of line that a report draws."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image

PARTS = ("audio", "vision", "language", "talker", "code_predictor")
MEDIA = ("text", "audio", "image", "video")
BOOKS = 16
RECIPE = """name: {name}
model:
  text: {{num_hidden_layers: 4, hidden_size: 64, num_experts: 16, num_experts_per_tok: 2}}
  audio: {{encoder_layers: 2, d_model: 64}}
  vision: null
data: {{shards: [corpus/*.tar], tokenizer: corpus/tokenizer, sequence_length: 1024, sequences_per_step: 8}}
seed: {seed}
run: outputs/{name}
init: null
phases:
  warm: {{steps: {first}}}
  main: {{steps: {rest}}}
max_steps: 0
optim: {{lr: {lr}, betas: [0.9, 0.95]}}
engine: {{name: deepspeed, precision: bf16, ep: 2}}
"""


def wave(at: float, *of: int) -> float:
    """Noise that is always the same."""
    return math.sin(at * 12.9898 + sum(of) * 78.233) * 43758.5453 % 1.0


def lines(steps: int, every: int = 10, start: float = 7.0) -> Iterator[dict[str, Any]]:
    """All kinds of lines of a run of so many steps."""
    for step in range(every, steps + 1, every):
        done, noise = step / steps, 1 + 0.08 * (wave(step) - 0.5)
        loss = (1.2 + (start - 1.2) * math.exp(-5 * done)) * noise
        lr = min(1.0, 20 * done) * 0.5 * (1 + math.cos(math.pi * done))
        seconds = 1.6 + 0.2 * wave(step, 3)
        yield {
            "step": step,
            "phase": "warm" if step <= steps // 5 else "main",
            "loss": loss * (1 + 0.1 * (wave(step, 1) - 0.5)),
            "mean_loss": loss,
            "balance_loss": 1 + 0.6 * math.exp(-8 * done) + 0.02 * wave(step, 4),
            "grad_norm": 6 * math.exp(-2 * done) * noise,
            "lr": 1e-3 * lr,
            "tokens": 8000,
            "targets": 6000,
            "skipped": int(3 * done),
            "tokens_per_second": 8000 / seconds,
            "seconds_per_step": seconds,
            "wait_share": 0.03 * wave(step, 5),
            "mfu": 0.38 + 0.04 * wave(step, 6),
            "expert_load": [1.2 + math.exp(-6 * done) * layer + 0.1 * wave(step, layer) for layer in range(4)],
            "terms": {"text": loss, **{f"code {book}": loss * (0.4 + 0.05 * book) for book in range(BOOKS)}},
            "modalities": {
                name: {"loss": loss * (0.8 + 0.2 * place), "targets": 1500 + 400 * place}
                for place, name in enumerate(("text", "audio", "audio+image", "video"))
            },
            "grad_norms": {part: (place + 1) * math.exp(-2 * done) * noise for place, part in enumerate(PARTS)},
            "lrs": {part: 1e-3 * lr * 0.6**place for place, part in enumerate(PARTS)},
            "times": {
                "data": 0.05 + 0.03 * wave(step, 7),
                "forward": 0.45,
                "backward": 0.85 + 0.1 * wave(step, 8),
                "optimizer": 0.2,
                "other": 0.05,
            },
            "imbalance": {
                "work": 1.01 + 0.01 * wave(step, 9),
                "seconds": 1.03 + 0.05 * wave(step, 9),
                "slowest": int(8 * wave(step, 9) ** 3),
            },
            "memory_gb": 61.0 + 2 * done,
            "fill": 0.955 + 0.02 * wave(step, 10),
        }
        if step % (every * 5) == 0:
            yield {"step": step, "experts": {"thinker": loads(4, 16, done), "talker": {"all": table(3, 8, 0, done)}}}
            yield {"step": step, "mixture": mixture(0.01 * wave(step, 11)), "asked": mixture(0.0)}
        if step % (every * 20) == 0:
            for place, name in enumerate(("heldout", "voices")):
                error = 0.08 * (place + 1) + 0.9 * math.exp(-6 * done)
                yield {"step": step, "eval": name, "wer": error, "words": 400, "accuracy": 1 - min(1, 1.3 * error)}


def mixture(off: float) -> dict[str, float]:
    return {"text/en": 0.4 + off, "speech/en": 0.3 - off, "speech/de": 0.2, "film/en": 0.1}


def table(layers: int, experts: int, shift: int, done: float) -> list[list[float]]:
    rows = [
        [math.exp((2 - 1.6 * done) * wave(e + 31 * layer, shift)) for e in range(experts)] for layer in range(layers)
    ]
    return [[share / sum(row) for share in row] for row in rows]


def loads(layers: int, experts: int, done: float) -> dict[str, list[list[float]]]:
    found = {name: table(layers, experts, place, done) for place, name in enumerate(("all", *MEDIA))}
    found["video"][1][3] = 0.0
    return found


EVENTS = [
    {"event": "spike", "text": "loss 9.1 at step 410: 6.2 deviations above the mean of 200 steps"},
    {"event": "skipped_step", "text": "gradient is not finite on rank 3; samples a.tar:17, a.tar:18"},
    {"event": "straggler", "text": "rank 5 (node7) takes 1.4 times the mean"},
    {"event": "dead_experts", "text": "thinker layer 1: expert 3 got no token of 500 steps"},
]


def write_run(
    folder: Path, steps: int = 1000, *, seed: int = 0, lr: float = 1e-3, evals: bool = True, **how: Any
) -> Path:
    """A run folder that is done."""
    folder.mkdir(parents=True)
    recipe = RECIPE.format(name=folder.name, seed=seed, lr=lr, first=steps // 5, rest=steps - steps // 5)
    (folder / "recipe.yaml").write_text(recipe)
    with (folder / "metrics.jsonl").open("w") as file:
        for line in lines(steps, **how):
            file.write(json.dumps(line) + "\n")
        for place, event in enumerate(EVENTS):
            file.write(json.dumps({"step": steps * (place + 1) // 5, **event}) + "\n")
    for step in (steps // 2, steps):
        write_checkpoint(folder / "checkpoints" / f"step-{step:08d}", step)
    (folder / "checkpoints" / "latest").write_text(f"step-{steps:08d}\n")
    (folder / "checkpoints" / "best").write_text(f"step-{steps // 2:08d}\n")
    if evals:
        write_evals(folder / "eval", steps)
    return folder


def write_checkpoint(folder: Path, step: int) -> None:
    folder.mkdir(parents=True)
    shapes = {
        "thinker.model.embed_tokens.weight": [1000, 64],
        "thinker.model.layers.0.mlp.experts.0.up_proj.weight": [96, 64],
        "thinker.audio_tower.conv1.weight": [64, 80, 3],
    }
    manifest = {
        "format": "omniloom-checkpoint",
        "version": 1,
        "step": step,
        "world": 8,
        "info": {"engine": {"name": "deepspeed", "world": 8, "zero": 2}},
        "versions": {"torch": "2.10.0", "commit": hashlib.sha1(b"it").hexdigest()},
        "tensors": {name: {"shape": shape, "ranges": {}} for name, shape in shapes.items()},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "rank0.safetensors").write_bytes(b"\0" * 300_000)


def write_evals(folder: Path, step: int) -> None:
    """As launch.evaluate leaves them: answers, and speech with sounds and pictures."""
    folder.mkdir()
    answers = [
        ("four white horses", "four white houses"),
        ("zwei blaue Katzen", "zwei blaue Katzen"),
        ("<b>one</b>", "two & two"),
    ]
    examples = [
        {"key": f"shard-000000.tar:k{n}", "language": "en", "source": "transcription", "reference": a, "answer": b}
        for n, (a, b) in enumerate(answers * 8)
    ]
    row = {"group": "en", "num_samples": 24, "num_right": 8, "num_words": 56, "substitutions": 10, "deletions": 3}
    rows = [{**row, "wer": 0.2321, "accuracy": 0.3333}, {**row, "group": "all", "wer": 0.2321, "accuracy": 0.3333}]
    body = {"set": "heldout", "step": step, "wer": 0.2321, "rows": rows, "skipped": [], "examples": examples}
    (folder / f"heldout-step{step:08d}.json").write_text(json.dumps(body))
    (folder / f"heldout-step{step // 2:08d}.json").write_text("{}")
    spoken = folder / f"tts-step{step:08d}"
    spoken.mkdir()
    kinds = ("speech", "codec", "recording")
    said = [
        {"key": f"shard-000000.tar:u{n}", "language": "en", "speaker": "anna", "text": f"number {n}"} for n in range(3)
    ]
    said = [{**each, "heard": dict.fromkeys(kinds, each["text"])} for each in said]
    talks = {
        "set": "voices",
        "wer": {"speech": 0.2, "codec": 0.1, "recording": 0.05},
        "rows": {kind: [{"language": "en", "num_words": 6, "wer": 0.2}] for kind in kinds},
        "code_accuracy": [0.5, 0.3],
        "code_nll": [1.5, 2.5],
        "likeness": {kind: {"same": 0.5, "different": -0.1, "nearest": 0.9, "num_clips": 3} for kind in kinds},
        "skipped": [],
        "examples": said,
    }
    (spoken / "report.json").write_text(json.dumps({"run": "it", "step": step, "sets": [talks]}))
    for n in range(3):
        for place, kind in enumerate(kinds):
            tone = 0.3 * np.sin(2 * np.pi * 220 * (n + place + 1) * np.arange(12_000) / 24_000)
            soundfile.write(spoken / f"voices-u{n}-{n}-{kind}.wav", tone, 24_000, subtype="PCM_16")
        pixels = (np.add.outer(np.arange(280), np.arange(320)) * (n + 1) % 256).astype(np.uint8)
        Image.fromarray(pixels).save(spoken / f"voices-u{n}-{n}.png")


def write_curriculum(folder: Path) -> Path:
    """Five stages: two done, one running, one stopped beside it, one waiting."""
    folder.mkdir(parents=True)
    graph = {
        "audio_encoder": ("done", [], 300),
        "stage1": ("done", ["audio_encoder"], 400),
        "stage2": ("running", ["stage1"], 500),
        "talker": ("stopped", ["stage1"], 200),
        "sft": ("waiting", ["stage2", "talker"], 0),
    }
    stages = {}
    for name, (state, after, steps) in graph.items():
        entry: dict[str, Any] = {
            "state": state,
            "after": after,
            "run": str(folder / name),
            "engine": "local",
            "world": 1,
        }
        if steps:
            write_run(folder / name, steps, evals=False, start=6.0 - len(after))
            entry |= {"init": [f"outputs/c/{each}" for each in after], "step": steps, "tokens": 8000 * steps}
            entry |= {
                "began": "2026-03-01T10:00:00+00:00",
                "ended": "2026-03-01T11:30:00+00:00" if state == "done" else None,
            }
        stages[name] = entry
    (folder / "lineage.json").write_text(json.dumps({"name": folder.name, "stages": stages}))
    beat(folder / "stage2")
    path = folder / "stage2" / "recipe.yaml"
    path.write_text(path.read_text().replace("main: {steps: 400}", "main: {steps: 900}"))
    return folder


def beat(folder: Path, ago: float = 0.0) -> None:
    """A heartbeat of rank 0."""
    (folder / "heartbeats").mkdir(exist_ok=True)
    body = {"rank": 0, "host": "node0", "pid": 1, "step": 5, "part": "forward", "at": time.time() - ago}
    (folder / "heartbeats" / "rank00000.json").write_text(json.dumps(body))
