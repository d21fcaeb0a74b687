"""The whole order of training as a pure function of (corpus, settings, seed): the state of the data is the step.

    epoch e: shards permuted by hash(seed, e) --cut--> windows of about `window` samples
    window:  samples permuted, speeds drawn, lengths from the index --pack--> packs, permuted
    packs of all windows of all epochs, end to end --cut--> step s = packs [s S, (s + 1) S)      S = sequences_per_step
    step:    --balance.deal--> the packs of each rank, the same set whatever the number of ranks

No media is opened.  Memory is the windows that a step touches and one integer for each window passed; the rest stays
in mapped indexes.  Finding step s packs every window before it, unless a cursor, which a checkpoint may keep, says
where the step's window begins; the result is the same.  Cost: about 1.2 us a sample.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256

import numpy as np

from data.audio import MIN_SAMPLES
from data.augment import ramp
from data.balance import Work, deal
from data.corpus import Corpus
from data.errors import DataError
from data.hashing import hashed, permutation
from data.mel import HOP
from data.packing import pack

_SHARDS, _SAMPLES, _PACKS, _SPEED, _RAMP = range(5)  # what a random number is for


@dataclass(frozen=True)
class PlanSettings:
    """What shapes the plan; the fields mean what they mean in DataConfig."""

    sequence_length: int
    sequences_per_step: int
    window: int = 65536
    speeds: tuple[float, ...] = (1.0,)
    too_long: str = "error"
    ramp_epochs: float = 0.0  # epochs over which ever more samples change their speed


@dataclass(frozen=True)
class Pack:
    """One packed sequence, before anything is read: n samples of one epoch."""

    epoch: int
    samples: np.ndarray  # int64 [n]: ids in the corpus
    speeds: np.ndarray  # float64 [n]
    tokens: np.ndarray  # int64 [n]: length of each sample
    work: float  # of the whole pack, see balance.Work


@dataclass(frozen=True)
class Cursor:
    """Where the window begins that holds the first pack of a step; lets a resumed run start there."""

    plan: str  # fingerprint of the plan it belongs to
    window: int  # counted from the start of training, over all epochs
    first_pack: int  # packs of all windows before it


@dataclass(frozen=True)
class _Window:
    """Packed samples of one window: pack p is the slice starts[p] to starts[p + 1] of the others."""

    epoch: int
    starts: np.ndarray
    samples: np.ndarray
    speeds: np.ndarray
    tokens: np.ndarray
    works: np.ndarray  # per pack


@dataclass(frozen=True)
class _Costs:
    """What the index says of n consecutive samples with c clips."""

    text_tokens: np.ndarray  # int64 [n]
    clip_samples: np.ndarray  # int64 [c]
    clip_owners: np.ndarray  # int64 [c]: which of the n samples a clip belongs to

    def sum_clips(self, values: np.ndarray) -> np.ndarray:
        """int64 [n]: sum over each sample's clips of int [c] values."""
        return np.bincount(self.clip_owners, values, len(self.text_tokens)).astype(np.int64)

    @cached_property
    def fixed_speed(self) -> np.ndarray:
        """bool [n]: samples with a clip so short that a faster one could fall below one analysis window."""
        short = self.clip_owners[self.clip_samples < 2 * MIN_SAMPLES]
        return np.bincount(short, minlength=len(self.text_tokens)) > 0


class Plan:
    """Steps of training. `num_audio_tokens` gives the decoder tokens of a number of log-mel frames, elementwise."""

    def __init__(
        self,
        corpus: Corpus,
        settings: PlanSettings,
        *,
        seed: int,
        num_audio_tokens: Callable[[np.ndarray], np.ndarray],
        work: Work | None = None,
    ) -> None:
        """Raise DataError where a sample is longer than sequence_length and too_long says "error"."""
        self.corpus = corpus
        self.settings = settings
        self.seed = seed
        self.num_audio_tokens = num_audio_tokens
        self.work = work or Work()
        self.dropped = self._find_too_long()  # samples above sequence_length, left out, by source
        kept = corpus.num_samples - sum(self.dropped.values())
        if not kept:
            raise DataError(f"no sample is left: all are longer than sequence_length={settings.sequence_length}")
        self.windows_per_epoch = max(1, round(corpus.num_samples / settings.window))
        self._base = 0  # number of the first window in _first_pack
        self._first_pack = [0]  # first pack of each window from _base on, the last entry being the next one's
        self._recent: dict[int, _Window] = {}

    @cached_property
    def fingerprint(self) -> str:
        """Same fingerprint, same samples in the same steps. The balance over ranks is not part of it."""
        probe = self.num_audio_tokens(np.arange(0, 4000, 7)).tolist()
        # settings at their defaults do not count, so that a new one leaves the fingerprints of older runs alone
        plain = asdict(PlanSettings(0, 0))
        settings = sorted(item for item in asdict(self.settings).items() if plain[item[0]] != item[1])
        parts = (self.corpus.fingerprint, settings, self.seed, probe, 1)
        return sha256(repr(parts).encode()).hexdigest()

    def step(self, step: int) -> list[Pack]:
        """The packs of a step, sequences_per_step of them, in an order that does not depend on ranks."""
        size = self.settings.sequences_per_step
        packs: list[Pack] = []
        window = self._find(step * size)
        first_needed = window
        while len(packs) < size:
            packed, start = self._packed(window), self._first_pack[window - self._base]
            skip = step * size + len(packs) - start
            packs += [_take(packed, p) for p in range(skip, min(len(packed.works), skip + size - len(packs)))]
            window += 1
        self._recent = {number: kept for number, kept in self._recent.items() if number >= first_needed}
        return packs

    def share(self, step: int, rank: int, num_ranks: int) -> list[Pack]:
        """The packs of one rank in a step, heaviest first: at most ceil(sequences_per_step / num_ranks)."""
        packs = self.step(step)
        return [packs[position] for position in deal([pack.work for pack in packs], num_ranks)[rank]]

    def cursor(self, step: int) -> Cursor:
        """Where a run that goes on with `step` may begin. Cheap for steps near those asked for last."""
        window = self._find(step * self.settings.sequences_per_step)
        return Cursor(self.fingerprint, window, self._first_pack[window - self._base])

    def seek(self, cursor: Cursor | Mapping[str, object]) -> None:
        """Start from a cursor, given as such or as its fields. Raises DataError where it is another plan's."""
        if not isinstance(cursor, Cursor):
            cursor = Cursor(**cursor)  # type: ignore[arg-type]
        if cursor.plan != self.fingerprint:
            raise DataError(
                "data.shards, the sequence length, batch, window, speeds or seed are not those of the checkpoint, so "
                "its place in the data means nothing; go back to them, or start another run with init=THIS_RUN"
            )
        self._base, self._first_pack, self._recent = cursor.window, [cursor.first_pack], {}

    def _find(self, pack_number: int) -> int:
        """Number of the window that holds a pack, counted from the start of training."""
        if pack_number < self._first_pack[0]:
            self._base, self._first_pack, self._recent = 0, [0], {}
        while pack_number >= self._first_pack[-1]:
            newest = self._base + len(self._first_pack) - 1
            self._recent = {number: kept for number, kept in self._recent.items() if number > newest - 2}
            self._packed(newest)
        return self._base + bisect_right(self._first_pack, pack_number) - 1

    def _packed(self, number: int) -> _Window:
        if number not in self._recent:
            self._recent[number] = self._pack_window(*divmod(number, self.windows_per_epoch))
        packed, position = self._recent[number], number - self._base
        if position + 1 == len(self._first_pack):
            self._first_pack.append(self._first_pack[position] + len(packed.works))
        return packed

    def _pack_window(self, epoch: int, window: int) -> _Window:
        ids, costs = self._gather(self._window_rows(epoch, window))
        speeds = self._speeds(epoch, ids, costs)
        tokens, frames = self._lengths(costs, speeds)
        order = np.argsort(hashed(self.seed, epoch, _SAMPLES, ids), kind="stable")
        order = order[self._slowest_tokens(costs)[order] <= self.settings.sequence_length]
        packed, starts = pack(tokens[order], self.settings.sequence_length)
        shuffled = permutation(len(starts) - 1, self.seed, epoch, _PACKS, window)
        sizes = np.diff(starts)[shuffled]
        rows = order[packed[_ranges(starts[:-1][shuffled], sizes)]]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        works = np.add.reduceat(self.work.of(tokens[rows], frames[rows]), starts[:-1]) if len(rows) else np.zeros(0)
        return _Window(epoch, starts, ids[rows], speeds[rows], tokens[rows], works)

    def _window_rows(self, epoch: int, window: int) -> list[tuple[int, int, int]]:
        """(shard, first row, last row + 1) of the stretch of the epoch's shard order that a window is."""
        order = permutation(len(self.corpus.paths), self.seed, epoch, _SHARDS)
        ends = np.cumsum(np.diff(self.corpus.offsets)[order])
        first, last = (self.corpus.num_samples * w // self.windows_per_epoch for w in (window, window + 1))
        rows = []
        for position in range(int(np.searchsorted(ends, first, side="right")), len(order)):
            begin = int(ends[position - 1]) if position else 0
            if begin >= last:
                break
            rows.append((int(order[position]), max(first - begin, 0), min(last, int(ends[position])) - begin))
        return rows

    def _gather(self, rows: Sequence[tuple[int, int, int]]) -> tuple[np.ndarray, _Costs]:
        """Ids and costs of the samples in stretches (shard, first row, last row + 1) of shards."""
        ids, text, clips, owners, count = [], [], [], [], 0
        for shard, first, last in rows:
            text_tokens, num_clips, clip_samples = self.corpus.index(shard).costs(first, last)
            ids.append(np.arange(first, last) + self.corpus.offsets[shard])
            text.append(text_tokens)
            clips.append(clip_samples)
            owners.append(np.repeat(np.arange(last - first), num_clips) + count)
            count += last - first
        return np.concatenate(ids), _Costs(*(np.concatenate(parts) for parts in (text, clips, owners)))

    def _speeds(self, epoch: int, ids: np.ndarray, costs: _Costs) -> np.ndarray:
        choices = np.asarray(self.settings.speeds, np.float64)
        drawn = choices[hashed(self.seed, epoch, _SPEED, ids) % np.uint64(len(choices))]
        chance = hashed(self.seed, epoch, _RAMP, ids) / 2.0**64
        drawn = np.where(chance < ramp(self.settings.ramp_epochs, epoch), drawn, 1.0)
        return np.where(costs.fixed_speed, 1.0, drawn)

    def _lengths(self, costs: _Costs, speeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and log-mel frames (int64) of samples at their speeds."""
        frames = np.rint(costs.clip_samples / speeds[costs.clip_owners]).astype(np.int64) // HOP
        tokens = np.asarray(self.num_audio_tokens(frames))
        return costs.text_tokens + costs.sum_clips(tokens), costs.sum_clips(frames)

    def _slowest_tokens(self, costs: _Costs) -> np.ndarray:
        """Tokens at the slowest speed: whether a sample is too long must not depend on the epoch's draw."""
        slowest = np.where(costs.fixed_speed, 1.0, self.slowest_speed)
        return self._lengths(costs, slowest)[0]

    @property
    def slowest_speed(self) -> float:
        """The smallest factor that a sample may get."""
        return min(*self.settings.speeds, 1.0) if self.settings.ramp_epochs else min(self.settings.speeds)

    def _find_too_long(self) -> dict[str, int]:
        """Samples above sequence_length by source; reads the costs of those shards only that may hold one."""
        limit, found, first = self.settings.sequence_length, Counter(), ""
        for shard in range(len(self.corpus.paths)):
            index = self.corpus.index(shard)
            about = index.about
            longest = int(about["max_audio_samples"] / self.slowest_speed) // HOP + 1
            audio_tokens = int(np.asarray(self.num_audio_tokens(np.array([longest])))[0])
            if about["max_text_tokens"] + about["max_clips"] * audio_tokens <= limit:
                continue
            ids, costs = self._gather([(shard, 0, index.num_samples)])
            tokens = self._slowest_tokens(costs)
            rows = np.flatnonzero(tokens > limit).tolist()
            found.update(index.name("source", row) or "(no source)" for row in rows)
            if rows and not first:
                first = f"{self.corpus.name(int(ids[rows[0]]))}: {tokens[rows[0]]} tokens"
        if first and self.settings.too_long == "error":
            raise DataError(
                f"{first}, above data.sequence_length={limit} (as are {found.total()} samples of "
                f"{self.corpus.num_samples}); raise data.sequence_length or set data.too_long=drop"
            )
        return dict(found)


def _take(window: _Window, number: int) -> Pack:
    part = slice(window.starts[number], window.starts[number + 1])
    return Pack(
        window.epoch, window.samples[part], window.speeds[part], window.tokens[part], float(window.works[number])
    )


def _ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """starts[0], starts[0] + 1, ... (sizes[0] of them), starts[1], ... as one array."""
    ends = np.cumsum(sizes)
    return np.repeat(starts - ends + sizes, sizes) + np.arange(ends[-1] if len(ends) else 0)
