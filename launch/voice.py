"""A new voice: recordings of one speaker and their transcripts become a Talker that speaks as they do.

    python -m launch.voice run=RUN recordings=FOLDER|LIST.jsonl speaker=NAME out=FOLDER [steps=200] [lr=...]
                           [language=en] [KEY=VALUE ...]        further settings of the run's recipe

    recordings --data.convert --speak--> OUT/data --data.codes, the run's codec--> codes
    RUN's weights, one more speaker id --train, Thinker frozen--> OUT/run --export--> OUT/model, whose config names NAME

A folder holds recordings, each beside a .txt of the same stem; a list holds a JSON object a line, "audio" and "text".
All that exists stays: the other voices keep their ids, and the Thinker is not touched. Parts that are done are kept, so
the same command goes on where it was stopped.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from data import codes, convert
from data.audio import EXTENSIONS
from data.errors import DataError
from data.files import write_atomically
from launch.arguments import guarded, number, parse, whole
from launch.convert import export
from models.omni_config import CONTROL_IDS, TalkerConfig
from train.config import Phase, Recipe
from train.errors import RecipeError
from train.main import train
from train.recipe import load_saved

KNOWN = {"run": None, "recordings": None, "speaker": None, "out": None, "steps": "200", "lr": "", "language": ""}


def voice(argv: Sequence[str]) -> None:
    """Run the command. Raises this project's errors."""
    given, settings = parse(argv, KNOWN)
    source, out = Path(given["recordings"]), Path(given["out"])
    recipe = recipe_of(given, settings)
    done = out / "data" / ".done"
    if not done.is_file():
        manifest = listed(source, out) if source.is_dir() else source
        words = ["--speaker", given["speaker"], "--tokenizer", recipe.data.tokenizer]
        words += ["--language", given["language"]] if given["language"] else []
        media = ["--media", str(source if source.is_dir() else source.parent), "--speak"]
        _must(convert.main(["manifest", str(manifest), str(out / "data"), *media, *words]))
        done.touch()
    _must(codes.main([f"codec={recipe.data.codec}", f"shards={recipe.data.shards[0]}"]))
    if not train(recipe):
        raise SystemExit(130)  # the same command goes on; half a voice is not exported
    if not (out / "model").exists():
        export([f"from={recipe.run}", f"to={out / 'model'}"])
    print(f"{given['speaker']}: python -m launch.generate run={recipe.run} speaker={given['speaker']} text=... out=...")


def recipe_of(given: Mapping[str, str], settings: Sequence[str]) -> Recipe:
    """The run's recipe, for the new voice. Raises RecipeError for a run, speaker or setting that cannot be."""
    folder, out, name = Path(given["run"]), Path(given["out"]), given["speaker"]
    recipe = load_saved(folder / "recipe.yaml", settings)
    talker = recipe.model.talker
    if talker is None or not recipe.data.codec:
        raise RecipeError(f"run={folder}: its model has no talker, or its recipe no data.codec: nothing there speaks")
    if not name or not name.isprintable() or len(name) > 200:
        raise RecipeError(f"speaker={name!r}: a printable name of at most 200 characters")
    if name in talker.speaker_id:
        raise RecipeError(f"speaker={name}: the model of {folder} has such a voice already; choose another name")
    steps = whole(given, "steps", 1, 1 << 31)
    phase = Phase(steps, train=["talker.*"], speech="frozen", warmup_steps=steps // 10)
    speakers = {**talker.speaker_id, name: free_id(talker)}
    lr = number(given, "lr", 1e-12, 1e3) if given["lr"] else 0.3 * recipe.optim.lr
    return replace(
        recipe,
        name="voice",
        model=replace(recipe.model, talker=replace(talker, speaker_id=speakers)),
        data=replace(recipe.data, shards=[str(out / "data" / "train" / "*.tar")], mixture=None),
        run=str(out / "run"),
        init=str(folder),
        phases={"voice": phase},
        optim=replace(recipe.optim, lr=lr),
        save=replace(recipe.save, every=max(1, steps // 2)),
        eval=replace(recipe.eval, every=0, sets={}),
    )


def free_id(talker: TalkerConfig) -> int:
    """A control id for one more voice: behind those of the others. Raises RecipeError where the vocabulary is full."""
    taken = {getattr(talker, name) for name in CONTROL_IDS} | set(talker.speaker_id.values())
    free = [number for number in range(talker.code_predictor.vocab_size, talker.text.vocab_size) if number not in taken]
    if not free:
        raise RecipeError(f"model.talker.text.vocab_size={talker.text.vocab_size} has no id left for another voice")
    return next((number for number in free if number > max(taken)), free[0])


def listed(folder: Path, out: Path) -> Path:
    """A list of the recordings in a folder and their transcripts. Raises DataError where a transcript is missing."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lstrip(".").lower() in EXTENSIONS)
    if not found:
        raise DataError(f"{folder}: holds no recordings")
    lines = []
    for path in found:
        try:
            text = path.with_suffix(".txt").read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise DataError(f"{path}: no transcript in {path.with_suffix('.txt').name}: {why}") from None
        lines.append(json.dumps({"audio": str(path.relative_to(folder)), "text": text}, ensure_ascii=False))
    out.mkdir(parents=True, exist_ok=True)
    manifest = out / "recordings.jsonl"
    write_atomically(manifest, ("\n".join(lines) + "\n").encode())
    return manifest


def _must(status: int) -> None:
    """Leave with the status of a part that has said what is wrong."""
    if status:
        raise SystemExit(status)


def main(argv: Sequence[str]) -> int:
    """The command; its exit status."""
    return guarded(voice, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
