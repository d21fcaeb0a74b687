"""train.py as a launcher starts it: hears a request to stop once, and writes down how the run ended.

    launch.torchrun --> torchrun --> launch.rank recipe=stage2 [KEY=VALUE ...]
                                       | SIGTERM or SIGUSR1, from SLURM or a script: the run finishes its step, saves
                                       | SIGTERM from torchrun: a peer has failed; leaves at once
                                       --> exit status for torchrun; $OMNILOOM_OUTCOME: done, stopped or error

The same request often comes twice: from SLURM to all processes, and from the script that was told. train.run takes a
second one for impatience and leaves without saving, so all after the first are dropped here. SIGKILL is the way out.
A run that was stopped as asked leaves with 0 like one that is done, since torchrun calls anything else a failure.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from launch.torchrun import STOPS
from train import ranks
from train.main import main as train

OUTCOME = "OMNILOOM_OUTCOME"  # file for the ending; without it nothing is written
STOPPED, USER_ERROR, LEFT, PEER_FAILED = 75, 2, 130, 143


def main(argv: Sequence[str]) -> int:
    """Train. The exit status for torchrun."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # as launch.torchrun has done already
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start what runs beside them deaf to it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT,))  # below it is what is handed on
    try:
        threading.Thread(target=_listen, args=(threading.main_thread().ident,), daemon=True).start()
        status = train(argv, stopped=STOPPED)
    except KeyboardInterrupt:  # a request that waited while Python started comes before train can catch it
        print("stopped before it began; the last checkpoint is whole", file=sys.stderr)
        status = LEFT
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # too late to change how the run ended
    if status == USER_ERROR:
        _tell("error")
    elif ranks.rank() == 0 and status in (0, STOPPED):
        _tell("stopped" if status == STOPPED else "done")
    return 0 if status == STOPPED else status


def _listen(main_thread: int) -> None:
    """Hand the first request on, as Ctrl-C, and drop the others."""
    asked = False
    while True:
        came = signal.sigwaitinfo(STOPS)
        if came.si_pid == os.getppid():  # torchrun, which sends nothing while all is well
            os._exit(PEER_FAILED)
        if not asked:
            asked = True
            signal.pthread_kill(main_thread, signal.SIGINT)


def _tell(outcome: str) -> None:
    if name := os.environ.get(OUTCOME):
        part = Path(f"{name}.{os.getpid()}.part")
        part.write_text(f"{outcome}\n")
        part.replace(name)


if __name__ == "__main__":
    ranks.leave(main(sys.argv[1:]))
