"""Whole runs of train.py in their own processes, on a small corpus of tones."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import yaml

from data.shards import write_shards
from tests.data.corpus_kit import mixed, tokenizer

ROOT = Path(__file__).resolve().parents[1]
TINY = {
    "text": {
        "vocab_size": 320,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "mrope_section": [4, 2, 2],
        "initializer_range": 0.1,
    },
    "audio": {
        "d_model": 32,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 48,
        "output_dim": 32,
        "downsample_hidden_size": 4,
    },
}


def write_corpus(folder: Path, count: int = 60) -> Path:
    """Shards of speech and text below folder/train, a small set below folder/heldout, and the tokenizer."""
    words = tokenizer()
    write_shards(mixed(count), folder / "train", words, 20)
    write_shards([record for record in mixed(9) if record.media], folder / "heldout", words, 20)
    words.save(folder / "tokenizer")
    return folder


def command(corpus: Path, run: Path, *settings: str, processes: int = 1) -> list[str]:
    """The command line of a run of twelve steps on the corpus."""
    text = [f"model.text.{key}={json.dumps(value)}" for key, value in TINY["text"].items()]
    audio = [f"model.audio.{key}={json.dumps(value)}" for key, value in TINY["audio"].items()]
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--master-port", str(free_port())]
    return [
        *launcher,
        str(ROOT / "train.py"),
        "recipe=transcribe",
        *text,
        *audio,
        f"run={run}",
        f"data.shards=[{corpus}/train/*.tar]",
        f"data.tokenizer={corpus}/tokenizer",
        "data.sequence_length=96",
        "data.sequences_per_step=3",
        "data.window=32",
        "data.workers=0",
        "data.speeds=[0.9,1.0,1.1]",
        "phases.all.steps=12",
        "optim.warmup_steps=3",
        "optim.lr=1e-2",
        "save.every=3",
        "log.every=1",
        "log.keys=true",
        "eval.every=0",
        "eval.sets={}",
        *settings,
    ]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    """Start a run in its own process group, one thread a process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        arguments, cwd=ROOT, env=environment, text=True, start_new_session=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], timeout_s: float = 200) -> str:
    """Wait for a run that must end well; its output."""
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        kill(process)
        raise
    assert process.returncode == 0, output
    return output


def kill(process: subprocess.Popen[str]) -> None:
    """kill -9 of every process of the run."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int, timeout_s: float = 120) -> None:
    """Until the run's log says that it has done `step`."""
    deadline = time.monotonic() + timeout_s
    while not [at for at in losses(run) if at >= step]:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"no step {step} after {timeout_s} s"
        time.sleep(0.02)


def losses(run: Path) -> dict[int, float]:
    """Step -> loss, from metrics.jsonl."""
    path, found = run / "metrics.jsonl", {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:  # the line being written
            continue
        if "loss" in entry:
            assert entry["step"] not in found, f"step {entry['step']} is logged twice"
            found[entry["step"]] = entry["loss"]
    return found


def keys(run: Path) -> dict[int, list[str]]:
    """Step -> sorted keys of the samples that all ranks consumed."""
    found: dict[int, list[str]] = {}
    for path in sorted(run.glob("keys-rank*.jsonl")):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            found.setdefault(entry["step"], []).extend(entry["keys"])
    return {step: sorted(names) for step, names in found.items()}


def saved_settings(run: Path) -> dict:
    """The recipe that a run wrote down."""
    return yaml.safe_load((run / "recipe.yaml").read_text())


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
