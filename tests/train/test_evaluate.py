"""Word error rates: normalisation, rows, and that distributed ranks would add up to the same report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from data.corpus import Corpus
from data.prompts import PromptSet
from data.reader import Reader
from data.sample import SampleRecord
from data.shards import write_shards
from tests.data.corpus_kit import spoken, tokenizer, written
from tests.data.layouts import layout_of
from train.config import EvalConfig
from train.engines import Shard
from train.evaluate import Evaluator
from train.word_errors import normalise


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello,  World!", "hello world"),
        ("it's - fine.", "its fine"),
        ("四只红狗。", "四 只 红 狗"),
        ("Ёлка\tи  дом", "ёлка и дом"),
        ("ﬁve", "five"),
        ("", ""),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected


class Parrot:
    """An engine that answers by key, and counts the batches it was given."""

    is_main = True

    def __init__(self, answers: dict[str, str]) -> None:
        self.shard, self.words, self.answers, self.batches = Shard(0, 1), tokenizer(), answers, 0

    def generate(self, batch, max_new_tokens, stop_id):
        self.batches += 1
        assert stop_id == self.words.id("<|im_end|>")
        return [self.words.encode(self.answers[key.split(":")[1]])[:max_new_tokens] for key in batch.keys]

    def losses(self, batch):
        counts = [(labels_S >= 0).sum().item() for labels_S in batch.labels_T.split(list(batch.doc_lengths))]
        return [0.25 * count for count in counts]


def make_set(folder: Path) -> PromptSet:
    records = [
        spoken("a", 0.4, "one two three", language="en"),
        spoken("b", 1.5, "one two", language="en"),
        spoken("c", 0.3, "四只狗", language="zh"),
        written("d", "hello world", language="de"),
    ]
    write_shards(records, folder, tokenizer())
    corpus = Corpus.open([f"{folder}/*.tar"], tokenizer().fingerprint)
    return PromptSet(Reader(corpus, tokenizer(), seed=0, layout=layout_of(tokenizer())))


def test_report_counts_by_language(tmp_path: Path) -> None:
    engine = Parrot({"a": "one two four", "b": "One two!", "c": "四狗", "d": "hello big world"})
    config = EvalConfig(batch_tokens=40, max_new_tokens=30)
    (report,) = Evaluator(config, {"mine": make_set(tmp_path / "s")}, tokenizer()).reports(engine, 7)  # type: ignore[arg-type]
    rows = {row.group: {**row.counts, **row.values} for row in report.tables["language"]}
    assert engine.batches > 1, "a limit of 40 prompt tokens must part the samples"
    assert rows["en"]["wer"] == pytest.approx(1 / 5) and rows["en"]["substitutions"] == 1
    assert rows["zh"]["wer"] == pytest.approx(1 / 3) and rows["zh"]["deletions"] == 1
    assert rows["de"]["wer"] == pytest.approx(1 / 2) and rows["de"]["insertions"] == 1
    found = report.metrics
    assert found["wer"] == pytest.approx(3 / 10) and found["words"] == 10 and report.all.num_samples == 4
    assert found["cer"] == pytest.approx((5 + 1 + 3) / (11 + 6 + 3 + 10)), "three to four, a sign, and big"
    saved = json.loads(report.write(tmp_path / "eval", 7).read_text())
    assert saved["wer"] == found["wer"] and saved["rows"][-1]["group"] == "all" and len(saved["examples"]) == 4
    assert saved["rows"][-1]["insertions"] == 1 and saved["rows"][-1]["accuracy"] == 0.25
    assert saved["examples"][0]["reference"] == "one two three"
    assert "zh" in report.table() and "30.0%" in report.table()


def test_max_samples_are_always_the_same_ones(tmp_path: Path) -> None:
    engine = Parrot({"a": "one", "b": "", "c": "", "d": ""})
    evaluator = Evaluator(EvalConfig(max_samples=2, max_new_tokens=4), {"s": make_set(tmp_path / "s")}, tokenizer())
    first, second = (next(evaluator.reports(engine, step)) for step in (0, 1))  # type: ignore[arg-type]
    assert len(first.examples) == 2 and first.examples == second.examples


def test_a_damaged_clip_is_counted_not_hidden(tmp_path: Path) -> None:
    prompts = make_set(tmp_path / "s")
    tar = next((tmp_path / "s").glob("*.tar"))
    data = bytearray(tar.read_bytes())
    start = int(prompts.reader.corpus.index(0).columns["member_start"][1])  # the audio of the first sample
    data[start + 2000] ^= 0xFF
    tar.write_bytes(data)
    engine = Parrot({"a": "x", "b": "one two", "c": "四只狗", "d": "hello world"})
    (report,) = Evaluator(EvalConfig(max_new_tokens=30), {"s": prompts}, tokenizer()).reports(engine, 0)  # type: ignore[arg-type]
    assert report.all.num_samples == 3 and report.metrics["wer"] == 0
    assert len(report.skipped) == 1 and ":a: " in report.skipped[0] and "crc32" in report.skipped[0]
    assert "1 samples could not be used" in report.table()


def test_report_counts_by_source(tmp_path: Path) -> None:
    records = [
        replace(written(key, reference, language="en"), source=source)
        for key, reference, source in (("a", "red", "pictures"), ("b", "blue", "pictures"), ("c", "a bell", "sounds"))
    ]
    write_shards(records, tmp_path, tokenizer())
    corpus = Corpus.open([f"{tmp_path}/*.tar"], tokenizer().fingerprint)
    prompts = PromptSet(Reader(corpus, tokenizer(), seed=0, layout=layout_of(tokenizer())))
    engine = Parrot({"a": "Red.", "b": "red", "c": "a red bell"})
    (report,) = Evaluator(EvalConfig(max_new_tokens=30), {"s": prompts}, tokenizer()).reports(engine, 0)  # type: ignore[arg-type]
    found = {row.group: (row.num_samples, row.values["accuracy"]) for row in report.tables["source"]}
    assert found == {"pictures": (2, 0.5), "sounds": (1, 0.0)}
    assert report.metrics["accuracy"] == pytest.approx(1 / 3) and report.loss is None
    saved = json.loads(report.write(tmp_path / "eval", 0).read_text())
    assert [row["accuracy"] for row in saved["sources"]] == [0.5, 0.0]
    assert "pictures" in report.table() and "50.0%" in report.table()


def test_documents_have_a_loss(tmp_path: Path) -> None:
    """The mean over tokens of all documents, whatever the groups."""
    records = [written("q", "hello", language="en")]
    records += [SampleRecord(f"d{i}", segments=[{"type": "text", "text": "one two " * 9}]) for i in range(5)]
    write_shards(records, tmp_path, tokenizer())
    corpus = Corpus.open([f"{tmp_path}/*.tar"], tokenizer().fingerprint)
    prompts = PromptSet(Reader(corpus, tokenizer(), seed=0, layout=layout_of(tokenizer())))
    evaluator = Evaluator(EvalConfig(batch_tokens=40, max_new_tokens=9), {"s": prompts}, tokenizer())
    (report,) = evaluator.reports(Parrot({"q": "hello"}), 0)  # type: ignore[arg-type]
    whole, read = prompts.load(prompts.documents.tolist(), whole=True)
    targets = int((whole.labels_T != -100).sum())
    assert len(read) == len(whole.doc_lengths) == 5 and targets >= 5 * 17
    assert (report.loss, report.num_targets) == (0.25, targets) and report.all.num_samples == 1
    assert f"documents: 0.2500 nats a token, over {targets} tokens" in report.table()
    assert evaluator.metrics("s") == {"wer": False, "cer": False, "accuracy": True, "loss": False}
