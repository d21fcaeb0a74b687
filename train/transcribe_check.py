"""What of a recipe cannot be in a run that trains an audio encoder with a text decoder."""

from __future__ import annotations

from collections.abc import Iterator

from train.config import Recipe
from train.errors import RecipeError
from train.suites import CHOOSE
from train.suites.registry import suite_of
from train.transcribe_config import TranscribeConfig


def check_transcriber(recipe: Recipe) -> None:
    """Raise RecipeError for settings that a recipe with `model.audio_decoder` cannot have."""
    if recipe.model.audio_decoder is None:
        if recipe.loss.transcribe != TranscribeConfig():
            raise RecipeError("loss.transcribe: the model has no audio_decoder, and no windows are drawn for it")
        return
    for problem in _problems(recipe):
        raise RecipeError(f"model.audio_decoder: encoder and decoder alone are trained: {problem}")


def _problems(recipe: Recipe) -> Iterator[str]:
    model = recipe.model
    if model.talker is not None or model.code2wav is not None:
        yield "set model.talker=null and model.code2wav=null"
    if model.vision is not None:
        yield "set model.vision=null"
    for name in recipe.eval.sets:
        if suite_of(recipe.eval, name).ASKS == CHOOSE:
            yield f"eval.sets.{name} asks for the likelihood of choices; take a suite of answers"
    for name, phase in recipe.phases.items():
        if phase.speech != "off":
            yield f"phases.{name}.speech={phase.speech} has nobody to speak; leave it out"
