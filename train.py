"""The command: `python train.py recipe=demo`, `torchrun --nproc-per-node 8 train.py recipe=stage2 KEY=VALUE ...`."""

import sys

from train.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
