"""python -m data.index: what it says to wrong arguments, and its status."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.index import main
from data.shard_index import index_path
from data.shards import write_shards
from tests.data.corpus_kit import mixed, tokenizer


def test_help(capsys: pytest.CaptureFixture) -> None:
    for flag in ("-h", "--help"):
        assert main([flag]) == 0
        out, err = capsys.readouterr()
        assert out.startswith("usage: python -m data.index SHARDS...") and not err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--workers", "2", "tokenizer=words"], "unknown option --workers; usage: python -m data.index"),
        (["a.tar", "tokenizer=words", "wrokers=2"], "usage: python -m data.index SHARDS"),
        (["a.tar", "tokenizer=words", "workers=0"], "workers=0: must be a whole number above 0"),
        (["s3://bucket/a.tar", "tokenizer=words"], "s3://bucket/a.tar: indexes are made of local shards"),
        (["FOLDER", "tokenizer=words"], "is a folder; name its shards: '"),
        (["absent.tar", "tokenizer=absent"], "absent"),
    ],
)
def test_wrong_arguments(arguments: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([argument.replace("FOLDER", str(tmp_path)) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and line in err and err.count("\n") == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_indexes_what_has_no_index(workers: int, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = tokenizer()
    words.save(tmp_path / "words")
    write_shards(mixed(6), tmp_path / "shards", words, 3)
    tars = sorted((tmp_path / "shards").glob("*.tar"))
    for tar in tars:
        index_path(tar).unlink()
    assert main([str(tmp_path / "shards" / "*.tar"), f"tokenizer={tmp_path}/words", f"workers={workers}"]) == 0
    assert capsys.readouterr().out == f"{len(tars)} shards indexed, 0 samples left out\n"
    assert all(index_path(tar).is_file() for tar in tars)
