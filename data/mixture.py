"""What share of the tokens each source and language gets, and when a source has given enough.

    indexes --find_groups--> groups (source, language), their samples in each shard
    weights of sources, or tokens ** (1 / temperature) --------------------+
    tokens ** (1 / language_temperature) x factor, within each source -----+--> Shares --> data.order

A source that has given its most epochs or tokens leaves, and the others share its place in proportion; a language that
has given its epochs leaves its place to the other languages of its source. Cost: one look at each index's header.

G groups, S shards.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from data.corpus import Corpus
from data.errors import DataError
from data.shard_index import ShardIndex

NO_SOURCE, NO_LANGUAGE = "(no source)", "(no language)"  # what samples that name none count as
GroupName = tuple[str, str]  # source and language


@dataclass(frozen=True)
class Mixture:
    """How sources and languages are mixed. Shares are of tokens, as the decoder sees them."""

    weights: dict[str, float] = field(default_factory=dict)
    """Share of each source, in any unit: 0 leaves one out. Empty: shares follow size, by `temperature`."""
    temperature: float = 1.0
    """Without weights a source's share is its tokens ** (1 / temperature): 1 as they come, more evens out."""
    language_temperature: float = 1.0
    """The same for the languages of a source."""
    languages: dict[str, float] = field(default_factory=dict)
    """Factor on a language's share of each source; 1 where none is given, 0 leaves the language out."""
    epochs: dict[str, float] = field(default_factory=dict)
    """Most passes over a source; parts of one may be asked for."""
    caps: dict[str, float] = field(default_factory=dict)
    """Most tokens of a source."""

    def validate(self, name: str = "data.mixture") -> None:
        """Raise DataError naming the first setting that cannot be used."""
        for key in ("temperature", "language_temperature"):
            value = getattr(self, key)
            if not 0 < value < math.inf:
                raise DataError(f"{name}.{key}={value}: must be above 0")
        for key in ("weights", "languages"):
            for item, value in getattr(self, key).items():
                if not 0 <= value < math.inf:
                    raise DataError(f"{name}.{key}.{item}={value}: must be 0 or more")
        for key in ("epochs", "caps"):
            for item, value in getattr(self, key).items():
                if not 0 < value < math.inf:
                    raise DataError(f"{name}.{key}.{item}={value}: must be above 0")
        if self.weights and not any(self.weights.values()):
            raise DataError(f"{name}.weights: all are 0; give one source at least a share")


@dataclass(frozen=True)
class Group:
    """The samples of one source and language, and where they are."""

    name: GroupName
    shards_S: np.ndarray  # int64, rising: shards that hold any
    counts_S: np.ndarray  # int64: samples in each of them
    codes_S2: np.ndarray  # int64: of source and language, in each of them

    @property
    def num_samples(self) -> int:
        """In all shards."""
        return int(self.counts_S.sum())


def find_groups(corpus: Corpus) -> list[Group]:
    """Every (source, language) of a corpus, by name."""
    found: dict[GroupName, list[tuple[int, int, int, int]]] = defaultdict(list)
    for shard in range(len(corpus.offsets) - 1):
        for name, codes, count in groups_of(corpus.index(shard)):
            found[name].append((shard, count, *codes))
    groups = []
    for name, rows in sorted(found.items()):
        table = np.array(rows, np.int64)
        groups.append(Group(name, table[:, 0], table[:, 1], table[:, 2:]))
    return groups


def groups_of(index: ShardIndex) -> list[tuple[GroupName, tuple[int, int], int]]:
    """(name, codes of source and language, samples) of each group in a shard."""
    about = index.about
    try:
        return [
            ((about["sources"][s] or NO_SOURCE, about["languages"][g] or NO_LANGUAGE), (int(s), int(g)), int(count))
            for s, g, count in about["groups"]
        ]
    except (TypeError, ValueError, IndexError):
        raise DataError(f"{index.tar}: its index has damaged groups; run python -m data.index again") from None


def select(
    groups: Sequence[Group], mixture: Mixture, setting: str = "data.mixture"
) -> tuple[list[Group], dict[str, int]]:
    """The groups that take part, and samples left out by source.

    Raises DataError for names that do not fit; `setting` is what the mixture is called in it.
    """
    sources = sorted({group.name[0] for group in groups})
    languages = sorted({group.name[1] for group in groups})
    for key, known in (("weights", sources), ("epochs", sources), ("caps", sources), ("languages", languages)):
        for name in getattr(mixture, key):
            if name not in known:
                raise DataError(f'{setting}.{key}: no sample is of "{name}"{_nearest(name, known)}')
    missing = [source for source in sources if source not in mixture.weights] if mixture.weights else []
    if missing:
        raise DataError(
            f'{setting}.weights: source "{missing[0]}" has none (of {len(missing)} such); 0 leaves a source out'
        )
    kept, left_out = [], Counter()
    for group in groups:
        source, language = group.name
        if mixture.weights.get(source, 1) > 0 and mixture.languages.get(language, 1) > 0:
            kept.append(group)
        else:
            left_out[source] += group.num_samples
    if not kept:
        raise DataError(f"{setting} leaves out every sample; raise a weight or a factor of a language")
    return kept, dict(left_out)


class Shares:
    """Shares of groups, and how far each may go.

    `tokens_G` are the tokens of all samples of each group. Raises DataError for a source that cannot give its share;
    `setting` is what the mixture is called in it.
    """

    def __init__(
        self, groups: Sequence[Group], mixture: Mixture, tokens_G: Sequence[int], setting: str = "data.mixture"
    ) -> None:
        self.sources = [group.name[0] for group in groups]
        by_source: dict[str, int] = defaultdict(int)
        for source, tokens in zip(self.sources, tokens_G, strict=True):
            by_source[source] += tokens
        for source, tokens in by_source.items():
            if not tokens and mixture.weights:
                raise DataError(
                    f'{setting}: every sample of source "{source}" is too long; raise data.sequence_length, '
                    f"or the phase's own, or set {setting}.weights.{source}=0 "
                    "(where speech is trained: or has no speech codes)"
                )
        if not any(by_source.values()):
            raise DataError(
                f"{setting}: no sample is left: all are longer than data.sequence_length, or have no speech codes "
                "where speech is trained"
            )
        most, heaviest = max(by_source.values()), max(mixture.weights.values(), default=1.0)
        self._weights = {source: weight / heaviest for source, weight in mixture.weights.items()} or {
            source: _power(tokens / most, mixture.temperature) for source, tokens in by_source.items()
        }
        self._factors = [
            _power(tokens / max(by_source[group.name[0]], 1), mixture.language_temperature)
            * mixture.languages.get(group.name[1], 1.0)
            for group, tokens in zip(groups, tokens_G, strict=True)
        ]
        for group, tokens, share in zip(groups, tokens_G, self.of([True] * len(groups)), strict=True):
            if tokens and not share > 0:
                raise DataError(f"{setting}: the share of {'/'.join(group.name)} is too small to count; leave it out")
        self.asked = [share > 0 for share in self.of([True] * len(groups))]
        self.caps = {source: mixture.caps.get(source, math.inf) for source in by_source}
        epochs = {source: mixture.epochs.get(source, math.inf) for source in by_source}
        self.most_samples = [_passes(epochs[group.name[0]], group.num_samples) for group in groups]
        self.most_tokens = sum(min(self.caps[source], epochs[source] * tokens) for source, tokens in by_source.items())

    def of(self, active: Sequence[bool]) -> list[float]:
        """Share of each group among those that are active, 0 for the others; they sum to 1."""
        present: dict[str, float] = defaultdict(float)
        for source, factor, here in zip(self.sources, self._factors, active, strict=True):
            present[source] += factor * here
        total = math.fsum(self._weights[source] for source, factor in present.items() if factor)
        return [
            self._weights[source] / total * (factor / present[source]) if here and factor else 0.0
            for source, factor, here in zip(self.sources, self._factors, active, strict=True)
        ]

    def sums(self, values_G: Iterable[float]) -> dict[str, float]:
        """Values of groups summed by source."""
        sums: dict[str, float] = defaultdict(float)
        for source, value in zip(self.sources, values_G, strict=True):
            sums[source] += value
        return sums


def table(names: Sequence[GroupName], asked: Sequence[float], tokens: Sequence[int], size: Sequence[int]) -> list[str]:
    """Lines of a table: asked beside realised share of the tokens, and passes so far, of each group.

    `size` is the tokens of one pass. Groups that have given all they may are asked for 0 %.
    """
    total = max(sum(tokens), 1)
    rows = [("source", "language", "asked", "realised", "tokens", "epochs")]
    for name, share, given, one in zip(names, asked, tokens, size, strict=True):
        rows.append((*name, f"{share:.3%}", f"{given / total:.3%}", f"{given:,}", f"{given / max(one, 1):.2f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:{'<' if at < 2 else '>'}{widths[at]}}" for at, cell in enumerate(row)).rstrip()
        for row in rows
    ]


def _power(size: float, temperature: float) -> float:
    """size ** (1 / temperature) of 0 to 1, to nine digits: the last ones differ from one C library to the next."""
    return float(f"{size ** (1 / temperature):.9g}")


def _passes(epochs: float, samples: int) -> float:
    """Samples of so many epochs; 0.29 of 100 samples is 28.999999999999996 in floating point."""
    return math.inf if epochs == math.inf else math.floor(epochs * samples + 1e-6)


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f'; did you mean "{close[0]}"?' if close else f"; there are {', '.join(known[:8])}"
