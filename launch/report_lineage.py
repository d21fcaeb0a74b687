"""The stages of a curriculum as a small graph, drawn from left to right, and as a table.

RUN/lineage.json --rank: the longest way from a first stage--> columns --> SVG: a box a stage, a line a predecessor
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from data.report import hours
from launch.report_html import badge, figure, short, table, text
from launch.report_metrics import number_of
from launch.report_read import Run

WIDE, TALL, GAP_X, GAP_Y, EDGE = 172, 58, 44, 18, 4  # pixels: a box, between boxes, around all
LETTERS = 21  # of a name in a box
ARROW = (
    '<defs><marker id=arrow viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" orient=auto>'
    '<path d="M0 0 8 4 0 8z"/></marker></defs>'
)


def lineage(runs: Sequence[Run]) -> str:
    """Graph and table of every curriculum among the runs."""
    out = ""
    for run in runs:
        if stages := run.lineage.get("stages"):
            out += f"<h3>{text(run.name)}</h3>" * (len(runs) > 1) + graph(stages) + _table(stages)
    return out


def graph(stages: Mapping[str, Mapping[str, Any]]) -> str:
    """Boxes and lines as SVG; `stages` has predecessors first."""
    column: dict[str, int] = {}
    for name, entry in stages.items():
        column[name] = max((column[before] + 1 for before in entry["after"] if before in column), default=0)
    rows: dict[int, int] = {}
    place = {}
    for name in stages:
        row = rows.get(column[name], 0)
        rows[column[name]] = row + 1
        place[name] = (EDGE + column[name] * (WIDE + GAP_X), EDGE + row * (TALL + GAP_Y))
    lines, boxes = [], []
    for name, entry in stages.items():
        x, y = place[name]
        for before in entry["after"]:
            if before in column and column[before] < column[name]:
                from_x, from_y = place[before][0] + WIDE, place[before][1] + TALL / 2
                bend, to_y = GAP_X / 2, y + TALL / 2
                curve = f"C{from_x + bend} {from_y} {x - bend} {to_y} {x - 3} {to_y}"
                lines.append(f'<path class=edge d="M{from_x} {from_y}{curve}"/>')
        shown = name if len(name) <= LETTERS else name[: LETTERS - 1] + "\N{HORIZONTAL ELLIPSIS}"
        boxes.append(
            f'<g class="stage {text(entry["state"])}" transform="translate({x} {y})">'
            f"<title>{text(name)}: {text(entry['state'])}</title>"
            f'<rect width="{WIDE}" height="{TALL}" rx="8"/><rect class=side width="5" height="{TALL}" rx="2.5"/>'
            f'<text x="15" y="23" class=name>{text(shown)}</text><text x="15" y="43">{text(_beside(entry))}</text></g>'
        )
    width = 2 * EDGE + max(column.values()) * (WIDE + GAP_X) + WIDE
    height = 2 * EDGE + max(rows.values()) * (TALL + GAP_Y) - GAP_Y
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    parts = f"{ARROW}{''.join(lines)}{''.join(boxes)}"
    label = "Stages and what they follow"
    return f'<div class=wide><svg class=lineage {size} role=img aria-label="{label}">{parts}</svg></div>'


def _beside(entry: Mapping[str, Any]) -> str:
    step, tokens = number_of(entry.get("step")), number_of(entry.get("tokens"))
    reached = [f"{int(step):,} steps" if step < 10_000 else f"{short(step)} steps"] if step else []
    return ", ".join([entry["state"], *reached] if not tokens else [*reached, f"{short(tokens)} tokens"])


def _table(stages: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, entry in stages.items():
        init = entry.get("init")
        init = init if isinstance(init, list) else []
        engine = " x ".join(str(entry[key]) for key in ("engine", "world") if entry.get(key))
        tokens = number_of(entry.get("tokens"))
        rows.append([
            text(name), badge(entry["state"]), text(", ".join(entry["after"])),
            "<br>".join(f"<code>{text(source)}</code>" for source in init), text(engine), _minute(entry.get("began")),
            _took(entry.get("began"), entry.get("ended")), figure(entry.get("step")), short(tokens) if tokens else "-",
        ])  # fmt: skip
    return table(
        ["stage", "state", "after", "weights from", "engine", "began", "took", "steps", "tokens"], rows, words=5
    )


def _moment(value: object) -> datetime | None:
    try:
        return datetime.fromisoformat(value) if isinstance(value, str) else None
    except ValueError:
        return None


def _minute(value: object) -> str:
    at = _moment(value)
    return at.strftime("%Y-%m-%d %H:%M") if at else "-"


def _took(began: object, ended: object) -> str:
    first, last = _moment(began), _moment(ended)
    try:
        return hours((last - first).total_seconds()) if first and last else "-"
    except TypeError:  # one of them names its zone, the other none
        return "-"
