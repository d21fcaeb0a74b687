"""Thinker and Talker under teacher forcing, together or apart: one module that gives sums.

    way        Thinker                                   reaches the Talker as        gradient
    live       whole, with its own text loss             layer `accept_hidden_layer`  through, into the Thinker
    detached   whole, with its own text loss             the same, cut off            each keeps its own
    frozen     up to that layer, nothing kept            the same                     Talker alone
    cached     not at all: rows from data/hidden.py      as they were written         Talker alone

Text always reaches the Talker as plain embeddings. The report does not say whether the Talker's gradient reaches the
Thinker, so both are here; a frozen Thinker costs half of its forward in the released shapes, a cached one nothing.

Sums only: the engine divides (train/loss.py). Letters: M multimodal rows, H hidden of the Thinker, R residual
codebooks.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from data.types import Batch
from models.omni import Omni
from models.talker_inputs import TalkerPlan, multimodal_rows, talker_inputs
from train.errors import RecipeError
from train.loss import MAX_LOGITS, cross_entropy_sum, inputs_of, pictures_of
from train.speech_loss import code_loss_sums

Way = Literal["live", "detached", "frozen", "cached"]


class SpeechObjective(nn.Module):
    """Model and losses as one module; parameters that the way leaves out are frozen when it is made."""

    def __init__(self, omni: Omni, way: Way, *, max_logits: int = MAX_LOGITS) -> None:
        super().__init__()
        if way not in get_args(Way):
            raise RecipeError(f"the Thinker can be {', '.join(get_args(Way))} for the Talker, not {way!r}")
        if omni.talker is None:
            raise RecipeError("the model has no talker to train")
        self.omni, self.way, self.max_logits = omni, way, max_logits
        if way in ("frozen", "cached"):
            omni.thinker.requires_grad_(False)

    def forward(self, batch: Batch, plan: TalkerPlan, media_MH: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy sums of a pack: text (fp32 scalar), first codes (fp32 scalar), residual codes (fp32 [R]).

        `batch` holds the Thinker's conversations, `plan` the Talker's, document by document. `media` is given where
        the way is "cached", [M, H] in the order of the plan's placeholders. The text sum is 0 where the Thinker does
        not run to its end. Counts are `Totals.of(batch).targets` and `code_counts(plan)`.
        """
        talker = self.omni.talker
        assert talker is not None
        text_sum, media_MH = self._think(batch, media_MH)
        text_XH = self.omni.thinker.model.embed_tokens(plan.text_ids_X)
        if self.way == "detached":
            text_XH = text_XH.detach()
        hidden_PD, _ = talker(
            talker_inputs(talker, plan, text_XH, media_MH.to(text_XH.dtype)), plan.position_ids_3P, plan.doc_lengths
        )
        first_sum, _, residual_sums_R, _ = code_loss_sums(talker, hidden_PD, plan, max_logits=self.max_logits)
        return text_sum, first_sum, residual_sums_R

    def _think(self, batch: Batch, media_MH: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.way == "cached":
            if media_MH is None:
                raise ValueError("the way is cached: the Thinker's hidden states must be given")
            return media_MH.new_zeros((), dtype=torch.float32), media_MH
        rows_M = multimodal_rows(self.omni.config, batch.token_ids_T, batch.doc_lengths)
        if self.way == "frozen":
            states_MH = hidden_states(self.omni, batch)[rows_M]
            return states_MH.new_zeros((), dtype=torch.float32), states_MH
        thinker, tap = self.omni.thinker, _tap(self.omni)
        hidden_TH, _, tapped_TH = thinker(*inputs_of(batch), **pictures_of(batch), tap=tap)
        head = partial(cross_entropy_sum, labels_T=batch.labels_T, max_logits=self.max_logits)
        states_MH = tapped_TH[rows_M]
        return thinker.lm_head(hidden_TH, head), states_MH.detach() if self.way == "detached" else states_MH


@torch.no_grad()
def hidden_states(omni: Omni, batch: Batch) -> Tensor:
    """What the Talker reads of the Thinker, [T, H] for all rows of a pack; layers beyond it do not run."""
    return omni.thinker(*inputs_of(batch), **pictures_of(batch), tap=_tap(omni), stop=True)[2]


def _tap(omni: Omni) -> int:
    assert omni.config.talker is not None
    return omni.config.talker.accept_hidden_layer
