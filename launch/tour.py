"""The whole path on a laptop: make a speech corpus, train a tiny Thinker on it, evaluate, say where everything is.

    python -m launch.tour [KEY=VALUE ...]        settings of recipes/demo.yaml

    espeak-ng --> outputs/demo_data/{train,voices,sentences} --> train.py recipe=demo --> word error rate, curves

Interrupted, it goes on where it was; ended, it says so. Remove outputs/demo to train again, outputs/demo_data to make
new data.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from data import demo as corpus
from train.main import main as train

DATA = Path("outputs/demo_data")


def main(argv: Sequence[str]) -> int:
    """Exit status: 0, or that of the part that failed."""
    print(f"speech corpus in {DATA}: English, German, French, Russian, Mandarin; synthetic voices")
    made = corpus.main([str(DATA), "--tasks", "transcription"])  # a corpus that is there already is kept
    return made or train(["recipe=demo", *argv])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
