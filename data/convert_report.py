"""What a conversion tells at its end: a table of its splits, and what was left out and why.

    outcomes of jobs --Summary.add--> lines

A reason is what stands before the colon of "no such file: a/b.wav", its numbers as N. Memory is a few lines for each.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from data.convert_jobs import Outcome, Totals

MAX_EXAMPLES = 3
_HEAD = ("split", "samples", "shards", "MB", "audio h", "images", "videos", "text tokens", "left out")


class Summary:
    """Sums over jobs."""

    def __init__(self, splits: Sequence[str], notes: Sequence[str], dry: bool) -> None:
        self.totals = {split: Totals() for split in splits}
        self.notes, self.dry = list(notes), dry
        self.left_out: dict[str, Counter[str]] = {split: Counter() for split in splits}  # by split and reason
        self.unread: Counter[str] = Counter()
        self._examples: dict[str, list[tuple[int, int, int, str]]] = defaultdict(list)

    def add(self, outcome: Outcome) -> None:
        """Count a job, in any order."""
        self.totals[outcome.split].add(outcome.totals)
        self.unread.update(outcome.unread)
        order = list(self.totals).index(outcome.split)
        for i, (place, reason) in enumerate(outcome.left_out):
            kind = kind_of(reason)
            self.left_out[outcome.split][kind] += 1
            examples = self._examples[kind]
            examples.append((order, outcome.number, i, f"{place}: {reason}"))
            examples.sort()
            del examples[MAX_EXAMPLES:]

    @property
    def total(self) -> Totals:
        """Over all splits."""
        total = Totals()
        for each in self.totals.values():
            total.add(each)
        return total

    def first_left_out(self) -> str:
        """A line on the first row that was left out; "" for none."""
        return min((examples[0] for examples in self._examples.values()), default=(0, 0, 0, ""))[3]

    def lines(self) -> list[str]:
        """The report."""
        rows = [_HEAD, *(self._row(split, each) for split, each in self.totals.items())]
        if len(self.totals) > 1:
            rows.append(self._row("all", self.total))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        lines = ["would be written:" if self.dry else "", *table] if self.dry else table
        if spoken := self.total.spoken:
            lines.append(f"answers with speech: {spoken}; python -m data.codes decodes and encodes them")
        reasons = sum(self.left_out.values(), Counter())
        if reasons:
            lines.append("left out, by reason:")
        for reason, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0])):
            lines.append(f"{count:8}  {reason}")
            lines += [f"            {line}" for _, _, _, line in self._examples[reason]]
            if count > MAX_EXAMPLES:
                lines.append(f"            and {count - MAX_EXAMPLES} more")
        if self.unread:
            fields = ", ".join(f"{name} ({count})" for name, count in sorted(self.unread.items()))
            lines.append(f"fields that nothing was made of, and rows that have them: {fields}")
        return [line.encode(errors="backslashreplace").decode() for line in [*lines, *self.notes]]

    def _row(self, split: str, totals: Totals) -> tuple[str, ...]:
        left_out = sum(
            sum(self.left_out[name].values()) for name in ([split] if split in self.left_out else self.totals)
        )
        return (
            split,
            str(totals.samples),
            str(totals.shards),
            f"{totals.bytes / 1e6:.1f}",
            f"{totals.audio_seconds / 3600:.3f}",
            str(totals.images),
            str(totals.videos),
            str(totals.text_tokens),
            str(left_out),
        )


def kind_of(reason: str) -> str:
    """The kind of a reason: what stands before its colon or its list of what is known, numbers as N."""
    text = re.split(r":| is none of ", reason, maxsplit=1)[0]
    return re.sub(r"(?<![\w-])\d+(?:\.\d+)?(?!\w)", "N", text)[:100]
