"""torchrun whose processes are asked to stop by a signal and are not ended by it.

    python -m launch.torchrun [OPTIONS OF torchrun] -m launch.rank recipe=stage2 [KEY=VALUE ...]

torchrun ends itself and its processes at a SIGTERM and dies of SIGUSR1. SLURM sends either to every process of a job,
or to none but the script; a terminal sends SIGINT to all. So they are blocked here, before torchrun starts, and every
process below inherits that: torchrun, the ranks, readers of data, the writer of checkpoints, compilers. Only a rank
waits for them (launch/rank.py), and the script that started this one decides who is told. SIGKILL ends all as ever.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

STOPS = (signal.SIGTERM, signal.SIGUSR1)


def main(argv: Sequence[str]) -> NoReturn:
    """Become torchrun."""
    signal.pthread_sigmask(signal.SIG_BLOCK, (*STOPS, signal.SIGINT))  # kept by exec, unlike a handler
    os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *argv])


if __name__ == "__main__":
    main(sys.argv[1:])
