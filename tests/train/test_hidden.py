"""A frozen Thinker's hidden states beside shards: the same as computed live, refused where they are another's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data.corpus import Corpus
from data.errors import DataError
from data.hidden import HiddenShard, HiddenWriter, hidden_path
from data.reader import Reader
from data.shards import write_shards
from models.audio_encoder import num_audio_tokens
from models.omni import Omni
from models.talker_inputs import multimodal_rows
from tests.data.corpus_kit import mixed, tokenizer
from tests.data.layouts import layout_of
from tests.models import random_model as r
from tests.models import random_speech as s
from train.hidden import cache_hidden
from train.speech import hidden_states

TOKENIZER = tokenizer()


@pytest.fixture
def made(tmp_path):
    """A tiny model that reads the tokenizer's ids, and a corpus of two shards."""
    config = s.random_omni_config(5)
    names = {"im_start_token_id": "<|im_start|>", "im_end_token_id": "<|im_end|>"}
    ids = {field: TOKENIZER.id(name) for field, name in names.items()}
    roles = {f"{role}_token_id": TOKENIZER.encode(role)[0] for role in ("user", "assistant")}
    text = replace(config.thinker.text, vocab_size=TOKENIZER.vocab_size)
    audio = TOKENIZER.id("<|audio_pad|>")
    thinker = replace(config.thinker, text=text, audio_token_id=audio, image_token_id=0, video_token_id=1)
    omni = Omni(replace(config, thinker=thinker, **ids, **roles))
    r.randomize(omni, 0)
    write_shards(mixed(14), tmp_path, TOKENIZER, 9)
    corpus = Corpus.open([str(tmp_path / "*.tar")], TOKENIZER.fingerprint)
    return omni, corpus, Reader(corpus, TOKENIZER, seed=0, layout=layout_of(TOKENIZER))


def cached(omni, corpus, model="weights-1"):
    layer = omni.config.talker.accept_hidden_layer
    shards = [HiddenShard(corpus.index(shard), model=model, layer=layer) for shard in range(len(corpus.paths))]
    located = map(corpus.locate, range(corpus.num_samples))
    return [shards[shard].states(row) for shard, row in located]


def test_equal_to_live_and_independent_of_packs(made):
    omni, corpus, reader = made
    said = []
    assert cache_hidden(omni, corpus, reader, "weights-1", max_tokens=60, dtype=torch.float32, tell=said.append) == 0
    assert [line.rsplit(": ")[-1].split()[-2:] for line in said] == [["9", "samples"], ["5", "samples"]]
    some = 0
    for sample, states_MH in enumerate(cached(omni, corpus)):
        batch, _ = reader.prompts([sample])
        rows_M = multimodal_rows(omni.config, batch.token_ids_T, batch.doc_lengths)
        torch.testing.assert_close(states_MH, hidden_states(omni, batch)[rows_M], atol=1e-5, rtol=1e-5)
        assert len(states_MH) == sum(map(num_audio_tokens, batch.mel_lengths))
        some += len(states_MH)
    assert some > 20


def test_an_interrupted_run_goes_on(made):
    omni, corpus, reader = made
    cache_hidden(omni, corpus, reader, "weights-1", tell=lambda _: None)
    first, second = (hidden_path(path) for path in corpus.paths)
    before = first.stat().st_mtime_ns
    second.unlink()
    said = []
    cache_hidden(omni, corpus, reader, "weights-1", tell=said.append)
    assert first.stat().st_mtime_ns == before and second.exists()
    assert said[0].endswith("has its hidden states")
    assert cached(omni, corpus)[1].dtype is torch.bfloat16
    assert not list(first.parent.glob(".*tmp"))


def test_refuses_states_of_another_model_layer_or_shard(made):
    omni, corpus, reader = made
    with pytest.raises(DataError, match="has no hidden states of the Thinker"):
        cached(omni, corpus)
    cache_hidden(omni, corpus, reader, "weights-1", tell=lambda _: None)
    with pytest.raises(DataError, match="made with model weights-1, needed is weights-2"):
        cached(omni, corpus, "weights-2")
    with pytest.raises(DataError, match="made with model weights-1, needed is weights-2"):
        cache_hidden(omni, corpus, reader, "weights-2", tell=lambda _: None)
    first, second = (hidden_path(path) for path in corpus.paths)
    first.write_bytes(second.read_bytes())
    with pytest.raises(DataError, match=f"{first.name}: made with tar_size"):
        cached(omni, corpus)
    first.write_bytes(second.read_bytes()[:-4])
    with pytest.raises(DataError, match=f"{first.name}: damaged"):
        cached(omni, corpus)


def test_offsets_that_make_no_sense_are_damage(made):
    omni, corpus, reader = made
    cache_hidden(omni, corpus, reader, "weights-1", tell=lambda _: None)
    path = hidden_path(corpus.paths[0])
    payload = bytearray(path.read_bytes())
    payload[4096 + 16 : 4096 + 24] = (10**9).to_bytes(8, "little")
    path.write_bytes(payload)
    with pytest.raises(DataError, match="damaged .its offsets make no sense.; delete it"):
        cached(omni, corpus)


def test_nothing_is_left_where_writing_fails(made):
    omni, corpus, _ = made
    index = corpus.index(0)
    with pytest.raises(DataError, match="sample 1 has hidden states that are not finite"):
        with HiddenWriter(index, model="m", layer=1, width=4) as writer:
            writer.add(torch.zeros(2, 4))
            writer.add(torch.full((1, 4), torch.nan))
    with pytest.raises(ValueError, match="1 samples were added, the shard has 9"):
        with HiddenWriter(index, model="m", layer=1, width=4) as writer:
            writer.add(torch.zeros(2, 4))
    assert sorted(p.suffix for p in Path(corpus.paths[0]).parent.iterdir()) == [".index", ".index", ".tar", ".tar"]
