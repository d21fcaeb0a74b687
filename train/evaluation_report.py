"""What an evaluation of one set found: rows of tables, every answer, and the files they go to.

    counts of samples --by language, source, ...--> sums --Suite.values--> Row --> table, JSON

Letters: N samples.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.files import write_atomically
from train.suites import Answered, Counts, Group, Suite

BASIC: Mapping[str, Group] = {"language": lambda p: p.language, "source": lambda p: p.source or "unknown"}
SHOWN = 5  # counts beside the metrics in a table


@dataclass(frozen=True)
class Row:
    """One group of samples, or all."""

    group: str
    num_samples: int
    counts: Mapping[str, float]  # summed
    values: Mapping[str, float]  # metrics; none of no samples

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {"group": self.group, "num_samples": self.num_samples, **_whole(self.counts), **self.values}


@dataclass(frozen=True)
class Report:
    """The result on one set."""

    set_name: str
    suite: Suite
    step: int
    tables: Mapping[str, Sequence[Row]]  # by language, by source, and those of the suite
    all: Row
    examples: Sequence[Mapping[str, Any]]  # every sample: reference, answer, counts
    skipped: Sequence[str]  # samples that could not be read, asked or graded, with the reason
    loss: float | None = None  # of documents beside the questions, nats a token; None where there are none
    num_targets: int = 0  # tokens that it is the mean of

    @property
    def metrics(self) -> dict[str, float]:
        """What metrics.jsonl and a choice by metric (`SET.METRIC`) know of it; of no samples, nothing."""
        found = dict(self.all.values)
        if "num_words" in self.all.counts:
            found["words"] = self.all.counts["num_words"]
        if self.loss is not None:
            found |= {"loss": self.loss, "targets": self.num_targets}
        return found

    def table(self) -> str:
        """For people."""
        lines = [f"{self.set_name} at step {self.step}: {self.suite.ABOUT}"]
        names = [*self.suite.METRICS]
        counts = [name for name in self.all.counts if name not in names][:SHOWN]
        heads = [*names, "samples", *counts]
        widths = [max(9, len(head) + 2) for head in heads]
        for title, rows in self.tables.items():
            shown = [*rows, self.all] if title == "language" else rows if len(rows) > 1 else ()
            if shown:
                lines.append(f"  {title:<22}" + _cells(heads, widths))
            for row in shown:
                cells = [shown_as(name, row.values.get(name)) for name in names] + [f"{row.num_samples:,}"]
                cells += [f"{row.counts[name]:,.10g}" for name in counts]
                lines.append(f"  {row.group[:22]:<22}" + _cells(cells, widths))
        if self.skipped:
            lines.append(f"  {len(self.skipped)} samples could not be used, first: {self.skipped[0]}")
        if self.loss is not None:
            lines.append(f"  documents: {self.loss:.4f} nats a token, over {self.num_targets:,} tokens")
        return "\n".join(lines)

    def plain(self) -> dict[str, Any]:
        """All of it, for JSON."""
        body: dict[str, Any] = {"set": self.set_name, "suite": self.suite.NAME, "step": self.step}
        body |= {"metrics": self.metrics, "higher_is_better": dict(self.suite.METRICS), **self.all.values}
        if self.loss is not None:
            body |= {"loss": self.loss, "targets": self.num_targets}
        body["rows"] = [row.plain() for row in (*self.tables["language"], self.all)]
        body["sources"] = [row.plain() for row in self.tables["source"]]
        others = {title: rows for title, rows in self.tables.items() if title not in BASIC}
        body["tables"] = {title: [row.plain() for row in rows] for title, rows in others.items()}
        return body | {"skipped": list(self.skipped), "examples": list(self.examples)}

    def write(self, folder: Path, step: int) -> Path:
        """As JSON with every answer; published whole."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.set_name}-step{step:08d}.json"
        write_atomically(path, (json.dumps(self.plain(), ensure_ascii=False, indent=1) + "\n").encode())
        return path


def make_report(
    name: str,
    suite: Suite,
    step: int,
    answers: Sequence[Answered],
    skipped: Sequence[str],
    loss: float | None = None,
    num_targets: int = 0,
) -> Report:
    """Grade answers and put them into tables."""
    counts = suite.count(answers)
    groups = {"group": lambda prompt: prompt.grading.group, **suite.TABLES}
    tables = {}
    for title, group in {**BASIC, **groups}.items():
        names = [group(each.prompt) for each in answers]
        tables[title] = [
            row(suite, one, [each for each, its in zip(counts, names, strict=True) if its == one])
            for one in sorted({*names} - {""}, key=_in_order)
        ]
    examples = [example(each, found) for each, found in zip(answers, counts, strict=True)]
    return Report(name, suite, step, tables, row(suite, "all", counts), examples, skipped, loss, num_targets)


def row(suite: Suite, group: str, counts: Sequence[Counts]) -> Row:
    """Sums and metrics of a group of samples."""
    sums = {name: float(sum(each[name] for each in counts)) for name in (counts[0] if counts else ())}
    if not counts:
        return Row(group, 0, {}, {})
    arrays = {name: np.array(value) for name, value in {**sums, "num_samples": len(counts)}.items()}
    return Row(group, len(counts), sums, {name: float(value) for name, value in suite.values(arrays).items()})


def example(each: Answered, counts: Counts) -> dict[str, Any]:
    """One sample, for JSON."""
    prompt = each.prompt
    grading = prompt.grading
    reference = (
        grading.choices[grading.correct] if grading.choices else prompt.reference or "".join(grading.answers[:1])
    )
    found: dict[str, Any] = {"key": prompt.key, "language": prompt.language, "source": prompt.source}
    found |= {"reference": reference, "answer": each.text}
    if prompt.minutes:
        found["minutes"] = round(prompt.minutes, 4)
    if each.logprobs:
        found["logprobs"] = [round(value, 6) for value in each.logprobs]
    return found | ({"grading": grading.plain()} if grading.plain() else {}) | {"counts": _whole(counts)}


def shown_as(name: str, value: float | None) -> str:
    """A metric for people: rates in per cent, all else as numbers."""
    if value is None:
        return "-"
    plain = name in ("loss", "perplexity", "loss_per_byte", "choice_loss", "cider")
    return f"{value:.4f}" if plain else f"{value:.1%}"


def _cells(texts: Sequence[str], widths: Sequence[int]) -> str:
    return "".join(f"{text:>{width}}" for text, width in zip(texts, widths, strict=True))


def _whole(counts: Counts) -> dict[str, float]:
    """Whole numbers without a point."""
    return {name: int(value) if float(value).is_integer() else value for name, value in counts.items()}


def _in_order(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts numbers within names by value: 5-15 before 15-40."""
    parts = re.findall(r"\d+|\D+", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]
