"""Pairs beside shards: found again by row, counted by plans, refused where they are not those, whole after a stop."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save

from data.code_store import ShardCodes
from data.codes import encode_shards
from data.corpus import Corpus
from data.errors import BadSample, DataError
from data.pair_store import ALIKE, Pair, PairsWriter, ShardPairs, counts, has_pairs
from tests.data.test_codes import CODEC, ToyCodec, shards

MADE = {"candidates": "4", "seed": "0"}


def pair(number: int, chosen: int = 3, rejected: int = 2) -> Pair:
    generator = torch.Generator().manual_seed(number)
    codes = [torch.randint(0, 64, (3, frames), generator=generator) for frames in (chosen, rejected)]
    return Pair(*codes, torch.randn(2, 2, generator=generator) - 9, (0.25, 1.5), number % 2 == 1)


def write(corpus: Corpus, shard: int = 0, upto: int = 99) -> list[int]:
    """Pairs of every second answer with speech; returns their rows."""
    index = corpus.index(shard)
    with PairsWriter(index, CODEC, MADE) as writer:
        rows = [row for row in index.speech_rows().tolist() if row < upto]
        for row in rows:
            if row < writer.next_row:
                continue
            if row % 2:
                writer.leave_out(row, f"{ALIKE}: word error rate 0.0%" if row % 3 else "it is damaged")
            else:
                writer.add(row, pair(row, 3 + row, row), "george" if row else "")
        if upto == 99:
            writer.finish()
    return [row for row in rows if row % 2 == 0]


def opened(corpus: Corpus) -> ShardPairs:
    return ShardPairs.open(corpus.paths[0], corpus.index(0), CODEC.identity)


def test_pairs_are_found_again_by_row(tmp_path: Path) -> None:
    corpus = shards(tmp_path, each=99)
    rows = write(corpus)
    pairs = opened(corpus)
    for row in range(corpus.num_samples):
        found, wanted = pairs.pair(row), pair(row, 3 + row, row)
        assert (found is None) is (row not in rows)
        if found is not None:
            assert torch.equal(found.chosen_GF, wanted.chosen_GF) and torch.equal(found.rejected_GF, wanted.rejected_GF)
            assert torch.equal(found.logprobs_22, wanted.logprobs_22) and found.logprobs_22.dtype is torch.float32
            assert (found.errors, found.recorded) == (wanted.errors, wanted.recorded)
    assert pairs.frames(slice(None)).tolist() == [3 + 2 * row if row in rows else 0 for row in range(11)]
    assert pairs.speakers == {"", "george"} and len(pairs.other) == 2 and "it is damaged" in pairs.other[0]
    count = counts([pairs])
    assert (count["pairs"], count["alike"], count["other"], count["recorded"]) == (len(rows), 2, 2, 0)
    assert (count["chosen_wer"], count["rejected_wer"]) == (0.25, 1.5)


def test_an_interrupted_shard_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    whole, cut = shards(tmp_path / "whole", each=99), shards(tmp_path / "cut", each=99)
    write(whole)
    write(cut, upto=5)
    partial = Path(f"{cut.paths[0]}.pairs.partial")
    assert not Path(f"{cut.paths[0]}.pairs").exists()
    partial.write_bytes(partial.read_bytes() + b"\x09\x00\x00\x00half")
    write(cut)
    assert not partial.exists()
    assert Path(f"{cut.paths[0]}.pairs").read_bytes() == Path(f"{whole.paths[0]}.pairs").read_bytes()


def test_a_corpus_counts_both_sequences_and_nobody_elses(tmp_path: Path) -> None:
    write(shards(tmp_path, each=99))
    corpus = Corpus.open([f"{tmp_path}/*.tar"], codec=CODEC.identity, pairs=True)
    frames = corpus.costs(4).speech_N
    assert frames is not None and frames.tolist() == [3 + 2 * 4]
    assert corpus.sought == "preference pairs"
    only = Corpus.open([f"{tmp_path}/*.tar"], codec=CODEC.identity, pairs=True, voices=("george",))
    assert only.speakers == {"george"} and only.sought == "preference pairs of george"
    assert only.fingerprint != corpus.fingerprint
    build, arguments, state = only.__reduce__()
    travelled = build(*arguments)
    travelled.__dict__.update(state)
    for found in (only, travelled):
        everybody, anybody = corpus.index(0).codes, found.index(0).codes
        assert everybody is not None and isinstance(anybody, ShardPairs)
        assert (everybody.codes(0) is None, anybody.pair(0)) == (False, None)
        assert anybody.frames(np.array([0, 4])).tolist() == [0, 11] and anybody.pair(4) is not None


def test_codes_of_some_speakers(tmp_path: Path) -> None:
    encode_shards(shards(tmp_path, each=99), CODEC)
    corpus = Corpus.open([f"{tmp_path}/*.tar"], codec=CODEC.identity, voices=("lucas",))
    codes = corpus.index(0).codes
    assert corpus.speakers == {"lucas"} and codes is not None
    assert np.flatnonzero(codes.frames(slice(None))).tolist() == [10] and codes.codes(0) is None


def test_other_pairs_are_refused(tmp_path: Path) -> None:
    corpus = shards(tmp_path, each=99)
    index = corpus.index(0)
    with pytest.raises(DataError, match=r"has no preference pairs; make them with: python -m launch.preferences run="):
        opened(corpus)
    assert not has_pairs(index, CODEC, MADE)
    write(corpus)
    assert has_pairs(index, CODEC, MADE)
    with pytest.raises(DataError, match="made with seed=0, asked for is seed=1; replace=true makes it anew"):
        has_pairs(index, CODEC, MADE | {"seed": "1"})
    with pytest.raises(DataError, match="its codes are those of codec toy/1, needed is toy/2"):
        has_pairs(index, ToyCodec("toy/2"), MADE)
    with pytest.raises(DataError, match="pairs: damaged pairs .*format is omniloom-codes-1, needed is omniloom-pairs"):
        encode_shards(corpus, CODEC)
        Path(f"{corpus.paths[0]}.pairs").write_bytes(Path(f"{corpus.paths[0]}.codes").read_bytes())
        opened(corpus)
    with pytest.raises(DataError, match="format is omniloom-pairs-1, needed is omniloom-codes-1"):
        write(shards(tmp_path / "b", each=99))
        Path(f"{tmp_path}/b/shard-000000.tar.pairs").rename(f"{corpus.paths[0]}.codes")
        ShardCodes.open(corpus.paths[0], index)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("chosen", 0, "chosen sequences make no sense"),
        ("chosen", 99, "chosen sequences make no sense"),
        ("logprobs", np.nan, "a log-probability is not finite"),
        ("errors", None, "its columns differ in length"),
        ("recorded", "missing", "column recorded is missing or not uint8"),
    ],
)
def test_damage_is_told(tmp_path: Path, column: str, value: object, message: str) -> None:
    corpus = shards(tmp_path, each=99)
    write(corpus)
    path = Path(f"{corpus.paths[0]}.pairs")
    columns, about = load_file(path), json.dumps(opened(corpus).about)
    if value is None:
        columns[column] = columns[column][:-1]
    elif value == "missing":
        del columns[column]
    else:
        columns[column] = np.full_like(columns[column], value)
    path.write_bytes(save(columns, metadata={"omniloom": about}))
    with pytest.raises(DataError, match=f"damaged pairs .{message}.; make it again with: python -m launch.preferences"):
        opened(corpus)


def test_bytes_that_changed_leave_the_sample_out(tmp_path: Path) -> None:
    corpus = shards(tmp_path, each=99)
    row = write(corpus)[1]
    path = Path(f"{corpus.paths[0]}.pairs")
    columns, about = load_file(path), json.dumps(opened(corpus).about)
    columns["codes"] = columns["codes"].copy()
    columns["codes"][3 * 3 + 1] ^= 1
    path.write_bytes(save(columns, metadata={"omniloom": about}))
    with pytest.raises(BadSample, match="codes have changed"):
        opened(corpus).pair(row)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    corpus = shards(tmp_path, each=99)
    with PairsWriter(corpus.index(0), CODEC, MADE) as writer:
        with pytest.raises(BadSample, match="its best candidate has no frames"):
            writer.add(0, pair(0, 0, 2), "")
        with pytest.raises(BadSample, match="gives a candidate no probability"):
            writer.add(0, replace(pair(0), logprobs_22=torch.tensor([[0.0, 1.0], [-torch.inf, 0.0]])), "")
        with pytest.raises(ValueError, match="codes run from"):
            writer.add(0, replace(pair(0), rejected_GF=torch.full((3, 2), 64)), "")
        with pytest.raises(DataError, match="another process is writing it"):
            PairsWriter(corpus.index(0), CODEC, MADE)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), min_size=1, max_size=7))
def test_any_lengths(tmp_path_factory: pytest.TempPathFactory, lengths: list[tuple[int, int]]) -> None:
    corpus = shards(tmp_path_factory.mktemp("pairs"), each=99)
    index = corpus.index(0)
    rows = index.speech_rows().tolist()[: len(lengths)]
    with PairsWriter(index, CODEC, MADE) as writer:
        for row, (chosen, rejected) in zip(rows, lengths, strict=False):
            writer.add(row, pair(row, chosen, rejected), "")
        writer.finish()
    for row, (chosen, rejected) in zip(rows, lengths, strict=False):
        found = opened(corpus).pair(row)
        assert found is not None and (found.chosen_GF.shape[1], found.rejected_GF.shape[1]) == (chosen, rejected)
        assert torch.equal(found.rejected_GF, pair(row, chosen, rejected).rejected_GF)
