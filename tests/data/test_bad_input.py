"""Every way in which shards can be wrong: one clear line at the start, or one sample left out with its reason."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.config import DataConfig
from data.corpus import Corpus
from data.costs import Sizing
from data.errors import BadSample, DataError
from data.index import build_index
from data.plan import Plan, PlanSettings
from data.reader import Reader
from data.sample import SampleRecord, media_of, parse_sample
from data.shard_index import ShardIndex, index_path
from data.shards import write_shards
from data.tokenizer import load_tokenizer
from data.types import Batch
from tests.data.audio_bytes import encode, tone
from tests.data.corpus_kit import members_of, spoken, tokenizer, write_tar, written
from tests.data.layouts import layout_of

TOKENIZER = tokenizer()


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write_shards([spoken("a"), spoken("b", 0.8), written("c")], tmp_path, TOKENIZER).paths[0]


def refusal(action) -> str:
    """The line with which `action` is refused."""
    with pytest.raises(DataError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def read_all(path: Path, **replaced) -> Batch:
    """All samples of a shard as one batch."""
    corpus = Corpus.open([str(path)])
    layout = layout_of(TOKENIZER)
    plan = Plan(corpus, PlanSettings(1000, 1), seed=0, sizing=Sizing(layout))
    reader = Reader(corpus, replaced.get("tokenizer", TOKENIZER), seed=0, layout=layout)
    return reader.batch(plan.step(0)[0])


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ({"sequence_length": 0}, "data.sequence_length=0: must be above 0"),
        ({"workers": -1}, "data.workers=-1: must be 0 or more"),
        ({"too_long": "cut"}, 'data.too_long=cut: must be "error", "drop" or "split"'),
        ({"speeds": [1.0, 3.0]}, "data.speeds=[1.0, 3.0]: must be one or more factors between 0.5 and 2"),
        ({"shards": []}, "data.shards is empty: name at least one shard (a path or a glob pattern)"),
        ({"tokenizer": "???"}, "data.tokenizer is not set: name the folder that holds tokenizer.json"),
    ],
)
def test_settings(setting: dict, line: str) -> None:
    DataConfig(shards=["x.tar"], tokenizer="folder").validate()
    assert refusal(DataConfig(**({"shards": ["x.tar"], "tokenizer": "folder"} | setting)).validate) == line


def test_missing_shard(tmp_path: Path, shard: Path) -> None:
    gone = tmp_path / "gone.tar"
    assert refusal(lambda: Corpus.open([str(gone)])) == f"{gone}: no such shard"
    assert refusal(lambda: Corpus.open([f"{tmp_path}/no*.tar"])) == f'data.shards: no file matches "{tmp_path}/no*.tar"'
    assert refusal(lambda: Corpus.open([str(shard)] * 2)) == f"data.shards: {shard} is listed twice"
    assert refusal(lambda: build_index(gone, TOKENIZER)) == f"{gone}: no such shard"


def test_missing_index(shard: Path) -> None:
    index_path(shard).unlink()
    assert refusal(lambda: Corpus.open([str(shard)])) == (
        f"{shard}: has no index; make it with: python -m data.index {shard} tokenizer=FOLDER"
    )


def test_truncated_tar(shard: Path) -> None:
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1500])
    assert refusal(lambda: Corpus.open([str(shard)])) == (
        f"{shard}: truncated: {len(whole) - 1500} bytes, its index was made from {len(whole)}"
    )
    for length in (700, 5_000, 3_000):
        shard.write_bytes(whole[:length])
        line = refusal(lambda: build_index(shard, TOKENIZER))
        assert line.startswith(f"{shard}: truncated") and line.endswith("write it again"), line


def test_index_of_another_tar(shard: Path, tmp_path: Path) -> None:
    line = f"{shard}: changed since its index was made; run python -m data.index"
    whole = shard.read_bytes()
    shard.write_bytes(whole + bytes(512))
    assert refusal(lambda: Corpus.open([str(shard)])) == line
    other = write_shards([spoken("x"), spoken("y", 0.8), written("z")], tmp_path / "other", TOKENIZER).paths[0]
    assert len(other.read_bytes()) == len(whole)
    shard.write_bytes(other.read_bytes())
    assert refusal(lambda: Corpus.open([str(shard)])) == line


def test_damaged_header_does_not_end_the_shard_silently(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    second = data.index(b"b.json")
    data[second + 148 : second + 156] = b"7777777\0"  # the header's checksum
    shard.write_bytes(data)
    assert refusal(lambda: build_index(shard, TOKENIZER)) == (
        f"{shard}: damaged: no valid tar header at byte {second}; write it again"
    )


def test_compressed_tar_and_other_files(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    for content in (b"\x1f\x8b" + bytes(2000), b"hello", b"", b"\xff" * 4096):
        path.write_bytes(content)
        line = refusal(lambda: build_index(path, TOKENIZER))
        assert line.startswith(f"{path}: ") and ("not a plain tar" in line or "no usable sample" in line), line
    assert refusal(lambda: build_index(tmp_path, TOKENIZER)).startswith(f"{tmp_path}: cannot be read: ")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.tar")
    assert "is a folder, a device or a pipe" in refusal(lambda: build_index(tmp_path / "x.tar", TOKENIZER))


def test_a_folder_of_shards_is_told_how_to_name_them(tmp_path: Path) -> None:
    line = refusal(lambda: Corpus.open([str(tmp_path)]))
    assert line == f'data.shards: "{tmp_path}" is a folder; name its shards, for instance "{tmp_path}/*.tar"'


def test_a_tokenizer_nested_too_deeply(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("[" * 100_000)
    assert refusal(lambda: load_tokenizer(tmp_path)).startswith(f"{tmp_path}/tokenizer.json: cannot be read as JSON: ")


def test_workers_are_deaf_to_ctrl_c_from_the_start() -> None:
    script = (
        "import signal\nfrom data.interrupts import deaf_workers\n"
        "if __name__ == '__main__':\n"
        "    before = signal.getsignal(signal.SIGINT)\n"
        "    with deaf_workers('data.errors').Pool(1) as pool:\n"
        "        print(pool.apply(signal.getsignal, (signal.SIGINT,)), signal.getsignal(signal.SIGINT) is before)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() in ("1 True", "Handlers.SIG_IGN True"), done.stderr


def test_damaged_index(shard: Path) -> None:
    index_path(shard).write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    assert refusal(lambda: Corpus.open([str(shard)])) == (
        f"{index_path(shard)}: index has format None, needed is omniloom-index-2; run python -m data.index"
    )
    index_path(shard).write_bytes(b"nonsense" * 10)
    line = refusal(lambda: Corpus.open([str(shard)]))
    assert line.startswith(f"{index_path(shard)}: damaged index (") and line.endswith("run python -m data.index again")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_byte_of_an_index_is_an_error_or_one_lost_sample(shard: Path, data) -> None:
    path = index_path(shard)
    whole = path.read_bytes()  # the same at every example: it is restored below
    place = data.draw(st.integers(0, len(whole) - 1))
    changed = bytearray(whole)
    changed[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(changed)
    try:
        batch = read_all(shard)
        assert len(batch.doc_lengths) + len(batch.skipped) <= 3
    except DataError:
        pass
    finally:
        path.write_bytes(whole)


def test_samples_that_indexing_leaves_out(tmp_path: Path) -> None:
    good, answer = spoken("good"), {"role": "assistant", "content": "x"}
    asks = json.dumps({"messages": [{"role": "user", "content": [{"type": "audio", "audio": "wav"}]}, answer]}).encode()
    members = members_of(good) | {
        "zero.json": asks, "zero.wav": encode(tone(16_000, 0), 16_000),
        "empty.json": asks, "empty.wav": b"",
        "noise.json": asks, "noise.wav": b"noise",
        "gone.json": asks,
        "cut.json": asks[:-5],
        "latin.json": b'{"messages": "\xe9"}',
        "list.json": b"[]",
        "silent.json": b"{}",
        "deep.json": b"[" * 100_000,
        "half.json": asks.replace(b'"x"', b'"\\ud800"'), "half.wav": good.media["wav"],
        "two\nlines.json": b"{}",
        "no\udcffutf.json": b"{}",
        "alone.wav": b"RIFF",
    }  # fmt: skip
    index = build_index(write_tar(tmp_path / "x.tar", members), TOKENIZER)
    assert index.num_samples == 1
    lines = dict(line.removeprefix("x.tar:").split(": ", 1) for line in index.about["left_out"])
    assert lines["zero"] == "audio has zero length"
    assert lines["empty"] == "audio is empty (0 bytes)"
    assert lines["noise"].startswith("audio is none of wav, flac, ") and lines["noise"].endswith(
        "(starts with b'noise')"
    )
    assert lines["gone"] == "its .json names .wav, which is not there"
    assert lines["cut"].startswith("its .json cannot be read: ")
    assert lines["latin"].startswith("its .json cannot be read: ")
    assert lines["list"] == "its .json is not an object"
    assert lines["silent"] == 'its .json needs either "messages" or "segments"'
    assert lines["deep"].startswith("its .json cannot be read: ")
    assert lines["alone"] == "has no .json member (found: .wav)"
    assert lines["half"].startswith("its .json cannot be read: ")
    assert {"two\\nlines", "no\\udcffutf"} < set(lines)
    assert len(lines) == 13


def test_no_usable_sample(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"a.txt": b"hello"})
    assert refusal(lambda: build_index(path, TOKENIZER)) == (
        f"{path}: holds no usable sample; the first: x.tar:a: has no .json member (found: .txt)"
    )


def test_a_repeated_key(tmp_path: Path) -> None:
    from tarfile import open as open_tar

    path = write_tar(tmp_path / "x.tar", members_of(written("a")) | members_of(written("b")))
    with open_tar(path, "a") as tar:
        tar.add(write_tar(tmp_path / "y", {}), "a.txt")
    assert refusal(lambda: build_index(path, TOKENIZER)) == (
        f"{path}: key 'a' occurs twice; a sample's members must lie together"
    )


def test_bytes_that_change_after_indexing_cost_one_sample(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[data.index(b"b.wav") + 512 + 3_000] ^= 1
    shard.write_bytes(data)
    batch = read_all(shard)
    assert sorted(batch.keys) == ["shard-000000.tar:a", "shard-000000.tar:c"]
    assert batch.skipped == ("shard-000000.tar:b: .wav has changed since its index was made (crc32 differs)",)
    assert sum(batch.doc_lengths) == len(batch.token_ids_T) == len(batch.labels_T)


def test_a_pack_of_bad_samples_is_an_empty_batch(shard: Path) -> None:
    data = shard.read_bytes()
    shard.write_bytes(data.replace(b'"messages"', b'"massages"'))
    batch = read_all(shard)
    assert (len(batch.token_ids_T), batch.position_ids_3T.shape, batch.mel_FM.shape) == (0, (3, 0), (0, 128))
    assert len(batch.skipped) == 3


def test_an_index_that_lies_about_lengths_costs_the_sample(shard: Path) -> None:
    from data.shard_index import save_index

    index = ShardIndex.open(shard)
    columns = {name: column.copy() for name, column in index.columns.items()}
    columns["media_samples"][0] += 160
    columns["text_tokens"][2] -= 1
    save_index(shard, index.about, columns)
    batch = read_all(shard)
    assert batch.keys == ("shard-000000.tar:b",)
    tokens = index.columns["text_tokens"][2]
    assert sorted(batch.skipped) == [
        "shard-000000.tar:a: .wav decodes to 8000 samples, its index says 8160",
        f"shard-000000.tar:c: it has {tokens} tokens, its index says {tokens - 1}",
    ]


def test_a_shard_that_vanishes_after_the_start(shard: Path) -> None:
    corpus = Corpus.open([str(shard)])
    shard.unlink()
    assert set(corpus.index(0).read(0)) == {"json", "wav"}  # it is still open
    *rest, store, codec = corpus.__reduce__()[1]
    fresh = Corpus(*rest, store.__reduce__()[0](*store.__reduce__()[1]), codec)
    assert refusal(lambda: fresh.index(0).read(0)) == f"{shard}: no such file"


WORDS = "messages segments role content type audio image video sound text language loss".split()


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
    | st.sampled_from(["user", "audio", "text", "wav", "image", "video", "png", "mp4"]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from(WORDS), inner),
    max_leaves=20,
).map(lambda value: json.dumps(value).encode())))  # fmt: skip
def test_no_json_breaks_the_parser(payload: bytes) -> None:
    try:
        record = parse_sample("k", payload)
    except BadSample as error:
        assert "\n" not in error.reason
    else:
        assert isinstance(record, SampleRecord) and len(media_of(record)) >= 0


def test_tokenizer_that_differs_only_at_reading(shard: Path) -> None:
    from data.tokenizer import train_tokenizer

    batch = read_all(shard, tokenizer=train_tokenizer(["other words"], 290))
    assert all("tokens, its index says" in line for line in batch.skipped) and batch.skipped


def test_no_shard_at_all() -> None:
    assert refusal(lambda: Corpus.open([])) == "data.shards is empty: name at least one shard"


def test_an_interrupt_while_a_clip_is_decoded_waits_and_loses_nothing() -> None:
    """libsndfile swallows an exception in the middle of its reading and takes the file for shorter than it is."""
    from data.interrupts import uninterrupted

    steps = []
    with pytest.raises(KeyboardInterrupt):
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            steps.append("decoded whole")
        steps.append("never")
    assert steps == ["decoded whole"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    "payload", [b'{"segments": [{"type": "text", "text": "a\xed\xa0\x80b"}]}', '{"segments": []}'.encode("utf-16")]
)
def test_half_characters_and_other_encodings_are_left_out(tmp_path: Path, payload: bytes) -> None:
    tar = write_tar(tmp_path / "x.tar", members_of(written("good")) | {"bad.json": payload})
    index = build_index(tar, TOKENIZER)
    assert index.num_samples == 1 and index.about["left_out"][0].startswith("x.tar:bad: its .json cannot be read: ")


@pytest.mark.parametrize(
    "changed",
    [
        {"sources": [["x"]]},
        {"max_samples": 10**400},
        {"max_media": []},
        {"max_text_tokens": -1},
        {"groups": [[0, 0, -3]]},
        {"groups": [[0, 7, 3]]},
        {"groups": [[0, 0, 2]]},
    ],
)
def test_an_index_whose_metadata_lie(shard: Path, changed: dict) -> None:
    from data.shard_index import save_index

    index = ShardIndex.open(shard)
    columns = {name: column.copy() for name, column in index.columns.items()}
    save_index(shard, dict(index.about) | changed, columns)
    assert "damaged index (" in refusal(lambda: Corpus.open([str(shard)]))
