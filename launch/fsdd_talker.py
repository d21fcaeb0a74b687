"""A Talker that says digits in the voices of real people (Free Spoken Digit Dataset), and a recogniser that checks it.

    python -m launch.fsdd_talker TAR_OR_FOLDER [KEY=VALUE ...]        settings of recipes/fsdd_talker.yaml

    {digit}_{speaker}_{n}.wav --launch.fsdd--> outputs/fsdd: the recogniser, which never hears the Talker
                              --data.convert --speak--> outputs/fsdd_talker_data: "Say it." -> "seven", spoken
    --launch.own_codec--> codec and codes --train.py recipe=fsdd_talker--> outputs/fsdd_talker
    --launch.evaluate suite=tts--> word error rate, recordings and pictures

Each part is kept once it is done: the same command goes on where it was.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from data import convert
from launch import evaluate, fsdd, own_codec
from launch.arguments import guarded
from train.main import main as train

DATA = Path("outputs/fsdd_talker_data")
HELDOUT = f"shards={DATA}/heldout/*.tar"
EVALUATION = ["run=outputs/fsdd_talker", "suite=tts", "recogniser=outputs/fsdd", HELDOUT, "temperature=0"]


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 (also when there is no such data), or that of the part that failed."""
    source = Path(argv[0]) if argv and "=" not in argv[0] else None
    if source is None:
        print("error: give the folder or tar of {digit}_{speaker}_{n}.wav files first", file=sys.stderr)
        return 2
    if not source.exists():
        print(f"skipped: {source} does not exist; give the recordings by: make fsdd-talker FSDD=PATH")
        return 0
    return (
        fsdd.main([str(source)], stopped=130)
        or _corpus(source)
        or train(["recipe=fsdd_talker", *argv[1:]], stopped=130)
        or guarded(evaluate.evaluate, EVALUATION)
    )


def _corpus(source: Path) -> int:
    """Shards with speech, their codec and codes: exit status."""
    if not (DATA / ".done").is_file():
        command = ["wavs", str(source), str(DATA), "--names", fsdd.NAMES, "--eval-speaker", "nicolas"]
        if status := convert.main([*command, "--holdout", "0.1", "--language", "en", "--speak"]):
            return status
        (DATA / ".done").touch()
    return own_codec.main([str(DATA), "codebooks=6", "codebook_size=256"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
