"""A frozen Thinker's hidden states beside shards: the same as computed live, refused where they are another's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data.corpus import Corpus
from data.errors import BadSample, DataError
from data.hidden import HiddenShard, HiddenStates, HiddenWriter, Origin, hidden_path
from data.reader import Reader
from data.sample import SampleRecord
from data.shards import write_shards
from data.vision import ImageLimits
from models.audio_encoder import num_audio_tokens
from models.omni import Omni
from models.say import media_states
from tests.data.audio_bytes import encode, tone
from tests.data.corpus_kit import mixed, tokenizer
from tests.data.layouts import layout_of
from tests.models import random_model as r
from tests.models import random_speech as s
from train.hidden import cache_hidden, thinker_digest

TOKENIZER = tokenizer()
WAVE = encode(tone(16_000, 0.5), 16_000)


def aloud(record: SampleRecord) -> SampleRecord:
    """The same with a recording of its answer."""
    question, answer = record.messages
    said = [{"type": "text", "text": answer["content"]}, {"type": "speech", "speech": "speech.wav"}]
    messages = [question, {"role": "assistant", "content": said}]
    return replace(record, messages=messages, media={**record.media, "speech.wav": WAVE})


@pytest.fixture
def made(tmp_path):
    """A tiny model that reads the tokenizer's ids, and a corpus of two shards; every fifth answer is not spoken."""
    config = s.random_omni_config(5)
    names = {"im_start_token_id": "<|im_start|>", "im_end_token_id": "<|im_end|>"}
    ids = {field: TOKENIZER.id(name) for field, name in names.items()}
    roles = {f"{role}_token_id": TOKENIZER.encode(role)[0] for role in ("user", "assistant")}
    text = replace(config.thinker.text, vocab_size=TOKENIZER.vocab_size)
    audio = TOKENIZER.id("<|audio_pad|>")
    thinker = replace(config.thinker, text=text, audio_token_id=audio, image_token_id=0, video_token_id=1)
    omni = Omni(replace(config, thinker=thinker, **ids, **roles))
    r.randomize(omni, 0)
    records = [aloud(record) if number % 5 else record for number, record in enumerate(mixed(14))]
    write_shards(records, tmp_path, TOKENIZER, 9)
    corpus = Corpus.open([str(tmp_path / "*.tar")], TOKENIZER.fingerprint)
    return omni, corpus, Reader(corpus, TOKENIZER, seed=0, layout=layout_of(TOKENIZER))


def origin(omni, reader, model="weights-1"):
    return Origin(model, omni.config.talker.accept_hidden_layer, reader.sizing)


def make(omni, corpus, reader, model="weights-1", **settings):
    return cache_hidden(omni, corpus, reader, model, **{"tell": lambda _: None, **settings})


def test_equal_to_live_and_independent_of_packs(made):
    omni, corpus, reader = made
    said = []
    assert make(omni, corpus, reader, max_tokens=60, dtype="fp32", tell=said.append) == 0
    assert [line.rsplit(": ")[-1].split()[-4:] for line in said] == [
        [count, "samples", "with", "speech"] for count in ("7", "4")
    ]
    states, some = HiddenStates(corpus, origin(omni, reader)), 0
    for sample in range(corpus.num_samples):
        if sample % 5 == 0:
            with pytest.raises(BadSample, match="could not be read when the hidden states were made"):
                states.document(sample)
            continue
        document, (batch, _) = states.document(sample), reader.prompts([sample], whole=True)
        assert torch.equal(document.ids_T, batch.token_ids_T) and document.key == batch.keys[0]
        assert torch.equal(document.position_ids_3T, batch.position_ids_3T)
        torch.testing.assert_close(document.media_RH, media_states(omni, batch, always=True), atol=1e-5, rtol=1e-5)
        assert len(document.media_RH) == sum(map(num_audio_tokens, batch.mel_lengths))
        some += len(document.media_RH)
    assert some > 20


def test_an_interrupted_run_goes_on(made):
    omni, corpus, reader = made
    make(omni, corpus, reader)
    first, second = (hidden_path(path) for path in corpus.paths)
    before = first.stat().st_mtime_ns
    second.unlink()
    said = []
    make(omni, corpus, reader, tell=said.append)
    assert first.stat().st_mtime_ns == before and second.exists()
    assert said[0].endswith("has its hidden states")
    assert HiddenStates(corpus, origin(omni, reader)).document(1).media_RH.dtype is torch.bfloat16
    assert not list(first.parent.glob(".*tmp"))


def test_refuses_states_of_another_model_layer_sizes_or_shard(made):
    omni, corpus, reader = made
    own = origin(omni, reader)

    def verify(**other):
        HiddenStates(corpus, replace(own, **other)).verify()

    with pytest.raises(DataError, match="has no hidden states of the Thinker; make them with: python -m launch.cache"):
        verify()
    make(omni, corpus, reader)
    verify()
    verify(sizing=replace(own.sizing, image=ImageLimits(max_pixels=5000)))  # there is no picture to be of another size
    with pytest.raises(DataError, match="made with model weights-1, needed is weights-2"):
        verify(model="weights-2")
    with pytest.raises(DataError, match="made with layer [0-9], needed is 9; delete it"):
        verify(layer=9)
    with pytest.raises(DataError, match="made with model weights-1, needed is weights-2"):
        make(omni, corpus, reader, "weights-2")
    first, second = (hidden_path(path) for path in corpus.paths)
    first.write_bytes(second.read_bytes())
    with pytest.raises(DataError, match=f"{first.name}: made with tar_size"):
        verify()
    first.write_bytes(second.read_bytes()[:-4])
    with pytest.raises(DataError, match=f"{first.name}: damaged"):
        verify()
    first.write_bytes(b"")
    with pytest.raises(DataError, match=f"{first.name}: damaged"):
        verify()


def test_damage_is_noticed(made):
    omni, corpus, reader = made
    make(omni, corpus, reader)
    own, path = origin(omni, reader), hidden_path(corpus.paths[0])
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # of the last sample with speech
    states = HiddenStates(corpus, own)
    assert len(states.document(7).media_RH)
    with pytest.raises(BadSample, match="hidden states have changed since they were made .crc32 differs."):
        states.document(8)
    payload = bytearray(whole)
    payload[4096 + 16 : 4096 + 24] = (10**9).to_bytes(8, "little")
    path.write_bytes(payload)
    with pytest.raises(DataError, match="damaged .its offsets make no sense.; delete it"):
        HiddenShard(corpus.index(0), own)


def test_nothing_is_left_where_writing_fails(made):
    omni, corpus, reader = made
    index, own = corpus.index(0), origin(omni, reader)
    ids_S, places_3S = torch.zeros(2, dtype=torch.int64), torch.zeros(3, 2)
    with pytest.raises(DataError, match="sample 1 has hidden states that are not finite"):
        with HiddenWriter(index, own, width=4) as writer:
            writer.add(ids_S, places_3S, torch.zeros(2, 4))
            writer.add(ids_S, places_3S, torch.full((1, 4), torch.nan))
    with pytest.raises(ValueError, match="1 samples were added, the shard has 9"):
        with HiddenWriter(index, own, width=4) as writer:
            writer.skip()
    assert sorted(p.suffix for p in Path(corpus.paths[0]).parent.iterdir()) == [".index", ".index", ".tar", ".tar"]


def test_the_digest_is_of_every_weight_and_of_the_sizes(made):
    config, thinker = made[0].config.thinker, made[0].thinker  # not a new one: its memory is whatever lay there
    weights = {f"thinker.{name}": weight.detach().clone() for name, weight in thinker.named_parameters()}

    def digest(of=config):
        return thinker_digest(of, lambda name, _, start, length: weights[name].view(-1)[start : start + length])

    before = digest()
    assert before == digest() and before != digest(replace(config, text=replace(config.text, rope_theta=7.0)))
    for weight in list(weights.values())[::9]:
        last = weight.view(-1)[-1:]
        kept = last.clone()
        last += 1.0
        assert digest() != before
        last.copy_(kept)
    for name in weights:
        weights[name] = weights[name].bfloat16()
    rounded = digest()
    for name in weights:
        weights[name] = weights[name].float()
    assert digest() == rounded != before  # of the values, whatever holds them
