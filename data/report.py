"""A survey as tables for the terminal and the page, and as JSON.

    Survey --tables--> [Table] --as_text--> aligned lines
                               --data.page--> HTML
           --as_json--> the same numbers, all of them: a printed table folds its smallest rows into one

Cost: milliseconds; it depends on the numbers of sources and languages alone.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from data.survey import LIMITS, Lengths, Survey, Totals

PERCENTILES = (50, 90, 99)
MAX_ROWS = 40  # of a table; the rest is folded into one row
_TOKENS = ("text", "audio", "image", "video", "film_sound")


@dataclass(frozen=True)
class Table:
    """Rows of cells that are ready to be shown; the columns in `words` stand left, all else are numbers."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Collection[int] = (0,)
    total: Sequence[str] = ()


def summary(survey: Survey) -> list[tuple[str, str]]:
    """(name, value) of the whole corpus."""
    total, patching = survey.total, survey.sizing.layout.patching
    images, videos = _settings(survey.sizing.image, "pixels"), _settings(survey.sizing.video)
    if patching is None:
        images = videos = "no tokens: the model has no vision encoder"
    else:
        images += f", a token for {patching.factor} x {patching.factor} pixels"
        videos += "; all is heard at its own speed"
    return [
        ("shards", f"{survey.shards:,}"),
        (
            "samples",
            f"{total.samples:,}: {total.samples - total.documents:,} conversations, {total.documents:,} documents",
        ),
        ("bytes", f"{survey.bytes:,} ({human_bytes(survey.bytes)})"),
        ("audio", f"{hours(total.audio_seconds)} in {total.clips:,} clips"),
        ("images", f"{total.images:,}"),
        (
            "video",
            f"{hours(total.video_seconds)} in {total.videos:,} videos, {hours(total.sound_seconds)} of their "
            "sound heard",
        ),
        *([("spoken", _spoken(survey))] if total.spoken else []),
        ("tokens", f"{total.tokens:,}"),
        ("left out", f"{survey.left_out.total():,} samples"),
        ("images become", images),
        ("videos become", videos),
        ("tokenizers", f"{len(survey.tokenizers)}, by which text was counted"),
    ]


def tables(survey: Survey) -> list[Table]:
    """Tokens by source and language, lengths by media and by source, speech by speaker, what was left out."""
    found = [_tokens_table(survey)]
    for title, part in (
        ("lengths in tokens, by media (a film is a video whose sound is heard)", 1),
        ("lengths in tokens, by source", 0),
    ):
        groups = survey.lengths_by(part)
        rows = [_lengths_row(name, lengths) for name, lengths in groups.items()]
        if len(rows) > MAX_ROWS:
            rest = Lengths()
            for lengths in list(groups.values())[MAX_ROWS - 1 :]:
                rest.add(lengths)
            rows[MAX_ROWS - 1 :] = [_lengths_row(f"({len(rows) - MAX_ROWS + 1} others)", rest)]
        total = _lengths_row("all", survey.lengths_by(None)["all"])
        found.append(Table(title, ["media" if part else "source", *_LENGTHS_HEADER], rows, total=total))
    if survey.speech.speakers:
        title = f"speech of answers, by the codec codes of {survey.speech.shards:,} shards"
        found.append(speakers_table(title, survey.speech.speakers))
    if survey.left_out:
        common = survey.left_out.most_common()
        rows = [(f"{count:,}", survey.examples[reason]) for reason, count in common[:MAX_ROWS]]
        if rest := common[MAX_ROWS:]:
            rows.append((f"{sum(count for _, count in rest):,}", f"({len(rest)} other reasons)"))
        found.append(Table("left out", ["samples", "for instance"], rows, words=(1,)))
    return found


def speakers_table(title: str, speakers: Mapping[str, tuple[int, float]]) -> Table:
    """Utterances and seconds of each speaker, those who speak longest first."""
    ranked = sorted(speakers.items(), key=lambda item: (-item[1][1], item[0]))
    rows = [[name or "(unknown)", f"{count:,}", hours(seconds)] for name, (count, seconds) in ranked]
    if len(rows) > MAX_ROWS:
        rest = [value for _, value in ranked[MAX_ROWS - 1 :]]
        rows[MAX_ROWS - 1 :] = [[f"({len(rest)} others)", *_utterances(rest)]]
    return Table(title, ["speaker", "utterances", "speech"], rows, total=["all", *_utterances(speakers.values())])


def as_text(table: Table) -> str:
    """A table as aligned lines, ready for a terminal."""
    lines = [[printable(cell) for cell in row] for row in (table.header, *table.rows, table.total) if row]
    widths = [max(_width(row[column]) for row in lines) for column in range(len(table.header))]
    left = [column in table.words for column in range(len(widths))]
    text = [
        "  ".join(_pad(cell, width, side) for cell, width, side in zip(row, widths, left, strict=True)).rstrip()
        for row in lines
    ]
    rule = "-" * min(sum(widths) + 2 * len(widths) - 2, 118)
    text.insert(1, rule)
    if table.total:
        text.insert(-1, rule)
    return "\n".join([f"{table.title}:", *(f"  {line}" for line in text)])


def bars_as_text(lengths: Lengths, width: int = 50) -> str:
    """A histogram of lengths, a line for each bar, on a logarithmic axis; empty bars in a row become one line."""
    bars = lengths.bars()
    tallest = max(count for _, _, count in bars)
    sizes = [max(len(f"{bar[column]:,}") for bar in bars) for column in range(3)]
    lines = []
    for first, last, count in bars:
        share, blocks = 100 * count / lengths.samples, "#" * -(-count * width // tallest)
        line = f"  {first:>{sizes[0]},} - {last:>{sizes[1]},}  {count:>{sizes[2]},}  {share:5.1f} %  {blocks}"
        if count or lines[-1] != "  ...":
            lines.append(line if count else "  ...")
    return "\n".join(lines)


def as_json(survey: Survey) -> dict[str, Any]:
    """Everything that the tables tell, whole."""
    total = survey.total
    return {
        "shards": survey.shards,
        "bytes": survey.bytes,
        "tokenizers": sorted(survey.tokenizers),
        "total": _totals(total),
        "sizes": {"image": asdict(survey.sizing.image), "video": asdict(survey.sizing.video)},
        "groups": [
            {"source": source, "language": language, **_totals(group)}
            for (source, language), group in sorted(survey.groups.items())
        ],
        "lengths": {
            name: {key: _lengths(lengths) for key, lengths in survey.lengths_by(part).items()}
            for name, part in (("all", None), ("media", 1), ("source", 0))
        },
        "speech": {
            "answers": total.spoken,
            "shards_with_codes": survey.speech.shards,
            "speakers": [
                {"speaker": name, "utterances": count, "seconds": seconds}
                for name, (count, seconds) in sorted(survey.speech.speakers.items())
            ],
            "unusable_codes": survey.speech.unusable,
        },
        "left_out": [
            {"reason": reason, "samples": count, "example": survey.examples[reason]}
            for reason, count in survey.left_out.most_common()
        ],
    }


def hours(seconds: float) -> str:
    """A duration in the unit that suits it."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:,.1f} h"


def human_bytes(count: int) -> str:
    """A size in the unit that suits it."""
    power = min(len(str(int(count))) - 1, 15) // 3
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB', 'PB')[power]}"


def printable(text: str) -> str:
    """Text of a corpus for a terminal: what would steer it, or break a line, becomes a replacement character."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


_LENGTHS_HEADER = (
    "samples",
    "tokens",
    "mean",
    *(f"{percent} %" for percent in PERCENTILES),
    "longest",
    *(f"> {limit:,}" for limit in LIMITS),
)


def _tokens_table(survey: Survey) -> Table:
    header = ["source", "language", "samples", "tokens", "share", "text", "audio", "image", "video", "film sound"]
    header += ["audio hours", "video hours", "images"]
    total = survey.total
    groups = sorted(survey.groups.items(), key=lambda item: (-item[1].tokens, item[0]))
    rows = [_tokens_row(*names, group, total) for names, group in groups]
    if len(rows) > MAX_ROWS:
        rest = _sum(group for _, group in groups[MAX_ROWS - 1 :])
        rows[MAX_ROWS - 1 :] = [_tokens_row(f"({len(rows) - MAX_ROWS + 1} others)", "", rest, total)]
    return Table("tokens by source and language", header, rows, (0, 1), _tokens_row("all", "", total, total))


def _tokens_row(source: str, language: str, group: Totals, total: Totals) -> list[str]:
    counts = [f"{getattr(group, name):,}" for name in _TOKENS]
    times = [f"{seconds / 3600:,.3f}" for seconds in (group.audio_seconds, group.video_seconds)]
    share = f"{100 * group.tokens / max(total.tokens, 1):.1f} %"
    return [source, language, f"{group.samples:,}", f"{group.tokens:,}", share, *counts, *times, f"{group.images:,}"]


def _lengths_row(name: str, lengths: Lengths) -> list[str]:
    samples = max(lengths.samples, 1)
    above = [f"{100 * int(count) / samples:.2f} %" for count in lengths.above]
    percentiles = [f"{lengths.percentile(percent):,}" for percent in PERCENTILES]
    mean = f"{lengths.tokens / samples:,.1f}"
    return [name, f"{lengths.samples:,}", f"{lengths.tokens:,}", mean, *percentiles, f"{lengths.longest:,}", *above]


def _spoken(survey: Survey) -> str:
    """How many answers have speech, and what is known of it."""
    speech, count = survey.speech, f"{survey.total.spoken:,} answers have speech"
    if speech.unusable:
        return f"{count}; codes of {len(speech.unusable):,} shards cannot be used: {speech.unusable[0]}"
    if not speech.shards:
        return f"{count}; python -m data.codes tells by whom and how long"
    coded = sum(utterances for utterances, _ in speech.speakers.values())
    return f"{count}, {coded:,} of them have codec codes, of {len(speech.speakers):,} speakers"


def _utterances(counts: Collection[tuple[int, float]]) -> list[str]:
    """How many, and how long they are together."""
    return [f"{sum(count for count, _ in counts):,}", hours(sum(seconds for _, seconds in counts))]


def _sum(groups: Iterable[Totals]) -> Totals:
    total = Totals()
    for group in groups:
        total.add(group)
    return total


def _settings(settings: Any, ending: str = "") -> str:
    """Settings as they are written on a command line, those only whose name ends so."""
    values = asdict(settings).items()
    return " ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in values
        if name.endswith(ending) and "source" not in name
    )


def _totals(totals: Totals) -> dict[str, Any]:
    return {**asdict(totals), "tokens": totals.tokens}


def _lengths(lengths: Lengths) -> dict[str, Any]:
    return {
        "samples": lengths.samples,
        "tokens": lengths.tokens,
        "longest": lengths.longest,
        "percentiles": {str(percent): lengths.percentile(percent) for percent in (1, 10, 25, *PERCENTILES)},
        "above": {str(limit): int(count) for limit, count in zip(LIMITS, lengths.above, strict=True)},
        "bars": [{"first": first, "last": last, "samples": count} for first, last, count in lengths.bars()],
    }


def _width(text: str) -> int:
    """Columns of a terminal that a text takes."""
    return sum(
        0 if unicodedata.combining(letter) else 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        for letter in text
    )


def _pad(text: str, width: int, left: bool) -> str:
    space = " " * (width - _width(text))
    return text + space if left else space + text
