"""Commands as processes that cost milliseconds to start: each is a fork of one process that has imported everything.

    test --a line of JSON: words, folder, file for its output--> this module, as a process --fork--> the command
         <--exit status--

Run as `python -m tests.docs.forks` by `Forks`. Only `python -m MODULE ...` and `python FILE ...` are run so.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
USED = (
    "train.main", "launch.answering", "launch.loading", "launch.tts", "launch.weights", "launch.plan_search",
    "data.demo_plan", "data.convert_run", "data.fit_codec", "launch.report_page", "data.page",
    "launch.slurm_script",
)  # fmt: skip


class Forks:
    """The process; `run` waits for one command at a time."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.docs.forks"],
            cwd=ROOT,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def run(self, words: list[str], folder: Path, timeout_s: float, environment: dict[str, str]) -> tuple[int, str]:
        """Exit status and output of `words`, which follow `python`. Killed after `timeout_s`: status -9."""
        log = folder / ".output"
        assert self.process.stdin and self.process.stdout
        job = {
            "words": words,
            "folder": str(folder),
            "log": str(log),
            "environment": environment,
            "timeout_s": timeout_s,
        }
        print(json.dumps(job), file=self.process.stdin, flush=True)
        status = int(self.process.stdout.readline())
        return status, log.read_text(errors="replace")

    def close(self) -> None:
        """End it."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(10)


def child(job: dict) -> None:
    """Become the command of a job, as `python WORDS` in its folder; never returns."""
    os.setsid()
    os.chdir(job["folder"])
    os.environ.update(job["environment"])
    output = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    status = 1
    try:
        if job["words"][0] == "-m":
            sys.argv = job["words"][1:]
            sys.path[0] = job["folder"]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = job["words"]
            sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
            runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve() -> None:
    """Fork for every line of standard input."""
    import importlib

    for name in USED:
        importlib.import_module(name)
    for line in sys.stdin:
        job = json.loads(line)
        if not (pid := os.fork()):
            child(job)
        timer = threading.Timer(job["timeout_s"], stop, [pid])
        timer.start()
        _, status = os.waitpid(pid, 0)
        timer.cancel()
        print(os.waitstatus_to_exitcode(status), flush=True)
    os._exit(0)  # nothing here is worth the time of an orderly end


def stop(pid: int) -> None:
    """End a command and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGTERM)
        time.sleep(2)
        os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    serve()
