"""A recording of 40 minutes goes all the way, whole: 13 tokens a second, counted at every station.

file -> samples -> log-mel -> pack -> audio encoder -> training step -> prompt -> greedy answer
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.audio import decode
from data.corpus import Corpus
from data.mel import log_mel
from data.prompts import PromptSet
from data.reader import Reader
from data.shards import write_shards
from data.tokenizer import AUDIO_PAD
from models.config import AudioConfig, TextConfig, ThinkerConfig
from models.layers.attention import make_segments
from tests.data.layouts import layout_of
from tests.data.test_exactness import TOKENIZER, asked, batches, clip
from train.config import EngineConfig, EvalConfig, LossConfig, OptimConfig, Phase
from train.engines.build import build_engine
from train.engines.setup import EngineSetup
from train.evaluate import Evaluator

SECONDS, RATE, FRAMES, TOKENS = 2400, 8000, 240_000, 31_200
GB = 1e9


def engine_of(**engine: Any) -> Any:
    """A toy Thinker that hears."""
    text = TextConfig(TOKENIZER.vocab_size, 32, 2, 4, 2, 8, 4, 2, 16, mrope_section=(2, 1, 1))
    audio = AudioConfig(16, 1, 2, 32, output_dim=32, downsample_hidden_size=4)
    setup = EngineSetup(
        model=ThinkerConfig(text, audio, TOKENIZER.id(AUDIO_PAD)),
        engine=EngineConfig(device="cpu", **engine),
        optim=OptimConfig(),
        loss=LossConfig(),
        phase=Phase(steps=1),
        phase_name="all",
        seed=0,
        device=torch.device("cpu"),
    )
    return build_engine(setup)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, bytes]]:
    folder, payload = tmp_path_factory.mktemp("long"), clip(float(SECONDS), RATE)
    write_shards([asked("long", payload)], folder, TOKENIZER)
    yield folder, payload


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_the_way(shards: tuple[Path, bytes], tmp_path: Path) -> None:
    folder, payload = shards
    pad = TOKENIZER.id(AUDIO_PAD)
    assert len(decode(payload)) == SECONDS * 16_000  # samples, at the model's rate
    assert len(log_mel(decode(payload))) == FRAMES
    (batch,) = batches(tmp_path, [asked("long", payload)], 32_768)
    assert not batch.skipped and len(batch.mel_FM) == FRAMES and int((batch.token_ids_T == pad).sum()) == TOKENS
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    engine = engine_of(recompute_layers=True, tiles=4)
    heard: list[int] = []
    tower = engine.objective.thinker.audio_tower
    tower.register_forward_hook(lambda module, inputs, features_TD: heard.append(len(features_TD)))
    stats = engine.train_step([batch], 1e-3)
    assert heard == [TOKENS] and stats.num_tokens == len(batch.token_ids_T) > TOKENS and stats.num_skipped == 0
    assert 0 < stats.grad_norm < 1e3 and 0 < stats.loss < 20
    corpus = Corpus.open([str(folder / "*.tar")], TOKENIZER.fingerprint)
    prompts = PromptSet(Reader(corpus, TOKENIZER, seed=0, layout=layout_of(TOKENIZER)))
    asked_for, rows = prompts.load([0])
    assert rows == [0] and int((asked_for.token_ids_T == pad).sum()) == TOKENS
    # the usual limit of a batch of prompts is below one such prompt: it is answered alone, not cut
    (report,) = Evaluator(EvalConfig(max_new_tokens=3), {"long": prompts}, TOKENIZER).reports(engine, 1)
    assert heard == [TOKENS, TOKENS, 0, 0]  # the prompt at once, then two words more
    assert not report.skipped and report.all.num_samples == 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    # one matrix of 31,200 x 31,200 fp32 scores is 3.9 GB a head
    assert grown < 1.5 * GB, f"{grown / GB:.2f} GB"


def test_every_second_counts(shards: tuple[Path, bytes]) -> None:
    """What the model hears in the last second changes what it says after it: nothing is cut on the way in."""
    folder, payload = shards
    engine = engine_of()
    mel_FM = log_mel(decode(payload))[-20_000:]
    tower = engine.objective.thinker.audio_tower

    @torch.no_grad()
    def features(mel_FM: Tensor) -> Tensor:
        return tower(mel_FM, (len(mel_FM),))

    other_FM = mel_FM.clone()
    other_FM[-100:] = -1.0
    whole_TD, changed_TD = features(mel_FM), features(other_FM)
    assert len(whole_TD) == 2_600
    assert not torch.equal(whole_TD[-13:], changed_TD[-13:]) and torch.equal(whole_TD[:-104], changed_TD[:-104])


def test_attention_is_never_a_matrix_of_all_pairs() -> None:
    """A document of 31,200 tokens is one segment, which the kernel walks in blocks: no mask, nothing gathered."""
    (bucket,) = make_segments((TOKENS,), torch.device("cpu")).buckets
    assert bucket.start == 0 and bucket.real_NL is None and bucket.num == 1
