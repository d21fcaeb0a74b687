"""The whole order of training as a pure function of (corpus, settings, seed): the state of the data is the step.

    window: samples drawn (data/order.py), permuted, lengths from the index --pack--> packs, permuted
    packs of all windows, end to end --cut--> step s = packs [s S, (s + 1) S)      S = sequences_per_step
    step:   --balance.deal--> the packs of each rank, the same set whatever the number of ranks

No media is opened.  Memory is the windows that a step touches and a few states of passed windows; the rest stays in
mapped indexes.  Finding step s packs every window before it, unless a cursor, which a checkpoint may keep, says where
the step's window begins; the result is the same.  A new run looks at the whole corpus once before its first step
(measure.scan), a resumed one has the result in its cursor.  Cost: about 1 us a sample.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any

import numpy as np

from data.balance import deal
from data.corpus import Corpus
from data.costs import KINDS, Costs, Sizing, Work
from data.errors import DataError
from data.hashing import hashed, permutation
from data.measure import PACKS, SAMPLES, Measure, PlanSettings, Rows, Tally, scan
from data.mixture import Group, GroupName, Shares, find_groups, select, table
from data.order import EvenOrder, MixedOrder, State
from data.packing import pack
from data.shard_index import ranges

__all__ = ["Cursor", "Pack", "Plan", "PlanSettings"]

_MOST_MARKS = 512
_WALK = 10_000_000  # samples, about 10 s, that may be packed to see whether the data lasts


@dataclass(frozen=True)
class Pack:
    """One packed sequence, before anything is read: n whole samples, or pieces of documents longer than a sequence."""

    samples: np.ndarray  # int64 [n]: ids in the corpus
    epochs: np.ndarray  # int64 [n]: passes over the corpus, or over the sample's group, before this one
    pieces: np.ndarray  # int64 [n]: -1 the whole sample, else the number of a piece
    groups: np.ndarray  # int16 [n]: rows of Plan.groups
    speeds: np.ndarray  # float64 [n]
    tokens: np.ndarray  # int64 [n]
    work: float  # of the pack for the decoder, in decoder tokens, as the next two; see costs.Work
    audio_work: float
    vision_work: float


@dataclass(frozen=True)
class Cursor:
    """Where the window begins that holds the first pack of a step; lets a resumed run start there."""

    plan: str  # fingerprint of the plan it belongs to
    first_pack: int  # packs of all windows before it
    state: State
    tally: Tally  # spares a resumed run the look at the whole corpus


@dataclass(frozen=True)
class _Mark:
    """Where a window begins."""

    first_pack: int
    state: State


@dataclass(frozen=True)
class _Window:
    """Rows of one window: pack p is the slice starts[p] to starts[p + 1] of them."""

    rows: Rows
    starts: np.ndarray
    works: np.ndarray  # float64 [packs, 3]: for the decoder, audio encoder, vision encoder
    next: _Mark

    @property
    def num_packs(self) -> int:
        """In this window."""
        return len(self.starts) - 1

    def pack(self, number: int) -> Pack:
        """One of its packs."""
        rows, part = self.rows, slice(self.starts[number], self.starts[number + 1])
        work, audio_work, vision_work = self.works[number].tolist()
        return Pack(
            rows.samples[part],
            rows.epochs[part],
            rows.pieces[part],
            rows.groups[part],
            rows.speeds[part],
            rows.tokens[part],
            work,
            audio_work,
            vision_work,
        )


class Plan:
    """Steps of training. Making one is cheap: the corpus is looked at when the first step, or `dropped`, is asked."""

    def __init__(
        self,
        corpus: Corpus,
        settings: PlanSettings,
        *,
        seed: int,
        sizing: Sizing,
        work: Work | None = None,
        mixture: str = "data.mixture",
    ) -> None:
        """Raise DataError for a mixture that names what the corpus has not; `mixture` is what errors call it."""
        self.corpus = corpus
        self.settings = settings
        self.seed = seed
        self.sizing = sizing
        self._measure = Measure(settings, seed, sizing, work or Work())
        self._setting = mixture
        self._chosen: list[Group] | None = None
        self.left_out: dict[str, int] = {}  # samples that the mixture leaves out, by source
        if settings.mixture is not None:
            settings.mixture.validate(mixture)
            self._chosen, self.left_out = select(find_groups(corpus), settings.mixture, mixture)
        self._tally: Tally | None = None
        self._marks: list[_Mark] = []  # of some windows, rising; the first may be a cursor's
        self._recent: dict[int, _Window] = {}

    @cached_property
    def fingerprint(self) -> str:
        """Same fingerprint, same samples in the same steps. The balance over ranks is not part of it."""
        # settings at their defaults do not count, so that a new one leaves the fingerprints of older runs alone
        plain = asdict(PlanSettings(0, 0))
        settings = sorted(item for item in asdict(self.settings).items() if plain[item[0]] != item[1])
        parts = (self.corpus.fingerprint, json.dumps(settings, sort_keys=True), self.seed, _probe(self.sizing), 2)
        return sha256(repr(parts).encode()).hexdigest()

    @property
    def dropped(self) -> dict[str, int]:
        """Samples above sequence_length that are left out, by source.

        Raises DataError where the corpus cannot be used: a sample too long and too_long="error", or images for a
        model without a vision encoder.
        """
        return self._order.tally.dropped

    @property
    def tally(self) -> Tally:
        """What one look at the whole corpus has found, by this run or by that of the cursor. Raises DataError."""
        if self._tally is None:
            self._tally = scan(self.corpus, self._measure, self._chosen)
        return self._tally

    @cached_property
    def _shares(self) -> Shares | None:
        mixture = self.settings.mixture
        return Shares(self._chosen, mixture, self.tally.tokens, self._setting) if mixture and self._chosen else None

    @cached_property
    def _order(self) -> EvenOrder | MixedOrder:
        if self._shares is None:
            return EvenOrder(self.corpus, self._measure, self.tally)
        return MixedOrder(self.corpus, self._measure, self.tally, self._chosen or [], self._shares)

    @property
    def groups(self) -> list[GroupName]:
        """Source and language of each group of the mixture; one for all samples without a mixture."""
        return list(self._order.names)

    def step(self, step: int) -> list[Pack]:
        """The packs of a step, sequences_per_step of them, in an order that does not depend on ranks.

        Raises DataError where the data has ended: less than a whole step, which may be left then, is no step.
        """
        return [window.pack(number) for window, packs in self._parts(step) for number in packs]

    def share(self, step: int, rank: int, num_ranks: int) -> list[Pack]:
        """The packs of one rank in a step, heaviest first: at most ceil(sequences_per_step / num_ranks)."""
        parts = self._parts(step)
        works = np.concatenate([window.works[packs.start : packs.stop].sum(axis=1) for window, packs in parts])
        where = [(window, number) for window, packs in parts for number in packs]
        mine = (where[position] for position in deal(works.tolist(), num_ranks)[rank])
        return [window.pack(number) for window, number in mine]

    def _parts(self, step: int) -> list[tuple[_Window, range]]:
        """The packs of a step as windows and which of their packs."""
        size = self.settings.sequences_per_step
        first, stop = step * size, (step + 1) * size
        mark, window = self._find(first)
        oldest, parts = mark.state.window, []
        while True:
            end = window.next.first_pack
            parts.append(
                (window, range(max(first, mark.first_pack) - mark.first_pack, min(stop, end) - mark.first_pack))
            )
            if stop <= end:
                break
            mark = window.next
            window = self._packed(mark)
        self._recent = {number: kept for number, kept in self._recent.items() if number >= oldest}
        return parts

    def require(self, stop_step: int) -> None:
        """Raise DataError where the mixture's epochs and caps end before `stop_step`, if that is cheap to know."""
        if self._shares is None or self._shares.most_tokens == math.inf:
            return
        assert isinstance(self._order, MixedOrder)
        settings, packs = self.settings, stop_step * self.settings.sequences_per_step
        tokens = self._shares.most_tokens / min(1.0, *settings.speeds)
        windows = tokens / max(self._order.window_tokens, 1)
        if windows * settings.window <= _WALK:
            self._before(packs)
        elif 2 * tokens / settings.sequence_length + windows + 1 < packs:  # best fit leaves packs half full at least
            about = int(tokens / settings.sequence_length / settings.sequences_per_step)
            raise self._end(f"after about {about:,} steps, before step {stop_step:,}")

    def realised(self, step: int) -> dict[GroupName, int]:
        """Tokens of each (source, language) in the steps before `step`."""
        packs = step * self.settings.sequences_per_step
        mark, window = self._before(packs)
        rows = slice(0, window.starts[packs - mark.first_pack])
        here = np.bincount(window.rows.groups[rows], window.rows.tokens[rows], len(self.groups)).astype(int).tolist()
        return {name: old + new for name, old, new in zip(self.groups, mark.state.tokens, here, strict=True)}

    def mixture_report(self, step: int) -> list[str]:
        """Asked beside realised shares of the tokens before `step`, and epochs so far, as lines of a table."""
        if self._shares is None:
            return []
        return table(self.groups, [*self.asked(step).values()], [*self.realised(step).values()], self.tally.tokens)

    def asked(self, step: int) -> dict[GroupName, float]:
        """Share of the tokens that the mixture asks of each source and language before `step`: they sum to 1."""
        assert self._shares is not None, "the plan has no mixture"
        mark, _ = self._before(step * self.settings.sequences_per_step)
        shares = self._shares.of(self._order.active(mark.state))
        return dict(zip(self.groups, shares, strict=True))

    def cursor(self, step: int) -> Cursor:
        """Where a run that goes on with `step` may begin. Cheap for steps near those asked for last."""
        packs = step * self.settings.sequences_per_step
        mark, window = self._before(packs)
        if packs == window.next.first_pack:
            mark = window.next
        return Cursor(self.fingerprint, mark.first_pack, mark.state, self.tally)

    def seek(self, cursor: Cursor | Mapping[str, Any]) -> None:
        """Start from a cursor, given as such or as its fields. Raises DataError where it is another plan's."""
        fields = cursor if isinstance(cursor, Mapping) else asdict(cursor)
        if fields.get("plan") != self.fingerprint:  # a run's own check (train.feed) comes first, and says what to do
            raise DataError(
                "the shards and settings of the plan are not those of the checkpoint, so its place in the data means "
                "nothing"
            )
        state, tally = ({name: _tuple(value) for name, value in fields[part].items()} for part in ("state", "tally"))
        self._tally = Tally(**tally)
        self._marks, self._recent = [_Mark(fields["first_pack"], State(**state))], {}

    def _before(self, packs: int) -> tuple[_Mark, _Window]:
        """Where the window begins that holds the last of so many packs, and that window."""
        return self._find(max(packs - 1, 0))

    def _find(self, number: int) -> tuple[_Mark, _Window]:
        """Where the window begins that holds a pack, and that window. Raises DataError past the end of the data."""
        if not self._marks or number < self._marks[0].first_pack:
            self._marks, self._recent = [_Mark(0, self._order.start())], {}
        mark = self._marks[bisect_right(self._marks, number, key=lambda mark: mark.first_pack) - 1]
        while True:
            window = self._packed(mark)
            if number < window.next.first_pack:
                return mark, window
            mark = window.next
            self._recent = {at: kept for at, kept in self._recent.items() if at > mark.state.window - 2}

    def _packed(self, mark: _Mark) -> _Window:
        number = mark.state.window
        if number not in self._recent:
            if not any(self._order.active(mark.state)):
                steps = mark.first_pack // self.settings.sequences_per_step
                raise self._end(f"at step {steps:,}")
            self._recent[number] = self._pack_window(mark)
        window = self._recent[number]
        if number >= self._marks[-1].state.window:
            self._marks.append(window.next)
            if len(self._marks) > _MOST_MARKS:  # the older the sparser: going back there packs some windows again
                older = _MOST_MARKS // 2
                self._marks = self._marks[:older:2] + self._marks[older:]
        return window

    def _end(self, when: str) -> DataError:
        """Steps are this plan's own; those of a phase with a mixture of its own begin with the phase."""
        return DataError(
            f"the data ends {when} of {self._setting}: every source has given its epochs or caps; stop training there, "
            "or raise them"
        )

    def _pack_window(self, mark: _Mark) -> _Window:
        rows, state = self._order.draw(mark.state)
        if rows.tokens.max(initial=0) > self.settings.sequence_length:
            name = self.corpus.name(int(rows.samples[rows.tokens.argmax()]))
            raise DataError(f"{name}: longer than its index says any sample is; run python -m data.index again")
        order = np.argsort(hashed(self.seed, rows.epochs, SAMPLES, rows.samples), kind="stable")
        packed, starts = pack(rows.tokens[order], self.settings.sequence_length)
        epoch, window = self._order.place(mark.state)
        shuffled = permutation(len(starts) - 1, self.seed, epoch, PACKS, window)
        sizes = np.diff(starts)[shuffled]
        rows = rows.take(order[packed[ranges(starts[:-1][shuffled], sizes)]])
        starts = np.concatenate([[0], np.cumsum(sizes)])
        works = np.stack([self._measure.work.decoder(rows.tokens), rows.audio, rows.vision], axis=1)
        works = np.add.reduceat(works, starts[:-1]) if len(rows) else works
        return _Window(rows, starts, works, _Mark(mark.first_pack + len(starts) - 1, state))


def _probe(sizing: Sizing) -> tuple:
    """What `sizing` makes of some audio, images and videos."""
    frames = np.arange(0, 4000, 7)
    sides = np.arange(1, 3000, 37)
    shapes = np.concatenate([np.stack([sides, sides[::-1]]), np.stack([sides * 2, sides])], axis=1)
    kinds = np.arange(shapes.shape[1]) % (len(KINDS) - 1) + 1
    zeros = np.zeros_like(kinds)
    costs = Costs(
        text_tokens_N=np.zeros(1, np.int64),
        document_N=np.zeros(1, bool),
        owner_M=zeros,
        kind_M=kinds.astype(np.uint8),
        samples_M=shapes[0] * 100,
        height_M=shapes[0],
        width_M=shapes[1],
        frames_M=shapes[1],
        seconds_M=shapes[0] / 7.0,
        text_before_M=zeros,
    )
    heard = np.asarray(sizing.layout.num_audio_tokens(frames)).tolist()
    chosen = sorted(asdict(sizing.video).items()), sizing.image.min_pixels, sizing.image.max_pixels
    return heard, sizing.sizes(costs).grid_M3.tolist(), sizing.layout.audio_window, chosen


def _tuple(value: Any) -> Any:
    """JSON has no tuples."""
    return tuple(value) if isinstance(value, list) else value
