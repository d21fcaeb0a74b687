"""Word error rate of any checkpoint of any engine.

    python -m launch.evaluate run=outputs/demo suite=asr [checkpoint=latest] [shards=corpus/test/*.tar] [KEY=VALUE ...]

Without `shards` it takes the sets of the run's recipe (eval.sets). Other settings change the recipe, for instance
eval.max_samples=200 or engine.device=cpu. Prints a table and writes RUN/eval/SET-stepN.json.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data.tokenizer import load_tokenizer
from models.hf import released_pieces
from train import ranks
from train.checkpoint import CheckpointReader, choose
from train.engines.build import build_engine
from train.engines.setup import EngineSetup
from train.errors import CheckpointError, RecipeError
from train.main import USER_ERRORS, model_config, open_evaluator
from train.recipe import EngineConfig, Phase, load_saved


def main(argv: Sequence[str]) -> int:
    """0, or 2 after one line on what is wrong."""
    try:
        evaluate(argv)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        ranks.stop()
    return 0


def evaluate(argv: Sequence[str]) -> None:
    """Load, answer, print, write. Raises this project's errors."""
    own, rest = {"suite": "asr", "checkpoint": "latest"}, []
    for word in argv:
        key, _, value = word.partition("=")
        if key in ("run", "suite", "checkpoint", "shards"):
            own[key] = value
        else:
            rest.append(word)
    if "run" not in own:
        raise RecipeError("give run=FOLDER, the folder of a run")
    if own["suite"] != "asr":
        raise RecipeError(f"suite={own['suite']}: there is only asr")
    folder = Path(own["run"])
    recipe = load_saved(folder / "recipe.yaml", rest)
    recipe = replace(recipe, engine=EngineConfig(device=recipe.engine.device, precision=recipe.engine.precision))
    if "shards" in own:
        recipe = replace(recipe, eval=replace(recipe.eval, sets={"shards": own["shards"].strip("[]").split(",")}))
    if not recipe.eval.sets:
        raise RecipeError(f"{folder}/recipe.yaml has no eval.sets: give shards=PATTERN")
    tokenizer = load_tokenizer(Path(recipe.data.tokenizer))
    manifest = choose(folder, own["checkpoint"], wait_s=0)
    if manifest is None:
        raise CheckpointError(f"{folder}: no checkpoint yet")
    model = model_config(recipe, tokenizer)
    reader = CheckpointReader(manifest, released_pieces)
    device = ranks.choose_device(recipe.engine.device)
    setup = EngineSetup(
        model, recipe.engine, recipe.optim, recipe.loss, Phase(steps=1), "evaluate", recipe.seed, device
    )
    engine = build_engine(setup)
    engine.restore(reader, optimizer_step=0)
    evaluator = open_evaluator(recipe, tokenizer)
    for report in evaluator.reports(engine, manifest.step):
        print(report.table())
        print(f"  written to {report.write(folder / 'eval', manifest.step)}")
    engine.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
