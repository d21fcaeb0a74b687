"""The demo's speech codec and the codes of its spoken answers: what launch/tour.py runs beside the training.

python -m launch.tour_codec outputs/demo_data

shards --data.fit_codec--> codec --data.codes--> NAME.tar.codes beside each shard
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from data import codes, fit_codec

SPLITS = ("train", "voices", "sentences", "scenes")


def main(argv: Sequence[str]) -> int:
    """Exit status: 0, or that of the part that failed."""
    folder = Path(argv[0])
    codec, shards = folder / "codec", ",".join(f"{folder}/{split}/*.tar" for split in SPLITS)
    if not codec.is_dir() and (status := fit_codec.main([str(codec), f"shards={folder}/train/*.tar", *argv[1:]])):
        return status
    return codes.main([f"codec={codec}", f"shards={shards}"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
