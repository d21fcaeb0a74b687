"""The page: sections in order, their charts, the data, the style and the script, in one file that asks for nothing.

    runs --Charts, sections--> HTML with empty figures + JSON --report.js in the browser--> curves, heatmaps

The policy allows the page's own style and script by their digests, pictures and sounds from data: addresses, and
nothing else: no request leaves it. Data lies in a JSON block whose "<" are escaped, so that none can end it.
"""

from __future__ import annotations

import hashlib
import json
from base64 import b64encode
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from data.report import human_bytes
from launch import report_samples as samples
from launch import report_sections as sections
from launch.report_charts import Charts, Spec, marks
from launch.report_html import badge, text
from launch.report_lineage import lineage
from launch.report_metrics import FRAMES, POINTS
from launch.report_overview import is_share, metric_name, overview
from launch.report_read import Run

HEAT_BYTES = 1_500_000  # of all heatmaps, as base64
BOOK = "code "  # how the names of codebooks' terms begin
LOSS = (
    Spec("", "Training loss", "nats a target", ("mean_loss",), log=True),
    Spec("modalities.loss", "Loss by media", "nats a target", log=True, note="By what the documents hold."),
    Spec("terms", "Loss of each term", "nats a target", lambda name: not name.startswith(BOOK), log=True),
    Spec("terms", "Loss of each codebook", "nats a code", lambda name: name.startswith(BOOK), ordered=True, log=True),
    Spec("", "Balance loss of the routers", "1 is balanced", ("balance_loss",)),
)
OPTIMIZER = (
    Spec("lrs", "Learning rates", "AdamW's step size", exact=True),
    Spec("grad_norms", "Gradient norms", "L2, before clipping", log=True),
    Spec("", "Gradient norm", "L2 of all parts, before clipping", ("grad_norm",), log=True),
)
ONE_RATE = Spec("", "Learning rate", "AdamW's step size", ("lr",), exact=True)
DATA = (
    Spec("mixture", "Mixture", "share of tokens", percent=True, note="Dashed: what was asked.", exact=True),
    Spec("modalities.targets", "Targets by media", "share of targets", area=True, share=True, percent=True),
    Spec("", "Packing waste", "share of positions without a token", ("fill",), percent=True, change=lambda v: 1 - v),
    Spec("", "Waiting for data", "share of the time", ("wait_share",), percent=True),
    Spec(
        "", "Samples left out", "samples since the beginning", ("skipped",), note="They could not be read.", exact=True
    ),
)
SPEED = (
    Spec("times", "Time of a step", "seconds", area=True),
    Spec("", "Throughput", "tokens a second", ("tokens_per_second",)),
    Spec("", "MFU", "share of the peak", ("mfu",), percent=True),
    Spec("", "Seconds a step", "seconds", ("seconds_per_step",)),
    Spec("", "Memory", "GB, highest of ranks", ("memory_gb",)),
    Spec("imbalance", "Rank imbalance", "slowest over mean", ("work", "seconds"), note="1 is even."),
)
UNITS = {  # of metrics of evaluations
    "wer": "errors a reference word",
    "cer": "errors a reference character",
    "accuracy": "share of right answers",
    "loss": "nats a token",
    "perplexity": "of a token",
}
EXPERTS = (Spec("expert_load", "Busiest expert", "times the mean, worst layer", log=True),)
DRAWN = {"step", "loss", "tokens", "targets"} | {
    name
    for spec in (*LOSS, *OPTIMIZER, ONE_RATE, *DATA, *SPEED)
    if isinstance(spec.names, tuple)
    for name in spec.names
}


def page(runs: Sequence[Run], stamp: datetime) -> tuple[bytes, list[str]]:
    """The page as UTF-8, and notes on what could not be read."""
    charts, notes, budget = Charts(runs), [note for run in runs for note in run.notes], samples.Budget()
    last, heard, said = samples.of_all(runs, notes, budget)
    heat = heatmaps(runs)
    groups = dict.fromkeys(group for run in runs for stage in run.stages for group, _ in stage.metrics.series)
    rates = OPTIMIZER if "lrs" in groups else (ONE_RATE, *OPTIMIZER)
    metrics = [_of_metric(group.removeprefix("eval.")) for group in groups if group.startswith("eval.")]
    other = Spec("", "Other numbers", "", lambda name: name not in DRAWN)
    plain = dict.fromkeys(
        n for run in runs for stage in run.stages for g, n in stage.metrics.series if not g and other.takes(n)
    )
    others = [Spec("", name.replace("_", " "), "", (name,)) for name in plain]
    found = [
        ("overview", "Overview", overview(runs)),
        ("differences", "Differences", sections.differences(runs)),
        ("lineage", "Lineage", lineage(runs)),
        ("events", "Events", sections.events(runs)),
        ("loss", "Loss", _figures(charts, LOSS)),
        ("optimizer", "Optimizer", _figures(charts, rates)),
        ("evaluation", "Evaluation", _figures(charts, metrics) + last),
        ("speech", "Speech", heard),
        ("answers", "Answers", said),
        ("experts", "Experts", _figures(charts, EXPERTS) + _heats(heat)),
        ("data", "Data", _figures(charts, DATA) + sections.mixture(runs)),
        ("speed", "Speed", _figures(charts, SPEED) + sections.slowest(runs)),
        ("other", "Other numbers", _figures(charts, others)),
        ("checkpoints", "Checkpoints", sections.checkpoints(runs)),
        ("recipes", "Recipes", sections.recipes(runs)),
        ("about", "About", _about(charts, budget, notes, runs)),
    ]
    end = max((stage.offset + stage.metrics.step for run in runs for stage in run.stages), default=0)
    data = {"runs": marks(runs), "last": end, "charts": charts.data, "heat": heat}
    return _document(runs, stamp, [each for each in found if each[2]], data), notes


def _of_metric(metric: str) -> Spec:
    name, share = metric_name(metric), is_share(metric)
    title = {"WER": "Word error rate", "CER": "Character error rate"}.get(name, name[:1].upper() + name[1:])
    return Spec(f"eval.{metric}", title, UNITS.get(metric, ""), percent=share, dots=True)


def _figures(charts: Charts, specs: Sequence[Spec]) -> str:
    places = charts.draw(specs)
    shown = "".join(f'<figure class=chart data-chart="{place}"></figure>' for place in places)
    return f"<div class=charts>{shown}</div>" if shown else ""


def heatmaps(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Loads of experts for the page: a heatmap of each decoder of a run, stages of the same shape together."""
    frames = [
        (run.name, stage.offset, decoder, found)
        for run in runs
        for stage in run.stages
        for decoder, found in stage.metrics.experts.items()
    ]
    merged: dict[tuple[str, str, tuple[int, int]], list[Any]] = {}
    for run_name, offset, decoder, found in frames:
        (layers, experts), last = found.chosen(1)
        size = layers * experts * 4 / 3 * len(last[-1][1]) if last else 0
        if size:
            most = max(2, min(FRAMES, int(HEAT_BYTES / len(frames) / size)))
            steps = merged.setdefault((run_name, decoder, (layers, experts)), [])
            steps += [(step + offset, loads) for step, loads in found.chosen(most)[1]]
    maps = []
    for (run_name, decoder, (layers, experts)), steps in merged.items():
        names = list(dict.fromkeys(name for _, loads in steps for name in loads))
        shown = [
            {"step": step, "loads": {name: _base64(cell) for name, cell in loads.items()}} for step, loads in steps
        ]
        sizes = {"layers": layers, "experts": experts}
        maps.append({"run": run_name, "decoder": decoder, **sizes, "names": names, "frames": shown})
    return maps


def _heats(heat: Sequence[Any]) -> str:
    return "".join(f'<figure class=heat data-heat="{place}"></figure>' for place in range(len(heat)))


def _about(charts: Charts, budget: samples.Budget, notes: Sequence[str], runs: Sequence[Run]) -> str:
    lines = sum(stage.metrics.num_lines for run in runs for stage in run.stages)
    said = [f"{lines:,} lines of metrics were read."]
    if charts.num_thinned:
        said.append(
            f"{charts.num_thinned} curves are thinned to about {min(charts.most, POINTS):,} points: of every stretch "
            "the lowest and the highest value are kept, so no spike is lost."
        )
    if budget.num_embedded or budget.num_left_out:
        one, most = human_bytes(samples.MEDIUM_BYTES), human_bytes(samples.MEDIA_BYTES)
        named = f"; {budget.num_left_out} beyond that are only named" if budget.num_left_out else ""
        said.append(f"Sounds and pictures: at most {one} of one file and {most} of all are in the page{named}.")
    items = "".join(f"<li>{text(note)}</li>" for note in notes)
    return f"<p>{' '.join(said)}</p>" + (f"<p>What could not be read:</p><ul class=notes>{items}</ul>" if notes else "")


def _document(runs: Sequence[Run], stamp: datetime, found: Sequence[tuple[str, str, str]], data: Any) -> bytes:
    here = Path(__file__)
    style, script = (here.with_name(f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; img-src data:; "
        "media-src data:; base-uri 'none'; form-action 'none'"
    )
    title = text(", ".join(run.name for run in runs))
    state = badge(runs[0].state) if len(runs) == 1 else ""
    block = json.dumps(data, allow_nan=False, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8>",
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><meta name=referrer content=no-referrer>',
        '<meta name=viewport content="width=device-width, initial-scale=1"><link rel=icon href="data:,">',
        f"<title>{title} - Omniloom</title><style>{style}</style></head><body><header><h1>{title} {state}</h1>",
        f'<p>Omniloom, report of {stamp:%Y-%m-%d %H:%M %Z}</p></header><nav aria-label="Sections"><div class=links>',
        *(f'<a href="#{key}">{name}</a>' for key, name, _ in found),
        "</div><label id=smoothing hidden title='moving average of the training curves'>smooth "
        "<input type=range min=0 max=0.98 step=0.02 value=0></label></nav><main>",
        "<noscript><p>Curves and heatmaps are drawn by a script that is part of this page.</p></noscript>",
        *(f"<section id={key}><h2>{name}</h2>{html}</section>" for key, name, html in found),
        f"</main><script type=application/json id=page-data>{block}</script><script>{script}</script></body></html>\n",
    ]
    return "".join(parts).encode("utf-8", "replace")


def _base64(payload: bytes) -> str:
    return b64encode(payload).decode()


def _digest(source: str) -> str:
    return "sha256-" + _base64(hashlib.sha256(source.encode()).digest())
