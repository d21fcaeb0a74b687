"""Sections of the page that are tables: differences of recipes, events, mixture, ranks, checkpoints, recipes.

Run --> HTML, "" where no run has anything of it. Columns for the run and the stage come where there are several.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from data.report import human_bytes
from launch.report_html import bar, percent, table, text
from launch.report_overview import moment
from launch.report_read import Run, Stage

MAX_LISTED = 300  # events
OWN = ("name", "run", "resume")  # settings in which any two runs differ


def _stages(runs: Sequence[Run]) -> Iterator[tuple[Stage, list[str]]]:
    """Every stage, and the cells that name it in a table."""
    staged = any(len(run.stages) > 1 for run in runs)
    for run in runs:
        for stage in run.stages:
            yield stage, [text(run.name)] * (len(runs) > 1) + [text(stage.name)] * staged


def _heads(runs: Sequence[Run]) -> list[str]:
    return ["run"] * (len(runs) > 1) + ["stage"] * any(len(run.stages) > 1 for run in runs)


def differences(runs: Sequence[Run]) -> str:
    """The settings in which the runs' recipes differ."""
    if len(runs) < 2:
        return ""
    settings = [dict(_settings(run)) for run in runs]
    keys = list(dict.fromkeys(key for each in settings for key in each))
    different = [key for key in keys if len({each.get(key) for each in settings}) > 1]
    if not different:
        return "<p>The recipes are the same.</p>"
    rows = [[_code(key), *(_code(each.get(key, "-")) for each in settings)] for key in different]
    note = f"<p class=note>{len(keys) - len(different):,} other settings are the same.</p>"
    return table(["setting", *(run.name for run in runs)], rows, words=1 + len(runs)) + note


def _code(value: str) -> str:
    return f"<code>{text(value)}</code>"


def _settings(run: Run) -> Iterator[tuple[str, str]]:
    for stage in run.stages:
        prefix = f"{stage.name}: " if run.lineage else ""
        yield from ((prefix + key, value) for key, value in _leaves(stage.recipe) if key not in OWN)


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value, ensure_ascii=False, default=str).strip('"')


def events(runs: Sequence[Run]) -> str:
    """What happened, newest first."""
    rows, kinds, count = [], Counter(), 0
    for stage, where in _stages(runs):
        count += stage.metrics.num_events
        for event in stage.metrics.events:
            kind = str(event["event"]).replace("_", " ")
            kinds[kind] += 1
            cells = [
                *where,
                f'<span class="kind">{text(kind)}</span>',
                text(event.get("text", "")),
                f"{event['step']:,}",
            ]
            rows.append((stage.offset + event["step"], cells))
    if not rows:
        return ""
    rows.sort(key=lambda row: -row[0])
    heads = [*_heads(runs), "kind", "what", "step"]
    summary = ", ".join(f"{text(kind)} {number:,}" for kind, number in kinds.most_common())
    more = f" The newest {MAX_LISTED} of {count:,} are listed." if count > MAX_LISTED else ""
    shown = table(heads, [cells for _, cells in rows[:MAX_LISTED]], words=len(heads) - 1)
    return f"<p>{summary}.{more} They are marked on the curves.</p><div class=long>{shown}</div>"


def mixture(runs: Sequence[Run]) -> str:
    """The last shares of tokens: asked and realised."""
    out = ""
    for run in runs:
        metrics = next((stage.metrics for stage in reversed(run.stages) if stage.metrics.mixture), None)
        if metrics is None:
            continue
        got, asked, rows = metrics.mixture, metrics.asked, []
        for name in sorted({**asked, **got}, key=lambda name: -got.get(name, 0.0)):
            share, wish = got.get(name, 0.0), asked.get(name)
            wanted = [percent(wish), "-" if wish is None else f"{(share - wish) * 100:+.2f}"] if asked else []
            rows.append([text(name), bar(share, wish), percent(share), *wanted])
        heads = ["source", "", "realised", *["asked", "points"] * bool(asked)]
        title = "Last mixture, shares of tokens" + f": {run.name}" * (len(runs) > 1)
        out += f"<div class=long>{table(heads, rows, words=2, name=title)}</div>"
    return out


def slowest(runs: Sequence[Run]) -> str:
    """Which ranks were the slowest most often."""
    out = ""
    for run in runs:
        counts = sum((stage.metrics.slowest for stage in run.stages), Counter())
        if len(counts) > 1:
            shares = [(rank, count / counts.total()) for rank, count in counts.most_common(8)]
            rows = [[f"rank {rank}", bar(share), percent(share)] for rank, share in shares]
            title = "Slowest rank" + f": {run.name}" * (len(runs) > 1)
            out += table(["", "", "of the lines"], rows, words=2, name=title)
    return out


def checkpoints(runs: Sequence[Run]) -> str:
    """Published checkpoints that are on disk."""
    rows = []
    for stage, where in _stages(runs):
        for each in stage.checkpoints:
            name = " ".join([_code(each.name), *(f'<span class="kind">{kind}</span>' for kind in each.kinds)])
            rows.append([*where, name, f"{each.step:,}", human_bytes(each.size), moment(each.at)])
    heads = [*_heads(runs), "checkpoint", "step", "size", "written"]
    return table(heads, rows, words=len(heads) - 3) if rows else ""


def recipes(runs: Sequence[Run]) -> str:
    """The resolved recipes as they are written, folded."""
    out = ""
    for run in runs:
        for stage in run.stages:
            if stage.recipe_text:
                name = " / ".join(dict.fromkeys((run.name, stage.name)))
                out += f"<details><summary>{text(name)}</summary><pre>{text(stage.recipe_text)}</pre></details>"
    return out
