"""Evaluation of a tiny model: batches with a cache equal one by one without, and two ranks find what one does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.corpus import Corpus
from data.errors import DataError
from data.grading import Grading
from data.prompts import PromptSet
from data.reader import Reader
from data.sample import SampleRecord
from data.shards import write_shards
from data.types import Batch
from launch.folder_engine import FolderEngine
from models.audio_encoder import AudioEncoder
from models.init import init_weights
from models.omni import Omni
from tests.data.corpus_kit import spoken, written
from tests.data.layouts import layout_of
from tests.distributed import spawn
from tests.launch.tiny_omni import tiny_config, tiny_tokenizer
from train import ranks
from train.config import EvalConfig
from train.engines import Shard
from train.evaluate import Evaluator
from train.loss import IGNORE

WORDS = tiny_tokenizer()
SUITES = ("asr", "qa", "likelihood", "text")


def records() -> list[SampleRecord]:
    """Questions with and without sound, choices of several lengths, documents; some lack what a suite needs."""
    choices = (("one", "two three", "hello world"), ("four", "three"))
    found = []
    for number in range(7):
        grading = Grading(choices=choices[number % 2], correct=1, group=f"g{number % 3}")
        make = spoken(f"a{number}", 0.3 + 0.4 * number) if number % 2 else written(f"a{number}", "two " * number)
        found.append(SampleRecord(make.key, make.messages, make.media, "en", "asked", grading=grading))
    found.append(SampleRecord("mute", [{"role": "user", "content": "one"}]))
    for number in range(4):
        segments = [{"type": "text", "text": "one two three " * (number + 1)}]
        found.append(
            SampleRecord(f"d{number}", segments=segments, grading=Grading(choices=(" one", " two"), correct=0))
        )
    return found


def model() -> Omni:
    omni = Omni(tiny_config(WORDS))
    init_weights(omni, seed=0)
    for parameter in omni.thinker.parameters():  # far from uniform, or every answer is a tie
        parameter.data.mul_(4 if parameter.dim() > 1 else 1)
    return omni.train(False).requires_grad_(False)


def evaluator(shards: str, suite: str, batch_tokens: int = 150, **settings: Any) -> Evaluator:
    corpus = Corpus.open([shards], WORDS.fingerprint)
    prompts = PromptSet(Reader(corpus, WORDS, seed=0, layout=layout_of(WORDS)))
    config = EvalConfig(suite=suite, batch_tokens=batch_tokens, max_new_tokens=6, **settings)
    return Evaluator(config, {"set": prompts}, WORDS)


def results(shards: str, batch_tokens: int = 150) -> dict[str, Any]:
    """Every suite's report, as this rank of the world finds it."""
    ranks.start(torch.device("cpu"))
    engine = FolderEngine(model(), torch.device("cpu"))
    engine.shard = Shard(ranks.rank(), ranks.world())
    found = {}
    for suite in SUITES:
        (report,) = evaluator(shards, suite, batch_tokens).reports(engine, 3)
        found[suite] = json.loads(json.dumps(report.plain()))
    ranks.stop()
    return found


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("sets")
    write_shards(records(), folder, WORDS)
    return f"{folder}/*.tar"


@pytest.fixture(scope="module")
def one(shards: str) -> dict[str, Any]:
    return results(shards)


def test_two_ranks_find_what_one_does(shards: str, one: dict[str, Any]) -> None:
    first, second = spawn(results, 2, shards)
    assert first == second == one, "bit by bit: the batches are the same"


def test_what_cannot_be_asked_is_named(one: dict[str, Any]) -> None:
    assert one["asr"]["rows"][-1]["num_samples"] == 7
    (line,) = one["asr"]["skipped"]
    assert ":mute: its last turn is not the assistant's" in line
    assert one["likelihood"]["rows"][-1]["num_samples"] == 11, "conversations and documents"
    assert [row["group"] for row in one["qa"]["tables"]["group"]] == ["g0", "g1", "g2"]
    assert {row["group"] for row in one["qa"]["tables"]["media"]} == {"audio", "text"}


def test_batches_equal_one_by_one(shards: str, one: dict[str, Any]) -> None:
    """A batch for each prompt gives the same answers, and the same numbers but for the last bits."""
    alone = results(shards, batch_tokens=1)
    for suite in SUITES:
        for mine, other in zip(one[suite]["examples"], alone[suite]["examples"], strict=True):
            assert mine["answer"] == other["answer"] and mine["key"] == other["key"]
            assert mine.get("logprobs") == pytest.approx(other.get("logprobs"), abs=1e-4)
        assert one[suite]["metrics"] == pytest.approx(alone[suite]["metrics"], rel=1e-5)
    assert len({each["answer"] for each in one["asr"]["examples"]}) > 1, "a model that says one thing proves nothing"


def without_cache(omni: Omni, batch: Batch, ids: list[list[int]]) -> list[tuple[int, float]]:
    """Of each document with ids behind it, whole, from one forward: the next token, and log-probability of the ids."""
    tokens = [torch.cat([own, torch.tensor(more, dtype=torch.int64)]) for own, more in
              zip(batch.token_ids_T.split(list(batch.doc_lengths)), ids, strict=True)]  # fmt: skip
    places: list[Tensor] = []
    for own_3S, more in zip(batch.position_ids_3T.split(list(batch.doc_lengths), 1), ids, strict=True):
        places.append(torch.cat([own_3S, (own_3S.max() + 1 + torch.arange(len(more))).expand(3, -1)], 1))
    lengths = [len(each) for each in tokens]
    hidden_TD, _ = omni.thinker(
        torch.cat(tokens), torch.cat(places, 1), lengths, batch.mel_FM, batch.mel_lengths,
        pixels_PX=batch.pixels_PX, grids=batch.grids,
    )  # fmt: skip
    found = []
    for own_SD, more in zip(hidden_TD.split(lengths), ids, strict=True):
        logits_SV = omni.thinker.lm_head(own_SD).float()
        logits_SV[:, [omni.config.thinker.audio_token_id]] = -torch.inf  # no answer holds a placeholder
        logprobs_SV = omni.thinker.lm_head(own_SD).float().log_softmax(-1)
        total = sum(logprobs_SV[len(own_SD) - len(more) + k - 1, token].item() for k, token in enumerate(more))
        found.append((int(logits_SV[-1].argmax()), total))
    return found


def test_the_cache_equals_whole_forwards(shards: str) -> None:
    omni = model()
    engine, prompts = FolderEngine(omni, torch.device("cpu")), evaluator(shards, "asr").sets["set"]
    batch, read = prompts.load(prompts.samples[:7].tolist())
    assert len(read) == 7 and batch.mel_lengths
    answers = engine.generate(batch, 4, stop_id=-1)
    so_far: list[list[int]] = [[] for _ in answers]
    for _ in range(4):
        for own, (token, _) in zip(so_far, without_cache(omni, batch, so_far), strict=True):
            own.append(token)
    assert answers == so_far
    choices = [[[3, 9, 4], [5]] if place % 2 else [[8], [1, 2], [7, 7, 7, 7]] for place in range(7)]
    found = engine.likelihoods(batch, choices)
    for turn in range(3):
        these = [own[turn] if turn < len(own) else [] for own in choices]
        for (_, expected), own in zip(without_cache(omni, batch, these), found, strict=True):
            assert turn >= len(own) or own[turn] == pytest.approx(expected, abs=1e-4)
    assert batch.labels_T.max() == IGNORE


def test_media_are_encoded_once_however_long_the_answers(shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []
    forward = AudioEncoder.forward

    def counted(self: AudioEncoder, mel_FM: Tensor, *lengths: Any) -> Tensor:
        heard.append(len(mel_FM))
        return forward(self, mel_FM, *lengths)

    monkeypatch.setattr(AudioEncoder, "forward", counted)
    engine, prompts = FolderEngine(model(), torch.device("cpu")), evaluator(shards, "asr").sets["set"]
    batch, _ = prompts.load(prompts.samples[:7].tolist())
    engine.generate(batch, 6, stop_id=-1)
    engine.likelihoods(batch, [[[1, 2, 3], [4, 5]]] * 7)
    assert len(heard) > 6 and sum(heard) == 2 * len(batch.mel_FM), "each call once; the other forwards hear nothing"


def test_a_set_of_nothing_to_ask_is_refused_at_the_start(tmp_path: Path) -> None:
    write_shards([written("a"), written("b")], tmp_path, WORDS)
    for suite, message in (
        ("likelihood", "none of its samples can be asked by suite=likelihood; the first: "),
        ("long_qa", "it has no grading.position"),
        ("text", "its shards have no documents, which suite=text asks about"),
    ):
        with pytest.raises(DataError, match=message):
            evaluator(f"{tmp_path}/*.tar", suite).check()


def test_reasons_come_from_every_rank(tmp_path: Path) -> None:
    """A clip that is damaged is named in the same words whoever reads it."""
    write_shards(records(), tmp_path, WORDS)
    (tar,) = tmp_path.glob("*.tar")
    data, corpus = bytearray(tar.read_bytes()), Corpus.open([str(tar)])
    start = int(corpus.index(0).columns["member_start"][2])  # the sound of a1
    data[start + 3000] ^= 0xFF
    tar.write_bytes(data)
    alone, (first, second) = results(str(tar), 40), spawn(results, 2, str(tar), 40)
    assert first == second == alone
    assert [":a1: " in line and "crc32" in line for line in alone["asr"]["skipped"]] == [True, False], alone["asr"]
