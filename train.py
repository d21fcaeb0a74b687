"""The command: `python train.py recipe=demo`, `torchrun --nproc-per-node 8 train.py recipe=stage2 KEY=VALUE ...`."""

import sys

from train.main import main
from train.ranks import leave

if __name__ == "__main__":
    leave(main(sys.argv[1:]))
