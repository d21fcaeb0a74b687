"""Keep what a Talker reads of a frozen Thinker beside the shards, once, so that training the Talker skips the Thinker.

    python -m launch.cache_hidden run=RUN [checkpoint=latest] [shards='data/*.tar'] [KEY=VALUE ...]
    python -m launch.cache_hidden model=FOLDER shards='data/*.tar' [data.image.max_pixels=...]
    ... then: python train.py recipe=... init=RUN|FOLDER phases.X.speech=cached

`run` is a run of train.py whose model has a Talker, by default with the shards of its recipe; KEY=VALUE changes that.
`model` is a folder of released weights with its tokenizer, the one that the shards were indexed with. A phase takes the
states only where it starts with the very same weights. Shards that have their file already are left alone; samples
without speech need none. See data/hidden.py for what is written.

max_tokens=8192  tokens that the Thinker reads together     keep=bf16|fp32  how the states are kept
dtype=bf16|fp32  how they are computed                      device=cpu|cuda
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from data.config import DataConfig, check_sizes
from data.corpus import Corpus
from data.document import MediaLimits
from data.hidden import DTYPES
from data.reader import Reader
from data.tokenizer import Tokenizer, load_tokenizer
from launch.arguments import guarded, parse, whole
from launch.loading import load_model
from launch.released import open_released
from launch.run_engine import omni_of, open_run
from launch.weights import fused_weights
from models.config import ConfigError
from models.omni import Omni
from models.omni_config import OmniConfig
from models.positions import MediaTokens
from train.engines import WEIGHT
from train.errors import RecipeError
from train.hidden import cache_hidden, thinker_digest
from train.layout import ModelLayout
from train.typed import build

KNOWN = {"run": "", "model": "", "checkpoint": "", "shards": "", "max_tokens": "8192", "keep": "bf16"}
KNOWN |= {"dtype": "", "device": ""}


class Opened(NamedTuple):
    """A model to run, and how it reads."""

    omni: Omni
    digest: str
    tokenizer: Tokenizer
    limits: MediaLimits
    shards: list[str]


def cache(argv: Sequence[str]) -> None:
    """Run the command. Raises this project's errors."""
    given, settings = parse(argv, KNOWN)
    if bool(given["run"]) == bool(given["model"]):
        raise RecipeError("give run=RUN, or model=FOLDER")
    for name in ("keep", "dtype"):
        if given[name] not in ("", *DTYPES):
            raise RecipeError(f"{name}={given[name]}: it is {' or '.join(DTYPES)}")
    max_tokens = whole(given, "max_tokens", 1, 1 << 31)
    omni, digest, tokenizer, limits, shards = (of_run if given["run"] else of_folder)(given, settings)
    corpus = Corpus.open(shards, tokenizer.fingerprint)
    layout = ModelLayout.of(omni.config.thinker, MediaTokens.of(omni.config))
    reader = Reader(corpus, tokenizer, seed=0, layout=layout, limits=limits)
    left_out = cache_hidden(omni, corpus, reader, digest, max_tokens=max_tokens, dtype=given["keep"])
    print(f"{corpus.num_samples} samples, {left_out} left out")


def of_run(given: Mapping[str, str], settings: Sequence[str]) -> Opened:
    """The model of a checkpoint. Raises this project's errors."""
    names = {"dtype": "engine.precision", "device": "engine.device"}
    changes = [f"{name}={given[key]}" for key, name in names.items() if given[key]]
    opened = open_run(Path(given["run"]), [*settings, *changes])
    check_talker(opened.model, given["run"])
    engine, step = opened.engine(given["checkpoint"] or "latest")
    print(f"step {step} of {given['run']}")
    masters = {part.name: part.tensors.get(WEIGHT) for part in engine.fragments()}  # whole: one process owns all

    def read(name: str, shape: Sequence[int], start: int, length: int) -> Tensor:
        flat = masters[name]
        assert flat is not None
        return flat[start : start + length]

    omni, data = omni_of(engine), opened.recipe.data
    digest, shards = thinker_digest(omni.config.thinker, read), [given["shards"]] if given["shards"] else data.shards
    return Opened(omni, digest, opened.tokenizer, data.limits, shards)


def of_folder(given: Mapping[str, str], settings: Sequence[str]) -> Opened:
    """The model of a folder of released weights. Raises this project's errors."""
    folder = Path(given["model"])
    for key, asked in (("checkpoint", False), ("shards", True)):
        if bool(given[key]) != asked:
            raise RecipeError(f"model=FOLDER {'needs' if asked else 'has no'} {key}=")
    try:
        plain: Any = OmegaConf.to_container(OmegaConf.from_dotlist(list(settings)))
    except OmegaConfBaseException as error:
        raise RecipeError(" ".join(str(error).split())) from None
    data = build(DataConfig, {"tokenizer": str(folder)} | plain.pop("data", {}), "data.")
    if plain:
        raise RecipeError(f"unknown argument {next(iter(plain))!r}: with model=FOLDER settings are of data alone")
    check_sizes(data.image, data.video)
    released = open_released(folder)
    check_talker(released.config, given["model"])
    omni = load_model(folder, given["dtype"] or None, given["device"] or "cpu")
    weights = fused_weights(released.weights)
    read: Callable[..., Tensor] = lambda name, _, start, length: weights[name].read(start, length)  # noqa: E731
    digest = thinker_digest(omni.config.thinker, read)
    return Opened(omni, digest, load_tokenizer(folder), data.limits, [given["shards"]])


def check_talker(config: object, source: str) -> None:
    """Raise ConfigError for a model without a Talker."""
    if not isinstance(config, OmniConfig) or config.talker is None:
        raise ConfigError(f"{source}: has no Talker, so nothing says which hidden states to keep")


def main(argv: Sequence[str]) -> int:
    """The command; its exit status."""
    return guarded(cache, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
