"""Real recordings of spoken digits: three speakers train, a fourth is never heard (Free Spoken Digit Dataset).

python -m launch.fsdd TAR_OR_FOLDER [KEY=VALUE ...]        settings of recipes/fsdd.yaml

{digit}_{speaker}_{n}.wav --> outputs/fsdd_data/train     george, jackson, lucas, nine takes in ten
                                               /heldout   the other takes of the three
                                               /speaker   nicolas
train.py recipe=fsdd --> word error rate on heldout and speaker
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from data import convert
from train.main import main as train

DATA = Path("outputs/fsdd_data")
NAMES = "zero,one,two,three,four,five,six,seven,eight,nine"


def main(argv: Sequence[str], stopped: int = 0) -> int:
    """Exit status: 0 (also when there is no such data), that of the part that failed, or `stopped` (train.main)."""
    if not argv or "=" in argv[0]:
        print("error: give the folder or tar of {digit}_{speaker}_{n}.wav files first", file=sys.stderr)
        return 2
    source, settings = Path(argv[0]), argv[1:]
    if not source.exists():
        print(f"skipped: {source} does not exist; give the recordings by: make fsdd FSDD=PATH")
        return 0
    done = DATA / ".done"
    if not done.is_file():
        shutil.rmtree(DATA, ignore_errors=True)
        command = ["wavs", str(source), str(DATA), "--names", NAMES, "--eval-speaker", "nicolas", "--holdout", "0.1"]
        status = convert.main([*command, "--language", "en"])
        if status:
            return status
        done.touch()
    return train(["recipe=fsdd", *settings], stopped)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
