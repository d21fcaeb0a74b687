"""Media encoded by all ranks together are those that each would have encoded alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data.costs import Work
from data.types import Batch
from models.audio_encoder import num_audio_tokens
from models.config import AudioConfig, TextConfig, ThinkerConfig, VisionConfig
from models.init import init_weights
from models.thinker import Media, Thinker
from tests.distributed import spawn
from train import ranks
from train.encoders import Cuts, Route, SharedEncoding, audio_cuts, route, vision_cuts

MELS, PATCH, WINDOW, MERGE = 16, 24, 200, 2

counts = st.integers(1, 5)
frames = st.lists(st.integers(1, 1000), max_size=6)
grids = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4)), max_size=6)


def homes(of_ranks: list[list[Any]]) -> np.ndarray:
    return np.repeat(np.arange(len(of_ranks)), [len(media) for media in of_ranks])


def shared_out(cuts: Cuts, home_M: np.ndarray, num_ranks: int, tokens_of: Any) -> list[Route]:
    return [route(cuts, home_M, tokens_of, rank, num_ranks) for rank in range(num_ranks)]


def delivered(parts: list[np.ndarray], out: list[list[int]], back: list[list[int]]) -> list[np.ndarray]:
    """What `ranks.exchange` gives every rank."""
    cut = [np.split(part, np.cumsum(sizes)[:-1]) for part, sizes in zip(parts, out, strict=True)]
    got = [np.concatenate([cut[source][target] for source in range(len(parts))]) for target in range(len(parts))]
    assert [[len(cut[source][target]) for source in range(len(parts))] for target in range(len(parts))] == back
    return got


def check(cuts: Cuts, home_M: np.ndarray, num_ranks: int, tokens_of: Any) -> None:
    """Every row is encoded once, in an unbroken stretch, and its features come home in order."""
    routes = shared_out(cuts, home_M, num_ranks, tokens_of)
    first_M = np.cumsum(cuts.rows_M) - cuts.rows_M
    own = [np.flatnonzero(home_M == rank) for rank in range(num_ranks)]
    rows = [
        np.concatenate([np.arange(first_M[m], first_M[m] + cuts.rows_M[m]) for m in [*mine]] or [[]]) for mine in own
    ]
    sent = [part[way.own_rows] for part, way in zip(rows, routes, strict=True)]
    taken = delivered(sent, [way.rows_out for way in routes], [way.rows_in for way in routes])
    assert sorted(np.concatenate(taken)) == list(range(cuts.rows_M.sum()))
    made = []
    for way, got in zip(routes, taken, strict=True):
        names, at = [], 0
        for medium, size in zip(way.medium_N, way.rows_N, strict=True):
            stretch = got[at : at + size]
            at += size
            assert (stretch == np.arange(stretch[0], stretch[0] + size)).all()
            offset = stretch[0] - first_M[medium]
            assert offset % cuts.per_atom_M[medium] == 0
            before = tokens_of(np.array([offset]))[0] if offset else 0
            names += [(medium, before + token) for token in range(tokens_of(np.array([size]))[0])]
        made.append(np.array(names).reshape(-1, 2))
    home = delivered(made, [way.tokens_out for way in routes], [way.tokens_in for way in routes])
    for mine, back, way in zip(own, home, routes, strict=True):
        placed = np.empty_like(back)
        placed[way.own_tokens] = back
        assert placed.tolist() == [[m, t] for m in mine for t in range(tokens_of(cuts.rows_M[m : m + 1])[0])]


@settings(max_examples=200, deadline=None)
@given(st.lists(frames, min_size=1, max_size=5))
def test_every_clip_comes_home(clips: list[list[int]]) -> None:
    frames_M = np.array([n for mine in clips for n in mine], np.int64)
    check(audio_cuts(frames_M, WINDOW), homes(clips), len(clips), num_audio_tokens)


@settings(max_examples=200, deadline=None)
@given(st.lists(grids, min_size=1, max_size=5))
def test_every_picture_comes_home(pictures: list[list[tuple[int, int, int]]]) -> None:
    grid_M3 = np.array([grid for mine in pictures for grid in mine], np.int64).reshape(-1, 3)
    grid_M3[:, 1:] *= MERGE
    check(vision_cuts(grid_M3, Work()), homes(pictures), len(pictures), lambda rows: rows // MERGE**2)


def test_the_heaviest_rank_is_near_the_mean() -> None:
    """One rank has all the sound; in the end each has its share, to a window."""
    frames_M = np.array([6000, 150, 4000, 90], np.int64)
    routes = shared_out(audio_cuts(frames_M, WINDOW), np.zeros(4, np.int64), 4, num_audio_tokens)
    loads = [int(way.rows_N.sum()) for way in routes]
    assert sum(loads) == frames_M.sum() and max(loads) <= frames_M.sum() / 4 + 2 * WINDOW
    assert [sum(way.rows_in) for way in routes] == loads


@pytest.mark.parametrize(
    ("frames", "atoms"), [(1, 1), (99, 1), (200, 1), (299, 1), (300, 2), (400, 2), (499, 2), (500, 3)]
)
def test_a_last_chunk_below_a_second_stays_with_its_window(frames: int, atoms: int) -> None:
    assert audio_cuts(np.array([frames]), WINDOW).atoms_M.tolist() == [atoms]


def model() -> ThinkerConfig:
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    text = TextConfig(64, 32, 2, 4, 2, 8, mrope_section=(2, 1, 1), **moe)
    audio = AudioConfig(16, 1, 2, 32, output_dim=32, downsample_hidden_size=8, num_mel_bins=MELS, n_window_infer=WINDOW)
    return ThinkerConfig(text, audio, 63, VisionConfig(2, 16, 16, 2, 32, (0,), 16, patch_size=2), 62, 61)


def batch(rank: int, number: int) -> Batch:
    """Clips and pictures of one micro-batch; odd ranks have no sound, rank 2 has no picture but one."""
    generator = torch.Generator().manual_seed(10 * rank + number)
    lengths = () if rank % 2 else ((730, 41), (1250,), ())[number]
    shapes = ((1, 4, 2), (5, 2, 4), (1, 2, 2))[: 1 + (rank + number) % 3] if rank != 2 or number == 1 else ()
    empty = Batch.empty(MELS)
    return Batch(
        **{
            name: getattr(empty, name) for name in ("token_ids_T", "labels_T", "position_ids_3T", "doc_lengths", "keys")
        },
        mel_FM=torch.randn(sum(lengths), MELS, generator=generator),
        mel_lengths=lengths,
        pixels_PX=torch.randn(sum(t * h * w for t, h, w in shapes), PATCH, generator=generator),
        grids=shapes,
    )


def weigh(features: list[Any]) -> Tensor:
    """A loss in which every feature counts otherwise."""
    total = torch.zeros((), dtype=torch.float64)
    for number, each in enumerate(features):
        for part in (each.audio_TD, each.visual_VD, *each.deepstack):
            total = total + (part.double() * torch.arange(part.numel()).view(part.shape).cos()).sum() * (number + 1)
    return total


def encode_together() -> dict[str, Any]:
    """Features and gradients of this rank: shared, beside those that it finds alone."""
    torch.set_num_threads(1)
    ranks.start(torch.device("cpu"))
    config, gradients, features = model(), [], []
    batches = [batch(ranks.rank(), number) for number in range(3)]
    for together in (True, False):
        thinker = Thinker(config)
        init_weights(thinker, 0)
        if together:
            shared = SharedEncoding(batches, config, torch.device("cpu"), thinker.encode)
            found = [each for _, each in shared.parts()]
            weigh(found).backward()
            assert shared.learns
            shared.loss().backward()
        else:
            found = [thinker.encode(Media(b.mel_FM, b.mel_lengths, b.pixels_PX, b.grids)) for b in batches]
            weigh(found).backward()
        towers = [p for tower in (thinker.audio_tower, thinker.visual) for p in tower.parameters()]
        gradients.append(ranks.total(torch.cat([p.grad.flatten() for p in towers if p.grad is not None])))
        features.append(
            [torch.cat([t.flatten() for t in (f.audio_TD, f.visual_VD, *f.deepstack)]).detach() for f in found]
        )
        assert [len(f.audio_TD) for f in found] == [
            sum(map(int, map(num_audio_tokens, b.mel_lengths))) for b in batches
        ]
    thinker.audio_tower.requires_grad_(False)
    thinker.visual.requires_grad_(False)
    frozen = SharedEncoding(batches, config, torch.device("cpu"), thinker.encode)
    assert not frozen.learns and not any(f.audio_TD.requires_grad for _, f in frozen.parts())
    error = max(float((mine - alone).abs().amax()) for mine, alone in zip(*features, strict=True) if len(mine))
    ranks.stop()
    return {"features": error, "gradients": float((gradients[0] - gradients[1]).norm() / gradients[1].norm())}


@pytest.mark.parametrize("processes", [2, 4])
def test_shared_equals_alone(processes: int) -> None:
    for found in spawn(encode_together, processes, timeout=120):
        assert found["features"] < 1e-5
        assert found["gradients"] < 1e-5
