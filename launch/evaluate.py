"""Evaluate any checkpoint of any engine, or a model's folder: what it understands, and what its speech is like.

    python -m launch.evaluate run=RUN [suite=NAME] [checkpoint=latest] [shards=corpus/*.tar] [KEY=VALUE ...]
    python -m launch.evaluate model=FOLDER shards=corpus/*.tar [suite=asr] [dtype=bf16] [device=cuda]
        [eval.KEY=VALUE ...]
    python -m launch.evaluate compare A B [seed=0] [resamples=10000] [out=FOLDER]
    python -m launch.evaluate model=FOLDER suite=lm_eval tasks=NAME,NAME [limit=N] [fewshot=N] [include=FOLDER]
    python -m launch.evaluate run=RUN suite=tts recogniser=RUN2 [shards=PATTERN] [levels=N] [max_samples=N]
        [speaker=NAME] [system=TEXT] [rewrite=FILE] [temperature=T] [seed=0] [max_seconds=20] [instruction=TEXT]
        [out=FOLDER] [checkpoint=latest] [KEY=VALUE ...]
    python -m launch.evaluate run=RUN suite=regression baseline=RUN0 recogniser=RUN2 [tolerance=0.05] [as for tts]

Suites of answers in text: asr, vqa, caption, qa, long_qa, likelihood, text (train/suites/); without `suite` each set
has its own, or eval.suite. lm_eval: tasks of lm-evaluation-harness. tts: the Talker says the answers, a recogniser
writes what it hears. regression: tts of two runs, exit status 1 where the word error rate of the speech rose. compare:
the difference of two runs or two results (JSON), with bootstrap intervals.
Without `shards` the sets of the run's recipe (eval.sets) are taken. Other settings change the recipe, for instance
eval.max_samples=200 or engine.device=cpu. Prints tables and writes JSON and a page below RUN/eval. docs/evaluate.md has
it all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from data.errors import DataError
from data.files import write_atomically
from launch.arguments import guarded, parse
from launch.compare import compare
from launch.evaluation_page import page
from launch.folder_engine import open_folder
from launch.lm_eval_suite import lm_eval
from launch.run_engine import open_run
from launch.tts import regression, tts
from train.config import EvalConfig, EvalSet
from train.errors import RecipeError
from train.evaluate import nothing_to_ask
from train.evaluation_report import Report
from train.feed import open_evaluator
from train.suites.registry import SUITES
from train.typed import nearest

Command = Callable[[Sequence[str]], None]
COMMANDS: Mapping[str, Command] = {"tts": tts, "regression": regression, "lm_eval": lm_eval}


def evaluate(argv: Sequence[str]) -> None:
    """Run what is asked for. Raises this project's errors."""
    if argv and argv[0] == "compare":
        compare(argv[1:])
        return
    suite = next((word.partition("=")[2] for word in reversed(argv) if word.startswith("suite=")), "")
    known = [*SUITES, *COMMANDS]
    if suite and suite not in known:
        raise RecipeError(f"suite={suite}{nearest(suite, known)}; there is only {', '.join(known)}")
    if suite in COMMANDS:
        COMMANDS[suite](argv)
    elif any(word.startswith("model=") for word in argv):
        of_folder(argv)
    else:
        of_run(argv)


def of_run(argv: Sequence[str]) -> None:
    """A checkpoint of a run: load, ask, print, write."""
    given, rest = parse(argv, {"run": None, "suite": "", "checkpoint": "latest", "shards": ""})
    opened = open_run(Path(given["run"]), rest)
    recipe = replace(opened.recipe, eval=asked(opened.recipe.eval, given))
    if not recipe.eval.sets:
        raise RecipeError(f"{opened.folder}/recipe.yaml has no eval.sets: give shards=PATTERN")
    evaluator = open_evaluator(recipe, opened.tokenizer, opened.model)
    engine, step = opened.engine(given["checkpoint"])
    show(evaluator.reports(engine, step), opened.folder / "eval", str(opened.folder))
    engine.close()


def of_folder(argv: Sequence[str]) -> None:
    """A model in the released layout: load, ask, print, write."""
    known = {"model": None, "suite": "", "shards": "", "dtype": "", "device": "", "out": ""}
    given, rest = parse(argv, known)
    if not given["shards"]:
        raise RecipeError("give shards=PATTERN: a model's folder names no evaluation sets")
    folder = open_folder(given, rest)
    evaluator, engine = folder.evaluator(asked(folder.config, given)), folder.engine()
    show(evaluator.reports(engine, 0), Path(given["out"] or folder.path / "eval"), str(folder.path))


def asked(config: EvalConfig, given: Mapping[str, str]) -> EvalConfig:
    """The sets and suites that a command line asks for."""
    if given["shards"]:
        config = replace(config, sets={"shards": given["shards"].strip("[]").split(",")})
    if given["suite"]:
        plain = {name: entry.shards if isinstance(entry, EvalSet) else entry for name, entry in config.sets.items()}
        config = replace(config, suite=given["suite"], sets={**plain})
    return config


def show(reports: Iterable[Report], folder: Path, model: str) -> None:
    """Print each report and write it. Raises DataError, at the end, for sets of which no sample could be used."""
    empty = []
    for report in reports:
        if not report.all.num_samples:
            empty.append(nothing_to_ask(report.set_name, report.suite, report.skipped))
            continue
        print(report.table())
        path = report.write(folder, report.step)
        write_atomically(path.with_suffix(".html"), page(report, model))
        print(f"  written to {path}, and as a page to {path.with_suffix('.html').name}")
    if empty:
        raise DataError("; ".join(empty))


if __name__ == "__main__":
    sys.exit(guarded(evaluate, sys.argv[1:]))
