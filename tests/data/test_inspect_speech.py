"""What a survey tells of answers with speech: how many, and by codes beside the shards who speaks and how long."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import data.survey
from data.codes import encode_shards
from data.corpus import Corpus
from data.costs import Sizing
from data.inspect import main
from data.report import as_json, as_text, summary, tables
from data.survey import Survey, survey
from tests.data.corpus_kit import written
from tests.data.test_codes import CODEC, shards
from train.layout import ModelLayout


def surveyed(corpus: Corpus) -> Survey:
    return survey(Corpus.open(corpus.paths), Sizing(ModelLayout()))


def spoken(found: Survey) -> str:
    return dict(summary(found))["spoken"]


@pytest.mark.parametrize("window", [2, 1 << 16])
def test_without_codes_answers_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    monkeypatch.setattr(data.survey, "WINDOW", window)
    found = surveyed(shards(tmp_path))  # 11 samples, 3 of them without speech
    assert found.total.spoken == 8 and found.total.samples == 11 and found.total.clips == 0
    assert spoken(found) == "8 answers have speech; python -m data.codes tells by whom and how long"
    assert "speech of answers" not in "".join(table.title for table in tables(found))
    content = as_json(found)
    assert content["total"]["spoken"] == sum(group["spoken"] for group in content["groups"]) == 8
    assert content["speech"] == {"answers": 8, "shards_with_codes": 0, "speakers": [], "unusable_codes": []}


def test_codes_tell_who_speaks(tmp_path: Path) -> None:
    corpus = shards(tmp_path)
    made = encode_shards(corpus, CODEC)
    found = surveyed(corpus)
    assert found.speech.shards == 3 and found.speech.speakers == made.speakers and len(made.speakers) == 3
    assert spoken(found) == "8 answers have speech, 7 of them have codec codes, of 3 speakers"  # one is undecodable
    (table,) = [table for table in tables(found) if table.title.startswith("speech of answers")]
    assert {row[0]: row[1] for row in table.rows} == {"(unknown)": "3", "george": "3", "lucas": "1"}
    assert list(table.total)[:2] == ["all", "7"] and "george" in as_text(table)
    speakers = as_json(found)["speech"]["speakers"]
    assert [each["speaker"] for each in speakers] == ["", "george", "lucas"] and speakers[2]["utterances"] == 1
    assert speakers[2]["seconds"] == pytest.approx(0.56)  # 0.5 s in frames of 80 ms


def test_codes_that_cannot_be_used_are_told(tmp_path: Path) -> None:
    corpus = shards(tmp_path)
    encode_shards(corpus, CODEC)
    Path(f"{corpus.paths[1]}.codes").write_bytes(b"damaged")
    found = surveyed(corpus)
    assert found.total.spoken == 8 and found.speech.shards == 2
    assert "codes of 1 shards cannot be used: " in spoken(found) and "damaged codes" in spoken(found)
    assert len(as_json(found)["speech"]["unusable_codes"]) == 1


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = shards(tmp_path)
    encode_shards(corpus, CODEC)
    assert main([str(tmp_path / "*.tar"), "--json", str(tmp_path / "x.json"), "--page", str(tmp_path / "x.html")]) == 0
    printed = capsys.readouterr().out
    assert (
        "8 answers have speech, 7 of them" in printed and "speech of answers, by the codec codes of 3 shards" in printed
    )
    assert json.loads((tmp_path / "x.json").read_text())["speech"]["answers"] == 8
    assert "speech of answers, by the codec codes" in (tmp_path / "x.html").read_text()


def test_a_corpus_without_speech_says_nothing_of_it(tmp_path: Path) -> None:
    found = surveyed(shards(tmp_path, [written("a"), written("b")]))
    assert "spoken" not in dict(summary(found)) and found.total.spoken == 0
    assert not [table for table in tables(found) if "speech" in table.title]
