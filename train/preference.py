"""Preference optimisation of the Talker: DPO on pairs of code sequences, as sums over pairs.

    conversation --Thinker, frozen, up to the Talker's layer, once--> media rows --twice--.
    chosen, rejected plans --TalkerPlan [chosen 0, rejected 0, chosen 1, ...]-------------+--> Talker
      --> logprob of each document [N] --.
    reference's, from the pairs file [N] -+--dpo_sums--> preference, sft, margin, right ones

    reward = beta * (log p(codes) - log p_reference(codes))
    loss   = -log sigmoid(reward of chosen - reward of rejected)           Rafailov et al. 2023, eq. 7

Qwen3-Omni's report says of its third Talker stage no more than that it is DPO on multilingual pairs; beta is
Rafailov's. Optional: rewards per code, so that longer speech is not favoured (length-normalised DPO: Tulu 3, Lambert
et al. 2024, section 5); cross-entropy per code of the chosen sequence on top (Pang et al. 2024; Llama 3 adds
0.2 of it, Dubey et al. 2024, section 4.1.4).

The reference is the Talker that spoke the candidates: launch.preferences keeps its log-probabilities beside the pairs
(data/pair_store.py). So a resumed run has the same reference whatever the engine, and nothing of it is in a checkpoint.

A sequence's probability is that of its first codes and its end, and with `residual_weight` 1 that of all its codes. The
residual codebooks are most of the codes and of the cost, and say least of the words, so they are left out by default;
what only they need is frozen then: weight decay would wear it away.

Sums and the count of pairs, never means: shares of any split that leaves pairs together add up (train/loss.py).

Cost: the Talker runs on both sequences of a pair. No more than `max_logits` logits exist at a time; they are computed
again in backward, since each document's weight in the gradient is known only then.

Letters: N documents (2 for each pair), P positions, F frames, D hidden, V codes, H hidden of the Thinker, C chunk,
M multimodal rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data.types import Batch, SpeechPairs
from models.omni import Omni
from models.say import media_states
from models.talker import Talker
from models.talker_inputs import IGNORE, TalkerPlan, join
from train.errors import RecipeError
from train.loss import MAX_LOGITS, Term, Totals
from train.speech import SpeechObjective

TERMS = ("preference", "sft", "margin", "right")


@dataclass(frozen=True)
class PreferenceConfig:
    """Settings of the loss; sources above."""

    beta: float = 0.1
    residual_weight: float = 0.0
    """Of the residual codebooks' log-probabilities; 1 is the whole sequence's."""
    length_normalised: bool = False
    """Rewards per code: beta then is larger, 5 in Tulu 3."""
    sft_weight: float = 0.0
    """Of the cross-entropy per code of the chosen sequences."""

    def __post_init__(self) -> None:
        """Reject what would turn the preference round."""
        if not 0 < self.beta < math.inf:
            raise RecipeError(f"beta must be above 0, not {self.beta}")
        for name in ("residual_weight", "sft_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise RecipeError(f"{name} must not be below 0, not {getattr(self, name)}")


class PreferenceObjective(SpeechObjective):
    """A train.loss.Objective whose batches hold pairs: the Thinker is frozen, the Talker learns."""

    def __init__(self, omni: Omni, config: PreferenceConfig, *, max_logits: int = MAX_LOGITS) -> None:
        super().__init__(omni, "frozen", max_logits=max_logits)
        self.preference = config
        weights = (1.0, config.sft_weight, 0.0, 0.0)  # of TERMS: the last two are only told
        self.terms = tuple(Term(name, weight) for name, weight in zip(TERMS, weights, strict=True))
        assert omni.talker is not None
        if not config.residual_weight:
            for name, parameter in omni.talker.code_predictor.named_parameters():
                if "codec_embedding" not in name:  # which the Talker itself hears
                    parameter.requires_grad_(False)

    def pairs(self, batch: Batch) -> SpeechPairs:
        """What a batch holds; one without tokens has none."""
        if isinstance(batch.speech, SpeechPairs):
            return batch.speech
        return SpeechPairs.join(lambda parts: super(PreferenceObjective, self).plan(batch), ())

    def plan(self, batch: Batch) -> TalkerPlan:
        """The documents of all pairs, the chosen one of each before the rejected one."""
        (plan,) = self.pairs(batch).parts
        assert isinstance(plan, TalkerPlan)
        return plan

    def totals(self, batches: Sequence[Batch]) -> Totals:
        """Count this rank's micro-batches: every term is a sum over pairs."""
        plans = [self.plan(batch) for batch in batches]
        pairs = sum(len(plan.doc_lengths) for plan in plans) // 2
        positions = sum(sum(plan.doc_lengths) for plan in plans)
        return Totals(sum(len(batch.skipped) for batch in batches), (pairs,) * len(TERMS), (positions,))

    @torch.no_grad()
    def reference(self, batch: Batch) -> Tensor:
        """What a pairs file keeps of this Talker: fp32 [N, 2], of first codes with the end, and of residual codes."""
        plan = self.plan(batch).to(batch.mel_FM.device)
        media_MH = media_states(self.omni, batch, always=True)
        talker, hidden_PD, _ = self._run_talker(plan, twice(media_MH, media_counts(plan)))
        return logprob_parts(talker, hidden_PD, plan, residual=True, max_logits=self.max_logits)

    def _speak(self, batch: Batch, media_MH: Tensor | None) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Sums of TERMS, and the logits of the Talker's routers."""
        assert media_MH is not None
        plan, weight = self.plan(batch).to(batch.mel_FM.device), self.preference.residual_weight
        talker, hidden_PD, logits = self._run_talker(plan, twice(media_MH, media_counts(plan)))
        logprobs_N = sequence_logprobs(talker, hidden_PD, plan, residual_weight=weight, max_logits=self.max_logits)
        first_N, residual_N = self.pairs(batch).logprobs_N2.to(logprobs_N).unbind(1)
        sums = dpo_sums(logprobs_N, first_N + weight * residual_N, code_weights(plan, weight), self.preference)
        return [sums[name] for name in TERMS], logits


def pair(chosen: Sequence[TalkerPlan], rejected: Sequence[TalkerPlan], num_code_groups: int) -> TalkerPlan:
    """One plan of 2 N documents, each chosen one followed by its rejected one. Media rows follow in that order.

    Raises ValueError where there are not as many of one as of the other.
    """
    if len(chosen) != len(rejected):
        raise ValueError(f"{len(chosen)} chosen documents for {len(rejected)} rejected ones: pairs need one of each")
    return join([plan for two in zip(chosen, rejected, strict=True) for plan in two], num_code_groups)


def twice(rows_M: Tensor, counts: Sequence[int]) -> Tensor:
    """Media rows of N conversations, `counts` each -> those of the plan's documents: every conversation's twice."""
    return torch.cat([rows_M[:0], *(part for rows in rows_M.split(list(counts)) for part in (rows, rows))])


def media_counts(plan: TalkerPlan) -> list[int]:
    """Media rows of each pair's conversation: those of its chosen document, which its rejected one has too."""
    lengths = torch.tensor([0, *plan.doc_lengths]).cumsum(0)
    document_M = torch.searchsorted(lengths, plan.multimodal_places_M.cpu(), right=True) - 1
    return torch.bincount(document_M, minlength=len(plan.doc_lengths))[0::2].tolist()


def sequence_logprobs(
    talker: Talker,
    hidden_PD: Tensor,
    plan: TalkerPlan,
    *,
    residual_weight: float = 0.0,
    max_logits: int = MAX_LOGITS,
) -> Tensor:
    """Summed log-probability in nats of the codes of each document, fp32 [N], with gradient.

    hidden [P, D] is Talker.forward's for the inputs of `plan`, on its device. First codes and the end count once,
    residual codes `residual_weight` times; at 0 they are not computed, and the code predictor's gradients are zero.
    """
    parts_N2 = logprob_parts(talker, hidden_PD, plan, residual=residual_weight > 0, max_logits=max_logits)
    return parts_N2[:, 0] + residual_weight * parts_N2[:, 1]


def logprob_parts(
    talker: Talker, hidden_PD: Tensor, plan: TalkerPlan, *, residual: bool, max_logits: int = MAX_LOGITS
) -> Tensor:
    """As `sequence_logprobs`, fp32 [N, 2]: of first codes and the end, and of residual codes, 0 where not asked for."""
    positions_N = (plan.targets_P != IGNORE).nonzero().squeeze(1)
    targets_N = plan.targets_P.index_select(0, positions_N)
    first_N = talker.codec_head(hidden_PD.index_select(0, positions_N), chunked_logprobs(targets_N, max_logits))
    none_P = hidden_PD.new_zeros(len(hidden_PD), dtype=torch.float32)
    first_P, residual_P = none_P.index_add(0, positions_N, first_N), none_P
    places_F, codes_GF = plan.frame_places_F - 1, plan.codes_GF  # the positions that predict the frames
    if not residual:
        places_F, codes_GF = places_F[:0], codes_GF[:, :0]
    states_FRD = talker.residual_states(hidden_PD.index_select(0, places_F), codes_GF)
    for r, head in enumerate(talker.code_predictor.lm_head):
        each_F = head(states_FRD[:, r], chunked_logprobs(codes_GF[r + 1], max_logits))
        residual_P = residual_P.index_add(0, places_F, each_F)
    return per_document(torch.stack([first_P, residual_P], 1), plan)


def code_weights(plan: TalkerPlan, residual_weight: float = 0.0) -> Tensor:
    """Codes of each document that `sequence_logprobs` sums, with their weights: fp32 [N]."""
    weights_P = (plan.targets_P != IGNORE).float()
    extra_F = residual_weight * (len(plan.codes_GF) - 1) * torch.ones_like(plan.frame_places_F, dtype=torch.float32)
    return per_document(weights_P.index_add(0, plan.frame_places_F - 1, extra_F), plan)


def dpo_sums(logprobs_N: Tensor, reference_N: Tensor, codes_N: Tensor, config: PreferenceConfig) -> dict[str, Tensor]:
    """Sums over pairs, fp32 scalars. Documents alternate, chosen first; divide by the pairs of the global batch.

    preference, the loss, and sft with gradient; margin and right (pairs in the right order) without.
    Raises ValueError for an odd number of documents or for shapes that differ.
    """
    if len(logprobs_N) % 2 or not logprobs_N.shape == reference_N.shape == codes_N.shape:
        raise ValueError(
            f"policy {list(logprobs_N.shape)}, reference {list(reference_N.shape)} and codes {list(codes_N.shape)} "
            "must be one number for each document, two documents a pair"
        )
    rewards_N = config.beta * (logprobs_N - reference_N.detach())
    if config.length_normalised:
        rewards_N = rewards_N / codes_N.clamp(min=1.0)
    margins = rewards_N[0::2] - rewards_N[1::2]
    return {
        "preference": -F.logsigmoid(margins).sum(),
        "sft": -(logprobs_N / codes_N.clamp(min=1.0))[0::2].sum(),
        "margin": margins.detach().sum(),
        "right": (margins.detach() > 0).float().sum(),
    }


def per_document(values_P: Tensor, plan: TalkerPlan) -> Tensor:
    """Sums over the positions of each document, along the first dimension."""
    sums = [part.sum(0) for part in values_P.split(list(plan.doc_lengths))] if plan.doc_lengths else []
    return torch.stack(sums) if sums else values_P  # an empty pack has no positions either


def chunked_logprobs(target_N: Tensor, max_logits: int) -> Callable[[Tensor, Tensor], Tensor]:
    """What turns hidden states [N, D] and an output head [V, D] into the targets' log-probabilities, fp32 [N]."""
    return lambda hidden_ND, weight_VD: _ChunkedLogProbs.apply(hidden_ND, weight_VD, target_N, max_logits)


class _ChunkedLogProbs(torch.autograd.Function):
    """log softmax(hidden weight^T)[target] of each row, fp32 [N], a chunk of rows at a time, forward and backward."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, max_logits: int) -> Tensor:
        ctx.rows = max(1, max_logits // len(weight_VD))
        total_N = hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32)  # logarithm of the sum of exponentials
        right_N = torch.empty_like(total_N)
        for start in range(0, len(hidden_ND), ctx.rows):
            here = slice(start, start + ctx.rows)
            logits_CV = F.linear(hidden_ND[here], weight_VD).float()
            total_N[here] = logits_CV.logsumexp(1)
            right_N[here] = logits_CV.gather(1, target_N[here, None]).squeeze(1)
        ctx.save_for_backward(hidden_ND, weight_VD, target_N, total_N)
        return right_N - total_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, target_N, total_N = ctx.saved_tensors
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        grad_hidden_ND = torch.zeros_like(hidden_ND) if want_hidden else None
        # fp32 accumulation over chunks, whatever the weights are
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if want_weight else None
        for start in range(0, len(hidden_ND), ctx.rows):
            here = slice(start, start + ctx.rows)
            grad_CV = F.linear(hidden_ND[here], weight_VD).float().sub_(total_N[here, None]).exp_().neg_()
            grad_CV.scatter_add_(1, target_N[here, None], torch.ones_like(total_N[here, None]))
            grad_CV = grad_CV.mul_(grad_N[here, None]).to(weight_VD.dtype)
            if grad_hidden_ND is not None:
                grad_hidden_ND[here] = grad_CV @ weight_VD
            if grad_weight_VD is not None:
                grad_weight_VD.add_(grad_CV.t() @ hidden_ND[here])
        return grad_hidden_ND, None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype), None, None
