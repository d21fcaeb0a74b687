"""Results as pages that need nothing but themselves: tables, and answers beside their references, the worst first.

    Report -----------> page: metrics, tables, samples
    comparison (JSON) --> page: differences, intervals

What samples and models say is text, never markup: all of it is escaped, and the page's own policy forbids scripts and
everything remote. Cost: the page; MOST samples are shown, JSON has them all.
"""

from __future__ import annotations

import hashlib
import json
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from train.evaluation_report import SHOWN, Report, Row, shown_as

MOST = 500  # samples on a page
LETTERS = 2000  # of one text
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:76rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2.2rem}.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:13px}td,th{padding:.15rem .6rem;text-align:right;vertical-align:top}
td.text,th.text{text-align:left;white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate;
min-width:6rem;max-width:26rem}
th{border-bottom:1px solid #888}tr+tr td{border-top:1px solid #eee}tr.all td{border-top:1px solid #888}
.better{color:#17692b}.worse{color:#a33}.about{color:#666;font-size:13px}
"""
_DIGEST = b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_POLICY = f"default-src 'none'; style-src 'sha256-{_DIGEST}'; base-uri 'none'; form-action 'none'"


def page(report: Report, model: str) -> bytes:
    """The page of a result, UTF-8."""
    body = [f"<p class=about>{_text(report.suite.ABOUT)}; {_text(model)}, step {report.step}"]
    for title, rows in report.tables.items():
        shown = [*rows, report.all] if title == "language" else rows
        if shown and (title == "language" or len(rows) > 1):
            body.append(f"<h2>{_text(title)}</h2>{_rows(report, shown)}")
    if report.loss is not None:
        body.append(f"<p>documents: {report.loss:.4f} nats a token, over {report.num_targets:,} tokens")
    body.append(_samples(report))
    if report.skipped:
        body.append(f"<h2>{len(report.skipped)} samples could not be used</h2>")
        body += [f"<p class=worse>{_text(line)}" for line in report.skipped[:MOST]]
    return _page(f"{report.set_name}: {report.suite.NAME}", body)


def worst_first(report: Report) -> list[Mapping[str, Any]]:
    """Samples by the suite's first metric."""
    if not report.examples:
        return []
    names = [*report.examples[0]["counts"]]
    sums = {name: np.array([float(each["counts"][name]) for each in report.examples]) for name in names}
    name, higher = next(iter(report.suite.METRICS.items()))
    values_N = report.suite.values({**sums, "num_samples": np.ones(len(report.examples))})[name]
    order = np.argsort(values_N if higher else -values_N, kind="stable")
    return [{**report.examples[place], "value": shown_as(name, float(values_N[place]))} for place in order]


def comparison_page(body: Mapping[str, Any]) -> bytes:
    """The page of a comparison, UTF-8; `body` as launch/compare.py writes it."""
    parts = [
        f"<p class=about>A: {_text(body['a'])}<br>B: {_text(body['b'])}<br>paired bootstrap, {body['resamples']:,} "
        f"resamples, seed {body['seed']}, 95 % percentile intervals"
    ]
    for found in body["sets"]:
        parts.append(f"<h2>{_text(found['set'])} ({_text(found['suite'])}), {found['num_samples']:,} samples</h2>")
        rows = []
        for each in found["metrics"]:
            a, b, less, low, high = (
                shown_as(each["metric"], each[key]) for key in ("a", "b", "difference", "low", "high")
            )
            kind = each["verdict"] if each["verdict"] in ("better", "worse") else "same"
            rows.append(
                f"<tr><td class=text>{_text(each['metric'])}<td>{a}<td>{b}<td>{less}<td>{low} to {high}"
                f"<td>{each['p']:.4f}<td class='text {kind}'>{_text(each['verdict'])}"
            )
        heads = "<th class=text>metric<th>A<th>B<th>B - A<th>95 % interval<th>p<th class=text>B is"
        parts.append(f"<div class=wide><table><tr>{heads}{''.join(rows)}</table></div>")
    return _page("comparison", parts)


def _rows(report: Report, rows: Sequence[Row]) -> str:
    names = [*report.suite.METRICS]
    counts = [name for name in report.all.counts if name not in names][:SHOWN]
    heads = "".join(f"<th>{_text(name)}" for name in (*names, "samples", *counts))
    lines = []
    for row in rows:
        cells = [shown_as(name, row.values.get(name)) for name in names] + [f"{row.num_samples:,}"]
        cells += [f"{row.counts[name]:,.6g}" for name in counts]
        kind = " class=all" if row is report.all else ""
        lines.append(f"<tr{kind}><td class=text>{_text(row.group)}" + "".join(f"<td>{cell}" for cell in cells))
    return f"<div class=wide><table><tr><th class=text>group{heads}{''.join(lines)}</table></div>"


def _samples(report: Report) -> str:
    found = worst_first(report)
    metric = next(iter(report.suite.METRICS))
    heads = f"<th class=text>sample<th class=text>reference<th class=text>answer<th>{_text(metric)}"
    lines = [
        f"<tr><td class=text>{_text(each['key'])} <span class=about>{_text(each['language'])}</span>"
        f"<td class=text>{_text(_references(each))}<td class=text>{_text(each['answer'])}<td>{each['value']}"
        for each in found[:MOST]
    ]
    more = f"<p class=about>and {len(found) - MOST:,} more in the JSON" if len(found) > MOST else ""
    title = f"{len(found):,} samples, the worst first"
    return f"<h2>{title}</h2><div class=wide><table><tr>{heads}{''.join(lines)}</table></div>{more}"


def _references(each: Mapping[str, Any]) -> str:
    grading = each.get("grading", {})
    several = [] if "choices" in grading else grading.get("answers", [])
    lines = [*several] or [each["reference"]]
    if choices := grading.get("choices"):
        lines += ["", "of " + json.dumps(choices, ensure_ascii=False)]
    return "\n".join(dict.fromkeys(lines))


def _page(title: str, body: Iterable[str]) -> bytes:
    head = (
        f'<!doctype html><html lang=en><head><meta charset=utf-8><meta http-equiv="Content-Security-Policy" '
        f'content="{_POLICY}"><meta name=referrer content=no-referrer><meta name=viewport '
        f'content="width=device-width"><title>{_text(title)}</title><style>{_STYLE}</style></head>'
    )
    return f"{head}<body><h1>{_text(title)}</h1>{''.join(body)}</body></html>\n".encode("utf-8", "replace")


def _text(value: object) -> str:
    text = str(value)
    return escape(text if len(text) <= LETTERS else f"{text[:LETTERS]}...")
