"""The model on this rank: stages of the Thinker, stages of the Talker, and the Talker's front.

A Thinker that no pass runs whole is built whole all the same: evaluation asks it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from models.omni_config import OmniConfig
from models.talker import Talker
from train.engines.megatron.layout import Peers, decoder_config
from train.engines.megatron.parts import made, shell
from train.engines.megatron.passes import Parts
from train.engines.megatron.stages import TalkerStage, ThinkerStage
from train.engines.megatron.waveform import Alone, WaveStage, parts_of, undivided
from train.engines.megatron.weights import Degrees, Placed, place_parameters
from train.engines.setup import AnyObjective, EngineSetup
from train.errors import EngineError
from train.speech import SpeechObjective
from train.stages import stage_layers, stages_of
from train.waveform import ADVERSARY


class Front(MegatronModule):
    """The Talker's front under its names."""

    share_embeddings_and_output_weights = False
    pre_process = post_process = False

    def __init__(self, talker: Talker, config: TransformerConfig) -> None:
        super().__init__(config=config)
        self.talker = talker


@dataclass(frozen=True)
class Built:
    """Parts before they are wrapped, where their parameters belong, and layers of each of the Thinker's chunks."""

    parts: Any  # Parts of modules
    placed: dict[nn.Parameter, Placed]
    thinker_layers: list[int]


def build_parts(setup: EngineSetup, objective: AnyObjective, peers: Peers) -> Built:
    """Make this rank's modules with the flags of `objective`'s parameters. Weights are unset."""
    engine, limit, chunks = setup.engine, setup.loss.max_logits, range(peers.chunks)
    layers = stages_of(setup.model, engine.pp, engine.interleave, engine.media_share)
    text = setup.thinker.text
    config = decoder_config(text, engine, layers, setup.device)
    thinker = [ThinkerStage(setup.thinker, config, engine, layers, peers, chunk, limit) for chunk in chunks]
    omni = setup.model if isinstance(setup.model, OmniConfig) else None
    prefix = "thinker." if omni is not None else ""
    placed: dict[nn.Parameter, Placed] = {}
    degrees = Degrees.here()
    for stage in thinker:
        placed |= place_parameters(stage, prefix, text, degrees, _numbers(stage))
    talker, front = [], None
    if omni is not None and omni.talker is not None and isinstance(objective, SpeechObjective):
        speech = omni.talker.text
        through = stage_layers(speech.num_hidden_layers, engine.pp, engine.interleave)
        config = decoder_config(speech, engine, through, setup.device)
        talker = [TalkerStage(speech, config, engine, through, peers, chunk, limit) for chunk in chunks]
        for stage in talker:
            placed |= place_parameters(stage, "talker.", speech, degrees, _numbers(stage))
        if peers.is_last:
            with torch.device("meta"):
                whole = Talker(omni.talker)
            front = Front(made(shell(whole), config), config)
            placed |= place_parameters(front, "", speech, degrees, {})
    _set_flags(placed, dict(objective.model.named_parameters()))
    parts = Parts(thinker, talker, front)  # type: ignore[arg-type]
    return Built(parts, placed, layers)


def build_alone(setup: EngineSetup, objective: Alone) -> Built:
    """Make what is trained without a Thinker. Weights are unset, but those of discriminators."""
    engine = undivided(setup.engine)
    text = setup.thinker.text
    config = decoder_config(text, engine, [text.num_hidden_layers], setup.device)
    flags = {name: parameter.requires_grad for name, parameter in objective.model.named_parameters()}
    for name, part in parts_of(objective).items():
        part.to(setup.device) if name == ADVERSARY else part.to_empty(device=setup.device)
    stage = WaveStage(objective, config)
    placed = place_parameters(stage, "", text, Degrees.here(), {})
    for name, parameter in stage.named_parameters():
        parameter.requires_grad_(flags[name])
    return Built(Parts((), (), stage), placed, [text.num_hidden_layers])


def _numbers(stage: Any) -> dict[int, int]:
    return {place: layer.layer_number - 1 for place, layer in enumerate(stage.decoder.layers)}


def _set_flags(placed: dict[nn.Parameter, Placed], named: dict[str, nn.Parameter]) -> None:
    for parameter, where in placed.items():
        names = sorted({run.name for run in where.runs})
        flags = {named[name].requires_grad for name in names}
        if len(flags) > 1:
            raise EngineError(
                f"phases: under megatron {', '.join(names)} are one parameter: train or freeze them together"
            )
        parameter.requires_grad_(flags.pop())
