"""What is data parallel alone, whatever degrees the recipe has for Thinker and Talker: phases of the waveform decoder,
and runs of an audio encoder with its text decoder.

    every rank's own packs --decoder, losses--> share of the global loss --> distributed optimizer

These are small and nothing of them is split, so every rank reads packs of its own. In phases of the waveform decoder
Thinker and Talker are not made: their weights lie in host memory, in parts, until the next checkpoint. Media are
encoded where they are read, micro-batch by micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from data.types import Batch
from train.config import EngineConfig
from train.engines.megatron.passes import Parts, as_loss
from train.engines.megatron.stages import Share
from train.transcribe import TranscribeObjective
from train.waveform import ADVERSARY, WaveformObjective

WHOLE = {"tp": 1, "ep": 1, "pp": 1, "cp": 1, "expert_tp": 1, "interleave": 1}


Alone = WaveformObjective | TranscribeObjective


def parts_of(objective: Alone) -> dict[str, nn.Module]:
    """The modules that are made, by their names in the model."""
    if isinstance(objective, TranscribeObjective):
        return dict(objective.transcriber.named_children())
    adversary = {} if objective.adversary is None else {ADVERSARY: objective.adversary}
    return {"code2wav": objective.code2wav, **adversary}


def undivided(engine: EngineConfig) -> EngineConfig:
    """The same settings with every degree 1."""
    return replace(engine, **WHOLE)


class WaveStage(MegatronModule):
    """What learns, under its names, and the loss over it."""

    model_type = ModelType.encoder_or_decoder
    share_embeddings_and_output_weights = False
    pre_process = post_process = True
    vp_stage = None
    objective: Alone
    found: list[Tensor]

    def __init__(self, objective: Alone, config: TransformerConfig) -> None:
        """`objective` is on the meta device, its discriminators maybe not; what learns is moved here, unset."""
        super().__init__(config=config)
        for name, part in parts_of(objective).items():
            self.add_module(name, part.to(config.params_dtype))
        self.__dict__["objective"] = objective  # which holds Thinker and Talker too: no part of this module

    def set_input_tensor(self, input_tensor: Sequence[Tensor]) -> None:
        """Called by Megatron's schedules; there is no stage before."""

    def forward(self, batch: Batch, share: Share) -> Tensor:
        """The batch's share of the loss; its sums [K] are left in `found`."""
        losses_K = self.objective(batch).losses_K
        self.found.append(losses_K.detach())
        return share(losses_K)

    def begin(self) -> list[Tensor]:
        """Start a step; the list that its sums go to."""
        self.__dict__["found"] = []
        return self.found


class WavePasses:
    """The one pass of a step."""

    tap, media, counts_kinds = 0, None, False

    def __init__(self, parts: Parts) -> None:
        self.stage = parts.front

    def step(self, batches: Sequence[Batch], think: Share, speak: Share) -> list[Tensor]:
        """Forward and backward over micro-batches on the device; sums of the terms found here, [K]."""
        found = self.stage.module.begin()
        with self.stage.no_sync():
            get_forward_backward_func()(
                forward_step_func=lambda packs, stage: (stage(next(packs), speak), as_loss),
                data_iterator=iter(batches),
                model=[self.stage],
                num_microbatches=len(batches),
                seq_length=1,
                micro_batch_size=1,
                forward_only=False,
            )
        return [torch.stack(found).sum(0)]
