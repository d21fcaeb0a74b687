"""What a run is and where it stands: headline numbers, facts, the parts of its model.

Run --recipe, newest manifest, sums of its metrics--> tiles, a list of facts, a table of parts --> HTML
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from data.report import hours
from launch.report_html import badge, facts, figure, percent, short, table, text, tiles
from launch.report_metrics import number_of
from launch.report_read import Run, Stage, dictionary

PARTS = {  # of a model: how the released names of its parameters begin, the first match counts
    "audio encoder": "thinker.audio_tower.",
    "vision encoder": "thinker.visual.",
    "Thinker": "thinker.",
    "code predictor": "talker.code_predictor.",
    "Talker": "talker.",
    "waveform decoder": "code2wav.",
    "other": "",
}
SIZES = {  # part -> where its sizes are in a recipe
    "audio encoder": ("audio",),
    "vision encoder": ("vision",),
    "Thinker": ("text",),
    "code predictor": ("talker", "code_predictor"),
    "Talker": ("talker", "text"),
    "waveform decoder": ("code2wav",),
}
RATES = {"wer", "cer", "accuracy", "rate", "share", "right"}  # words in the names of metrics that are shares
MAX_SHARDS = 6  # patterns that are listed


def overview(runs: Sequence[Run]) -> str:
    """Of one run its tiles and facts; of several a row of headline numbers each, then the facts."""
    if len(runs) == 1:
        return tiles([each for each in _numbers(runs[0]) if each[1]]) + _about(runs[0])
    numbers = [{name: value for name, value, _ in _numbers(run) if value} for run in runs]
    names = list(dict.fromkeys(name for each in numbers for name in each))
    rows = [
        [text(run.name), badge(run.state), *(each.get(name, "-") for name in names)]
        for run, each in zip(runs, numbers, strict=True)
    ]
    about = "".join(f"<h3>{text(run.name)}</h3>{_about(run)}" for run in runs)
    return table(["run", "state", *names], rows, words=2) + about


def is_share(metric: str) -> bool:
    """Whether a metric is a share or a rate, by its name."""
    return bool(RATES & set(metric.replace(".", "_").lower().split("_")))


def metric_name(metric: str) -> str:
    """For people."""
    return metric.upper() if metric in ("wer", "cer") else metric.replace("_", " ")


def _now(run: Run) -> Stage:
    """The stage that runs, or ran last."""
    return max(run.stages, key=lambda stage: (stage.state == "running", stage.written))


def _numbers(run: Run) -> Iterator[tuple[str, str, str]]:
    """Names, HTML values ("" for none) and remarks of the numbers that tell most."""
    if not run.stages:
        return
    stage, metrics = _now(run), [stage.metrics for stage in run.stages]
    now, graph = stage.metrics, run.lineage.get("stages", {})
    if graph:
        yield "stages", f"{sum(each['state'] == 'done' for each in graph.values())}", f"done, of {len(graph)}"
    of = [f"of {stage.total:,}, {now.step / stage.total:.0%}"] if stage.total else []
    yield "step", f"{now.step:,}", text(", ".join([*of, *[stage.name] * bool(graph)]))
    loss = number_of(now.last.get("mean_loss", now.last.get("loss")))
    yield "training loss", figure(loss) if loss is not None else "", "nats a target, last line"
    for metric, sets in _evaluations(run).items():
        for name, (value, best) in list(sets.items())[:2]:
            form = percent if is_share(metric) else figure
            beside = "last and best" if best == value else f"last; best {form(best)}"
            yield text(f"{metric_name(metric)}, {name}"), form(value), beside
    tokens, seconds = sum(each.tokens for each in metrics), sum(each.seconds for each in metrics)
    yield "tokens", short(tokens) if tokens else "", "trained on"
    yield "throughput", short(tokens / seconds) if seconds else "", "tokens a second"
    left = (stage.total - now.step) * (number_of(now.last.get("seconds_per_step")) or 0)
    remains = f", {hours(left)} left" if stage.state == "running" and 0 < left < math.inf else ""
    yield "time", hours(seconds) if seconds else "", "in training steps" + remains
    work = sum(each.work_seconds for each in metrics)
    yield "MFU", percent(sum(each.work for each in metrics) / work) if work else "", "mean"
    peak = max(each.peak_gb for each in metrics)
    yield "memory", f"{peak:.3g} GB" if peak else "", "highest of ranks"
    skipped = number_of(now.last.get("skipped"))
    yield "samples left out", figure(skipped) if skipped else "", "could not be read"


def _evaluations(run: Run) -> dict[str, dict[str, tuple[float, float]]]:
    """Metric -> set -> last value and best: the highest of accuracies, the lowest of errors. At most two metrics."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for stage in run.stages:
        for (group, name), series in stage.metrics.series.items():
            values = [value for value in series.y if not math.isnan(value)]
            if group.startswith("eval.") and values:
                metric = group.removeprefix("eval.")
                best = max(values) if "accuracy" in metric or metric.startswith("right") else min(values)
                found.setdefault(metric, {})[name] = (values[-1], best)
    usual = [metric for metric in ("wer", "accuracy") if metric in found]
    return {metric: found[metric] for metric in (usual or list(found))[:2]}


def _about(run: Run) -> str:
    if not run.stages:
        return "<p class=note>No stage has begun.</p>"
    stage = _now(run)
    recipe, versions = stage.recipe, dictionary(stage.manifest.get("versions"))
    shards = dictionary(recipe.get("data")).get("shards")
    names = [f"<code>{text(name)}</code>" for name in (shards if isinstance(shards, list) else [shards] * bool(shards))]
    more = [f"and {len(names) - MAX_SHARDS} more"] * (len(names) > MAX_SHARDS)
    commit, dirty, changed = str(versions.get("commit", "")).partition("-")
    told = [
        ("recipe", text(recipe.get("name", ""))),
        ("folder", f"<code>{text(run.folder)}</code>"),
        ("state", badge(run.state)),
        ("last start", moment(stage.began)),
        ("last line", moment(stage.written)),
        ("engine", text(_engine(stage))),
        ("batch", text(_batch(recipe))),
        ("data", "<br>".join([*names[:MAX_SHARDS], *more])),
        ("began from", f"<code>{text(recipe['init'])}</code>" if recipe.get("init") else ""),
        ("seed", figure(recipe["seed"]) if "seed" in recipe else ""),
        ("commit", f"<code>{text(commit[:12] + dirty + changed)}</code>" if commit else ""),
        ("versions", text(", ".join(f"{key} {versions[key]}" for key in versions if key != "commit"))),
    ]
    return facts(told) + _model(stage)


def _engine(stage: Stage) -> str:
    """Name, precision, processes, degrees above 1."""
    saved = dictionary(dictionary(stage.manifest.get("info")).get("engine"))
    engine = dictionary(stage.recipe.get("engine"))
    world = saved.get("world")
    ranks = [f"{figure(world)} process{'es' * (world != 1)}"] if world else []
    degrees = [f"{key}={engine[key]}" for key in ("tp", "pp", "cp", "sp", "ep") if engine.get(key, 1) not in (0, 1)]
    return ", ".join([*(str(engine[key]) for key in ("name", "precision") if engine.get(key)), *ranks, *degrees])


def _batch(recipe: Mapping[str, Any]) -> str:
    data = dictionary(recipe.get("data"))
    length, count = data.get("sequence_length"), data.get("sequences_per_step")
    return f"{figure(count)} sequence{'s' * (count != 1)} of {figure(length)} tokens a step" if length and count else ""


def moment(at: float) -> str:
    """Unix seconds as local time; "" for 0."""
    return datetime.fromtimestamp(at).astimezone().strftime("%Y-%m-%d %H:%M %Z") if at else ""


def _model(stage: Stage) -> str:
    """Parts of the model: sizes by the recipe, parameters by the newest checkpoint."""
    counts, routed = _counts(stage.manifest)
    rows = []
    for part in PARTS:
        sizes: Any = dictionary(stage.recipe.get("model")) if part in SIZES else {}
        for key in SIZES.get(part, ()):
            sizes = dictionary(sizes.get(key))
        if not sizes and not counts[part]:
            continue
        per_token = f", {figure(sizes.get('num_experts_per_tok'))} a token"
        rows.append([
            text(part),
            *[short(count) if count else "" for count in (counts[part], routed[part])] * bool(counts),
            _first(sizes, "num_hidden_layers", "encoder_layers", "depth", "num_layers"),
            _first(sizes, "hidden_size", "d_model"),
            figure(sizes["num_experts"]) + per_token if sizes.get("num_experts") else "",
        ])  # fmt: skip
    if not rows:
        return ""
    if counts:
        rows.append(["<b>all</b>", f"<b>{short(counts.total())}</b>", short(routed.total()), "", "", ""])
    numbers = ["parameters", "of them experts'"] * bool(counts)
    return table(["part of the model", *numbers, "layers", "width", "experts"], rows)


def _first(sizes: Mapping[str, Any], *keys: str) -> str:
    return next((figure(sizes[key]) for key in keys if isinstance(sizes.get(key), int)), "")


def _counts(manifest: Mapping[str, Any]) -> tuple[Counter[str], Counter[str]]:
    """Parameters of each part, and those of its routed experts."""
    counts, routed = Counter(), Counter()
    for name, entry in dictionary(manifest.get("tensors")).items():
        shape = dictionary(entry).get("shape")
        if isinstance(shape, list) and all(isinstance(size, int) for size in shape):
            part = next(part for part, start in PARTS.items() if name.startswith(start))
            counts[part] += math.prod(shape)
            routed[part] += math.prod(shape) * (".experts." in name)
    return counts, routed
