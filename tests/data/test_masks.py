"""Which answers carry loss: turn by turn, for any conversation, and the same inside packs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import DataConfig
from data.corpus import Corpus
from data.document import IGNORE, Maker, MediaLimits, join
from data.errors import DataError
from data.loader import stream
from data.plan import Plan, PlanSettings
from data.reader import Reader
from data.sample import SampleRecord
from data.shards import write_shards
from data.tokenizer import IM_END
from tests.data.corpus_kit import tokenizer
from tests.data.layouts import layout_of
from tests.data.test_loader import Rank

TOKENIZER = tokenizer()
WORDS = ("one", "two three", "hello world", "four")
TURN = st.tuples(
    st.sampled_from(["system", "user", "assistant"]), st.sampled_from(WORDS), st.sampled_from([None, 0, 1])
)
TALK = st.lists(TURN, min_size=1, max_size=6)


def record(key: str, turns: list[tuple[str, str, int | None]]) -> SampleRecord:
    messages: list[dict[str, Any]] = []
    for role, text, flag in turns:
        messages.append({"role": role, "content": text} | ({} if flag is None else {"loss": bool(flag)}))
    return SampleRecord(key, messages)


def expected(messages: Any, last_only: bool = False) -> str:
    """The answers that are learnt, each with its end, one after the other."""
    answers = [turn for turn in messages if turn["role"] == "assistant"]
    learnt = [turn for turn in (answers[-1:] if last_only else answers) if turn.get("loss", True)]
    return "".join(turn["content"] + IM_END for turn in learnt)


def learnt(ids_T: torch.Tensor, labels_T: torch.Tensor) -> str:
    """The text of the targets; each must be the token after its place."""
    assert labels_T[-1] == IGNORE, "the last token of a document has no target in it"
    places = (labels_T != IGNORE).nonzero().squeeze(1)
    assert torch.equal(labels_T[places], ids_T[places + 1])
    return TOKENIZER.decode(labels_T[places].tolist(), keep_control_tokens=True)


@settings(deadline=None, max_examples=60)
@given(st.lists(TALK, min_size=1, max_size=4), st.booleans())
def test_masks_hold_under_packing(talks: list[Any], last_only: bool) -> None:
    """Each document of a pack learns what it says, whatever its neighbours; system and user turns never."""
    maker = Maker(TOKENIZER, layout_of(TOKENIZER), MediaLimits(), last_only)
    records = [record(f"k{i}", turns) for i, turns in enumerate(talks)]
    batch = join([maker.document(each) for each in records])
    ids, labels = (each.split(list(batch.doc_lengths)) for each in (batch.token_ids_T, batch.labels_T))
    for each, ids_T, labels_T in zip(records, ids, labels, strict=True):
        assert learnt(ids_T, labels_T) == expected(each.messages, last_only)


@pytest.mark.parametrize("last_only", [False, True])
def test_packs_of_shards_learn_what_the_turns_say(tmp_path: Path, last_only: bool) -> None:
    flags = (None, 0, 1)
    records = {}
    for i in range(30):
        turns: list[Any] = [("system", "four", None)]
        for j in range(1 + i % 3):
            turns += [("user", WORDS[(i + j) % 4], None), ("assistant", WORDS[(i * j) % 4], flags[(i + j) % 3])]
        records[f"k{i}"] = record(f"k{i}", turns)
    write_shards(list(records.values()), tmp_path, TOKENIZER, 10)
    corpus = Corpus.open([str(tmp_path / "*.tar")], TOKENIZER.fingerprint)
    reader = Reader(corpus, TOKENIZER, seed=0, layout=layout_of(TOKENIZER), last_only=last_only)
    plan = Plan(
        corpus, PlanSettings(sequence_length=200, sequences_per_step=1, window=30), seed=0, sizing=reader.sizing
    )
    seen = set()
    for _, (batch,) in stream(plan, reader, Rank(0, 1), 0, 6, 0):
        assert len(batch.doc_lengths) > 1, "a pack holds several"
        ids, labels = (each.split(list(batch.doc_lengths)) for each in (batch.token_ids_T, batch.labels_T))
        for key, ids_T, labels_T in zip(batch.keys, ids, labels, strict=True):
            name = key.split(":")[1]
            seen.add(name)
            assert learnt(ids_T, labels_T) == expected(records[name].messages, last_only), key
    assert len(seen) > 20


def test_the_setting_is_checked() -> None:
    with pytest.raises(DataError, match='data.learn=first: must be "all" or "last"'):
        DataConfig(["a.tar"], tokenizer="t", learn="first").validate()
