"""Word error rate of any checkpoint of any engine.

    python -m launch.evaluate run=outputs/demo [suite=asr] [checkpoint=latest] [shards=corpus/*.tar] [KEY=VALUE ...]

Without `shards` it takes the sets of the run's recipe (eval.sets). Other settings change the recipe, for instance
eval.max_samples=200 or engine.device=cpu. Prints a table and writes RUN/eval/SET-stepN.json.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data.tokenizer import load_tokenizer
from launch.arguments import guarded, parse
from models.hf import released_pieces
from train import ranks
from train.checkpoint import CheckpointReader, choose
from train.engines.build import build_engine
from train.engines.setup import EngineSetup
from train.errors import CheckpointError, RecipeError
from train.feed import open_evaluator
from train.main import model_config
from train.recipe import EngineConfig, Phase, load_saved


def evaluate(argv: Sequence[str]) -> None:
    """Load, answer, print, write. Raises this project's errors."""
    given, rest = parse(argv, {"run": None, "suite": "asr", "checkpoint": "latest", "shards": ""})
    if given["suite"] != "asr":
        raise RecipeError(f"suite={given['suite']}: there is only asr")
    folder = Path(given["run"])
    recipe = load_saved(folder / "recipe.yaml", rest)
    recipe = replace(recipe, engine=EngineConfig(device=recipe.engine.device, precision=recipe.engine.precision))
    if given["shards"]:
        recipe = replace(recipe, eval=replace(recipe.eval, sets={"shards": given["shards"].strip("[]").split(",")}))
    if not recipe.eval.sets:
        raise RecipeError(f"{folder}/recipe.yaml has no eval.sets: give shards=PATTERN")
    tokenizer = load_tokenizer(Path(recipe.data.tokenizer))
    model = model_config(recipe, tokenizer)
    evaluator = open_evaluator(recipe, tokenizer, model)
    manifest = choose(folder, given["checkpoint"], wait_s=0)
    if manifest is None:
        raise CheckpointError(f"{folder}: no checkpoint yet")
    device = ranks.choose_device(recipe.engine.device)
    phase = Phase(steps=1)
    engine = build_engine(
        EngineSetup(model, recipe.engine, recipe.optim, recipe.loss, phase, "evaluate", recipe.seed, device)
    )
    engine.restore(CheckpointReader(manifest, released_pieces), optimizer_step=0)
    for report in evaluator.reports(engine, manifest.step):
        print(report.table())
        print(f"  written to {report.write(folder / 'eval', manifest.step)}")
    engine.close()


if __name__ == "__main__":
    sys.exit(guarded(evaluate, sys.argv[1:]))
