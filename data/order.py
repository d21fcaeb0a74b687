"""Which samples each window of the plan draws: every sample in turn, or groups by their shares of the tokens.

    stream of a group: epoch 0, epoch 1, ...   epoch e = its shards, permuted by hash(seed, e, source), row by row
    without a mixture: one stream of all samples --epochs cut evenly--> windows
    with one:          targets of groups grow with their shares --each gives what its target covers--> windows

A window draws whole stretches of shards; within it the plan shuffles. A group is behind its target by less than one
sample at the end of every window. The state at a window is a few numbers for each group. Cost: without a mixture what
measuring costs; with one, 5 % of the samples are measured twice, and 0.1 ms for each group.

N samples, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from data.corpus import Corpus
from data.costs import Costs
from data.errors import DataError
from data.hashing import hashed
from data.measure import SHARDS, Measure, Measured, Rows, Tally, members_of
from data.mixture import Group, GroupName, Shares
from data.shard_index import ShardIndex

_EXACT = 1e-3  # of a token: what sums of floating-point targets may be off by


@dataclass(frozen=True)
class State:
    """Where a window begins."""

    window: int  # counted from the start of training
    positions: tuple[int, ...]  # of each group: samples passed, over all its epochs
    tokens: tuple[int, ...]  # given by it
    targets: tuple[float, ...]  # tokens that its share comes to, above `tokens` by less than one sample


@dataclass(frozen=True)
class Stretch:
    """Neighbouring samples of one shard, or of one group in it."""

    epoch: int
    samples_N: np.ndarray  # int64: ids in the corpus
    costs: Costs


class Stream:
    """The samples of some shards, epoch after epoch, or of one group in them.

    `number` is the source's: its languages go through the shards in one order, so that shards are read once.
    """

    def __init__(self, corpus: Corpus, seed: int, group: Group | None = None, number: int = 0) -> None:
        self.corpus = corpus
        self.group = group
        self.shards_S = np.arange(len(corpus.offsets) - 1) if group is None else group.shards_S
        self.counts_S = np.diff(corpus.offsets) if group is None else group.counts_S
        self.num_samples = int(self.counts_S.sum())
        self._seed = seed
        self._words = () if group is None else (number,)
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None  # the last one asked for
        self._open: tuple[int, ShardIndex, np.ndarray | None] | None = None  # the same, with the group's rows

    def read(self, position: int, count: int) -> list[Stretch]:
        """`count` samples from `position` on, counted from the start of epoch 0."""
        found = []
        while count > 0:
            epoch, first = divmod(position, self.num_samples)
            order, ends = self._order(epoch)
            place = int(np.searchsorted(ends, first, side="right"))
            begin = int(ends[place - 1]) if place else 0
            last = min(first + count, int(ends[place]))
            found.append(self._stretch(epoch, int(order[place]), first - begin, last - begin))
            position += last - first
            count -= last - first
        return found

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards of an epoch in order, as positions in shards_S, and samples up to the end of each."""
        if self._epoch is None or self._epoch[0] != epoch:
            keys = hashed(self._seed, epoch, SHARDS, *self._words, self.shards_S)
            order = np.argsort(keys, kind="stable")
            self._epoch = epoch, order, np.cumsum(self.counts_S[order])
        return self._epoch[1:]

    def _stretch(self, epoch: int, place: int, first: int, last: int) -> Stretch:
        shard = int(self.shards_S[place])
        if self._open is None or self._open[0] != shard:
            self._open = shard, *self._members(shard, place)
        _, index, members = self._open
        rows = np.arange(first, last) if members is None else members[first:last]
        costs = index.costs(slice(first, last) if members is None else rows)
        return Stretch(epoch, rows + int(self.corpus.offsets[shard]), costs)

    def _members(self, shard: int, place: int) -> tuple[ShardIndex, np.ndarray | None]:
        """A shard's index, and the rows that are of the group, None for all."""
        index = self.corpus.index(shard)
        if self.group is None or self.counts_S[place] == index.num_samples:
            return index, None
        members = members_of(index, self.group.codes_S2[place])
        if len(members) != self.counts_S[place]:
            raise DataError(f"{index.tar}: its index has damaged groups; run python -m data.index again")
        return index, members


def join(stretches: Sequence[Stretch]) -> tuple[np.ndarray, np.ndarray, Costs]:
    """Ids, epochs (int64 [N]) and costs of the samples in stretches, end to end."""
    samples_N = np.concatenate([stretch.samples_N for stretch in stretches])
    counts = [len(stretch.samples_N) for stretch in stretches]
    epochs_N = np.repeat([stretch.epoch for stretch in stretches], counts)
    return samples_N, epochs_N, Costs.join([stretch.costs for stretch in stretches])


class EvenOrder:
    """Every sample once an epoch; no window holds samples of two epochs."""

    names: Sequence[GroupName] = (("all", "all"),)

    def __init__(self, corpus: Corpus, measure: Measure, tally: Tally) -> None:
        """Raise DataError where no sample is left."""
        self.stream = Stream(corpus, measure.seed)
        self.measure = measure
        self.tally = tally
        if sum(tally.dropped.values()) + tally.silent == corpus.num_samples:
            which = f"all that have {corpus.sought}" if tally.silent else "all"
            raise DataError(
                f"no sample is left: {which} are longer than sequence_length={measure.settings.sequence_length}"
            )
        self.windows_per_epoch = max(1, round(corpus.num_samples / measure.settings.window))

    def start(self) -> State:
        """The state at the first window."""
        return State(0, (0,), (0,), (0.0,))

    def active(self, state: State) -> list[bool]:
        """There is always another epoch."""
        return [True]

    def place(self, state: State) -> tuple[int, int]:
        """Epoch of a window, and its number in that epoch."""
        return divmod(state.window, self.windows_per_epoch)

    def draw(self, state: State) -> tuple[Rows, State]:
        """What a window holds, not yet shuffled, and the state at the next."""
        epoch, window = self.place(state)
        samples = self.stream.num_samples
        first, last = (epoch * samples + samples * at // self.windows_per_epoch for at in (window, window + 1))
        ids, epochs, costs = join(self.stream.read(first, last - first))
        measured = self.measure.measure(ids, epochs, costs, check=self.tally.long > 0)
        rows = self.measure.rows(measured, np.arange(len(ids)), ids, epochs, np.zeros(len(ids), np.int16))
        tokens = state.tokens[0] + int(rows.tokens.sum())
        return rows, State(state.window + 1, (last,), (tokens,), (float(tokens),))


@dataclass(frozen=True)
class _Batch:
    """Samples of several groups, measured together, end to end."""

    samples_N: np.ndarray
    epochs_N: np.ndarray
    groups_N: np.ndarray
    measured: Measured


@dataclass
class _Supply:
    """What has been measured of one group's stream for this window."""

    position: int  # behind the last of it
    ends: list[np.ndarray]  # tokens given up to the end of each sample, from the start of training on
    last: int  # the last of them
    parts: list[tuple[int, int]] = field(default_factory=list)  # which batch, first row there

    def covered(self, target: float) -> int:
        """Samples that a target covers."""
        return sum(int(np.searchsorted(ends, target + _EXACT, side="right")) for ends in self.ends)


class MixedOrder:
    """Groups in proportion to their shares, until each has given what it may."""

    def __init__(self, corpus: Corpus, measure: Measure, tally: Tally, groups: Sequence[Group], shares: Shares) -> None:
        self.measure = measure
        self.tally = tally
        self.shares = shares
        self.names = [group.name for group in groups]
        sources = sorted(set(shares.sources))
        self.streams = [Stream(corpus, measure.seed, group, sources.index(group.name[0])) for group in groups]
        self.mean_tokens = [tokens / group.num_samples for tokens, group in zip(tally.tokens, groups, strict=True)]
        first = shares.of(self.active(self.start()))
        per_token = sum(share / mean for share, mean in zip(first, self.mean_tokens, strict=True) if share)
        self.window_tokens = measure.settings.window / per_token if per_token else 0.0

    def start(self) -> State:
        """The state at the first window."""
        zeros = (0,) * len(self.names)
        return State(0, zeros, zeros, (0.0,) * len(self.names))

    def active(self, state: State) -> list[bool]:
        """Of each group, whether it has more to give."""
        given = self.shares.sums(state.targets)
        return [
            asked and position < most and given[source] < self.shares.caps[source] - 0.5
            for source, asked, position, most in zip(
                self.shares.sources, self.shares.asked, state.positions, self.shares.most_samples, strict=True
            )
        ]

    def place(self, state: State) -> tuple[int, int]:
        """Windows are not of epochs here: 0, and the number of the window."""
        return 0, state.window

    def draw(self, state: State) -> tuple[Rows, State]:
        """What a window holds, not yet shuffled, and the state at the next."""
        supplies = [
            _Supply(position, [], tokens) for position, tokens in zip(state.positions, state.tokens, strict=True)
        ]
        batches: list[_Batch] = []
        targets = self._advance(state, supplies, batches)
        covered = [supply.covered(target) for supply, target in zip(supplies, targets, strict=True)]
        rows = self._collect(supplies, batches, covered)
        given = np.bincount(rows.groups, rows.tokens, len(targets)).astype(np.int64)
        return rows, State(
            state.window + 1,
            tuple(position + count for position, count in zip(state.positions, covered, strict=True)),
            tuple(tokens + more for tokens, more in zip(state.tokens, given.tolist(), strict=True)),
            tuple(targets),
        )

    def _advance(self, state: State, supplies: Sequence[_Supply], batches: list[_Batch]) -> list[float]:
        """Targets at the end of a window, whose samples are measured on the way.

        Between two moments at which groups leave the mix, targets grow in proportion to constant shares.
        """
        targets, active, left = list(state.targets), self.active(state), self.window_tokens
        while left > 0 and any(active):
            share = self.shares.of(active)
            here = [group for group in range(len(active)) if active[group]]
            self._measure_up_to(
                [target + left * rate for target, rate in zip(targets, share, strict=True)], here, supplies, batches
            )
            leaving = {}  # time until they leave, in tokens of all groups together
            for group in here:
                if supplies[group].position >= self.shares.most_samples[group]:
                    leaving[group] = max(0.0, (supplies[group].last - targets[group]) / share[group])
            given, rates = self.shares.sums(targets), self.shares.sums(share)
            capped = {
                source: max(0.0, (self.shares.caps[source] - given[source]) / rate)
                for source, rate in rates.items()
                if rate and self.shares.caps[source] < math.inf
            }
            span = min([left, *leaving.values(), *capped.values()])
            left -= span
            for group in here:
                targets[group] += share[group] * span
                if leaving.get(group, math.inf) <= span:
                    targets[group], active[group] = float(supplies[group].last), False
                elif capped.get(self.shares.sources[group], math.inf) <= span:
                    active[group] = False
        return targets

    def _measure_up_to(
        self, needed: Sequence[float], groups: Sequence[int], supplies: Sequence[_Supply], batches: list[_Batch]
    ) -> None:
        """Measure more of each of `groups` until it covers the tokens needed, or has no more."""
        while True:
            counts = {}
            for group in groups:
                supply, missing = supplies[group], needed[group] - supplies[group].last
                if missing > 0 and supply.position < self.shares.most_samples[group]:
                    samples = missing / self.mean_tokens[group]
                    count = int(1.02 * samples + 2 * math.sqrt(samples)) + 4
                    counts[group] = int(min(count, self.shares.most_samples[group] - supply.position))
            if not counts:
                return
            stretches = [
                stretch
                for group, count in counts.items()
                for stretch in self.streams[group].read(supplies[group].position, count)
            ]
            samples_N, epochs_N, costs = join(stretches)
            groups_N = np.repeat(np.array(list(counts), np.int16), list(counts.values()))
            measured = self.measure.measure(samples_N, epochs_N, costs, check=self.tally.long > 0)
            first = 0
            for group, count in counts.items():
                supply = supplies[group]
                ends = supply.last + np.cumsum(measured.tokens_N[first : first + count])
                supply.ends.append(ends)
                supply.parts.append((len(batches), first))
                supply.last, supply.position = int(ends[-1]), supply.position + count
                first += count
            batches.append(_Batch(samples_N, epochs_N, groups_N, measured))

    def _collect(self, supplies: Sequence[_Supply], batches: Sequence[_Batch], covered: Sequence[int]) -> Rows:
        """The first `covered` samples of each group's supply."""
        kept = [np.zeros(len(batch.samples_N), bool) for batch in batches]
        for supply, count in zip(supplies, covered, strict=True):
            for (batch, first), ends in zip(supply.parts, supply.ends, strict=True):
                kept[batch][first : first + min(count, len(ends))] = True
                count -= min(count, len(ends))
        parts = [
            self.measure.rows(batch.measured, np.flatnonzero(keep), batch.samples_N, batch.epochs_N, batch.groups_N)
            for batch, keep in zip(batches, kept, strict=True)
        ]
        return Rows.join(parts)
