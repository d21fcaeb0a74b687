"""What every engine starts from, and the choice between them.

recipe, phase -> EngineSetup -> build_engine -> local | deepspeed      (each imported only when chosen)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data.types import Batch
from models.config import ThinkerConfig
from models.generate import greedy
from models.init import init_weights
from models.thinker import Thinker
from train.engines import VALUE, StateReader, StepStats
from train.loss import IGNORE, Objective, Totals, inputs_of, pictures_of, uniform_share
from train.optim import param_groups, select_trainable
from train.recipe import EngineConfig, LossConfig, OptimConfig, Phase


@dataclass(frozen=True)
class EngineSetup:
    """Everything an engine is built from. The engine gets configurations, not modules: it decides how to build them."""

    model: ThinkerConfig
    engine: EngineConfig
    optim: OptimConfig
    loss: LossConfig
    phase: Phase
    phase_name: str
    seed: int
    device: torch.device

    @property
    def betas(self) -> tuple[float, float]:
        """AdamW's decay rates."""
        first, second = self.optim.betas
        return first, second

    def build_objective(self) -> Objective:
        """Model and loss on the CPU in fp32, with the same initial weights on every rank, frozen as the phase says."""
        thinker = Thinker(self.model, recompute_experts=self.engine.recompute)
        init_weights(thinker, self.seed)
        select_trainable(thinker, self.phase, self.phase_name)
        return Objective(thinker, top_k=self.model.text.num_experts_per_tok, max_logits=self.loss.max_logits)

    def param_groups(self, objective: Objective) -> list[dict[str, Any]]:
        """Optimizer groups over the trainable parameters."""
        return param_groups(objective.model, self.optim)


def stats_of(
    objective: Objective, totals: Totals, losses_K: Tensor, balance: float, grad_norm: float, shares: Sequence[Tensor]
) -> StepStats:
    """What a step reports, from sums over the global batch."""
    means = losses_K.tolist()
    means = {t.name: total / max(1, n) for t, total, n in zip(objective.terms, means, totals.targets, strict=True)}
    return StepStats(
        loss=sum(term.weight * means[term.name] for term in objective.terms),
        terms=means,
        balance_loss=balance / len(shares),
        grad_norm=grad_norm,
        num_tokens=totals.tokens[0],
        num_targets=sum(totals.targets),
        num_skipped=totals.skipped,
        expert_shares={r.name: share_LE.cpu() for r, share_LE in zip(objective.routers, shares, strict=True)},
    )


def first_shares(objective: Objective, device: torch.device) -> list[Tensor]:
    """Expert shares before the first step, [L, E] for each decoder with routers."""
    return [uniform_share(routers.layers, routers.experts).to(device) for routers in objective.routers]


def read_shares(state: StateReader, objective: Objective, device: torch.device) -> list[Tensor]:
    """Expert shares of a checkpoint."""
    found = []
    for routers in objective.routers:
        shape = routers.layers, routers.experts
        values = state.read(VALUE, routers.name, shape, 0, routers.layers * routers.experts)
        found.append(values.view(shape).to(device, copy=True))
    return found


def sums_of_eval(objective: Objective, batch: Batch) -> Mapping[str, float]:
    """Sums over a batch: `loss_sum`, `targets`, `correct` (most likely token right)."""
    hidden_TD, _ = objective.thinker(*inputs_of(batch), **pictures_of(batch))
    index_N = (batch.labels_T != IGNORE).nonzero().squeeze(1)
    logits_NV = objective.thinker.lm_head(hidden_TD.index_select(0, index_N)).float()
    target_N = batch.labels_T.index_select(0, index_N)
    return {
        "loss_sum": F.cross_entropy(logits_NV, target_N, reduction="sum").item(),
        "targets": float(len(target_N)),
        "correct": float((logits_NV.argmax(-1) == target_N).sum()),
    }


def continue_greedily(
    objective: Objective,
    batch: Batch,
    max_new_tokens: int,
    stop_id: int,
    all_done: Callable[[bool], bool] = bool,
) -> list[list[int]]:
    """Greedy answers to a batch of prompts, one per document."""
    return greedy(objective.thinker, batch, max_new_tokens, stop_id, all_done)
