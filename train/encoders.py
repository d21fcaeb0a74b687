"""Encode the media of a step where there is room for them: each encoder's work is dealt evenly over the ranks.

    sizes of every rank's media --all-gather, dealt alike everywhere (data/balance.py)--> stretches and their ranks
    mel, pixels at home --all-to-all--> encoder, once a step --all-to-all--> features at home, leaves of autograd
    ... each micro-batch: decoder forward and backward ...
    gradients of the leaves --all-to-all--> backward of the encoders, once a step

The plan deals packs by the decoder's work, so one rank may get an hour of sound and another none. Both encoders attend
within windows of audio and temporal patches of pictures: a medium may be cut there and its parts encoded anywhere, and
the features are the same. Documents stay where they are, and what a rank could not read never gets here.

Cost: four collectives an encoder and step, one more where it learns. What is sent is the media above the mean of the
ranks and their features: for an audio token 4 kB of mel, for a visual one 24 kB of pixels in the released shapes. The
raw media and the encoders' activations of a whole step are held until its last backward.

M media of all ranks, S stretches of them, N stretches that this rank encodes, X values of a row (a mel frame or a
patch), T tokens, D hidden, times 1 + DeepStack's layers for pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch
from torch import Tensor

from data.balance import deal_encoder
from data.costs import Work
from data.shard_index import ranges
from data.types import Batch
from models.audio_encoder import CHUNK_FRAMES, num_audio_tokens
from models.config import ThinkerConfig
from models.thinker import Features, Media
from train import ranks
from train.layout import work_of


class SharedEncoding:
    """The media of one step, encoded by all ranks together. Making one, and `loss`, are collective."""

    def __init__(
        self,
        batches: Sequence[Batch],
        config: ThinkerConfig,
        device: torch.device,
        encode: Callable[[Media], Features],
        deals: Sequence[Deal] | None = None,
    ) -> None:
        """Encode the media of this rank's micro-batches; `encode` runs the model's encoders.

        `deals`, of audio and of pictures, send the features on from the rank that presents the media of several.
        """
        self._texts = [without_media(batch) for batch in batches]
        heard_by, seen_by = deals or (None, None)
        self._width = config.text.hidden_size
        mel_FM = torch.cat([batch.mel_FM for batch in batches]).to(device)
        clip_M2, home_M = everyones([clip for batch in batches for clip in clips_of(batch, config)], 2)
        audio = route(audio_cuts(*clip_M2.T), home_M, num_audio_tokens)
        heard, windows = (send(mel_FM, audio), audio.rows_N.tolist()), clip_M2[audio.medium_N, 1].tolist()
        audio_tokens = [int(num_audio_tokens(np.array(batch.mel_lengths, np.int64)).sum()) for batch in batches]
        if config.vision is None:
            made = encode(Media(*heard, None, (), windows))
            self._shared = [_Shared(made.audio_TD, audio, audio_tokens, heard_by)]
            return
        block = config.vision.spatial_merge_size**2  # patches of a token
        pixels = [batch.pixels_PX for batch in batches if batch.grids]
        pixels_PX = torch.cat(pixels).to(device) if pixels else mel_FM.new_empty(0, config.vision.patch_dim)
        grid_M3, home_M = everyones([grid for batch in batches for grid in batch.grids], 3)
        vision = route(vision_cuts(grid_M3, work_of(config)), home_M, lambda patches: patches // block)
        seen = send(pixels_PX, vision), vision.grids(grid_M3)
        made = encode(Media(*heard, *seen, windows))
        assert made.visual_VD is not None
        self._shared = [
            _Shared(made.audio_TD, audio, audio_tokens, heard_by),
            _Shared(
                torch.cat([made.visual_VD, *made.deepstack], dim=1),
                vision,
                [sum(map(prod, batch.grids)) // block for batch in batches],
                seen_by,
            ),
        ]

    def parts(self) -> Iterator[tuple[Batch, Features]]:
        """Each micro-batch without its media, and what was made of them."""
        for text, audio_TD, *visual in zip(self._texts, *(shared.leaves for shared in self._shared), strict=True):
            seen_VD, *deepstack = visual[0].split(self._width, dim=1) if visual else (None,)
            yield text, Features(audio_TD, seen_VD, tuple(deepstack))

    @property
    def learns(self) -> bool:
        """Whether an encoder has trainable parameters; if so, `loss` must go backward."""
        return any(shared.made_TD.requires_grad for shared in self._shared)

    def loss(self) -> Tensor:
        """A scalar with the gradients of the encoders that learn, for when every micro-batch went backward."""
        return torch.stack([shared.loss() for shared in self._shared if shared.made_TD.requires_grad]).sum()


class _Shared:
    """Features of one encoder: those that this rank made, and those of its own media."""

    def __init__(self, made_TD: Tensor, way: Route, tokens: Sequence[int], deal: Deal | None) -> None:
        """`tokens` of each micro-batch's own media."""
        self.made_TD, self._way, self._deal = made_TD, way, deal
        mine_TD = give_back(made_TD, way)
        if deal is not None:
            mine_TD, tokens = deal.send(mine_TD), deal.tokens
        self.leaves = [leaf_TD.clone().requires_grad_(made_TD.requires_grad) for leaf_TD in mine_TD.split(tokens)]

    def loss(self) -> Tensor:
        """Its gradient in each feature made here is the one that the feature's home found."""
        found = [torch.zeros_like(leaf_TD) if leaf_TD.grad is None else leaf_TD.grad for leaf_TD in self.leaves]
        grad_TD = torch.cat(found) if self._deal is None else self._deal.send_back(torch.cat(found))
        return (self.made_TD.float() * send_gradients(grad_TD, self._way).float()).sum()


@dataclass(frozen=True)
class Deal:
    """How features go from the rank that presents media of several ranks to where their placeholders lie."""

    order: np.ndarray  # int64: features at that rank, rank by rank; empty on others
    out: list[int]  # to each rank of all
    into: list[int]  # from each
    tokens: list[int]  # here, of each micro-batch

    def send(self, mine_TD: Tensor) -> Tensor:
        """Features to their ranks. Collective."""
        return ranks.exchange(mine_TD[_index(self.order, mine_TD)], self.out, self.into)

    def send_back(self, grad_TD: Tensor) -> Tensor:
        """Their gradients to where they came from. Collective."""
        back_TD = ranks.exchange(grad_TD, self.into, self.out)
        return torch.empty_like(back_TD).index_copy_(0, _index(self.order, back_TD), back_TD)


@dataclass(frozen=True)
class Cuts:
    """Where the media of one encoder may be cut: rows of media, atoms of rows."""

    rows_M: np.ndarray  # int64: mel frames, or patches
    per_atom_M: np.ndarray  # int64: rows of an atom; of a medium's last one maybe more or fewer
    atoms_M: np.ndarray  # int64, at least 1
    work_M: np.ndarray  # float64: of one atom


def clips_of(batch: Batch, config: ThinkerConfig) -> list[tuple[int, int]]:
    """Mel frames of each clip, and of its attention windows."""
    windows = batch.windows or (config.audio.n_window_infer,) * len(batch.mel_lengths)
    return list(zip(batch.mel_lengths, windows, strict=True))


def audio_cuts(frames_M: np.ndarray, window: int | np.ndarray) -> Cuts:
    """An atom is an attention window of so many frames, one for all clips or of each.

    A last chunk below a second runs for a whole one where its clip does (models/audio_encoder.py), which as a clip of
    its own it would not: it stays with the window before it.
    """
    atoms_M = np.maximum(frames_M // window + (frames_M % window >= CHUNK_FRAMES), 1)
    return Cuts(frames_M, np.full_like(frames_M, window), atoms_M, frames_M / atoms_M)


def vision_cuts(grid_M3: np.ndarray, work: Work) -> Cuts:
    """An atom is a temporal patch; an image is one."""
    patches_M = grid_M3[:, 1] * grid_M3[:, 2]
    return Cuts(grid_M3[:, 0] * patches_M, patches_M, grid_M3[:, 0], work.vision(grid_M3) / grid_M3[:, 0])


@dataclass(frozen=True)
class Route:
    """What this rank sends and encodes of one encoder's media. Rows and tokens are counted for each rank."""

    medium_N: np.ndarray  # int64: the stretches that it encodes, in the order they arrive
    atoms_N: np.ndarray  # int64
    rows_N: np.ndarray  # int64
    own_rows: np.ndarray  # int64: which of its own rows leave, rank by rank
    rows_out: list[int]
    rows_in: list[int]
    own_tokens: np.ndarray  # int64: which of its own features come back, rank by rank
    tokens_out: list[int]  # features of others' media, on their way home
    tokens_in: list[int]

    def grids(self, grid_M3: np.ndarray) -> list[tuple[int, int, int]]:
        """Of the pictures that this rank encodes."""
        sides = grid_M3[self.medium_N, 1:].tolist()
        return [(count, height, width) for count, (height, width) in zip(self.atoms_N.tolist(), sides, strict=True)]


def route(
    cuts: Cuts,
    home_M: np.ndarray,
    tokens_of: Callable[[np.ndarray], np.ndarray],
    rank: int | None = None,
    num_ranks: int | None = None,
) -> Route:
    """Deal media to ranks, as one of them sees it. `home_M` rises; `tokens_of` turns rows of stretches into tokens."""
    rank, num_ranks = ranks.rank() if rank is None else rank, num_ranks or ranks.world()
    dealt = deal_encoder(cuts.work_M * cuts.atoms_M, cuts.work_M, home_M, num_ranks)
    medium_S, rank_S, home_S = dealt.medium_S, dealt.rank_S, home_M[dealt.medium_S]
    start_S, stop_S = (atoms_S * cuts.per_atom_M[medium_S] for atoms_S in (dealt.start_S, dealt.stop_S))
    stop_S = np.where(dealt.stop_S == cuts.atoms_M[medium_S], cuts.rows_M[medium_S], stop_S)
    rows_S = stop_S - start_S
    tokens_S = np.asarray(tokens_of(rows_S), np.int64)

    taken = np.flatnonzero(rank_S == rank)  # by medium and so by home: the order in which they arrive
    own = np.flatnonzero(home_S == rank)  # media end to end: rows and tokens of a rank's own follow each other
    order = np.argsort(rank_S[own], kind="stable")

    def places(sizes_S: np.ndarray) -> np.ndarray:
        sizes = sizes_S[own]
        return ranges((np.cumsum(sizes) - sizes)[order], sizes[order])

    def counts(which: np.ndarray, by_S: np.ndarray, sizes_S: np.ndarray) -> list[int]:
        return np.bincount(by_S[which], sizes_S[which], num_ranks).astype(int).tolist()

    return Route(
        medium_N=medium_S[taken],
        atoms_N=(dealt.stop_S - dealt.start_S)[taken],
        rows_N=rows_S[taken],
        own_rows=places(rows_S),
        rows_out=counts(own, rank_S, rows_S),
        rows_in=counts(taken, home_S, rows_S),
        own_tokens=places(tokens_S),
        tokens_out=counts(taken, home_S, tokens_S),
        tokens_in=counts(own, rank_S, tokens_S),
    )


def send(rows_NX: Tensor, way: Route) -> Tensor:
    """Mel frames or patches of this rank -> those that it encodes. Collective."""
    return ranks.exchange(rows_NX[_index(way.own_rows, rows_NX)], way.rows_out, way.rows_in)


def give_back(made_TD: Tensor, way: Route) -> Tensor:
    """Features that this rank made -> those of its own media. Collective."""
    back_TD = ranks.exchange(made_TD, way.tokens_out, way.tokens_in)
    return torch.empty_like(back_TD).index_copy_(0, _index(way.own_tokens, back_TD), back_TD)


def send_gradients(grad_TD: Tensor, way: Route) -> Tensor:
    """Gradients of the features of its own media -> of those that this rank made. Collective."""
    return ranks.exchange(grad_TD[_index(way.own_tokens, grad_TD)], way.tokens_in, way.tokens_out)


def everyones(mine: Sequence[Sequence[int]], columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Sizes of the media of all ranks, int64 [M, columns], and the rank that each is of, rising. Collective."""
    found = ranks.gather(torch.tensor(mine, dtype=torch.int64).view(-1, columns))
    homes = np.repeat(np.arange(len(found)), [len(sizes) for sizes in found])
    return torch.cat(found).numpy(), homes


def without_media(batch: Batch) -> Batch:
    """The same batch, of which the encoders get nothing."""
    return replace(batch, mel_FM=batch.mel_FM[:0], mel_lengths=(), windows=(), pixels_PX=batch.pixels_PX[:0], grids=())


def _index(places: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(places).to(like.device)
