"""`python -m launch.evaluate compare A B`: whether B is better than A, on the same samples.

    A, B: RUN/eval/SET-stepN.json, the newest of each set, or two results --samples matched by key-->
      paired bootstrap of each metric (launch/bootstrap.py) --> table, JSON and a page

Sets that only one of two runs has are named; sets of the same name must have the same samples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.files import write_atomically
from launch.arguments import parse, whole
from launch.bootstrap import Difference, paired
from launch.evaluation_page import comparison_page
from train.errors import RecipeError
from train.evaluation_report import shown_as
from train.suites.registry import SUITES

MAX_BYTES = 1 << 30  # of a result


@dataclass(frozen=True)
class Result:
    """The evaluation of a set, as it lies on disk."""

    path: Path
    set_name: str
    suite: str
    counts: Mapping[str, Mapping[str, float]]  # by key of the sample


@dataclass(frozen=True)
class Comparison:
    """Of one set."""

    set_name: str
    suite: str
    num_samples: int
    a: str  # files
    b: str
    differences: Sequence[Difference]


def compare(argv: Sequence[str]) -> None:
    """Run the command. Raises this project's errors."""
    places = [word for word in argv if "=" not in word]
    given, rest = parse([word for word in argv if "=" in word], {"seed": "0", "resamples": "10000", "out": ""})
    if rest or len(places) != 2:
        raise RecipeError("give two runs or two results: compare A B [seed=0] [resamples=10000] [out=FOLDER]")
    seed, resamples = whole(given, "seed", 0, 2**63 - 1), whole(given, "resamples", 100, 1_000_000)
    a, b = (results_of(Path(place)) for place in places)
    found = [compared(one, other, resamples, seed) for one, other in matched(a, b)]
    for comparison in found:
        print(table(comparison))
    for line in lonely(a, b):
        print(line)
    first, second = map(Path, places)
    folder = Path(given["out"]) if given["out"] else (second / "eval" if second.is_dir() else second.parent) / "compare"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_short(first)}-to-{_short(second)}.json"
    body: dict[str, Any] = {"a": places[0], "b": places[1], "seed": seed, "resamples": resamples, "interval": 0.95}
    body["sets"] = [plain(comparison) for comparison in found]
    write_atomically(path, (json.dumps(body, ensure_ascii=False, indent=1) + "\n").encode())
    write_atomically(path.with_suffix(".html"), comparison_page(body))
    print(f"written to {path}, and as a page to {path.with_suffix('.html').name}")


def results_of(place: Path) -> dict[str, Result]:
    """Results by set: of a run the newest of each. Raises DataError where there is none."""
    if place.is_file():
        result = read(place)
        return {result.set_name: result}
    newest: dict[str, Path] = {}
    for path in sorted(place.glob("eval/*-step*.json")):
        newest[path.name.rpartition("-step")[0]] = path
    if not newest:
        raise DataError(
            f"{place}: no results: name eval/SET-stepN.json, or a run that python -m launch.evaluate has seen"
        )
    return {result.set_name: result for result in map(read, newest.values())}


def read(path: Path) -> Result:
    """A result. Raises DataError for a file that is none."""
    again = "run python -m launch.evaluate on it again"
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path}: over {MAX_BYTES} bytes")
        body = json.loads(path.read_text(encoding="utf-8"))
        name, suite = str(body["set"]), str(body["suite"])
        counts = {
            str(each["key"]): {str(name): float(value) for name, value in each["counts"].items()}
            for each in body["examples"]
        }
    except (KeyError, TypeError, AttributeError):
        raise DataError(f"{path}: is no result of an evaluation of this version; {again}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read: {' '.join(str(error).split())[:200]}") from None
    if suite not in SUITES:
        raise DataError(f"{path}: its suite {suite!r} is unknown here")
    if not counts:
        raise DataError(f"{path}: it has no samples")
    if len(counts) != len(body["examples"]):
        raise DataError(f"{path}: two of its samples have the same key")
    return Result(path, name, suite, counts)


def matched(a: Mapping[str, Result], b: Mapping[str, Result]) -> list[tuple[Result, Result]]:
    """Pairs of the same samples. Raises DataError where there are none, or samples or suites differ."""
    pairs = [(a[name], b[name]) for name in a if name in b]
    if not pairs:
        raise DataError(f"no set is in both: A has {', '.join(a)}, B has {', '.join(b)}")
    for one, other in pairs:
        if one.suite != other.suite:
            raise DataError(f"{one.set_name}: {one.path} is of suite={one.suite}, {other.path} of suite={other.suite}")
        alone = sorted(one.counts.keys() ^ other.counts.keys())
        if alone:
            where = one.path if alone[0] in one.counts else other.path
            raise DataError(
                f"{one.set_name}: the samples differ: {len(alone)} are in one result alone, the first {alone[0]!r} in "
                f"{where}; evaluate both with the same shards and eval.max_samples"
            )
        if {frozenset(counts) for counts in (*one.counts.values(), *other.counts.values())} != {
            frozenset(next(iter(one.counts.values())))
        }:
            raise DataError(f"{other.path}: its counts are not those of {one.path}; run both evaluations again")
    return pairs


def compared(one: Result, other: Result, resamples: int, seed: int) -> Comparison:
    """Differences of all metrics of a set."""
    keys = sorted(one.counts)
    counts = [[result.counts[key] for key in keys] for result in (one, other)]
    try:
        differences = paired(SUITES[one.suite], *counts, resamples=resamples, seed=seed)
    except KeyError as error:
        raise DataError(f"{one.path}: it lacks the count {error}; run both evaluations again") from None
    return Comparison(one.set_name, one.suite, len(keys), str(one.path), str(other.path), differences)


def lonely(a: Mapping[str, Result], b: Mapping[str, Result]) -> list[str]:
    """Sets that are not compared, as lines."""
    return [f"{name} is in {'A' if name in a else 'B'} alone" for name in (*a, *b) if (name in a) != (name in b)]


def table(comparison: Comparison) -> str:
    """For people."""
    heads = ("A", "B", "B - A", "95 % interval", "p")
    lines = [f"{comparison.set_name} ({comparison.suite}), {comparison.num_samples} samples"]
    lines.append(f"  {'metric':<16}{heads[0]:>10}{heads[1]:>10}{heads[2]:>10}{heads[3]:>24}{heads[4]:>9}")
    for each in comparison.differences:
        a, b, less, low, high = (
            shown_as(each.metric, x) for x in (each.a, each.b, each.difference, each.low, each.high)
        )
        interval = f"{low} to {high}"
        lines.append(f"  {each.metric:<16}{a:>10}{b:>10}{less:>10}{interval:>24}{each.p:>9.4f}  B: {each.verdict}")
    return "\n".join(lines)


def plain(comparison: Comparison) -> dict[str, Any]:
    """For JSON."""
    differences = [
        {**asdict(each), "difference": each.difference, "verdict": each.verdict} for each in comparison.differences
    ]
    about = {"set": comparison.set_name, "suite": comparison.suite, "num_samples": comparison.num_samples}
    return about | {"a": comparison.a, "b": comparison.b, "metrics": differences}


def _short(place: Path) -> str:
    return place.stem if place.suffix == ".json" else place.resolve().name
