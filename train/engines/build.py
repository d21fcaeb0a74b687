"""The choice of an engine; each is imported only when it is chosen."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import fields
from importlib.util import find_spec

import torch

from models.config import TranscriberConfig
from train import ranks
from train.engines import Engine
from train.engines.setup import EngineSetup
from train.errors import EngineError
from train.fits import GB, check_fits
from train.lora import check_engine
from train.parallel import Degrees, Layout, check_layout, check_long, check_sequence
from train.waveform_config import DECODER_PHASES


def build_engine(setup: EngineSetup) -> Engine:
    """The engine that `engine.name` asks for. Degrees that cannot be are refused before a model is made."""
    if setup.engine.threads:
        torch.set_num_threads(setup.engine.threads)
    ranks.start(setup.device)
    if setup.lora is not None:
        named = setup.build_objective(drawn=False).model.named_parameters()
        check_engine(setup.engine, (name for name, _ in named))
    _check_long(setup)
    if setup.engine.name == "deepspeed":
        from train.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(setup)
    if setup.engine.name == "megatron":
        return _megatron(setup)
    from train.engines.local import LocalEngine

    return LocalEngine(setup)


def layout_of(setup: EngineSetup) -> Layout:
    """Its degrees on the processes there are."""
    return Layout(**{each.name: getattr(setup.engine, each.name) for each in fields(Degrees)}, world=ranks.world())


def _check_long(setup: EngineSetup) -> None:
    """Refuse settings for long packs that do not go together."""
    layout, phase = layout_of(setup), f"phases.{setup.phase_name}.speech={setup.phase.speech}"
    check_long(setup.model, layout)
    if layout.name != "deepspeed" or layout.cp == 1:
        return
    if setup.phase.speech != "off":
        raise EngineError(
            f"{phase}: engine.cp={layout.cp} under deepspeed is for phases of the Thinker alone; set engine.cp=1 or "
            "take engine.name=megatron"
        )
    if not setup.engine.share_encoders:
        raise EngineError(
            f"engine.share_encoders=false: engine.cp={layout.cp} under deepspeed needs it; set it to true"
        )


def _check_memory(setup: EngineSetup, layout: Layout) -> None:
    """Refuse what cannot fit, as the layout advisor counts it."""
    device, limit = setup.device, setup.engine.memory_gb * GB
    if device.type == "cuda" and not limit:
        limit = torch.cuda.get_device_properties(device).total_memory
    if limit:
        learns, packs = _learning(setup), max(1, setup.sequences_per_step // layout.dp)
        # a frozen decoder keeps less than the count says: then what is refused is too large without activations
        tokens = setup.sequence_length if "decoder" in learns else 2 * layout.cp * layout.tp
        kernels = "cuda" if device.type == "cuda" else "cpu"
        arguments = tokens, packs, setup.loss.max_logits, limit
        share = setup.engine.media_share
        check_fits(setup.model, layout, *arguments, media_share=share, train=learns, kernels=kernels)


def _learning(setup: EngineSetup) -> set[str]:
    """Which parts of the model the phase trains, as train.engine_state.OWNERS calls them."""
    named = setup.build_objective(drawn=False).model.named_parameters()
    names = [name.removeprefix("thinker.") for name, parameter in named if parameter.requires_grad]
    owners = {"audio_tower": "audio", "visual": "vision", "talker": "talker"}
    return {owners.get(name.split(".")[0], "decoder") for name in names}


def _wanted(setup: EngineSetup) -> Iterator[tuple[str, str, str]]:
    """Settings, the packages that they need, and what to do without."""
    yield "engine.name=megatron", "megatron", "pip install 'omniloom[megatron]'"
    if setup.engine.dispatcher == "deepep":
        yield "engine.dispatcher=deepep", "deep_ep", "install it, or set engine.dispatcher=alltoall"
    if setup.engine.transformer_engine:
        yield "engine.transformer_engine=true", "transformer_engine", "install it, or leave the setting out"


def _megatron(setup: EngineSetup) -> Engine:
    layout = layout_of(setup)
    check_layout(setup.model, layout)
    if setup.sequence_length and setup.encodes and not isinstance(setup.model, TranscriberConfig):
        check_sequence(layout, setup.sequence_length)
        _check_memory(setup, layout)
    if setup.phase.speech in DECODER_PHASES and setup.evaluates:
        raise EngineError(
            f"phases.{setup.phase_name}.speech={setup.phase.speech}: under engine.name=megatron only the waveform "
            "decoder is made, and nobody answers evaluations: set eval.sets={} or take another engine for this phase"
        )
    for setting, package, hint in _wanted(setup):
        if find_spec(package) is None:
            raise EngineError(f"{setting} needs the package {package}: {hint}")
    # that TransformerEngine and apex are not there, though a setting asks for them; names that torch is to drop
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    from train.engines.megatron.engine import MegatronEngine

    return MegatronEngine(setup)
