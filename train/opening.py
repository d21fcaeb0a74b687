"""What a phase is made of, opened one by one: sizes, engine's setup, first state, heart, guard, meters and writer.

recipe, span, manifest --> EngineSetup, StateReader, Guard, Run          (train/main.py puts them together)
"""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from data.tokenizer import AUDIO_PAD, IMAGE_PAD, VIDEO_PAD, Tokenizer
from data.types import Batch
from models.config import ThinkerConfig, TranscriberConfig
from models.flops import training_flops
from models.hf import released_pieces
from models.omni_config import OmniConfig
from train import ranks
from train.checkpoint import CheckpointReader, Manifest, Saver
from train.config import Recipe
from train.engines import Shard, StateReader
from train.engines.setup import EngineSetup
from train.errors import RecipeError
from train.evaluate import Evaluator
from train.feed import Course, Feed
from train.finetune import identity_of
from train.guard import Back, Guard
from train.hardware import peak_flops
from train.heartbeat import FOLDER, Heart
from train.layout import joining_ids
from train.metrics import About, Meters
from train.parallel import Model, thinker_of
from train.progress import Progress
from train.recipe import Span, spans
from train.run import Position, Run
from train.start import carried_steps, open_init
from train.transcribe import flops_of


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


def open_heart(recipe: Recipe, folder: Path) -> Heart:
    """What notes where this rank is. Collective."""
    return Heart(
        folder / FOLDER,
        rank=ranks.rank(),
        world=ranks.world(),
        launch=f"{ranks.shared_number():x}",
        hang_s=recipe.guard.hang_s,
        slow=recipe.guard.hang_slow,
    )


def open_guard(
    recipe: Recipe, setup: EngineSetup, span: Span, manifest: Manifest | None, back: Back | None, shard: Shard
) -> Guard:
    """What looks at the steps of a phase, as a checkpoint within it left it. Collective."""
    hosts = [host for (host,) in ranks.gather_text([socket.gethostname()])]
    within = manifest is not None and manifest.step > span.start
    memory = manifest.info.get("guard", {}) if manifest is not None and within else {}
    return Guard(recipe.guard, span, setup.device, memory=memory, back=back, leads=shard.leads, hosts=hosts)


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
    at: Position,
    guard: Guard,
    heart: Heart,
) -> Run:
    """Meters and writer of a phase. The writer's memory is allocated at the first save."""
    sharing = ranks.world() // shard.count  # ranks that work on the same packs
    meters = Meters(
        folder,
        recipe.log,
        start_step=at.step,
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
        start_step=at.step,
        released_pieces=released_pieces,
        warn=meters.say,
    )
    parts = recipe, folder, meters, saver, evaluator, identity_of(setup), feed, course
    return Run(*parts, progress, at, shard.leads, guard, heart)


def step_flops(model: Model, batch: Batch) -> int:
    """Forward and backward over a pack: of the Thinker whole, or of an audio encoder and its decoder."""
    if isinstance(model, TranscriberConfig):
        return flops_of(model, batch)
    return training_flops(thinker_of(model), batch.doc_lengths, batch.mel_lengths, batch.grids)
