"""The way through a curriculum: each stage is a run of its own, what is done is passed over, all of it is written down.

    for each stage in order:
        done already?  same settings, same ancestors --> next; otherwise refuse, with the difference
        train(recipe, init = checkpoints of the stages before) --> lineage.json

A kill loses what a kill of a single run loses: the stage goes on from its last checkpoint. All ranks walk together; the
main one writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from tqdm import tqdm

from train import lineage, ranks
from train.checkpoint import candidates
from train.checkpoint.format import folder_step
from train.config import Recipe
from train.curriculum import Curriculum, Stage
from train.errors import RecipeError
from train.lineage import Entry


def travel(curriculum: Curriculum, train: Callable[[Recipe], bool]) -> bool:
    """Train every chosen stage that is not done; False where it was stopped as asked. Raises this project's errors."""
    chosen = curriculum.stages[curriculum.first : curriculum.stop]
    patience_s = max(stage.recipe.guard.patience_s for stage in chosen)
    ranks.start(ranks.choose_device(chosen[0].recipe.engine.device), patience_s)
    main, entries = ranks.rank() == 0, lineage.read(curriculum.folder)
    check_all(curriculum, entries)
    ranks.barrier()  # every rank has read what is there before the main one writes
    for stage in chosen:
        found = entries.get(stage.name)
        if found is not None and found.state == "done":
            if main:
                tqdm.write(f"stage {stage.name}: done at step {found.step:,}")
            continue
        taken = handed_on(curriculum, stage)
        ready = with_init(curriculum, stage, taken)
        entry = begin(stage, ready, taken, found)
        entries[stage.name] = entry
        if main:
            tqdm.write(f"stage {stage.name}: {curriculum.stages.index(stage) + 1} of {len(curriculum.stages)}")
            lineage.write(curriculum.folder, curriculum.name, with_waiting(curriculum, entries))
        try:
            finished = train(ready)
        except BaseException:
            if main:  # the next start finds the stage as it is
                entries[stage.name] = replace(entry, state="stopped", ended=now())
                lineage.write(curriculum.folder, curriculum.name, with_waiting(curriculum, entries))
            raise
        entries[stage.name] = end(stage, entry, finished)
        if main:
            lineage.write(curriculum.folder, curriculum.name, with_waiting(curriculum, entries))
        ranks.barrier()
        if not finished:
            return False
    if main:
        tqdm.write(f"curriculum {curriculum.name}: {chosen[0].name} to {chosen[-1].name} done; {curriculum.folder}")
    return True


def check_all(curriculum: Curriculum, entries: Mapping[str, Entry]) -> None:
    """Refuse before anything trains what could not go on in the middle. Raises RecipeError."""
    chosen = {stage.name for stage in curriculum.stages[curriculum.first : curriculum.stop]}
    for stage in curriculum.stages:
        entry = entries.get(stage.name)
        if stage.name not in chosen:
            continue
        if entry is not None and entry.state == "done":
            if not candidates(stage.folder):
                raise RecipeError(f"stage {stage.name} is done, but {stage.folder} has no checkpoint any more")
            ancestors = {name: lineage.mark(path) for name, path in handed_on(curriculum, stage).items()}
            lineage.check_done(stage.name, entry, stage.recipe, ancestors)
            continue
        for name in stage.after:
            before, state = curriculum.stage(name), entries[name].state if name in entries else "waiting"
            if name in chosen or own_init(curriculum, stage):
                continue
            if state != "done" or not candidates(before.folder):
                raise RecipeError(
                    f"stage {stage.name} starts from stage {name}, which is not done ({before.folder}); begin with "
                    f"from={name}, or give {stage.name}.init=WEIGHTS"
                )


def handed_on(curriculum: Curriculum, stage: Stage) -> dict[str, Path]:
    """Stage -> the checkpoint of it that `stage` starts from, of those that there are."""
    before = [curriculum.stage(name) for name in stage.after]
    found = {earlier.name: lineage.checkpoint_of(earlier.folder, earlier.hand_on) for earlier in before}
    return {name: path for name, path in found.items() if path is not None}


def own_init(curriculum: Curriculum, stage: Stage) -> list[str]:
    """Places of a stage's `init` that are no other stages."""
    others = {str(curriculum.stage(name).folder) for name in stage.after}
    return [place for place in (stage.recipe.init or "").split(",") if place and place not in others]


def with_init(curriculum: Curriculum, stage: Stage, taken: Mapping[str, Path]) -> Recipe:
    """The recipe with the very checkpoints that it starts from; stages that have none are left out."""
    places = [str(taken[name]) for name in reversed(stage.after) if name in taken] + own_init(curriculum, stage)
    return replace(stage.recipe, init=",".join(places) or None)


def begin(stage: Stage, recipe: Recipe, taken: Mapping[str, Path], before: Entry | None) -> Entry:
    """The entry of a stage that starts, or goes on."""
    ancestors = {name: lineage.mark(path) for name, path in taken.items()}
    if not candidates(stage.folder):
        before = None  # nothing is kept of what it did: it begins anew
    if before is not None:
        lineage.check_ancestors(stage.name, before, ancestors)
    return Entry(
        state="running",
        after=list(stage.after),
        run=str(stage.folder),
        recipe=str(stage.folder / "recipe.yaml"),
        init=recipe.init.split(",") if recipe.init else [],
        ancestors=ancestors,
        engine=recipe.engine.name,
        world=ranks.world(),
        began=before.began if before is not None else now(),
    )


def end(stage: Stage, entry: Entry, finished: bool) -> Entry:
    """The entry of a stage that has ended, or was stopped."""
    path = lineage.checkpoint_of(stage.folder, stage.hand_on if finished else "latest")
    newest = candidates(stage.folder)
    return replace(
        entry,
        state="done" if finished else "stopped",
        checkpoint=str(path) if path else None,
        step=folder_step(newest[0].name) or 0 if newest else 0,
        tokens=tokens_of(stage.folder / "metrics.jsonl"),
        ended=now(),
    )


def with_waiting(curriculum: Curriculum, entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """All stages in order, those that have not begun among them."""
    return {
        stage.name: entries.get(stage.name)
        or Entry("waiting", list(stage.after), str(stage.folder), str(stage.folder / "recipe.yaml"))
        for stage in curriculum.stages
    }


def tokens_of(metrics: Path) -> int:
    """Tokens that a run has seen, by the rates in its log: each line stands for the steps since the one before."""
    total, last = 0, 0
    for text in metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:  # a line cut short by a kill
            continue
        if "tokens_per_second" in line:
            steps = line["step"] - last
            total += round(line["tokens_per_second"] * line["seconds_per_step"] * steps)
            last = line["step"]
    return total


def now() -> str:
    """Date and time, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
