"""Thinker and Talker under teacher forcing, together or apart: one module that gives sums.

    way        Thinker                                   reaches the Talker as        gradient
    live       whole, with its own text loss             layer `accept_hidden_layer`  through, into the Thinker
    detached   whole, with its own text loss             the same, cut off            each keeps its own
    frozen     up to that layer, nothing kept            the same                     Talker alone
    cached     not at all: rows from data/hidden.py      as they were written         Talker alone
    off        whole, with its own text loss             not at all                   Thinker alone

Text always reaches the Talker as plain embeddings. The report does not say whether the Talker's gradient reaches the
Thinker, so both are here; a frozen Thinker costs half of its forward in the released shapes, a cached one nothing.

Sums only: the engine divides (train/loss.py). Letters: M multimodal rows, H hidden of the Thinker, R residual
codebooks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from data.types import Batch
from models.omni import Omni
from models.say import media_states
from models.talker import Talker
from models.talker_inputs import TalkerPlan, multimodal_rows, talker_inputs
from models.thinker import Features, Media, Thinker
from train.errors import RecipeError
from train.loss import (
    IGNORE,
    MAX_LOGITS,
    SHARE,
    Family,
    Routers,
    Sums,
    Term,
    Totals,
    inputs_of,
    nothing_to_encode,
    pictures_of,
    routed,
    text_loss,
)
from train.media import by_kind, kinds_of
from train.speech_loss import RESIDUAL_WEIGHT, code_counts, code_loss_sums

Way = Literal["off", "live", "detached", "frozen", "cached"]


class SpeechObjective(nn.Module):
    """Model and losses as one module, a train.loss.Objective; parameters that the way leaves out are frozen here."""

    prefix = "omni."
    counts_kinds = False  # whether the Thinker's experts are counted by kind of token

    def __init__(
        self,
        omni: Omni,
        way: str,
        *,
        text: float = 1.0,
        residual: float = RESIDUAL_WEIGHT,
        max_logits: int = MAX_LOGITS,
    ) -> None:
        """`text` weighs the Thinker's loss beside the Talker's, `residual` the mean of the residual codebooks'."""
        super().__init__()
        if way not in get_args(Way):
            raise RecipeError(f"the Thinker can be {', '.join(get_args(Way))} for the Talker, not {way!r}")
        talker = omni.config.talker
        if omni.talker is None or talker is None:
            raise RecipeError("the model has no talker to train")
        self.omni, self.way, self.max_logits = omni, way, max_logits
        self._thinks, self._speaks = way in ("off", "live", "detached"), way != "off"
        if omni.code2wav is not None:
            omni.code2wav.requires_grad_(False)
        if not self._thinks:
            omni.thinker.requires_grad_(False)
        if not self._speaks:
            omni.talker.requires_grad_(False)
        residuals = talker.num_code_groups - 1
        codes = [Term("code 0"), *(Term(f"code {r + 1}", residual / residuals) for r in range(residuals))]
        self.terms = (*[Term("text", text if self._speaks else 1.0)] * self._thinks, *codes * self._speaks)
        self._decoders = [omni.config.thinker.text] * self._thinks + [talker.text] * self._speaks
        names = [SHARE] * self._thinks + [f"talker.{SHARE}"] * self._speaks
        self.routers = tuple(
            Routers(name, text.num_hidden_layers, text.num_experts)
            for name, text in zip(names, self._decoders, strict=True)
        )
        thinker, speaker = omni.config.thinker.text, talker.text
        self.families = (
            Family("thinker", "omni.thinker.model", thinker.num_experts, thinker.num_experts_per_tok),
            Family("talker", "omni.talker.model", speaker.num_experts, speaker.num_experts_per_tok, shared=True),
        )

    @property
    def model(self) -> nn.Module:
        """What is trained, kept in checkpoints and exported."""
        return self.omni

    @property
    def thinker(self) -> Thinker:
        """What answers in evaluations."""
        return self.omni.thinker

    def plan(self, batch: Batch) -> TalkerPlan:
        """What the Talker is to say; a batch without tokens has none."""
        assert self.omni.config.talker is not None
        groups = self.omni.config.talker.num_code_groups
        return batch.speech if isinstance(batch.speech, TalkerPlan) else TalkerPlan.empty(groups)

    def totals(self, batches: Sequence[Batch]) -> Totals:
        """Count this rank's micro-batches."""
        targets = [sum(int((batch.labels_T != IGNORE).sum()) for batch in batches)] * self._thinks
        tokens = [sum(len(batch.token_ids_T) for batch in batches)] * self._thinks
        if self._speaks:
            plans = [self.plan(batch) for batch in batches]
            first, frames = (sum(counts) for counts in zip(*map(code_counts, plans), strict=True))
            targets += [first] + [frames] * (len(self.terms) - len(targets) - 1)
            tokens.append(sum(sum(plan.doc_lengths) for plan in plans))
        return Totals(sum(len(batch.skipped) for batch in batches), tuple(targets), tuple(tokens))

    def forward(self, batch: Batch | Media, features: Features | None = None) -> Sums | Features:
        """Sums of a pack, of `terms` and `routers`; given Media alone, their features (train.loss.Objective).

        `batch` holds the Thinker's conversations and in `speech` the Talker's, document by document; and where the way
        is "cached", instead of media, the rows [M, H] of the plan's placeholders in their order.
        """
        if isinstance(batch, Media):
            return nothing_heard(self.thinker, batch) if self.way == "cached" else self.thinker.encode(batch)
        losses, logits, media_MH, media = self._think(batch, features)
        kinds = None
        if self.counts_kinds and self._thinks:
            kinds_T = kinds_of(self.thinker.config, batch.token_ids_T)
            kinds = by_kind(logits[0], self._decoders[0].num_experts_per_tok, kinds_T)
        if self._speaks:
            sums, talker_logits = self._speak(batch, media_MH)
            losses, logits = [*losses, *sums], [*logits, talker_logits]
        found = [routed(each, text.num_experts_per_tok) for each, text in zip(logits, self._decoders, strict=True)]
        probs, counts = (tuple(each[place][0] for each in found) for place in (0, 1))
        return Sums(torch.stack(losses), probs, counts, media, kinds)

    def _speak(self, batch: Batch, media_MH: Tensor | None) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Sums of the Talker's terms, and the logits of its routers."""
        plan = self.plan(batch).to(batch.mel_FM.device)
        talker, hidden_PD, logits = self._run_talker(plan, media_MH)
        first_sum, _, residual_sums_R, _ = code_loss_sums(talker, hidden_PD, plan, max_logits=self.max_logits)
        return [first_sum, *residual_sums_R], logits

    def _run_talker(self, plan: TalkerPlan, media_MH: Tensor | None) -> tuple[Talker, Tensor, Sequence[Tensor]]:
        """The Talker, its hidden states [P, D] for a plan, and the logits of its routers."""
        talker = self.omni.talker
        assert talker is not None and media_MH is not None
        text_XH = self.omni.thinker.model.embed_tokens(plan.text_ids_X)
        if self.way == "detached":
            text_XH = text_XH.detach()
        inputs_PD = talker_inputs(talker, plan, text_XH, media_MH.to(text_XH.dtype))
        hidden_PD, logits = talker(inputs_PD, plan.position_ids_3P, plan.doc_lengths)
        return talker, hidden_PD, logits

    def _think(
        self, batch: Batch, features: Features | None
    ) -> tuple[list[Tensor], list[Sequence[Tensor]], Tensor | None, Tensor | None]:
        """Losses and router logits of the Thinker, none where it does not run whole, and what the Talker reads.

        Last the losses by media of documents (train.media.by_media).
        """
        if self.way == "cached":
            width = self.omni.config.thinker.text.hidden_size  # rows of none have no width
            return [], [], batch.media_RH.reshape(-1, width), None
        if not self._thinks:
            return [], [], media_states(self.omni, batch, features, always=True), None
        talker, thinker = self.omni.config.talker, self.omni.thinker
        tap = talker.accept_hidden_layer if self._speaks and talker is not None else None
        hidden_TH, logits, *tapped = thinker(*inputs_of(batch), **pictures_of(batch), features=features, tap=tap)
        text_sum, media = text_loss(thinker, hidden_TH, batch, self.max_logits)
        if features is not None:
            text_sum = text_sum + nothing_to_encode(thinker, batch)
        if not tapped:
            return [text_sum], [logits], None, media
        states_MH = tapped[0][multimodal_rows(self.omni.config, batch.token_ids_T, batch.doc_lengths)]
        return [text_sum], [logits], states_MH.detach() if self.way == "detached" else states_MH, media


def nothing_heard(thinker: Thinker, media: Media) -> Features:
    """Features of no media, without running the encoders: ranks need not gather their weights for it."""
    none_TD, vision = media.mel_FM.new_empty(0, thinker.config.text.hidden_size), thinker.config.vision
    if vision is None:
        return Features(none_TD, None, ())
    return Features(none_TD, none_TD, (none_TD,) * len(vision.deepstack_visual_indexes))
