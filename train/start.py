"""What a run starts from: the weights that `init` names, from one place or from several.

    init=A,B  fresh=[...]  -->  of each parameter: A's, or B's, or, where `fresh` allows it, a new model's

So a curriculum takes the audio encoder of one stage and the language model of another. A parameter that nobody gives is
an error, never silently a random one.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from models.hf import released_pieces, released_tensors
from train.checkpoint import CheckpointReader, WeightsReader, open_weights
from train.config import Recipe
from train.engines import WEIGHT, StateReader
from train.engines.setup import Drawn, EngineSetup
from train.errors import CheckpointError, RecipeError
from train.finetune import open_released_weights, with_adapters
from train.handover import handed_over
from train.optim import matches
from train.waveform_config import DECODER_PHASES


class Sources:
    """A StateReader over several: the first that holds a parameter gives it."""

    step = 0

    def __init__(self, named: Sequence[tuple[str, StateReader]], fresh: Sequence[str], drawn: StateReader) -> None:
        """`named`: folder and reader of each; parameters that fit `fresh` and are in none of them come from `drawn`."""
        self._named, self._fresh, self._drawn = named, fresh, drawn
        readers = (reader for _, reader in named)
        self._held = [set(reader.names()) for reader in readers if isinstance(reader, CheckpointReader | WeightsReader)]

    def kinds(self, name: str) -> frozenset[str]:
        """See train.engines.StateReader. Weights of a part that may begin anew count as held."""
        return frozenset({WEIGHT} if self._from(name, (1,)) is not None or matches(name, self._fresh) else ())

    def read(self, kind: str, name: str, shape: Sequence[int], start: int, length: int) -> Tensor:
        """See train.engines.StateReader."""
        source = self._from(name, shape)
        if source is None and matches(name, self._fresh):
            source = self._drawn
        if source is None:
            folders = ", ".join(folder for folder, _ in self._named)
            raise CheckpointError(f"init={folders}: none holds {name}; if it is to begin anew, name it in fresh=[...]")
        return source.read(kind, name, shape, start, length)

    def _from(self, name: str, shape: Sequence[int]) -> StateReader | None:
        whole = tuple(shape) if len(shape) > 1 or ".mlp.experts." not in name else (1, 2, 1)  # any: the name counts
        released = released_tensors(name, whole)[0][0]
        return next(
            (reader for held, (_, reader) in zip(self._held, self._named, strict=True) if released in held), None
        )


def open_init(recipe: Recipe, setup: EngineSetup) -> tuple[StateReader, str]:
    """The weights that a new run starts from, and a line on what begins anew, "" for nothing.

    Raises CheckpointError for a place that has none.
    """
    if recipe.model.weights is not None:
        return with_adapters(recipe, open_released_weights(recipe, setup.model)), ""
    state, line = _from_places(recipe, setup)
    return with_adapters(recipe, state), line


def _from_places(recipe: Recipe, setup: EngineSetup) -> tuple[StateReader, str]:
    assert recipe.init is not None
    folders = [folder.strip() for folder in recipe.init.split(",")]
    if recipe.carry == "optimizer":
        if len(folders) > 1 or recipe.fresh:
            raise RecipeError("carry=optimizer takes the state of one run: give one init, and no fresh")
    elif len(folders) > 1 or recipe.fresh:
        named = [(folder, open_weights(folder, released_pieces)) for folder in folders]
        return Sources(named, recipe.fresh, Drawn(setup, {})), ""
    weights = open_weights(folders[0], released_pieces)
    if setup.phase.speech in DECODER_PHASES and not weights.kinds("code2wav.code_embedding.weight"):
        return weights, f"{recipe.init} has no code2wav: the decoder begins anew"
    return handed_over(recipe.init, weights, setup)


def carried_steps(recipe: Recipe, state: StateReader) -> int:
    """Updates that AdamW's moments in `init` are of, for `carry=optimizer`; 0 otherwise, and they begin anew.

    Raises CheckpointError where `init` has no moments.
    """
    if recipe.carry != "optimizer":
        return 0
    steps = state.manifest.info.get("optimizer_step", 0) if isinstance(state, CheckpointReader) else 0
    if not steps:
        raise CheckpointError(f"init={recipe.init}: has no optimizer state; set carry=weights, or take a run")
    return int(steps)
