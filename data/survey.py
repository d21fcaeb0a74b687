"""What a corpus holds, counted from its indexes alone: samples, hours, tokens, lengths.

    Corpus --windows of rows--> ShardIndex.costs --Sizing--> tokens --bincount--> Survey --data.report--> tables, JSON
    NAME.tar.codes, where a shard has them --> who speaks in answers, and for how long

No media is opened. Time is about 1 us a sample. Memory is one window and a few kilobytes for each pair of a source and
a pattern (the kinds of media in a sample, such as "audio + image"), whatever the number of samples.

N samples and M media of one window, G groups that occur in it, K kinds of media.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.audio import SAMPLE_RATE
from data.code_store import ShardCodes, codes_location
from data.corpus import Corpus
from data.costs import AUDIO, FILM, IMAGE, KINDS, VIDEO, Costs, Sizing
from data.errors import DataError
from data.hashing import hashed
from data.shard_index import ShardIndex

WINDOW = 1 << 16
LIMITS = (8192, 32768)  # tokens; usual sequence lengths
_FINE = 64  # bins of an octave: lengths below 128 exactly, above to within 1.6 %
_BINS = _FINE * 32
_MASKS = 1 << len(KINDS)


@dataclass
class Totals:
    """Sums over samples; those of media count a medium as often as samples use it."""

    samples: int = 0
    documents: int = 0  # samples that are no conversation
    spoken: int = 0  # samples whose answer has speech
    text: int = 0  # tokens, as the next four; of text and around media
    audio: int = 0
    image: int = 0
    video: int = 0
    film_sound: int = 0
    clips: int = 0
    images: int = 0
    videos: int = 0  # with sound or without
    audio_seconds: float = 0.0
    sound_seconds: float = 0.0  # of films
    video_seconds: float = 0.0

    @property
    def tokens(self) -> int:
        """Of all kinds."""
        return self.text + self.audio + self.image + self.video + self.film_sound

    def add(self, other: Totals) -> None:
        """Add another's sums."""
        for item in fields(self):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))


@dataclass
class Lengths:
    """How long samples are, in tokens."""

    counts: np.ndarray = field(default_factory=lambda: np.zeros(_BINS, np.int64))
    tokens: int = 0
    longest: int = 0
    above: np.ndarray = field(default_factory=lambda: np.zeros(len(LIMITS), np.int64))  # samples over each limit

    @property
    def samples(self) -> int:
        """All of them."""
        return int(self.counts.sum())

    def add(self, other: Lengths) -> None:
        """Add another's samples."""
        self.counts += other.counts
        self.above += other.above
        self.tokens += other.tokens
        self.longest = max(self.longest, other.longest)

    def percentile(self, percent: float) -> int:
        """The length that `percent` % of the samples do not exceed, rounded up to the end of its bin."""
        rank = max(1, int(np.ceil(self.samples * percent / 100)))
        place = int(np.searchsorted(np.cumsum(self.counts), rank))
        return min(_first(place + 1) - 1, self.longest)

    def bars(self, most: int = 24) -> list[tuple[int, int, int]]:
        """(first length, last length, samples) on a logarithmic axis: 8 bars an octave, or fewer so as to fit."""
        used = np.flatnonzero(self.counts)
        if not len(used):
            return []
        for width in (_FINE // 8, _FINE // 4, _FINE // 2, _FINE):
            first, last = used[0] // width, used[-1] // width
            if last - first < most or width == _FINE:
                break
        return [
            (
                _first(bar * width),
                _first((bar + 1) * width) - 1,
                int(self.counts[bar * width : (bar + 1) * width].sum()),
            )
            for bar in range(first, last + 1)
        ]


@dataclass
class Speech:
    """What codec codes beside the shards say of the speech of answers; nothing else tells without opening media."""

    shards: int = 0  # whose codes were read
    speakers: dict[str, tuple[int, float]] = field(default_factory=dict)  # answers and seconds of each
    unusable: list[str] = field(default_factory=list)  # why codes that are there could not be read, a line for each

    def add(self, tar: str, index: ShardIndex) -> None:
        """Count the codes beside a shard on disk, if there are any."""
        if "://" in tar or not Path(codes_location(tar)).exists():
            return
        try:
            codes = ShardCodes.open(tar, index)
        except DataError as error:
            self.unusable.append(str(error))
            return
        self.shards += 1
        frames_N = codes.frames(slice(None))
        for row in np.flatnonzero(frames_N).tolist():
            count, seconds = self.speakers.get(name := codes.speaker(row), (0, 0.0))
            self.speakers[name] = count + 1, seconds + int(frames_N[row]) / codes.about["frame_rate"]


@dataclass
class Survey:
    """What a corpus holds."""

    shards: int
    bytes: int  # of the tars
    sizing: Sizing
    groups: dict[tuple[str, str], Totals]  # by (source, language)
    lengths: dict[tuple[str, str], Lengths]  # by (source, pattern)
    picks: dict[tuple[str, str], list[int]]  # by (source, pattern): a few samples of each, chosen by the seed
    left_out: Counter[str]  # reasons, their numbers as N
    examples: dict[str, str]  # a whole line for each reason
    tokenizers: set[str]  # fingerprints
    speech: Speech = field(default_factory=Speech)

    @property
    def total(self) -> Totals:
        """Over all groups."""
        total = Totals()
        for group in self.groups.values():
            total.add(group)
        return total

    def lengths_by(self, part: int | None) -> dict[str, Lengths]:
        """Lengths by source (0), by pattern (1) or of all, longest total first."""
        merged: dict[str, Lengths] = defaultdict(Lengths)
        for names, lengths in self.lengths.items():
            merged["all" if part is None else names[part]].add(lengths)
        return dict(sorted(merged.items(), key=lambda item: (-item[1].tokens, item[0])))


def survey(corpus: Corpus, sizing: Sizing, *, picks: int = 0, seed: int = 0, quiet: bool = True) -> Survey:
    """Count a corpus, window by window; choose up to `picks` samples of each source and pattern.

    Raises DataError where an index is damaged.
    """
    found = Survey(len(corpus.paths), 0, sizing, defaultdict(Totals), defaultdict(Lengths), {}, Counter(), {}, set())
    best: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    with tqdm(total=corpus.num_samples, unit=" samples", desc="inspect", disable=quiet, leave=False) as bar:
        for shard in range(len(corpus.paths)):
            index = corpus.index(shard)
            found.bytes += index.about["tar_size"]
            found.tokenizers.add(index.about["tokenizer"])
            for line in index.about["left_out"]:
                reason = re.sub(r"\d+", "N", str(line).partition(": ")[2] or str(line))
                found.left_out[reason] += 1
                found.examples.setdefault(reason, str(line))
            spoken = index.speech_rows()
            if len(spoken):
                found.speech.add(corpus.paths[shard], index)
            for first in range(0, index.num_samples, WINDOW):
                rows = slice(first, min(first + WINDOW, index.num_samples))
                costs = index.costs(rows)
                patterns_N = _count(found, index, rows, costs, spoken)
                if picks:
                    _pick(best, index, rows, patterns_N, int(corpus.offsets[shard]), picks, seed)
                bar.update(rows.stop - rows.start)
    found.picks = {names: [sample for _, sample in chosen] for names, chosen in sorted(best.items())}
    return found


def pattern_name(mask: int) -> str:
    """Name of a pattern, from a number whose bit k says that the kind k of medium occurs."""
    return " + ".join(name for kind, name in enumerate(KINDS) if mask >> kind & 1) or "text only"


def _count(found: Survey, index: ShardIndex, rows: slice, costs: Costs, spoken: np.ndarray) -> np.ndarray:
    """Add a window to what was found; `spoken` are the shard's samples with speech, in order.

    Returns the mask of media of each sample, int64 [N].
    """
    sizes = found.sizing.sizes(costs)
    mask_N = np.zeros(len(costs.text_tokens_N), np.int64)
    for kind in range(len(KINDS)):
        mask_N[costs.owner_M[costs.kind_M == kind]] |= 1 << kind
    source_N, language_N = (_codes(index, name, rows) for name in ("source", "language"))

    pairs_G, group_N = np.unique(source_N * (1 << 16) + language_N, return_inverse=True)
    cell_M = group_N[costs.owner_M] * len(KINDS) + costs.kind_M

    def by_sample(values_N: np.ndarray | None) -> np.ndarray:
        return np.bincount(group_N, values_N, len(pairs_G))

    def by_medium(values_M: np.ndarray | None) -> np.ndarray:
        return np.bincount(cell_M, values_M, len(pairs_G) * len(KINDS)).reshape(len(pairs_G), len(KINDS))

    spoken_N = np.zeros(len(group_N))
    spoken_N[spoken[slice(*np.searchsorted(spoken, (rows.start, rows.stop)))] - rows.start] = 1
    samples, documents, text, said = map(by_sample, (None, costs.document_N, costs.text_tokens_N, spoken_N))
    media, heard, seen, sound, seconds = map(
        by_medium, (None, sizes.heard_M, sizes.seen_M, costs.samples_M, costs.seconds_M)
    )
    for group, pair in enumerate(pairs_G.tolist()):
        totals = Totals(
            samples=int(samples[group]),
            documents=int(documents[group]),
            spoken=int(said[group]),
            text=int(text[group]),
            audio=int(heard[group, AUDIO]),
            image=int(seen[group, IMAGE]),
            video=int(seen[group, VIDEO] + seen[group, FILM]),
            film_sound=int(heard[group, FILM]),
            clips=int(media[group, AUDIO]),
            images=int(media[group, IMAGE]),
            videos=int(media[group, VIDEO] + media[group, FILM]),
            audio_seconds=float(sound[group, AUDIO]) / SAMPLE_RATE,
            sound_seconds=float(sound[group, FILM]) / SAMPLE_RATE,
            video_seconds=float(seconds[group, VIDEO] + seconds[group, FILM]),
        )
        names = _name(index, "source", pair >> 16), _name(index, "language", pair & 0xFFFF)
        found.groups[names].add(totals)
    _count_lengths(found, index, source_N * _MASKS + mask_N, found.sizing.tokens(costs, sizes))
    return mask_N


def _count_lengths(found: Survey, index: ShardIndex, code_N: np.ndarray, tokens_N: np.ndarray) -> None:
    codes_G, group_N = np.unique(code_N, return_inverse=True)
    groups = len(codes_G)
    counts = np.bincount(group_N * _BINS + _bin(tokens_N), minlength=groups * _BINS).reshape(groups, _BINS)
    sums = np.bincount(group_N, tokens_N, groups)
    above = np.stack([np.bincount(group_N, tokens_N > limit, groups) for limit in LIMITS], axis=1).astype(np.int64)
    longest = np.zeros(groups, np.int64)
    np.maximum.at(longest, group_N, tokens_N)
    for group, code in enumerate(codes_G.tolist()):
        names = _name(index, "source", code // _MASKS), pattern_name(code % _MASKS)
        found.lengths[names].add(Lengths(counts[group], int(sums[group]), int(longest[group]), above[group]))


def _pick(
    best: dict[tuple[str, str], list[tuple[int, int]]],
    index: ShardIndex,
    rows: slice,
    mask_N: np.ndarray,
    offset: int,
    picks: int,
    seed: int,
) -> None:
    """Keep the `picks` samples of least hash of each source and pattern."""
    sample_N = np.arange(rows.start, rows.stop) + offset
    hash_N = hashed(seed, sample_N)
    code_N = _codes(index, "source", rows) * _MASKS + mask_N
    order = np.lexsort((hash_N, code_N))
    code_N = code_N[order]
    place_N = np.arange(len(code_N)) - np.searchsorted(code_N, code_N)  # in its group
    for at in np.flatnonzero(place_N < picks).tolist():
        names = _name(index, "source", int(code_N[at]) // _MASKS), pattern_name(int(code_N[at]) % _MASKS)
        best[names].append((int(hash_N[order[at]]), int(sample_N[order[at]])))
    for names, found in best.items():
        best[names] = sorted(found)[:picks]


def _codes(index: ShardIndex, kind: str, rows: slice) -> np.ndarray:
    """Codes of sources or languages of samples, int64 [N]. Raises DataError for one that has no name."""
    code_N = index.columns[kind][rows].astype(np.int64)
    index.name(kind, rows.start + int(code_N.argmax()))
    return code_N


def _name(index: ShardIndex, kind: str, code: int) -> str:
    return str(index.about[f"{kind}s"][code]) or f"(no {kind})"


def _bin(tokens_N: np.ndarray) -> np.ndarray:
    """Bin of each length: _FINE to the octave above 2 * _FINE, and one for each length below."""
    tokens_N = np.minimum(tokens_N, (1 << 36) - 1)
    shift_N = np.maximum(np.frexp(tokens_N.astype(np.float64))[1] - _FINE.bit_length(), 0).astype(np.int64)
    return shift_N * _FINE + (tokens_N >> shift_N)


def _first(place: int) -> int:
    """The least length of a bin."""
    shift = max(place // _FINE - 1, 0)
    return (place - shift * _FINE) << shift
