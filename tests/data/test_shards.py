"""Shards and indexes: what is written is read back, by us and by webdataset; built again, in parallel, by command."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data import index as index_module
from data.audio import decode
from data.chat import count_text_tokens
from data.corpus import Corpus
from data.errors import DataError
from data.index import build_index, build_indexes, main
from data.sample import SampleRecord
from data.shard_index import ShardIndex, index_path
from data.shards import write_shards
from data.shards import write_tar as write_shard
from tests.data.corpus_kit import members_of, mixed, spoken, tokenizer, write_tar, written

TOKENIZER = tokenizer()


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    records = mixed(23)
    report = write_shards(records, tmp_path, TOKENIZER, 10, prefix="train")
    assert [path.name for path in report.paths] == [f"train-{i:06d}.tar" for i in range(3)]
    assert (report.num_samples, report.left_out) == (23, [])
    corpus = Corpus.open([str(tmp_path / "*.tar")], TOKENIZER.fingerprint)
    for sample, record in enumerate(records):
        shard, row = corpus.locate(sample)
        index = corpus.index(shard)
        assert corpus.name(sample) == f"train-00000{sample // 10}.tar:{record.key}"
        assert index.read(row) == {"json": record.to_json(), **record.media}
        costs = index.costs(slice(row, row + 1))
        assert costs.samples_M.tolist() == [len(decode(payload)) for payload in record.media.values()]
        assert index.columns["text_tokens"][row] == count_text_tokens(record, TOKENIZER)
        assert (index.name("source", row), index.name("language", row)) == (record.source, record.language)
    assert not list(tmp_path.glob(".*"))  # no temporary file is left


def test_webdataset_reads_our_shards(tmp_path: Path) -> None:
    records = mixed(7)
    report = write_shards(records, tmp_path, TOKENIZER)
    dataset = webdataset.WebDataset(str(report.paths[0]), shardshuffle=False)
    read = [(sample["__key__"], sample["json"], sample.get("wav")) for sample in dataset]
    assert read == [(r.key, r.to_json(), r.media.get("wav")) for r in records]


def test_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write_shards(mixed(5), tmp_path / name, TOKENIZER).paths[0] for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    assert index_path(first).read_bytes() == index_path(second).read_bytes()


def test_several_clips_and_one_used_twice(tmp_path: Path) -> None:
    long, short = spoken("x", 1.0).media["wav"], spoken("y", 0.3).media["wav"]
    parts = [{"type": "audio", "audio": name} for name in ("0.wav", "1.wav", "0.wav")]
    record = SampleRecord("many", [{"role": "user", "content": parts}], {"0.wav": long, "1.wav": short})
    index = ShardIndex.open(write_shards([record], tmp_path, TOKENIZER).paths[0])
    assert index.costs(slice(0, 1)).samples_M.tolist() == [16_000, 4_800, 16_000]
    assert set(index.read(0)) == {"json", "0.wav", "1.wav"}


def test_index_of_a_tar_from_elsewhere(tmp_path: Path) -> None:
    """Long and non-ASCII names, folders, members of other kinds: none of it is in the way."""
    members = {"readme.txt": b"?"}
    records = [spoken("ü" * 90), spoken("b"), written("c")]
    for record in records:
        members |= {f"some/folder/{name}": payload for name, payload in members_of(record).items()}
    tar = write_tar(tmp_path / "x.tar", members)
    index = build_index(tar, TOKENIZER)
    assert [index.key(row) for row in range(3)] == [f"some/folder/{record.key}" for record in records]
    assert index.about["left_out"] == ["x.tar:readme: has no .json member (found: .txt)"]
    index.verify()


@pytest.mark.parametrize("key", ["a.b", "a/b", "../a", "", "a\n", ".a", "x" * 201])
def test_keys_that_a_tar_would_read_otherwise_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(DataError, match="needs 1 to 200 characters without dots, slashes, line ends"):
        write_shards([written(key)], tmp_path, TOKENIZER)
    assert not list(tmp_path.iterdir())


def test_writing_twice_or_nothing_or_a_key_twice_is_refused(tmp_path: Path) -> None:
    write_shards(mixed(2), tmp_path, TOKENIZER)
    with pytest.raises(DataError, match=r"already holds shard-\*.tar; delete them or write elsewhere"):
        write_shards(mixed(2), tmp_path, TOKENIZER)
    with pytest.raises(DataError, match="there is no sample to write"):
        write_shards([], tmp_path / "empty", TOKENIZER)
    with pytest.raises(DataError, match="key 'a1' occurs twice"):
        write_shards([written("a1"), written("a1")], tmp_path / "twice", TOKENIZER)


def test_a_tar_takes_no_more_records_than_it_holds(tmp_path: Path) -> None:
    records = iter([written(f"k{i}", "x" * 1000) for i in range(9)])
    assert write_shard(tmp_path / "a.tar", records, 2) == 2
    assert write_shard(tmp_path / "b.tar", records, 9, max_bytes=3000) == 3  # the third reaches it
    assert write_shard(tmp_path / "c.tar", records, 9) == 4
    assert write_shard(tmp_path / "d.tar", records, 9) == 0
    names = [tarfile.open(path).getnames() for path in sorted(tmp_path.iterdir())]
    assert [[name.partition(".")[0] for name in group] for group in names] == [
        ["k0", "k1"],
        ["k2", "k3", "k4"],
        ["k5", "k6", "k7", "k8"],
    ]


def test_a_tar_that_cannot_be_written_whole_is_not_there(tmp_path: Path) -> None:
    def records():
        yield written("a")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_shard(tmp_path / "a.tar", records(), 9)
    assert not list(tmp_path.iterdir())


def test_undecodable_audio_is_left_out_and_reported(tmp_path: Path) -> None:
    bad = SampleRecord("bad", spoken("bad").messages, {"wav": b"not audio"})
    report = write_shards([spoken("a"), bad, spoken("b")], tmp_path, TOKENIZER)
    assert report.num_samples == 2
    (line,) = report.left_out
    assert line.startswith("shard-000000.tar:bad: audio is none of wav, ") and line.endswith(
        "(starts with b'not audi')"
    )
    assert Corpus.open([str(report.paths[0])]).left_out() == report.left_out


def test_command_builds_in_parallel_and_skips_what_is_done(tmp_path: Path, capsys, monkeypatch) -> None:
    report = write_shards(mixed(12), tmp_path / "shards", TOKENIZER, 4)
    TOKENIZER.save(tmp_path / "tokenizer")
    before = [index_path(path).read_bytes() for path in report.paths]
    index_path(report.paths[0]).unlink()
    index_path(report.paths[2]).write_bytes(b"damaged")
    tars = [str(path) for path in report.paths]
    assert main([*tars, f"tokenizer={tmp_path / 'tokenizer'}", "workers=2"]) == 0
    assert capsys.readouterr().out == "3 shards indexed, 0 samples left out\n"
    assert [index_path(path).read_bytes() for path in report.paths] == before
    monkeypatch.setattr(index_module, "build_index", None)  # nothing is left to build
    assert main([f"{tmp_path}/shards/*.tar", f"tokenizer={tmp_path / 'tokenizer'}"]) == 0  # a pattern, quoted
    assert capsys.readouterr().out == "3 shards indexed, 0 samples left out\n"


def test_another_tokenizer_means_another_index(tmp_path: Path) -> None:
    from data.tokenizer import train_tokenizer

    paths = write_shards(mixed(4), tmp_path, TOKENIZER).paths
    other = train_tokenizer(["nothing in common"], 290)
    with pytest.raises(DataError) as caught:
        Corpus.open([str(paths[0])], other.fingerprint)
    assert str(caught.value) == (
        f"{paths[0]}: its index was made with another tokenizer; run python -m data.index with data.tokenizer"
    )
    build_indexes(paths, other, quiet=True)
    Corpus.open([str(paths[0])], other.fingerprint)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "usage: python -m data.index SHARDS... tokenizer=FOLDER [workers=N]"),
        (["a.tar", "tokeniser=x"], "usage: python -m data.index SHARDS... tokenizer=FOLDER [workers=N]"),
        (["a.tar", "tokenizer=nowhere", "workers=x"], "workers=x: must be a whole number above 0"),
        (
            ["a.tar", "tokenizer=nowhere"],
            "nowhere/tokenizer.json: no such file; give a folder that holds a tokenizer.json",
        ),
    ],
)
def test_command_says_what_is_wrong(capsys, arguments: list[str], line: str) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"error: {line}\n"


def test_open_indexes_hold_no_files_and_few_maps(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("data.corpus.MAX_OPEN", 2)
    paths = write_shards(mixed(8), tmp_path, TOKENIZER, 2).paths
    corpus = Corpus.open([str(path) for path in paths])
    for sample in (0, 2, 4, 6, 0, 7):
        shard, row = corpus.locate(sample)
        corpus.index(shard).read(row)
    assert len(corpus._open) == 2


def test_names_tell_shards_of_one_file_name_apart(tmp_path: Path) -> None:
    for folder in ("en", "de"):
        write_shards([written("a")], tmp_path / folder, TOKENIZER)
    corpus = Corpus.open([str(tmp_path / "*/*.tar")])
    assert [corpus.name(0), corpus.name(1)] == ["de/shard-000000.tar:a", "en/shard-000000.tar:a"]


def test_fingerprint_follows_content_not_place(tmp_path: Path) -> None:
    for name, count in (("a", 4), ("b", 4), ("c", 5)):
        write_shards(mixed(count), tmp_path / name, TOKENIZER)
    a, b, c = (Corpus.open([str(tmp_path / name / "*.tar")]).fingerprint for name in "abc")
    assert a == b != c


def test_headers_behind_the_digest_are_spread(tmp_path: Path) -> None:
    """A tar of the same size whose every member was renamed is noticed."""
    path = write_shards([written(f"k{i:03d}") for i in range(100)], tmp_path, TOKENIZER).paths[0]
    data = np.frombuffer(path.read_bytes(), np.uint8).tobytes()
    path.write_bytes(data.replace(b"k099.json", b"q099.json"))
    ShardIndex.open(path).verify()  # one member among hundred may hide: its bytes are covered by crc32 at every read
    path.write_bytes(data.replace(b".json\0", b".jsan\0"))
    with pytest.raises(DataError, match="changed since its index was made"):
        ShardIndex.open(path).verify()
    assert tarfile.open(fileobj=io.BytesIO(data)).getnames()[-1] == "k099.json"
