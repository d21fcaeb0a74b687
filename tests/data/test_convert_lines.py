"""Reading rows of files from any job's first row on: lines, arrays, gzipped ones, broken ones, repeated keys."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import BadSample, DataError
from data.sources import Common, Item, MediaFolder
from data.sources_files import TextRow
from data.sources_lines import MAX_LINE_BYTES, LineSource
from tests.data.convert_kit import clip, converts, counts, fails, members, said, samples, write_lines


def text_source(path: Path, size: int = 3) -> LineSource:
    return LineSource("train", [path], ["k"], TextRow(Common(MediaFolder(path.parent), "s"), plain=False))


ROWS = st.lists(
    st.one_of(
        st.builds(lambda text: {"text": text}, st.text(st.characters(codec="utf-8"), min_size=1, max_size=30)),
        st.just({"other": [1, {"a": "]}"}]}),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(1, 5), st.sampled_from(["jsonl", "json", "pretty.json", "jsonl.gz", "json.gz"]))
def test_jobs_hold_every_row_once(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], size: int, form: str
) -> None:
    path = tmp_path_factory.mktemp("rows") / f"x.{form}"
    array = "json" in form.split(".")
    text = (
        json.dumps(rows, ensure_ascii=False, indent=3 if "pretty" in form else None)
        if array
        else "".join(json.dumps(row) + "\n" for row in rows)
    )
    path.write_bytes(gzip.compress(text.encode()) if form.endswith("gz") else text.encode())
    source = text_source(path)
    spans = source.spans(size)
    assert [span.count for span in spans] == [min(size, len(rows) - first) for first in range(0, len(rows), size)]
    read = [list(source.read(span)) for span in spans]
    again = {span: list(source.read(span)) for span in sorted(spans, reverse=True)}  # in any order of jobs
    flat = [row for job in read for row in job]
    assert [row.place for row in flat] == [row.place for span in spans for row in again[span]]
    texts = [row.item.record.segments[0]["text"] if isinstance(row.item, Item) else None for row in flat]
    assert texts == [row["text"] if row.get("text", "").strip() else None for row in rows]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'[{"text": "a"}, {"text": ', "broken JSON in entry 2"),
        (b'[{"text": "a"} {"text": "b"}]', "no comma behind entry 1"),
        (b'[{"text": "a"}, {"text": "\xff"}]', "not UTF-8"),
        (b'[{"text": "a"}] {"text": "b"}', "there is more behind the array"),
        (b'[{"text": "a"}, nothing]', "broken JSON in entry 2"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_broken_array_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: bytes, reason: str
) -> None:
    (tmp_path / "x.json").write_bytes(text)
    error = fails(capsys, "llava", tmp_path / "x.json", tmp_path / "out")
    assert "x.json: " in error and reason in error
    assert not (tmp_path / "out").exists()


def test_a_line_without_end_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.sources_lines.MAX_LINE_BYTES", 100)
    path = write_lines(tmp_path / "x.jsonl", {"text": "a"}, {"text": "b" * 1000}, {"text": "c"})
    source = text_source(path)
    (span,) = source.spans(9)
    rows = list(source.read(span))
    assert [row.place for row in rows] == ["x.jsonl:1", "x.jsonl:2", "x.jsonl:3"]
    assert isinstance(rows[1].item, BadSample) and rows[1].item.reason.startswith("line too long")
    assert isinstance(rows[2].item, Item) and MAX_LINE_BYTES > 100


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", *[{"text": "a"}] * 9)
    source = text_source(path)
    span = source.spans(9)[0]
    write_lines(path, {"text": "a"})
    with pytest.raises(DataError, match="has fewer rows than before"):
        list(source.read(span))


def test_keys_given_twice_across_jobs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Also where a given key is what a row without one gets."""
    (tmp_path / "a.wav").write_bytes(clip())
    keys = ["x", "y", "x", None, "list-00000004", "z", "y"]
    rows = [{"audio": "a.wav", "text": str(i)} | ({"key": key} if key else {}) for i, key in enumerate(keys)]
    path = write_lines(tmp_path / "list.jsonl", *rows)
    printed = converts(capsys, "manifest", path, tmp_path / "out", "--samples-per-shard", 2)
    assert counts(printed) == (4, 3, 3) and "list.jsonl:5: key occurs twice: list-00000004" in printed
    assert [said(record) for record in samples(tmp_path / "out/train").values()] == ["0", "1", "3", "5"]
    assert len(members(tmp_path / "out/train")) == 8
