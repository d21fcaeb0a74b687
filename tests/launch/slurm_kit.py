"""A real SLURM cluster for tests, a run that only pretends, and waiting for what a job does."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from launch import slurm
from launch.arguments import guarded
from tests.run_kit import free_port

SCRIPT = Path(__file__).with_name("slurm_cluster.sh")
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
# Stands for Python on the nodes. It notes the words it gets, and node 0 does what line N of $PLAN says in attempt N:
# done, stopped or error (as launch.rank writes them), fail, or wait for SIGUSR1 and then stop.
PRETENDER = r"""#!/usr/bin/env bash
notes=$NOTES/$((${SLURM_RESTART_COUNT:-0} + 1)).$SLURM_NODEID
printf '%s\0' "$@" >"$notes.words"
env -0 >"$notes.env"
[ "$SLURM_NODEID" = 0 ] || exit 0
tell() { echo "$1" >"$OMNILOOM_OUTCOME"; }
trap 'echo heard; tell stopped; exit 0' USR1
trap 'exit 1' TERM
echo ready >"$notes.ready"
case $(sed -n "$((${SLURM_RESTART_COUNT:-0} + 1))p" "$NOTES/plan") in
wait) while :; do sleep 0.1; done ;;
fail) exit 1 ;;
error) tell error; exit 2 ;;
stopped) tell stopped ;;
*) tell done ;;
esac
"""


def why_not() -> str | None:
    """Why there can be no cluster here, or None."""
    missing = [name for name in DAEMONS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    if missing:
        return f"no {missing[0]} here: apt-get install slurm-wlm munge"
    return "SLURM's daemons need root" if os.geteuid() else None


@contextmanager
def cluster(state: Path) -> Iterator[None]:
    """Two nodes below `state`; what runs in this process sees them, and no other SLURM."""
    before = os.environ.copy()
    os.environ["PATH"] += ":/usr/sbin"
    os.environ["SLURM_CONF"] = str(state / "slurm.conf")
    try:
        ports = [str(free_port()) for _ in range(3)]
        started = subprocess.run(["bash", SCRIPT, "start", state, *ports], capture_output=True, text=True, timeout=60)
        assert started.returncode == 0, started.stdout + started.stderr
        yield
    finally:
        subprocess.run(["bash", SCRIPT, "stop", state], timeout=120, check=True)
        os.environ.clear()
        os.environ.update(before)


def submit(*words: str) -> int:
    """`python -m launch.slurm WORDS`; its exit status."""
    return guarded(slurm.main, words)


def call(*command: str) -> str:
    """Output of one of SLURM's commands."""
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def job_of(run: Path, number: int = 1) -> str:
    """The job of a submission."""
    return (run / "slurm" / str(number) / "job").read_text().strip()


def log_of(run: Path, number: int = 1) -> str:
    """What a submission's job has said so far."""
    path = run / "slurm" / str(number) / "log.txt"
    return path.read_text() if path.exists() else ""


def wait_until(holds: Callable[[], object], run: Path, timeout_s: float) -> None:
    """Look until something holds; the job's log tells why it does not."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {timeout_s} s\n{call('squeue')}\n{log_of(run)}"
        time.sleep(0.1)


def ended(run: Path, timeout_s: float = 100) -> dict[str, str]:
    """Wait until the run's job is over; what SLURM says of it."""
    job = job_of(run)
    fields: dict[str, str] = {}

    def over() -> bool:
        words = call("scontrol", "--oneliner", "show", "job", job).split()
        fields.update(word.split("=", 1) for word in words if "=" in word)
        return fields["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED")

    wait_until(over, run, timeout_s)
    return fields


def ranks(run: Path) -> list[int]:
    """Processes that train a run, on all nodes of this machine."""
    pattern = f"^[^ ]*python[0-9.]* -u -m launch.rank .*run={run}( |$)"
    return [int(pid) for pid in subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True).stdout.split()]
