"""launch/local.sh: one node without SLURM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch.slurm_kit import ranks
from tests.run_kit import ROOT, command, losses, write_corpus

LOCAL = ROOT / "launch" / "local.sh"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def begin(corpus: Path, run: Path, *words: str) -> subprocess.Popen[str]:
    """The script as a shell starts it, on twelve steps, from a folder that is not ours."""
    settings = command(corpus, run)
    settings = settings[settings.index("recipe=transcribe") :]
    return subprocess.Popen(
        [LOCAL, *settings, *words],
        cwd=corpus,
        env=os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def until(holds: Callable[[], object], process: subprocess.Popen[str], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "a run"
    process = begin(corpus, run, "save.every=1000", "phases.all.steps=200")
    until(lambda: max(losses(run), default=0) >= 2, process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes of the command
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, output + errors
    assert "asking the run to save and stop" in output and "Traceback" not in output
    step = max(losses(run))
    assert step < 200
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step-{step:08d}"
    assert output.strip() in (run / "local" / "log.txt").read_text()
    process = begin(corpus, run, "save.every=1000", "phases.all.steps=200", f"max_steps={step + 2}")
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0 and f"resumed at step {step}" in output, output + errors


@pytest.mark.slow
def test_a_crash_is_restarted_up_to_the_limit(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = begin(corpus, run, "restarts=1", "save.every=1000", "phases.all.steps=400")
    until(lambda: losses(run), process)
    os.kill(ranks(run)[0], signal.SIGKILL)
    log = run / "local" / "log.txt"
    until(lambda: "restart 1 of 1 from the beginning" in log.read_text(), process)
    began = log.read_text().count("run folder:")
    until(lambda: log.read_text().count("run folder:") > began or ranks(run), process)
    until(lambda: ranks(run), process)
    os.kill(ranks(run)[0], signal.SIGKILL)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 1, output + errors
    assert "it has failed 2 times without a new checkpoint, restarts=1: not started again" in output


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optim.rl=1", "unknown setting 'optim.rl', did you mean 'optim.lr'?"),
        ("restarts=x", "processes and restarts are whole numbers, not 'x'"),
    ],
)
def test_a_mistake_in_settings_is_one_line(corpus: Path, tmp_path: Path, word: str, message: str) -> None:
    process = begin(corpus, tmp_path / "run", word)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and errors == f"error: {message}\n"
    assert not (tmp_path / "run").exists()


def test_a_mistake_in_data_is_not_restarted(corpus: Path, tmp_path: Path) -> None:
    process = begin(corpus, tmp_path / "run", "data.shards=[nowhere/*.tar]")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 2, output + errors
    assert "error: data.shards: no file matches" in output and output.count("run folder") == 0
    assert "restart" not in output


RANK = """
import signal, sys, time
from launch import rank

def train(argv, stopped):
    try:
        print("ready", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(1)  # saving; a second request must not come through
        return stopped

rank.train = train
signal.pthread_sigmask(signal.SIG_BLOCK, rank.STOPS)
sys.exit(rank.main([]))
"""


@pytest.mark.parametrize(
    ("parent_sends", "status", "outcome"), [(True, 143, None), (False, 0, "stopped\n")], ids=["torchrun", "SLURM"]
)
def test_a_rank_hears_a_request_once_and_tells_torchruns_from_others(
    parent_sends: bool, status: int, outcome: str | None, tmp_path: Path
) -> None:
    """torchrun is its parent, and sends SIGTERM when a peer has failed: then there is nothing to save."""
    told = tmp_path / "outcome"
    environment = os.environ | {"OMNILOOM_OUTCOME": str(told), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", RANK], env=environment, text=True, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for _ in range(2):
        if parent_sends:
            process.send_signal(signal.SIGTERM)
        else:
            subprocess.run(["kill", "-TERM", str(process.pid)], check=True)
        time.sleep(0.3)
    assert process.wait(60) == status
    assert (told.read_text() if told.exists() else None) == outcome


EARLY = """
import os, signal, sys, time
from launch import rank

rank.train = lambda argv, stopped: time.sleep(60)
signal.pthread_sigmask(signal.SIG_BLOCK, rank.STOPS)
os.kill(os.getpid(), signal.SIGUSR1)
sys.exit(rank.main([]))
"""


def test_a_request_that_waited_while_a_rank_started_ends_it(tmp_path: Path) -> None:
    """It may come before train is called, which is what catches it later."""
    told = tmp_path / "outcome"
    environment = os.environ | {"OMNILOOM_OUTCOME": str(told), "PYTHONPATH": str(ROOT)}
    process = subprocess.run([sys.executable, "-c", EARLY], env=environment, capture_output=True, text=True, timeout=60)
    assert process.returncode == 130 and not told.exists()
    assert process.stderr == "stopped before it began; the last checkpoint is whole\n"
