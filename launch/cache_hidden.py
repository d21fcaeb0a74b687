"""Keep what a Talker reads of a frozen Thinker beside the shards, once, so that training the Talker skips the Thinker.

    python -m launch.cache_hidden model=FOLDER shards='data/*.tar'

`model` is a folder of released weights with its tokenizer, the one that the shards were indexed with. Shards that have
their file already are left alone. See data/hidden.py for what is written.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from data.corpus import Corpus
from data.reader import Reader
from data.tokenizer import load_tokenizer
from launch.arguments import guarded, parse
from launch.loading import load_model
from launch.weights import PRECISION, open_folder
from models.config import ConfigError
from models.positions import MediaTokens
from train.errors import RecipeError
from train.hidden import cache_hidden
from train.layout import ModelLayout

KNOWN = {"model": None, "shards": None, "max_tokens": "8192", "dtype": "", "keep": "bf16", "device": "cpu"}


def cache(argv: Sequence[str]) -> None:
    """Run the command. Raises this project's errors."""
    given, rest = parse(argv, KNOWN)
    if rest:
        raise RecipeError(f"unknown argument {rest[0]!r}")
    if given["keep"] not in PRECISION:
        raise RecipeError(f"keep={given['keep']}: it is {' or '.join(PRECISION)}")
    if not given["max_tokens"].isdigit() or int(given["max_tokens"]) < 1:
        raise RecipeError(f"max_tokens must be a positive number, not {given['max_tokens']!r}")
    folder = Path(given["model"])
    omni = load_model(folder, given["dtype"] or None, given["device"])
    if omni.config.talker is None:
        raise ConfigError(f"{folder}: has no Talker, so nothing says which hidden states to keep")
    tokenizer = load_tokenizer(folder)
    corpus = Corpus.open([given["shards"]], tokenizer.fingerprint)
    layout = ModelLayout.of(omni.config.thinker, MediaTokens.of(omni.config))
    reader = Reader(corpus, tokenizer, seed=0, layout=layout)
    kept, most = PRECISION[given["keep"]], int(given["max_tokens"])
    left_out = cache_hidden(omni, corpus, reader, identity(folder), max_tokens=most, dtype=kept)
    print(f"{corpus.num_samples} samples, {left_out} left out")


def identity(folder: Path) -> str:
    """Which weights: SHA-256 over names, shapes and a sample of the bytes of every tensor of the Thinker."""
    digest = hashlib.sha256()
    for name, weight in sorted(open_folder(folder).items()):
        if name.startswith("thinker."):
            sample = weight.read(0, min(weight.numel, 4096)).contiguous().view(torch.uint8)
            digest.update(repr((name, weight.shape)).encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def main(argv: Sequence[str]) -> int:
    """The command; its exit status."""
    return guarded(cache, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
