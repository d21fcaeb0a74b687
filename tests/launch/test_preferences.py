"""`launch.preferences` as a user types it: ranked by what is heard, written beside shards, stopped and gone on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.code_store import ShardCodes
from data.codec import open_codec
from data.codes import encode_shards
from data.corpus import Corpus
from data.pair_store import ShardPairs
from data.shards import write_shards
from launch.preferences import main
from tests.data.corpus_kit import written
from tests.launch.tts_kit import GROUPS, TEXTS, TOKENIZER, said, write_run, write_sets
from train.pairs import RECORDING, choose, sound_of, word_error_rate
from train.recogniser import Recogniser

BATCH = ["candidates=3", "max_seconds=0.4", "batch=2", "temperature=1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs in run and ear; shards, codec and tokenizer in sets."""
    folder = tmp_path_factory.mktemp("preferences")
    sets = write_sets(folder / "sets")
    write_run(folder / "run", sets, True)
    write_run(folder / "ear", sets, False, seed=1)
    return folder


def shards(folder: Path) -> str:
    """Six spoken answers, one of a speaker unknown to the run, one without speech."""
    records = [*(said(number, heard=number in (1, 4)) for number in range(6)), said(2, speaker="carla"), written("w")]
    write_shards([replace(record, key=f"s{at}") for at, record in enumerate(records)], folder, TOKENIZER)
    return f"shards={folder}/*.tar"


def launch(made: Path, *arguments: str) -> int:
    given = {"run": f"{made}/run", "recogniser": f"{made}/ear"} | dict(word.split("=", 1) for word in BATCH)
    given |= dict(word.split("=", 1) for word in arguments)
    return main([f"{key}={value}" for key, value in given.items() if value != "-"])


def hears(self: Recogniser | None, waves: Sequence[np.ndarray], languages: Sequence[str]) -> list[str]:
    """One of the texts, by the sound."""
    return [TEXTS[int(1e6 * float(np.abs(wave_S).sum())) % len(TEXTS)] for wave_S in waves]


def opened(folder: Path) -> ShardPairs:
    corpus = Corpus.open([f"{folder}/*.tar"])
    return ShardPairs.open(corpus.paths[0], corpus.index(0))


def test_the_best_heard_is_chosen_and_all_is_counted(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Recogniser, "hear", hears)
    assert launch(made, shards(tmp_path)) == 0
    shown, pairs = capsys.readouterr().out, opened(tmp_path)
    rows = np.flatnonzero(pairs.frames(slice(None))).tolist()
    assert rows and f"{len(rows)} pairs of 7 spoken answers in 1 shards" in shown
    others = len(pairs.other)
    assert f"left out: {7 - len(rows) - others} whose candidates score alike, {others} for other reasons" in shown
    assert "s6: its answer is spoken by 'carla', and the model has anna, berta" in shown
    codec = open_codec(made / "sets/codec")
    for row in rows:
        pair = pairs.pair(row)
        assert pair is not None and pair.errors[0] < pair.errors[1] and not pair.recorded
        assert pairs.speaker(row) == ("anna", "berta")[row % 2]
        for codes_GF, error in zip((pair.chosen_GF, pair.rejected_GF), pair.errors, strict=True):
            assert codes_GF.shape == (GROUPS, 5), "it is ended after 0.4 s"
            (heard,) = hears(None, [sound_of(codec, codes_GF)], [""])
            assert word_error_rate(TEXTS[row], heard) == pytest.approx(error)
        assert (pair.logprobs_22 < 0).all() and pair.logprobs_22.isfinite().all()


def test_stopped_and_gone_on_and_left_alone(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def stops(self: Recogniser, waves: Sequence[np.ndarray], languages: Sequence[str]) -> list[str]:
        calls.append(len(waves))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return hears(self, waves, languages)

    whole, cut = shards(tmp_path / "whole"), shards(tmp_path / "cut")
    monkeypatch.setattr(Recogniser, "hear", hears)
    assert launch(made, whole) == 0
    monkeypatch.setattr(Recogniser, "hear", stops)
    assert launch(made, cut) == 130 and calls == [6, 6, 6]
    assert "goes on where it stopped" in capsys.readouterr().err
    assert not list((tmp_path / "cut").glob("*.pairs")) and list((tmp_path / "cut").glob("*.pairs.partial"))
    assert launch(made, cut) == 0 and len(calls) == 5, "the first two groups are done, the last has two more"
    paths = [next((tmp_path / name).glob("*.pairs")) for name in ("whole", "cut")]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    monkeypatch.setattr(Recogniser, "hear", lambda *_: pytest.fail("heard again"))
    before = paths[0].read_bytes()
    assert launch(made, whole) == 0 and paths[0].read_bytes() == before
    assert launch(made, whole, "seed=1") == 2
    assert "made with seed=0, asked for is seed=1; replace=true makes it anew" in capsys.readouterr().err
    monkeypatch.setattr(Recogniser, "hear", hears)
    assert launch(made, whole, "seed=1", "replace=true") == 0 and paths[0].read_bytes() != before


def test_recordings_are_chosen_where_no_candidate_is_better(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = Corpus.open([shards(tmp_path).removeprefix("shards=")])
    codec = open_codec(made / "sets/codec")
    encode_shards(corpus, codec)

    def knows(self: Recogniser, waves: Sequence[np.ndarray], languages: Sequence[str]) -> list[str]:
        return [*TEXTS[: len(waves)]] if len(waves) == 2 else ["nothing"] * len(waves)  # recordings come in twos

    monkeypatch.setattr(Recogniser, "hear", knows)
    assert launch(made, f"shards={tmp_path}/*.tar", "chosen=recording") == 0
    pairs = opened(tmp_path)
    first = pairs.pair(0)
    assert first is not None and first.recorded and first.errors == (0.0, 1.0)
    wanted = _codes(corpus, 0)
    assert wanted is not None and torch.equal(first.chosen_GF, wanted)


def _codes(corpus: Corpus, row: int) -> torch.Tensor | None:
    return ShardCodes.open(corpus.paths[0], corpus.index(0)).codes(row)


def test_ranks() -> None:
    assert choose([(0.5, False), (0.0, True), (0.0, False), (1.0, False)]) == (2, 3)
    assert choose([(0.0, False), (0.0, True)]) == (0, 1), "who ended by itself is better"
    assert choose([(1.0, True), (0.5, False), (0.5, False), (1.0, True)]) == (1, 3), "the lower number is better"
    assert choose([(0.5, False), (0.5, False)]) is None
    assert choose([(0.5, False), (1.0, False)], (0.5, False)) == (RECORDING, 1)
    assert choose([(0.5, False), (1.0, False)], (0.6, False)) == (0, 1)
    assert choose([(0.5, False)], (0.0, False)) == (RECORDING, 0)
    assert choose([(0.0, False)], (0.0, False)) is None
    assert word_error_rate("one two", "one three four") == 1.0 and word_error_rate("One, two.", "one two") == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run=-"], "give run=..."),
        (["recogniser=-"], "give recogniser=..."),
        (["candidates=1"], "candidates must be from 2 to 1024, not 1"),
        (["candidates=x"], "candidates must be a whole number, not 'x'"),
        (["chosen=worst"], "chosen=worst: it is best or recording"),
        (["replace=yes"], "replace=yes: it is true or false"),
        (["temperature=0"], "temperature must be from 0.001 to 100, not 0"),
        (["batch=0"], "batch must be from 1 to 65536, not 0"),
        (["candidate=3"], "unknown argument 'candidate', did you mean 'candidates'?"),
        (["run=ABSENT"], "recipe.yaml: no such file; give the folder of a run"),
        (["run=EAR"], "has no model.talker: this run cannot speak"),
        (["data.codec=''"], "recipe.yaml has no data.codec: give data.codec=FOLDER"),
        (["recogniser=ABSENT"], "recogniser="),
        (["shards=ABSENT/*.tar"], "ABSENT"),
        (["shards=s3://bucket/a.tar"], "s3://bucket/a.tar: pairs are written beside local shards"),
        (["shards=ASKED"], "no answer of these shards has speech"),
        (["checkpoint=ABSENT"], "ABSENT"),
    ],
)
def test_bad_arguments_are_told_in_one_line(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    places = {"ABSENT": f"{tmp_path}/absent", "EAR": f"{made}/ear", "ASKED": f"{made}/sets/asked/*.tar"}
    for name, place in places.items():
        arguments = [word.replace(name, place) for word in arguments]
        message = message.replace(name, place)
    assert launch(made, *arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
