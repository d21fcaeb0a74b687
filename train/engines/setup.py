"""What every engine starts from, and the choice between them.

recipe, phase -> EngineSetup -> build_engine -> local | deepspeed | megatron      (each imported only when chosen)
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data.types import Batch
from models.config import ThinkerConfig, TranscriberConfig
from models.generate import greedy
from models.init import init_scale, init_tensor, init_weights
from models.layers.saving import Saving, keep_less
from models.omni import Omni
from models.omni_config import OmniConfig
from models.thinker import Thinker
from models.transcriber import Transcriber, transcribe
from train.config import EngineConfig, LossConfig, OptimConfig, Phase
from train.engines import VALUE, WEIGHT, StateReader, StepStats
from train.errors import RecipeError
from train.lora import adapt, freeze_base
from train.lora_config import LoraConfig
from train.loss import IGNORE, Objective, Totals, inputs_of, pictures_of, uniform_share
from train.optim import param_groups, select_trainable
from train.parallel import Model, thinker_of
from train.preference import PreferenceObjective
from train.speech import SpeechObjective
from train.transcribe import TranscribeObjective
from train.waveform import ADVERSARY, WaveformObjective, add_adversary
from train.waveform_config import DECODER_PHASES

KEPT = 3  # tensors of Drawn: queries, keys and values of a layer come in turns
AnyObjective = Objective | SpeechObjective | WaveformObjective | TranscribeObjective
LEFT_OUT = ("code2wav.", f"{ADVERSARY}.", "audio_decoder.")  # parts that weights to start from may lack


@dataclass(frozen=True)
class EngineSetup:
    """Everything an engine is built from. The engine gets configurations, not modules: it decides how to build them."""

    model: Model
    engine: EngineConfig
    optim: OptimConfig
    loss: LossConfig
    phase: Phase
    phase_name: str
    seed: int
    device: torch.device
    sequence_length: int = 0
    """Of the longest pack; 0 where nobody knows."""
    sequences_per_step: int = 0
    """Packs of the global batch; 0 where nobody knows."""
    evaluates: bool = False
    """Whether the run has sets to evaluate on."""
    lora: LoraConfig | None = None
    """Adapters that the model has; they alone learn then."""
    beat: Callable[[str], object] = str
    """Told which part of a step begins (train/heartbeat.py)."""

    @property
    def betas(self) -> tuple[float, float]:
        """AdamW's decay rates."""
        first, second = self.optim.betas
        return first, second

    @property
    def thinker(self) -> ThinkerConfig:
        """The Thinker's sizes."""
        return thinker_of(self.model)

    @property
    def encodes(self) -> bool:
        """Whether the phase runs the Thinker's encoders."""
        return self.phase.speech not in DECODER_PHASES

    def build_objective(self, drawn: bool = True) -> AnyObjective:
        """Model and loss on the CPU in fp32, with the same initial weights on every rank, frozen as the phase says.

        Not `drawn`, it is on the meta device: names, shapes and flags, without a weight.
        """
        recompute = self.engine.recompute
        with contextlib.nullcontext() if drawn else torch.device("meta"):
            if isinstance(self.model, OmniConfig):
                model = Omni(self.model, recompute_experts=recompute)
            elif isinstance(self.model, TranscriberConfig):
                model = Transcriber(self.model)
            else:
                model = Thinker(self.model, recompute_experts=recompute)
        keep_less(model, Saving(self.engine.recompute_layers, self.engine.offload_activations, self.engine.tiles))
        if drawn:
            init_weights(model, self.seed)
        if self.phase.speech == "adversarial" and isinstance(model, Omni):
            add_adversary(model, self.loss.waveform, self.seed)
        if self.lora is not None:
            adapt(model, self.lora, self.seed, drawn)
        select_trainable(model, self.phase, self.phase_name)
        if self.lora is not None:
            freeze_base(model, self.phase_name)
        limit = self.loss.max_logits
        if isinstance(model, Transcriber):
            return TranscribeObjective(model, max_logits=limit)
        if isinstance(model, Thinker):
            return Objective(model, top_k=self.thinker.text.num_experts_per_tok, max_logits=limit)
        if self.phase.speech in DECODER_PHASES:
            objective = WaveformObjective(model, self.loss.waveform)
        elif self.phase.speech == "preference":
            objective = PreferenceObjective(model, self.loss.preference, max_logits=limit)
        else:
            weights = {"text": self.loss.text, "residual": self.loss.residual}
            objective = SpeechObjective(model, self.phase.speech, **weights, max_logits=limit)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise RecipeError(
                f"phases.{self.phase_name}: speech={self.phase.speech} leaves nothing to train of what train names"
            )
        return objective

    def param_groups(self, objective: AnyObjective) -> list[dict[str, Any]]:
        """Optimizer groups over the trainable parameters."""
        return param_groups(objective.model, self.optim)


class Drawn:
    """The initial weights as a StateReader: each tensor is drawn when it is asked for, the last few are kept."""

    step = 0

    def __init__(self, setup: EngineSetup, given: Mapping[str, Tensor]) -> None:
        """`given` are weights that no rule draws."""
        self._setup, self._kept, self._given = setup, OrderedDict[str, Tensor](), given

    def kinds(self, name: str) -> frozenset[str]:
        """Every parameter has a weight."""
        return frozenset({WEIGHT})

    def read(self, kind: str, name: str, shape: Sequence[int], start: int, length: int) -> Tensor:
        """Elements [start, start + length) of the flat tensor, fp32."""
        if name in self._given:
            return self._given[name].cpu().reshape(-1)[start : start + length]
        if name not in self._kept:
            self._kept[name] = whole = torch.empty(tuple(shape))
            init_tensor(name, whole, self._setup.seed, init_scale(self._setup.model, name))
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return self._kept[name].view(-1)[start : start + length]


def stats_of(
    objective: AnyObjective,
    totals: Totals,
    losses_K: Tensor,
    balance: float,
    grad_norm: float,
    shares: Sequence[Tensor],
    applied: bool = True,
) -> StepStats:
    """What a step reports, from sums over the global batch."""
    means = losses_K.tolist()
    means = {t.name: total / max(1, n) for t, total, n in zip(objective.terms, means, totals.targets, strict=True)}
    return StepStats(
        loss=sum(term.weight * means[term.name] for term in objective.terms),
        terms=means,
        balance_loss=balance / max(1, len(shares)),
        grad_norm=grad_norm,
        num_tokens=totals.tokens[0],
        num_targets=sum(totals.targets),
        num_skipped=totals.skipped,
        expert_shares={r.name: share_LE.cpu() for r, share_LE in zip(objective.routers, shares, strict=True)},
        applied=applied,
    )


def first_shares(objective: AnyObjective, device: torch.device) -> list[Tensor]:
    """Expert shares before the first step, [L, E] for each decoder with routers."""
    return [uniform_share(routers.layers, routers.experts).to(device) for routers in objective.routers]


def read_shares(state: StateReader, objective: AnyObjective, device: torch.device) -> list[Tensor]:
    """Expert shares of a checkpoint."""
    found = []
    for routers in objective.routers:
        shape = routers.layers, routers.experts
        values = state.read(VALUE, routers.name, shape, 0, routers.layers * routers.experts)
        found.append(values.view(shape).to(device, copy=True))
    return found


def starts_anew(state: StateReader, name: str) -> bool:
    """Whether a parameter that learns keeps its first weights: of a part that the state may lack, and does."""
    return name.startswith(LEFT_OUT) and not state.kinds(name)


def read_whole(objective: AnyObjective, batch: Batch) -> tuple[Tensor, Tensor, Any]:
    """Last states of what reads a batch, the labels beside them, and its head."""
    if isinstance(objective, TranscribeObjective):
        return *objective.read(replace(batch, windows=())), objective.transcriber.audio_decoder.head
    hidden_TD, _ = objective.thinker(*inputs_of(batch), **pictures_of(batch))
    return hidden_TD, batch.labels_T, objective.thinker.lm_head


def sums_of_eval(objective: AnyObjective, batch: Batch) -> Mapping[str, float]:
    """Sums over a batch: `loss_sum`, `targets`, `correct` (most likely token right)."""
    hidden_TD, labels_T, lm_head = read_whole(objective, batch)
    index_N = (labels_T != IGNORE).nonzero().squeeze(1)
    head = partial(_loss_and_right, target_N=labels_T.index_select(0, index_N), most=objective.max_logits)
    loss, right = lm_head(hidden_TD.index_select(0, index_N), head).tolist()
    return {"loss_sum": loss, "targets": float(len(index_N)), "correct": right}


def _loss_and_right(hidden_ND: Tensor, weight_VD: Tensor, *, target_N: Tensor, most: int) -> Tensor:
    """Sum of the cross-entropy, and tokens that are the most likely ones, float64 [2]; `most` logits at a time."""
    sums, rows = hidden_ND.new_zeros(2, dtype=torch.float64), max(1, most // len(weight_VD))
    for start in range(0, len(target_N), rows):
        logits_CV, target_C = F.linear(hidden_ND[start : start + rows], weight_VD).float(), target_N[start:][:rows]
        right = (logits_CV.argmax(-1) == target_C).sum()
        sums += torch.stack([F.cross_entropy(logits_CV, target_C, reduction="sum"), right])
    return sums


def continue_greedily(
    objective: AnyObjective,
    batch: Batch,
    max_new_tokens: int,
    stop_id: int,
    all_done: Callable[[bool], bool] = bool,
) -> list[list[int]]:
    """Greedy answers to a batch of prompts, one per document."""
    if isinstance(objective, TranscribeObjective):
        return transcribe(objective.transcriber, batch, max_new_tokens, stop_id, all_done)
    return greedy(objective.thinker, batch, max_new_tokens, stop_id, all_done)
