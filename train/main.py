"""The whole program: recipe -> data -> for each phase: engine, state, loop -> curves.

    python train.py recipe=demo [KEY=VALUE ...]
    python train.py recipe=curriculum [from=STAGE] [to=STAGE] [STAGE.KEY=VALUE ...]
    torchrun --nproc-per-node 8 train.py recipe=stage2 engine=deepspeed engine.ep=8

A run's state is the number of its next step: the phase, the learning rate and the order of the data follow from it. A
phase has its own trainable parameters and so its own engine; between phases the weights pass through the checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from data.errors import DataError
from data.loader import stream
from data.tokenizer import AUDIO_PAD, IMAGE_PAD, VIDEO_PAD, Tokenizer, load_tokenizer
from data.types import Batch
from models.config import ConfigError, ThinkerConfig, TranscriberConfig
from models.flops import training_flops
from models.hf import released_pieces
from models.omni_config import OmniConfig
from train import ranks
from train.checkpoint import CheckpointReader, Manifest, Saver, choose
from train.config import Recipe
from train.curriculum import is_curriculum, load_curriculum
from train.engines import Shard, StateReader
from train.engines.build import build_engine
from train.engines.setup import EngineSetup
from train.errors import CheckpointError, EngineError, RecipeError
from train.evaluate import Evaluator
from train.feed import Course, Feed, open_evaluator, open_feed
from train.finetune import identity_of, keep_files
from train.hardware import peak_flops
from train.hidden import cached_course
from train.journey import travel
from train.layout import joining_ids
from train.loop import fit
from train.metrics import About, Meters, draw_curves
from train.parallel import Model, thinker_of
from train.progress import Progress
from train.recipe import Span, load_recipe, spans
from train.run import Position, Run
from train.start import carried_steps, open_init
from train.transcribe import flops_of

USER_ERRORS = (RecipeError, DataError, ConfigError, CheckpointError, EngineError)


def main(argv: Sequence[str], stopped: int = 0) -> int:
    """Run a recipe; 0 when it ended, 2 for an error that the user can cure.

    `stopped` when it was stopped as asked, by Ctrl-C or SIGTERM: commands that go on after training ask for another.
    """
    try:
        done = travel(load_curriculum(argv), train) if is_curriculum(argv) else train(load_recipe(argv))
        return 0 if done else stopped
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("left at once; the last checkpoint is whole", file=sys.stderr)
        return 130
    finally:
        ranks.stop()


def train(recipe: Recipe) -> bool:
    """Run every phase that is not done yet; False where it was stopped as asked. Raises this project's errors."""
    device = ranks.choose_device(recipe.engine.device)
    ranks.start(device)
    tokenizer = load_tokenizer(Path(recipe.data.tokenizer))
    model = model_config(recipe, tokenizer)
    feed = open_feed(recipe, tokenizer, model)
    evaluator = open_evaluator(recipe, tokenizer, model)
    folder = Run.open_folder(recipe)
    recipe = keep_files(recipe)
    tell = tqdm.write if ranks.rank() == 0 else _silent
    tell(f"run folder: {folder}")
    phases = spans(recipe)
    total = min(phases[-1].stop, recipe.max_steps or phases[-1].stop)
    resume, stopped = recipe.resume, False
    for span in phases:
        manifest = choose(folder, resume, agree=ranks.agree, rank=ranks.rank(), world=ranks.world(), warn=tell)
        step, stop = manifest.step if manifest else 0, min(span.stop, total)
        progress = Progress(recipe.eval, recipe.end, manifest.info.get("progress") if manifest else None)
        if step >= stop or (progress.ended and span is phases[-1]):
            tell(f"phase {span.name}: done at step {step}")
            continue
        course = feed.courses[span.name]
        if manifest is None:
            feed.require(total)
        else:
            feed.seek(step, manifest.info.get("data", {}))
        if span.phase.speech == "cached":
            assert isinstance(model, OmniConfig), "recipes check that who speaks has a talker"
            course = cached_course(course, recipe, span, model, manifest)
        for line in course.about():
            tell(line)
        setup = engine_setup(recipe, model, span, device)
        state = stored_state(recipe, setup, manifest)  # that of another model is refused before ours is made
        engine = build_engine(setup)
        updates = 0 if state is None else updates_before(recipe, span, manifest, state)
        if state is not None:
            engine.restore(state, optimizer_step=updates)
        if manifest is not None:
            tell(f"resumed at step {step} from {manifest.folder}")
        run = open_run(recipe, folder, setup, span, manifest, evaluator, feed, course, engine.shard, progress, updates)
        run.listen()
        with closing(run), closing(engine):
            batches = stream(
                course.plan,
                course.reader,
                engine.shard,
                step,
                stop,
                recipe.data.workers,
                origin=course.origin,
                prefetch=recipe.data.prefetch,
                pin_memory=device.type == "cuda",
            )
            with closing(batches):
                stopped = fit(engine, batches, span, recipe, run)
            if not (stopped or run.ended) and stop == total:
                run.evaluate(engine, total)
            for line in course.report(run.step):
                tell(line)
        ranks.barrier()  # the checkpoint is published before any rank looks for it
        if stopped or stop == total or run.ended:
            break
        resume = "latest"
    if ranks.rank() == 0:
        farewell(folder, stopped)
    return not stopped


def model_config(recipe: Recipe, tokenizer: Tokenizer) -> Model:
    """The model's sizes, checked against the tokenizer: of a Thinker alone, or with the Talker that the recipe has.

    Of an audio encoder and its decoder where the recipe has such a decoder.
    """
    text = recipe.model.text
    if text.vocab_size < tokenizer.vocab_size:
        raise RecipeError(
            f"model.text.vocab_size={text.vocab_size} is less than the tokenizer's {tokenizer.vocab_size} "
            f"({recipe.data.tokenizer}); raise it"
        )
    audio, vision = recipe.model.audio, recipe.model.vision
    thinker = ThinkerConfig(text, audio, tokenizer.id(AUDIO_PAD))
    if vision is not None:
        image_id, video_id = (tokenizer.id(name) for name in (IMAGE_PAD, VIDEO_PAD))
        thinker = replace(thinker, vision=vision, image_token_id=image_id, video_token_id=video_id)
    if recipe.model.audio_decoder is not None:
        return TranscriberConfig(thinker, recipe.model.audio_decoder)
    if recipe.model.talker is None:
        return thinker
    return OmniConfig(thinker, recipe.model.talker, recipe.model.code2wav, **joining_ids(tokenizer))


def engine_setup(recipe: Recipe, model: Model, span: Span, device: torch.device) -> EngineSetup:
    """What a phase's engine is built from."""
    longest = span.phase.sequence_length or recipe.data.sequence_length
    parts = recipe.engine, recipe.optim, recipe.loss, span.phase, span.name, recipe.seed, device
    return EngineSetup(
        model,
        *parts,
        sequence_length=longest,
        sequences_per_step=recipe.data.sequences_per_step,
        evaluates=bool(recipe.eval.sets),
        lora=recipe.lora,
    )


def stored_state(recipe: Recipe, setup: EngineSetup, manifest: Manifest | None) -> StateReader | None:
    """What the engine starts from: a checkpoint's state, the weights of `init`, or None for the initial weights."""
    if manifest is not None:
        return CheckpointReader(manifest, released_pieces, identity=identity_of(setup))
    if recipe.init is not None:
        weights, line = open_init(recipe, setup)
        if line and ranks.rank() == 0:
            tqdm.write(line)
        return weights
    return None


def updates_before(recipe: Recipe, span: Span, manifest: Manifest | None, state: StateReader) -> int:
    """Updates that the optimizer state to start from is of; 0: it begins anew, as in every new phase."""
    if manifest is None:
        return carried_steps(recipe, state)
    return manifest.info.get("optimizer_step", manifest.step - span.start) if manifest.step > span.start else 0


def open_run(
    recipe: Recipe,
    folder: Path,
    setup: EngineSetup,
    span: Span,
    manifest: Manifest | None,
    evaluator: Evaluator,
    feed: Feed,
    course: Course,
    shard: Shard,
    progress: Progress,
    updates: int,
) -> Run:
    """Meters and writer of a phase. The writer's memory is allocated at the first save."""
    step = manifest.step if manifest else 0
    sharing = ranks.world() // shard.count  # ranks that work on the same packs
    meters = Meters(
        folder,
        recipe.log,
        start_step=step,
        end_step=min(span.stop, recipe.max_steps or span.stop),
        flops=lambda batch: step_flops(setup.model, batch) // sharing,
        # of the Thinker whole: phases with speech run other parts, and have no utilisation to show
        peak_flops=peak_flops(setup.device) if setup.phase.speech == "off" else 0.0,
        num_skipped=manifest.info["counters"]["skipped"] if manifest else 0,
        enabled=ranks.rank() == 0,
        about=About(
            first_step=span.start,
            total_steps=min(spans(recipe)[-1].stop, recipe.max_steps or spans(recipe)[-1].stop),
            positions=setup.sequence_length * setup.sequences_per_step if setup.encodes else 0,
            leads=shard.leads,
            device=setup.device,
        ),
    )
    saver = Saver(
        folder,
        rank=ranks.rank(),
        world=ranks.world(),
        launch_id=f"{ranks.shared_number():x}",
        keep=recipe.save.keep,
        start_step=step,
        released_pieces=released_pieces,
        warn=meters.say,
    )
    at = Position(step, updates, span.name, final=span == spans(recipe)[-1])
    return Run(recipe, folder, meters, saver, evaluator, identity_of(setup), feed, course, progress, at, shard.leads)


def step_flops(model: Model, batch: Batch) -> int:
    """Forward and backward over a pack: of the Thinker whole, or of an audio encoder and its decoder."""
    if isinstance(model, TranscriberConfig):
        return flops_of(model, batch)
    return training_flops(thinker_of(model), batch.doc_lengths, batch.mel_lengths, batch.grids)


def farewell(folder: Path, stopped: bool) -> None:
    """Where everything is."""
    curves = draw_curves(folder)
    latest = folder / "checkpoints" / "latest"
    print("stopped as asked; the same command goes on from here" if stopped else "done")
    print(f"  run folder  {folder}")
    print(f"  curves      {curves}")
    if latest.is_file():
        print(f"  checkpoint  {latest.parent / latest.read_text().strip()}")


def _silent(_: str) -> None:
    pass
