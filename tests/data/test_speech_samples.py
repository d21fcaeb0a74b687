"""Speech of an answer in a sample: what is allowed, what the index says of it, and that the Thinker never meets it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from isal.isal_zlib import crc32

from data.audio import EXTENSIONS, decode
from data.chat import answer_text, gaps, render, rendered_texts
from data.corpus import Corpus
from data.costs import Sizing
from data.errors import BadSample
from data.index import build_index
from data.page import page
from data.plan import Plan, PlanSettings
from data.reader import Reader
from data.sample import SampleRecord, Speech, check_record, media_of, parse_sample, speech_of
from data.shard_index import FORMAT, ShardIndex
from data.shards import write_shards
from data.survey import survey
from tests.data.audio_bytes import encode, tone
from tests.data.corpus_kit import members_of, mixed, spoken, tokenizer, write_tar, written
from tests.data.layouts import layout_of
from train.layout import ModelLayout

TOKENIZER = tokenizer()
TEXT = {"type": "text", "text": "hello"}
SPEECH = {"type": "speech", "speech": "speech.wav"}


def said(key: str, seconds: float = 0.5, *, speaker: str | None = "george", heard: bool = True) -> SampleRecord:
    """A question, spoken or written, and an answer with a recording of it."""
    asked = spoken(key) if heard else written(key)
    part = SPEECH if speaker is None else {**SPEECH, "speaker": speaker}
    messages = [asked.messages[0], {"role": "assistant", "content": [TEXT, part]}]
    speech = encode(tone(24_000, seconds, 300 + sum(key.encode())), 24_000)
    return SampleRecord(key, messages, {**asked.media, "speech.wav": speech}, source="talk")


def without_speech(record: SampleRecord) -> SampleRecord:
    answer = {"role": "assistant", "content": [TEXT]}
    media = {name: payload for name, payload in record.media.items() if not name.startswith("speech.")}
    return SampleRecord(record.key, [record.messages[0], answer], media, source=record.source)


def answer(*parts: dict[str, Any], role: str = "assistant", more: bool = False) -> SampleRecord:
    turns = [{"role": "user", "content": "one"}, {"role": role, "content": list(parts)}]
    return SampleRecord("k", turns + [{"role": "user", "content": "two"}] * more)


@given(st.sampled_from(EXTENSIONS), st.sampled_from(["", "0.", "george.take1."]), st.text(max_size=20))
def test_speech_is_found_in_any_audio_format(extension: str, middle: str, speaker: str) -> None:
    part = {"type": "speech", "speech": f"speech.{middle}{extension}", "speaker": speaker}
    record = answer(part, TEXT)  # before the text or behind it
    if not speaker.isprintable():
        with pytest.raises(BadSample, match=r"messages\[1\].content\[0\].speaker must be a printable string"):
            check_record(record)
        return
    again = parse_sample("k", record.to_json())
    assert speech_of(again) == Speech(f"speech.{middle}{extension}", speaker)
    assert media_of(again) == [] and answer_text(again) == "hello"


def test_samples_without_speech_have_none() -> None:
    assert speech_of(spoken("a")) is None and speech_of(answer(TEXT)) is None
    assert speech_of(SampleRecord("k", segments=[TEXT])) is None
    assert speech_of(answer(TEXT, SPEECH)) == Speech("speech.wav", "")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (answer(SPEECH), r"messages\[1\]: speech without its transcript: the turn holds no text"),
        (answer({"type": "text", "text": " \n"}, SPEECH), "speech without its transcript"),
        (answer(TEXT, SPEECH, SPEECH), r"messages\[1\].content\[2\]: speech belongs to the last turn, an answer, and"),
        (answer(TEXT, SPEECH, more=True), r"content\[1\]: speech belongs to the last turn"),
        (answer(TEXT, SPEECH, role="user"), r"content\[1\]: speech belongs to the last turn"),
        (answer(TEXT, SPEECH, role="system"), r"content\[1\]: speech belongs to the last turn"),
        (answer(TEXT, {"type": "speech"}), r"content\[1\].speech is missing or not a string"),
        (answer(TEXT, {**SPEECH, "loss": True}), r"content\[1\] has unknown keys: loss"),
        (answer(TEXT, {**SPEECH, "speaker": 3}), r"content\[1\].speaker must be a printable string"),
        (answer(TEXT, {**SPEECH, "speaker": "x" * 201}), "of at most 200 characters"),
        *[
            (answer(TEXT, {**SPEECH, "speech": name}), 'it must begin with "speech." and end with one of wav, flac, ')
            for name in ("wav", "0.wav", "speech", "speech.", "speech.pkl", "speechwav", "Speech.wav", "speech./x.wav")
        ],
        (answer(TEXT, {"type": "audio", "audio": "speech.wav"}), "an assistant turn holds text only"),
        (answer({"type": "audio", "audio": "speech.wav"}, role="user"), "such names are for the speech of an answer"),
        (SampleRecord("k", segments=[TEXT, SPEECH]), r"segments\[1\]: speech belongs to an answer"),
    ],
)
def test_what_is_wrong_is_named(record: SampleRecord, reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        check_record(record)
    with pytest.raises(BadSample, match=reason):
        parse_sample("k", record.to_json())


def test_the_thinker_reads_the_same_with_and_without() -> None:
    record = said("a")
    assert render(record, TOKENIZER) == render(without_speech(record), TOKENIZER)
    assert gaps(record, TOKENIZER) == gaps(without_speech(record), TOKENIZER)
    assert rendered_texts(record) == rendered_texts(without_speech(record))
    halves = [{"type": "text", "text": "hel"}, SPEECH, {"type": "text", "text": "lo"}]
    assert render(answer(*halves), TOKENIZER) == render(answer(TEXT), TOKENIZER)  # one piece of text


def test_the_index_has_the_bytes_and_counts_nothing(tmp_path: Path) -> None:
    records = [said("a"), written("b"), said("c", heard=False)]
    write_shards(records, tmp_path / "with", TOKENIZER)
    write_shards([without_speech(records[0]), written("b"), without_speech(records[2])], tmp_path / "w", TOKENIZER)
    index, bare = (ShardIndex.open(tmp_path / name / "shard-000000.tar") for name in ("with", "w"))
    for row, record in enumerate(records):
        assert index.read(row, speech=True) == {"json": record.to_json(), **record.media}
        assert list(index.read(row)) == ["json", "wav"][: 2 if row == 0 else 1]
        assert list(index.read_speech(row)) == ["json", "speech.wav"][: 1 if row == 1 else 2]
    for name in ("text_tokens", "media_offsets", "media_kind", "media_samples", "media_text", "document"):
        np.testing.assert_array_equal(index.columns[name], bare.columns[name])
    names = [index.about["extensions"][code] for code in index.columns["member_extension"]]
    crc = int(index.columns["member_crc"][names.index("speech.wav")])
    assert crc == crc32(records[0].media["speech.wav"])
    assert index.speech_rows().tolist() == [0, 2] and bare.speech_rows().tolist() == []
    assert index.about["format"] == bare.about["format"] == FORMAT == "omniloom-index-2"


class Counting:
    """Notes which ranges are read."""

    def __init__(self, store: Any) -> None:
        self.store, self.ranges = store, []

    def read_many(self, tar: str, ranges: Any) -> list[bytes]:
        self.ranges += ranges
        return self.store.read_many(tar, ranges)


def test_training_the_thinker_never_opens_speech(tmp_path: Path) -> None:
    """Nor does training the Talker open what the Thinker hears."""
    record = said("a", 3.0)
    index = ShardIndex.open(write_shards([record], tmp_path, TOKENIZER).paths[0])
    index._store = counting = Counting(index._store)  # type: ignore[assignment]
    index.read(0)
    assert sorted(size for _, size in counting.ranges) == sorted(map(len, (record.to_json(), record.media["wav"])))
    counting.ranges.clear()
    index.read_speech(0)
    assert sorted(size for _, size in counting.ranges) == sorted(
        map(len, (record.to_json(), record.media["speech.wav"]))
    )


def test_packs_are_those_of_samples_without_speech(tmp_path: Path) -> None:
    records, layout = [said(f"k{i}", heard=i % 2 == 0) for i in range(4)], layout_of(TOKENIZER)
    batches = []
    for name, chosen in (("with", records), ("without", [without_speech(record) for record in records])):
        corpus = Corpus.open([str(write_shards(chosen, tmp_path / name, TOKENIZER).paths[0])], TOKENIZER.fingerprint)
        plan = Plan(corpus, PlanSettings(500, 1), seed=0, sizing=Sizing(layout))
        batches.append(Reader(corpus, TOKENIZER, seed=0, layout=layout).batch(plan.step(0)[0]))
    with_speech, bare = batches
    assert not with_speech.skipped and with_speech.keys == bare.keys and len(bare.keys) == 4
    assert with_speech.token_ids_T.tolist() == bare.token_ids_T.tolist()
    assert with_speech.labels_T.tolist() == bare.labels_T.tolist()
    assert with_speech.mel_FM.equal(bare.mel_FM)


def test_bad_speech_samples_are_left_out_of_the_index(tmp_path: Path) -> None:
    empty, gone = said("empty"), said("gone")
    members = members_of(written("b")) | members_of(said("undecodable"))
    members |= {"undecodable.speech.wav": b"not audio"}  # found when codes are made
    members |= members_of(empty) | {"empty.json": empty.to_json().replace(b'"text": "hello"', b'"text": ""')}
    members |= {name: payload for name, payload in members_of(gone).items() if name != "gone.speech.wav"}
    index = build_index(write_tar(tmp_path / "x.tar", members), TOKENIZER)
    assert [index.key(row) for row in range(index.num_samples)] == ["b", "undecodable"]
    assert index.about["left_out"] == [
        "x.tar:empty: messages[1]: speech without its transcript: the turn holds no text",
        "x.tar:gone: its .json names .speech.wav, which is not there",
    ]


def test_changed_speech_is_noticed(tmp_path: Path) -> None:
    record = said("a")
    tar = write_tar(tmp_path / "x.tar", members_of(record))
    index = build_index(tar, TOKENIZER)
    payload = bytearray(tar.read_bytes())
    payload[payload.find(record.media["speech.wav"]) + 100] ^= 1
    tar.write_bytes(payload)
    assert index.read(0).keys() == {"json", "wav"}
    with pytest.raises(BadSample, match=r".speech.wav has changed since its index was made"):
        index.read_speech(0)


def test_the_survey_counts_no_speech_and_the_page_plays_it(tmp_path: Path) -> None:
    records = [said("a"), said("<b>", speaker='"><script>'), *mixed(3)]
    corpus = Corpus.open([str(write_shards(records, tmp_path, TOKENIZER).paths[0])])
    found = survey(corpus, Sizing(ModelLayout()), picks=3)
    assert found.total.clips == 4 and found.total.samples == 5
    html = page("title", corpus, found).decode()
    assert html.count("<audio controls") == 6
    assert "what the Talker learns to say, speaker: george" in html and "<script>" not in html


def test_audio_is_decoded_at_the_rate_asked_for() -> None:
    wave_S = tone(24_000, 0.5, 440)
    payload = encode(wave_S, 24_000)
    np.testing.assert_allclose(decode(payload, rate=24_000), wave_S, atol=1e-4)
    assert len(decode(payload)) == 8_000
    upsampled = decode(encode(tone(16_000, 0.5, 440), 16_000, "flac"), rate=24_000)
    assert len(upsampled) == 12_000
    np.testing.assert_allclose(upsampled[500:-500], wave_S[500:-500], atol=2e-3)
    with pytest.raises(BadSample, match="too short: 480 samples at 24 kHz, at least 600 needed"):
        decode(encode(tone(24_000, 0.02), 24_000), rate=24_000)
