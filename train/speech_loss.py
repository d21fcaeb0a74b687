"""The Talker's loss under teacher forcing: sums and counts over one pack, never a mean (see train/loss.py).

    hidden [P, D] --codec_head--> first code of the next frame, or the end ----> first_sum, first_count
                  --positions before frames--> code predictor, one pass, R heads --> residual_sums [R], frames

    share of the global loss = first_sum / first_count + RESIDUAL_WEIGHT * mean of residual_sums / frames

with the counts of the global batch, so that the shares of any split add up (train.loss.weighted). The first part starts
near ln 3072, the second near ln 2048 in the released shapes; 0.3 is what Qwen3-TTS fine-tunes with.

Cost: the code predictor dominates, G positions a frame; no more than `max_logits` logits exist at a time. Letters: P
positions, F frames, G codes of a frame, R = G - 1 residual codes, D hidden.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from models.talker import Talker
from models.talker_inputs import TalkerPlan
from train.loss import MAX_LOGITS, cross_entropy_sum

RESIDUAL_WEIGHT = 0.3


def code_counts(plan: TalkerPlan) -> tuple[int, int]:
    """Targets of the first codebook, the end of each document among them, and frames."""
    frames = plan.codes_GF.shape[1]
    return frames + len(plan.doc_lengths), frames


def code_loss_sums(
    talker: Talker, hidden_PD: Tensor, plan: TalkerPlan, *, max_logits: int = MAX_LOGITS
) -> tuple[Tensor, int, Tensor, int]:
    """Cross-entropy sums of a pack and what to divide them by: first_sum, first_count, residual_sums_R, frames.

    hidden [P, D] is Talker.forward's for the inputs of `plan`, on its device. Sums are fp32, a scalar and [G - 1], with
    gradient. A pack without documents or frames gives zeros, and zero gradients.
    """
    first_count, frames = code_counts(plan)
    first = partial(cross_entropy_sum, labels_T=plan.targets_P, max_logits=max_logits)
    first_sum = talker.codec_head(hidden_PD, first)
    hidden_FD = hidden_PD.index_select(0, plan.frame_places_F - 1)  # of the positions that predict the frames
    states_FRD = talker.residual_states(hidden_FD, plan.codes_GF)
    sums = [
        head(states_FRD[:, r], partial(cross_entropy_sum, labels_T=plan.codes_GF[r + 1], max_logits=max_logits))
        for r, head in enumerate(talker.code_predictor.lm_head)
    ]
    return first_sum, first_count, torch.stack(sums), frames
