"""Run a frozen Thinker over shards once, and train a Talker on what it reads of it (data/hidden.py).

    cache_hidden: for each shard: conversations with speech, in order --packs of at most `max_tokens`-->
                    Thinker up to the layer --> NAME.tar.hidden
    cached_course: weights that a phase starts with --digest--> the files are theirs? --> a reader of records, not media

Media are heard and seen as they are: no augmentation. A shard whose file is there already is left alone, so an
interrupted run goes on where it was. Cost: one forward of half the Thinker in the released shapes; for a phase, one
pass over the Thinker's weights, 0.7 s a GB in fp32, on every rank.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from data.corpus import Corpus
from data.hidden import HiddenShard, HiddenStates, HiddenWriter, Origin, hidden_path
from data.reader import Reader
from data.types import Batch
from models.config import ThinkerConfig
from models.hf import released_pieces
from models.omni import Omni
from models.omni_config import OmniConfig
from models.say import media_states
from models.talker_inputs import multimodal_rows
from models.thinker import Thinker
from train.checkpoint import CheckpointReader, Manifest, open_weights
from train.config import Recipe
from train.engines import WEIGHT
from train.errors import RecipeError
from train.feed import Course
from train.recipe import Span

BLOCK = 4 << 20  # elements read at a time
ReadWeight = Callable[[str, Sequence[int], int, int], Tensor]  # our name, shape, start, length -> flat values


def cache_hidden(
    omni: Omni,
    corpus: Corpus,
    reader: Reader,
    model: str,
    *,
    max_tokens: int = 8192,
    dtype: str = "bf16",
    tell: Callable[[str], None] = print,
) -> int:
    """Write what is missing beside the shards of `corpus`; returns the number of samples that had to be left out.

    `model` is the `thinker_digest` of the weights. Raises DataError where a file of another model or layer lies there.
    """
    origin = _origin(omni.config, reader, model)
    width, device = omni.config.thinker.text.hidden_size, omni.thinker.model.embed_tokens.weight.device
    left_out = 0
    for shard, path in enumerate(corpus.paths):
        index = corpus.index(shard)
        if hidden_path(path).exists():
            HiddenShard(index, origin)  # raises where it is another's
            tell(f"{path}: has its hidden states")
            continue
        first = int(corpus.offsets[shard])
        rows = index.speech_rows().tolist()
        with HiddenWriter(index, origin, width=width, dtype=dtype) as writer:
            for pack in _packs([first + row for row in rows], reader, max_tokens):
                batch, readable = reader.prompts(pack, whole=True)
                for sample, found in zip(readable, _split(omni, batch.to(device)), strict=True):
                    _skip_to(writer, sample - first)
                    writer.add(*found)
                left_out += len(pack) - len(readable)
                for line in batch.skipped:
                    tell(line)
            _skip_to(writer, index.num_samples)
        tell(f"{path}: {writer.rows} rows of {len(rows)} samples with speech")
    return left_out


def cached_course(course: Course, recipe: Recipe, span: Span, model: OmniConfig, manifest: Manifest | None) -> Course:
    """The course of a phase whose Thinker does not run: its reader takes the records of the hidden states.

    They must be those of the weights that the phase starts with: of `manifest`, else of the recipe's `init`. Found
    from the files, so the engine does not matter. Raises DataError for a shard whose states are missing or others',
    RecipeError where there are no weights to start with.
    """
    if manifest is not None:
        opened = CheckpointReader(manifest, released_pieces)
    elif recipe.init is not None:
        opened = open_weights(recipe.init, released_pieces)
    else:
        raise RecipeError(
            f"phases.{span.name}.speech=cached: hidden states are those of trained weights: set init to their run"
        )
    digest = thinker_digest(model.thinker, partial(opened.read, WEIGHT))
    states = HiddenStates(course.reader.corpus, _origin(model, course.reader, digest))
    states.verify()
    return replace(course, reader=course.reader.of_records(states))


def thinker_digest(config: ThinkerConfig, read: ReadWeight) -> str:
    """Which Thinker: SHA-256 over its sizes and every weight as fp32, whatever file or engine it is in."""
    with torch.device("meta"):
        shapes = {f"thinker.{name}": tuple(weight.shape) for name, weight in Thinker(config).named_parameters()}
    digest = hashlib.sha256(repr(config).encode())
    for name, shape in sorted(shapes.items()):
        digest.update(repr((name, shape)).encode())
        numel = math.prod(shape)
        for start in range(0, numel, BLOCK):
            values = read(name, shape, start, min(BLOCK, numel - start)).to("cpu", torch.float32)
            digest.update(values.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _origin(config: OmniConfig, reader: Reader, model: str) -> Origin:
    assert config.talker is not None
    return Origin(model, config.talker.accept_hidden_layer, reader.sizing)


def _packs(samples: Sequence[int], reader: Reader, max_tokens: int) -> Iterator[list[int]]:
    """Samples in order, cut where a pack would exceed `max_tokens`; a longer one is a pack by itself."""
    pack: list[int] = []
    used = 0
    for sample in samples:
        tokens = reader.prompt_tokens(sample)
        if pack and used + tokens > max_tokens:
            yield pack
            pack, used = [], 0
        pack.append(sample)
        used += tokens
    if pack:
        yield pack


def _skip_to(writer: HiddenWriter, row: int) -> None:
    while len(writer.tokens) < row:
        writer.skip()


def _split(omni: Omni, batch: Batch) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Tokens, positions and the hidden states that the Talker reads, for each document of a pack."""
    lengths = list(batch.doc_lengths)
    ids = batch.token_ids_T.split(lengths)
    rows = [len(multimodal_rows(omni.config, ids_S, [len(ids_S)])) for ids_S in ids]
    states = media_states(omni, batch).split(rows)
    return list(zip(ids, batch.position_ids_3T.split(lengths, dim=1), states, strict=True))
