"""The installed command: `omniloom recipe=demo` trains, `omniloom evaluate run=...` and others run launch.*.

Inside the wheel the packages lie in one folder, `omniloom`; put on sys.path it gives the code the plain imports
(`train`, `data`, `models`) that it has in a checkout, and nothing generic lands in site-packages.
"""

import runpy
import sys
from pathlib import Path

COMMANDS = (
    "evaluate",
    "convert",
    "generate",
    "demo",
    "tour",
    "plan",
    "report",
    "slurm",
    "cache_hidden",
    "voice",
    "preferences",
    "fsdd",
    "fsdd_talker",
)


def main() -> int:
    """Run a command of `launch`, or train."""
    from omniloom import train as anchor  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

    sys.path.insert(0, str(Path(str(anchor.__file__)).parents[1]))
    if len(sys.argv) > 1 and sys.argv[1] in COMMANDS:
        command = sys.argv.pop(1)
        runpy.run_module(f"launch.{command}", run_name="__main__", alter_sys=True)
        return 0
    from train.main import main as train
    from train.ranks import leave

    leave(train(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
