"""The preference loss where a document's tokens lie on several ranks.

    rows here --head, code predictor--> log-probabilities --sum over documents--> sums over context and tensor ranks
    --train.preference.dpo_sums--> the same loss on every rank of a replica

A pair's loss is no sum over tokens, so documents are summed first: forward adds over ranks, backward is the identity,
and each rank has the gradient of its own tokens. Cost: one reduction of two numbers a document.

Letters: T rows here, S of the context rank, P of the pack, D hidden, N documents, F frames here, K terms.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor

from models.talker import Talker
from train.engines.megatron.packs import TalkerPack
from train.engines.megatron.parts import Head
from train.loss import IGNORE
from train.preference import TERMS, chunked_logprobs, code_weights, dpo_sums, per_document


def preference_sums(head: Head, front: Talker, hidden_TD: Tensor, pack: TalkerPack) -> Tensor:
    """Sums of train.preference.TERMS over a pack's pairs [K], the same on every rank of the replica."""
    assert pack.pairs is not None
    reference_N2, config = pack.pairs
    plan, cut, peers = pack.plan, pack.cut, pack.cut.peers
    weight = config.residual_weight
    labels_S = cut.pad(plan.targets_P, IGNORE)[cut.rows_S]
    index = (labels_S != IGNORE).nonzero().squeeze(1)
    hidden_SD = cut.gather_tensor(hidden_TD)
    first = head.logprobs(hidden_SD.index_select(0, index), labels_S.index_select(0, index))
    none_P = hidden_TD.new_zeros(cut.padded, dtype=torch.float32)
    first_P = none_P.index_add(0, cut.rows_S.index_select(0, index), first)  # tensor ranks have the same
    first_N = _sum(per_document(first_P[: cut.real], plan), peers.cp)
    logprobs_N = first_N
    if weight:
        residual_P = none_P.index_add(0, *_residual(front, hidden_TD, pack, head.max_logits))
        logprobs_N = first_N + weight * _sum(per_document(residual_P[: cut.real], plan), peers.tp_cp)
    once_N, more_N = reference_N2.to(logprobs_N).unbind(1)
    sums = dpo_sums(logprobs_N, once_N + weight * more_N, code_weights(plan, weight), config)
    return torch.stack([sums[name] for name in TERMS])


def _residual(front: Talker, hidden_TD: Tensor, pack: TalkerPack, max_logits: int) -> tuple[Tensor, Tensor]:
    """Rows of the pack that predict frames and lie here, and log-probabilities of all residual codes of each, [F]."""
    plan, cut = pack.plan, pack.cut
    places_F, which_F = cut.places_here(plan.frame_places_F - 1)
    codes_GF = plan.codes_GF[:, which_F]
    states_FRD = front.residual_states(hidden_TD.index_select(0, places_F), codes_GF)
    total_F = hidden_TD.new_zeros(len(places_F), dtype=torch.float32)
    for r, head in enumerate(front.code_predictor.lm_head):
        code_F = codes_GF[r + 1]
        total_F = total_F + head(states_FRD[:, r], chunked_logprobs(code_F, max_logits))
    return cut.rows_T.index_select(0, places_F), total_F


def _sum(values_N: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    return reduce_from_tensor_model_parallel_region(values_N, group) if group.size() > 1 else values_N
