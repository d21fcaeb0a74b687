"""What samples count as in a plan: their speed, tokens and work, from the index alone.

    samples, epochs, Costs --draw speeds--> Sizing --> Measured --too long: leave out, or split--> Rows
    whole corpus, once --scan--> Tally: what is too long, and the tokens of each group

A sample is too long by its tokens at the slowest speed, so that whether it takes part does not depend on an epoch's
draw; what is split is heard at its own speed. Cost: 0.4 us a sample, once more for a scan, which shards are spared
that cannot hold a sample too long.

N samples, R rows (a row is a sample or a piece of one), G groups.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy as np

from data.code_store import ShardCodes
from data.corpus import Corpus
from data.costs import AUDIO, IMAGE, Costs, Sizing, Work
from data.errors import DataError
from data.hashing import hashed
from data.mel import HOP
from data.mixture import NO_SOURCE, Group, Mixture
from data.pair_store import ShardPairs
from data.shard_index import ShardIndex
from data.split import Piece, split_document

SHARDS, SAMPLES, PACKS, SPEED, RAMP = range(5)  # what a random number is for
_CHUNK = 1 << 16  # samples that a scan measures together


@dataclass(frozen=True)
class PlanSettings:
    """What shapes the plan; the fields mean what they mean in DataConfig."""

    sequence_length: int
    sequences_per_step: int
    window: int = 65536
    speeds: tuple[float, ...] = (1.0,)
    too_long: str = "error"
    ramp_epochs: float = 0.0  # epochs over which ever more samples change their speed
    mixture: Mixture | None = None

    @property
    def slowest_speed(self) -> float:
        """The smallest factor that a sample may get."""
        return min(*self.speeds, 1.0) if self.ramp_epochs else min(self.speeds)


@dataclass(frozen=True)
class Rows:
    """What can be packed: R whole samples or pieces of split ones."""

    samples: np.ndarray  # int64: ids in the corpus
    epochs: np.ndarray  # int64: passes over its group, or over the corpus, before this one
    pieces: np.ndarray  # int64: -1 a whole sample, else the number of a piece
    groups: np.ndarray  # int16
    speeds: np.ndarray  # float64
    tokens: np.ndarray  # int64
    audio: np.ndarray  # float64: work for the audio encoder
    vision: np.ndarray  # float64: work for the vision encoder

    def __len__(self) -> int:
        """R."""
        return len(self.samples)

    def take(self, rows: np.ndarray | slice) -> Rows:
        """Some of the rows."""
        return Rows(*(getattr(self, column.name)[rows] for column in fields(Rows)))

    @staticmethod
    def join(parts: Sequence[Rows]) -> Rows:
        """The rows of `parts`, end to end."""
        if not parts:
            return Rows(*(np.zeros(0, dtype) for dtype in _ROW_TYPES))
        if len(parts) == 1:
            return parts[0]
        return Rows(*(np.concatenate([getattr(part, column.name) for part in parts]) for column in fields(Rows)))


_ROW_TYPES = (np.int64, np.int64, np.int64, np.int16, np.float64, np.int64, np.float64, np.float64)


@dataclass(frozen=True)
class Measured:
    """N samples as a plan counts them."""

    speeds_N: np.ndarray  # float64
    tokens_N: np.ndarray  # int64: of all pieces of one that is split; 0 where one is left out as too long
    audio_N: np.ndarray  # float64: work for the audio encoder
    vision_N: np.ndarray  # float64: work for the vision encoder
    long_N: np.ndarray  # bool: too long at the slowest speed
    pieces: Mapping[int, Sequence[Piece]] = field(default_factory=dict)  # of the samples that are split


@dataclass(frozen=True)
class Tally:
    """What a scan found."""

    long: int  # samples too long to be packed whole
    dropped: dict[str, int]  # of those, the ones left out, by source
    tokens: tuple[int, ...] = ()  # of all samples of each group at their own speed
    silent: int = 0  # samples left out since their answer has no speech codes


@dataclass(frozen=True)
class Measure:
    """Counts samples by the settings of a plan."""

    settings: PlanSettings
    seed: int
    sizing: Sizing
    work: Work

    def measure(self, samples_N: np.ndarray, epochs_N: np.ndarray | None, costs: Costs, *, check: bool) -> Measured:
        """Samples in their epochs, or at their own speed without. Without `check` none can be too long."""
        plain = epochs_N is None or self.settings.speeds == (1.0,)
        speeds_N = np.ones(len(samples_N))
        if epochs_N is not None and not plain:
            speeds_N = self._speeds(samples_N, epochs_N, costs)
        long_N = np.zeros(len(samples_N), bool)
        if check and not (plain and self.settings.slowest_speed == 1):
            long_N = self.slowest_tokens(costs) > self.settings.sequence_length
            speeds_N[long_N] = 1.0
        sizes = self.sizing.sizes(costs, 1.0 if plain else speeds_N)
        tokens_N = self.sizing.tokens(costs, sizes)
        if check and plain and self.settings.slowest_speed == 1:
            long_N = tokens_N > self.settings.sequence_length
        audio_N = self.work.audio(costs.sum_media(sizes.frames_M))
        sees = self.sizing.layout.patching is not None
        vision_N = costs.sum_media(self.work.vision(sizes.grid_M3)) if sees else np.zeros(len(samples_N))
        if costs.speech_N is not None:  # who cannot speak takes no part
            silent_N = costs.speech_N == 0
            tokens_N[silent_N], long_N[silent_N] = 0, False
        pieces: dict[int, Sequence[Piece]] = {}
        for row in np.flatnonzero(long_N).tolist():
            if self.settings.too_long != "split" or not costs.document_N[row]:
                tokens_N[row] = 0
            elif tokens_N[row] > self.settings.sequence_length:  # else it fits whole, at its own speed
                one = costs_of(costs, row)
                pieces[row] = split_document(
                    one, self.sizing.sizes(one), self.settings.sequence_length, self.sizing.layout
                )
                tokens_N[row] = sum(piece.tokens for piece in pieces[row])
        return Measured(speeds_N, tokens_N, audio_N, vision_N, long_N, pieces)

    def rows(
        self, measured: Measured, kept: np.ndarray, samples_N: np.ndarray, epochs_N: np.ndarray, groups_N: np.ndarray
    ) -> Rows:
        """What is packed of the samples `kept`, which are numbers of some of the N."""
        kept = kept[measured.tokens_N[kept] > 0]  # those too long are left out
        counts = np.ones(len(kept), np.int64)
        split = {}
        if measured.pieces:
            split = {at: measured.pieces[row] for at, row in enumerate(kept.tolist()) if row in measured.pieces}
            counts[list(split)] = [len(pieces) for pieces in split.values()]
            kept = np.repeat(kept, counts)
        rows = Rows(
            samples_N[kept],
            epochs_N[kept],
            np.full(len(kept), -1, np.int64),
            groups_N[kept],
            measured.speeds_N[kept],
            measured.tokens_N[kept],
            measured.audio_N[kept],
            measured.vision_N[kept],
        )
        for at, first in zip(split, (np.cumsum(counts) - counts)[list(split)].tolist(), strict=True):
            for number, piece in enumerate(split[at]):
                rows.pieces[first + number] = number
                rows.tokens[first + number] = piece.tokens
                rows.audio[first + number] = self.work.audio(np.array(sum(piece.frames)))
                grids_M3 = np.array(piece.grids, np.int64).reshape(-1, 3)
                rows.vision[first + number] = self.work.vision(grids_M3).sum()
        return rows

    def slowest_tokens(self, costs: Costs) -> np.ndarray:
        """int64 [N]: tokens at the slowest speed that a sample may get."""
        slowest = self.settings.slowest_speed
        speeds = 1.0 if slowest == 1 else np.where(costs.fixed_speed_N, 1.0, slowest)
        return self.sizing.tokens(costs, self.sizing.sizes(costs, speeds))

    def _speeds(self, samples_N: np.ndarray, epochs_N: np.ndarray, costs: Costs) -> np.ndarray:
        choices = np.asarray(self.settings.speeds, np.float64)
        drawn_N = choices[hashed(self.seed, epochs_N, SPEED, samples_N) % np.uint64(len(choices))]
        if self.settings.ramp_epochs > 0:  # as in augment.ramp
            chance_N = hashed(self.seed, epochs_N, RAMP, samples_N) / 2.0**64
            drawn_N = np.where(chance_N < np.minimum(1.0, epochs_N / self.settings.ramp_epochs), drawn_N, 1.0)
        return np.where(costs.fixed_speed_N, 1.0, drawn_N)


def costs_of(costs: Costs, row: int) -> Costs:
    """The costs of one of N samples."""
    media = slice(*np.searchsorted(costs.owner_M, [row, row + 1]))
    taken = {
        column.name: values[media if column.name.endswith("_M") else slice(row, row + 1)]
        for column in fields(Costs)
        if (values := getattr(costs, column.name)) is not None
    }
    return Costs(**taken | {"owner_M": np.zeros_like(taken["owner_M"])})


def scan(corpus: Corpus, measure: Measure, groups: Sequence[Group] | None) -> Tally:
    """Look once at the costs of all samples that take part, or without groups of those that may be too long.

    Raises DataError for media that the model cannot take, and for a sample too long where the settings say "error".
    """
    found = _Found(corpus, measure, np.zeros(len(groups or ()), np.int64))
    members: dict[int, list[tuple[int, np.ndarray]]] = {}  # of each shard: group, and codes of source and language
    for number, group in enumerate(groups or ()):
        for shard, codes in zip(group.shards_S.tolist(), group.codes_S2, strict=True):
            members.setdefault(shard, []).append((number, codes))
    for shard in range(len(corpus.offsets) - 1) if groups is None else sorted(members):
        if groups is None and not found.matters(corpus.index(shard)):
            continue
        for first in range(0, corpus.index(shard).num_samples, _CHUNK):
            found.add(shard, first, members.get(shard))
    settings = measure.settings
    if found.first and settings.too_long == "error":
        raise DataError(
            f"{found.first}, above data.sequence_length={settings.sequence_length} (as are {found.long} samples of "
            f"{corpus.num_samples}); raise data.sequence_length, or the phase's own, or set data.too_long=drop or split"
        )
    if found.silent and found.silent == found.taking_part:
        command = (ShardPairs if corpus.pairs else ShardCodes).command.format(tar="...")
        raise DataError(f"no sample has {corpus.sought}; make them with: {command}")
    return Tally(found.long, dict(found.dropped), tuple(found.tokens_G.tolist()), found.silent)


@dataclass
class _Found:
    """What a scan has found so far."""

    corpus: Corpus
    measure: Measure
    tokens_G: np.ndarray
    long: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    first: str = ""
    silent: int = 0
    taking_part: int = 0

    def matters(self, index: ShardIndex) -> bool:
        """Whether a shard may hold a sample that is too long or cannot be taken."""
        most = index.about["max_media"]
        if any(most[IMAGE:]) or index.codes is not None:
            return True
        measure, settings = self.measure, self.measure.settings
        longest = int(index.about["max_samples"] / settings.slowest_speed) // HOP + 1
        audio_tokens = int(np.asarray(measure.sizing.layout.num_audio_tokens(np.array([longest])))[0])
        return index.about["max_text_tokens"] + most[AUDIO] * audio_tokens > settings.sequence_length

    def add(self, shard: int, first: int, members: Sequence[tuple[int, np.ndarray]] | None) -> None:
        """Look at the rows of a shard from `first` on; with `members`, at those of its groups alone."""
        index = self.corpus.index(shard)
        rows = slice(first, min(first + _CHUNK, index.num_samples))
        costs = index.costs(rows)
        groups_N = np.zeros(len(costs.text_tokens_N), np.int64)
        if members is not None:
            groups_N[:] = -1
            for group, codes in members:
                groups_N[members_of(index, codes, rows)] = group
        ids = np.arange(rows.start, rows.stop) + self.corpus.offsets[shard]
        here_N = groups_N >= 0
        if self.measure.sizing.layout.patching is None:
            self._refuse_pictures(costs, ids, here_N)
        measured = self.measure.measure(ids, None, costs, check=True)
        if members is not None:
            self.tokens_G += np.bincount(
                groups_N[here_N], measured.tokens_N[here_N], minlength=len(self.tokens_G)
            ).astype(np.int64)
        if costs.speech_N is not None:
            self.taking_part += int(here_N.sum())
            self.silent += int((here_N & (costs.speech_N == 0)).sum())
        for row in np.flatnonzero(measured.long_N & here_N).tolist():
            self.long += 1
            if not measured.tokens_N[row]:
                self.dropped[index.name("source", first + row) or NO_SOURCE] += 1
            if not self.first:
                tokens = int(self.measure.slowest_tokens(costs_of(costs, row))[0])
                self.first = f"{self.corpus.name(int(ids[row]))}: {tokens} tokens"

    def _refuse_pictures(self, costs: Costs, ids: np.ndarray, here_N: np.ndarray) -> None:
        seen = np.flatnonzero((costs.kind_M != AUDIO) & here_N[costs.owner_M])
        if len(seen):
            name = self.corpus.name(int(ids[costs.owner_M[seen[0]]]))
            raise DataError(
                f"{name}: has images or videos, and the model no vision encoder; choose a model that has one, or leave "
                "such shards out of data.shards"
            )


def members_of(index: ShardIndex, codes: np.ndarray, rows: slice = slice(None)) -> np.ndarray:
    """Numbers of the samples among `rows` of a shard whose source and language have these codes."""
    chosen = index.columns["language"][rows] == codes[1]
    if len(index.about["sources"]) > 1:
        chosen &= index.columns["source"][rows] == codes[0]
    return np.flatnonzero(chosen)
