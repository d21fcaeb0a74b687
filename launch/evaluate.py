"""Evaluate any checkpoint of any engine: what it understands, and what its speech is like.

    python -m launch.evaluate run=RUN [suite=asr] [checkpoint=latest] [shards=corpus/*.tar] [KEY=VALUE ...]
    python -m launch.evaluate run=RUN suite=tts recogniser=RUN2 [shards=PATTERN] [levels=N] [max_samples=N]
        [speaker=NAME] [system=TEXT] [rewrite=FILE] [temperature=T] [seed=0] [max_seconds=20] [instruction=TEXT]
        [out=FOLDER] [checkpoint=latest] [KEY=VALUE ...]
    python -m launch.evaluate run=RUN suite=regression baseline=RUN0 recogniser=RUN2 [tolerance=0.05] [as for tts]

asr: word error rate of answers in text. tts: the Talker says the answers, a recogniser writes what it hears; accuracy
of codes; likeness of voices. regression: tts of two runs, exit status 1 where the word error rate of the speech rose.
Without `shards` the sets of the run's recipe (eval.sets) are taken. Other settings change the recipe, for instance
eval.max_samples=200 or engine.device=cpu. Prints tables and writes below RUN/eval. docs/evaluate.md has it all.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launch.arguments import guarded, parse
from launch.run_engine import open_run
from launch.tts import regression, tts
from train.errors import RecipeError
from train.feed import open_evaluator

SUITES = ("asr", "tts", "regression")


def evaluate(argv: Sequence[str]) -> None:
    """Run the suite that is asked for. Raises this project's errors."""
    suite = next((word.partition("=")[2] for word in reversed(argv) if word.startswith("suite=")), "asr")
    if suite not in SUITES:
        raise RecipeError(f"suite={suite}: there is only {', '.join(SUITES)}")
    {"asr": asr, "tts": tts, "regression": regression}[suite](argv)


def asr(argv: Sequence[str]) -> None:
    """Load, answer, print, write."""
    given, rest = parse(argv, {"run": None, "suite": "asr", "checkpoint": "latest", "shards": ""})
    opened = open_run(Path(given["run"]), rest)
    recipe = opened.recipe
    if given["shards"]:
        recipe = replace(recipe, eval=replace(recipe.eval, sets={"shards": given["shards"].strip("[]").split(",")}))
    if not recipe.eval.sets:
        raise RecipeError(f"{opened.folder}/recipe.yaml has no eval.sets: give shards=PATTERN")
    evaluator = open_evaluator(recipe, opened.tokenizer, opened.model)
    engine, step = opened.engine(given["checkpoint"])
    for report in evaluator.reports(engine, step):
        print(report.table())
        print(f"  written to {report.write(opened.folder / 'eval', step)}")
    engine.close()


if __name__ == "__main__":
    sys.exit(guarded(evaluate, sys.argv[1:]))
