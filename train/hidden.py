"""Run a frozen Thinker over shards once and keep what a Talker reads of it (data/hidden.py).

    for each shard: samples in order --packs of at most `max_tokens`--> Thinker up to the layer --> NAME.tar.hidden

Conversations are read up to the answer, media as they are: no augmentation. A shard whose file is there already is
left alone, so an interrupted run goes on where it was. A sample that cannot be read gets no rows and is reported.
Cost: one forward of half the Thinker in the released shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from data.corpus import Corpus
from data.hidden import HiddenShard, HiddenWriter, hidden_path
from data.reader import Reader
from data.shard_index import ShardIndex
from data.types import Batch
from models.omni import Omni
from models.talker_inputs import multimodal_rows
from train.speech import hidden_states


def cache_hidden(
    omni: Omni,
    corpus: Corpus,
    reader: Reader,
    model: str,
    *,
    max_tokens: int = 8192,
    dtype: torch.dtype = torch.bfloat16,
    tell: Callable[[str], None] = print,
) -> int:
    """Write what is missing beside the shards of `corpus`; returns the number of samples that had to be left out.

    `model` identifies the weights. Raises DataError where a file of another model or layer lies there.
    """
    assert omni.config.talker is not None
    layer, width = omni.config.talker.accept_hidden_layer, omni.config.thinker.text.hidden_size
    device, left_out = omni.thinker.model.embed_tokens.weight.device, 0
    for shard, path in enumerate(corpus.paths):
        index = corpus.index(shard)
        if hidden_path(path).exists():
            HiddenShard(index, model=model, layer=layer)  # raises where it is another's
            tell(f"{path}: has its hidden states")
            continue
        first = int(corpus.offsets[shard])
        with HiddenWriter(index, model=model, layer=layer, width=width, dtype=dtype) as writer:
            for rows in _packs(index, reader, max_tokens):
                batch, readable = reader.prompts([first + row for row in rows])
                states = iter(_split(omni, batch.to(device)))
                for row in rows:
                    found = first + row in readable
                    writer.add(next(states) if found else torch.empty(0, width))
                    left_out += not found
                for line in batch.skipped:
                    tell(line)
        tell(f"{path}: {writer.offsets[-1]} rows of {index.num_samples} samples")
    return left_out


def _packs(index: ShardIndex, reader: Reader, max_tokens: int) -> Iterator[list[int]]:
    """Rows of a shard in order, cut where a pack would exceed `max_tokens`; a longer sample is a pack by itself."""
    costs = index.costs(slice(0, index.num_samples))
    rows: list[int] = []
    used = 0
    for row, tokens in enumerate(reader.sizing.tokens(costs, reader.sizing.sizes(costs)).tolist()):
        if rows and used + tokens > max_tokens:
            yield rows
            rows, used = [], 0
        rows.append(row)
        used += tokens
    if rows:
        yield rows


def _split(omni: Omni, batch: Batch) -> Sequence[torch.Tensor]:
    """Rows that the Talker reads, for each document of the pack."""
    states_TH = hidden_states(omni, batch)
    parts = zip(batch.token_ids_T.split(list(batch.doc_lengths)), states_TH.split(list(batch.doc_lengths)), strict=True)
    return [states_SH[multimodal_rows(omni.config, ids_S, [len(ids_S)])] for ids_S, states_SH in parts]
