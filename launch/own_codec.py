"""A codec fitted to a corpus of its own, and codes of its spoken answers: part of make demo and make fsdd-talker.

python -m launch.own_codec CORPUS [settings of data.fit_codec ...]

CORPUS/train/*.tar --data.fit_codec--> CORPUS/codec
every shard of CORPUS/*/ --data.codes--> NAME.tar.codes beside it
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from data import codes, fit_codec


def main(argv: Sequence[str]) -> int:
    """Exit status: 0, or that of the part that failed. A codec that is there already is kept."""
    if not argv or "=" in argv[0]:
        print("error: give the folder of the corpus first", file=sys.stderr)
        return 2
    folder, codec = Path(argv[0]), Path(argv[0]) / "codec"
    if not codec.is_dir() and (status := fit_codec.main([str(codec), f"shards={folder}/train/*.tar", *argv[1:]])):
        return status
    return codes.main([f"codec={codec}", f"shards={folder}/*/*.tar"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
