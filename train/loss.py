"""The loss: sums and counts over one micro-batch, never a mean, so that any split of the global batch adds up.

    Batch -> Thinker -> hidden_TD -> chunked cross-entropy ------------> ce_sum
                     -> router_logits -> softmax, summed over tokens --> prob_LE   (with gradient)
                                      -> top-k, counted ---------------> count_LE  (without)

    share of the global loss = ce_sum / targets + balance * E / L * sum(f_LE * prob_LE) / tokens

`targets` and `tokens` are counts of the global batch, known from the labels before any forward. `f_LE` is the share
of assignments that each expert received in the *previous* step: known before the first backward whatever the split,
which the current step's is not. So the shares of all micro-batches and ranks sum to the loss, gradients too.

Cost: `max_logits` logits exist at a time, instead of all (4,096 targets x 152,064 words in fp32 are 2.5 GB, three
times over in a plain loss). The gradients of hidden states and head are made in forward: no logits are computed twice.

Shapes: T tokens, D hidden size, V vocabulary, L layers, E experts, N targets (tokens with a label).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.types import Batch
from models.layers.attention import Across
from models.thinker import Features, Media, Thinker
from train.media import IGNORE, by_kind, by_media, kinds_of, media_of

SHARE = "router.expert_share"  # name of the Thinker's expert shares in a checkpoint
MAX_LOGITS = 40_000_000  # 160 MB in fp32: 263 targets of the released vocabulary


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, max_logits: int, losses_N: Tensor | None
    ) -> Tensor:
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        grad_hidden_ND = torch.empty_like(hidden_ND) if want_hidden else None
        # fp32 accumulation over chunks, whatever the weights are
        grad_weight_VD = torch.empty_like(weight_VD, dtype=torch.float32) if want_weight else None
        rows = max(1, max_logits // len(weight_VD))
        for start in range(0, max(1, len(target_N)), rows):
            hidden_CD, target_C1 = hidden_ND[start : start + rows], target_N[start : start + rows, None]
            exp_CV = F.linear(hidden_CD, weight_VD).float()
            peak_C1 = exp_CV.amax(-1, keepdim=True)
            right_C1 = exp_CV.gather(1, target_C1)
            exp_CV.sub_(peak_C1).exp_()  # in place: the logits become, up to a factor per row, their own gradient
            sum_C1 = exp_CV.sum(-1, keepdim=True)
            loss_C1 = sum_C1.log() + peak_C1 - right_C1
            total += loss_C1.sum()
            if losses_N is not None:
                losses_N[start : start + rows] = loss_C1.squeeze(1)
            exp_CV.scatter_add_(1, target_C1, -sum_C1)
            grad_CV = exp_CV.to(weight_VD.dtype)
            if grad_hidden_ND is not None:
                out_CD = torch.mm(grad_CV, weight_VD, out=grad_hidden_ND[start : start + rows])
                out_CD.div_(sum_C1)  # the factor, on D columns instead of V
            if grad_weight_VD is not None:
                scaled_CD = hidden_CD / sum_C1.to(hidden_CD.dtype)
                _add_product(grad_weight_VD, grad_CV.t(), scaled_CD, first=start == 0)
            del exp_CV, grad_CV  # or they would be there until the next chunk's logits are
        ctx.grads = grad_hidden_ND, grad_weight_VD
        ctx.dtype = weight_VD.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD = ctx.grads
        ctx.grads = None
        return (
            None if hidden_ND is None else hidden_ND.mul_(grad.to(hidden_ND.dtype)),
            None if weight_VD is None else weight_VD.mul_(grad).to(ctx.dtype),
            None,
            None,
            None,
        )


def _add_product(total_VD: Tensor, a_VC: Tensor, b_CD: Tensor, *, first: bool) -> None:
    """total += a @ b, or = for the first: the sum is fp32, so 16-bit products are added to it as they are."""
    if a_VC.dtype is total_VD.dtype:
        torch.mm(a_VC, b_CD, out=total_VD) if first else total_VD.addmm_(a_VC, b_CD)
    else:
        total_VD.copy_(a_VC @ b_CD) if first else total_VD.add_(a_VC @ b_CD)


def cross_entropy_sum(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    *,
    labels_T: Tensor,
    max_logits: int = MAX_LOGITS,
    losses_T: Tensor | None = None,
) -> Tensor:
    """Sum of the cross-entropy over the positions with a label, fp32 scalar.

    Args:
        hidden_TD: after the final norm, fp32 or bf16.
        weight_VD: the output head, same dtype.
        labels_T: int64, already shifted; -100 where there is nothing to predict.
        max_logits: logits that exist at a time; at least one row.
        losses_T: fp32, takes the loss of each position with a label; without gradient.
    """
    index_N = (labels_T != IGNORE).nonzero().squeeze(1)
    losses_N = None if losses_T is None else losses_T.new_empty(len(index_N))
    total = _ChunkedCrossEntropy.apply(
        hidden_TD.index_select(0, index_N), weight_VD, labels_T.index_select(0, index_N), max_logits, losses_N
    )
    if losses_T is not None and losses_N is not None:
        losses_T[index_N] = losses_N
    return total


class Sums(NamedTuple):
    """What an objective makes of a pack: sums, never means."""

    losses_K: Tensor  # fp32, with gradient: one a term
    probs: tuple[Tensor, ...]  # fp32 [L, E], with gradient, one a stack of routers: router probabilities over tokens
    counts: tuple[Tensor, ...]  # fp32 [L, E]: assignments of each expert
    media: Tensor | None = None  # float64 [2, G]: the Thinker's loss by media of documents, train.media.by_media
    kinds: Tensor | None = None  # float64 [kinds, L, E]: its assignments by kind of token, where `counts_kinds`


@dataclass(frozen=True)
class Term:
    """A part of the loss: `weight` times its sum over the count of its targets in the global batch."""

    name: str
    weight: float = 1.0


@dataclass(frozen=True)
class Routers:
    """The routers of one decoder."""

    name: str  # of their expert shares in a checkpoint
    layers: int
    experts: int


@dataclass(frozen=True)
class Family:
    """The mixture-of-experts layers of one decoder, as an engine shards them."""

    name: str
    decoder: str  # module that has them as layers.N.mlp
    experts: int
    top_k: int
    shared: bool = False  # each beside an expert that all tokens share


@dataclass(frozen=True)
class Part:
    """What an objective must know of a pack that several ranks hold together, of which it gets one's part."""

    across: Across
    real: int  # tokens here; padding follows them
    media_T: Tensor  # which media the document of each token here holds (train.media.media_of)


@dataclass(frozen=True)
class Totals:
    """Counts of a set of micro-batches. The engine adds them over ranks before the first backward."""

    skipped: int
    targets: tuple[int, ...]  # of each term
    tokens: tuple[int, ...]  # of each decoder with routers; the first is the Thinker's, or frames where there is none

    def vector(self) -> Tensor:
        """All counts, float64."""
        return torch.tensor([self.skipped, *self.targets, *self.tokens], dtype=torch.float64)

    def like(self, vector: Tensor) -> Totals:
        """The inverse of `vector`."""
        skipped, *counts = (int(count) for count in vector)
        return Totals(skipped, tuple(counts[: len(self.targets)]), tuple(counts[len(self.targets) :]))


class Objective(nn.Module):
    """Model and loss as one module: an engine wraps it, and every parameter is used inside its forward.

    Another objective has the same attributes: `prefix` is what names of the model's parameters begin with in it.
    """

    prefix = "thinker."
    terms: tuple[Term, ...] = (Term("text"),)
    counts_kinds = False  # whether experts are counted by kind of token

    def __init__(self, thinker: Thinker, *, top_k: int, max_logits: int) -> None:
        super().__init__()
        self.thinker = thinker
        self.top_k = top_k
        self.max_logits = max_logits
        text = thinker.config.text
        self.routers = (Routers(SHARE, text.num_hidden_layers, text.num_experts),)
        self.families = (Family("thinker", "thinker.model", text.num_experts, top_k),)

    @property
    def model(self) -> nn.Module:
        """What is trained, kept in checkpoints and exported."""
        return self.thinker

    def totals(self, batches: Sequence[Batch]) -> Totals:
        """Count this rank's micro-batches."""
        return Totals(
            skipped=sum(len(batch.skipped) for batch in batches),
            targets=(sum(int((batch.labels_T != IGNORE).sum()) for batch in batches),),
            tokens=(sum(len(batch.token_ids_T) for batch in batches),),
        )

    def forward(
        self, batch: Batch | Media, features: Features | None = None, part: Part | None = None
    ) -> Sums | Features:
        """Sums over a pack, or a `part` of one. `features` are those of its media where they are encoded already.

        Given Media alone, returns their features: an engine that wraps this module calls nothing else of it.
        """
        if isinstance(batch, Media):
            return self.thinker.encode(batch)
        across, real, media_T = (part.across, part.real, part.media_T) if part is not None else (None, None, None)
        inputs = inputs_of(batch), pictures_of(batch)
        hidden_TD, router_logits = self.thinker(*inputs[0], **inputs[1], features=features, across=across)
        ce_sum, media = text_loss(self.thinker, hidden_TD, batch, self.max_logits, media_T)
        if features is not None:
            ce_sum = ce_sum + nothing_to_encode(self.thinker, batch)
        router_logits = [logits_TE[:real] for logits_TE in router_logits]
        kinds_T = kinds_of(self.thinker.config, batch.token_ids_T)[:real]
        kinds = by_kind(router_logits, self.top_k, kinds_T) if self.counts_kinds else None
        return Sums(ce_sum.unsqueeze(0), *routed(router_logits, self.top_k), media, kinds)


def text_loss(
    thinker: Thinker, hidden_TD: Tensor, batch: Batch, max_logits: int, media_T: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sum of the Thinker's cross-entropy, and the same by media of documents (train.media.by_media).

    `media_T` says what media the document of each token holds, where the batch is a stretch of a pack.
    """
    losses_T = torch.zeros(len(hidden_TD), device=hidden_TD.device)
    head = partial(cross_entropy_sum, labels_T=batch.labels_T, max_logits=max_logits, losses_T=losses_T)
    ce_sum = thinker.lm_head(hidden_TD, head)
    if media_T is None:
        media_T = media_of(kinds_of(thinker.config, batch.token_ids_T), batch.doc_lengths)
    return ce_sum, by_media(losses_T, batch.labels_T, media_T.to(losses_T.device))


def nothing_to_encode(thinker: Thinker, batch: Batch) -> Tensor:
    """Zero, and a gradient of zero in every parameter of the encoders, for a forward that got their features.

    Sharded engines count on one from every backward: DeepSpeed starts its sums in the first of a step, and cannot go
    backward at all where no parameter gets a gradient.
    """
    found = thinker.encode(Media(batch.mel_FM[:0], (), None, ()))
    parts = [found.audio_TD, *found.deepstack] + ([] if found.visual_VD is None else [found.visual_VD])
    return torch.stack([part_TD.float().sum() for part_TD in parts]).sum()


def inputs_of(batch: Batch) -> tuple[Any, ...]:
    """A batch as the positional arguments of Thinker.forward."""
    return batch.token_ids_T, batch.position_ids_3T, batch.doc_lengths, batch.mel_FM, batch.mel_lengths


def pictures_of(batch: Batch) -> dict[str, Any]:
    """A batch's images and videos as keyword arguments of Thinker.forward."""
    return {"pixels_PX": batch.pixels_PX, "grids": batch.grids}


def routed(router_logits: Sequence[Tensor], top_k: int) -> tuple[tuple[Tensor], tuple[Tensor]]:
    """Summed probabilities and assignments [L, E] of one decoder's routers."""
    prob_LE = torch.stack([F.softmax(logits_TE.float(), -1).sum(0) for logits_TE in router_logits])
    return (prob_LE,), (torch.stack([expert_count(logits_TE, top_k) for logits_TE in router_logits]),)


@torch.no_grad()
def expert_count(logits_TE: Tensor, top_k: int) -> Tensor:
    """How many assignments each expert receives, fp32 [E]."""
    chosen_TK = logits_TE.topk(top_k, -1).indices
    return torch.bincount(chosen_TK.flatten(), minlength=logits_TE.shape[-1]).float()


def weighted(losses_K: Tensor, terms: Sequence[Term], totals: Totals) -> Tensor:
    """A pack's share of the loss, fp32 scalar."""
    scales = [term.weight / max(1, count) for term, count in zip(terms, totals.targets, strict=True)]
    return (losses_K * losses_K.new_tensor(scales)).sum()


def balance_losses(shares: Sequence[Tensor], probs: Sequence[Tensor], tokens: Sequence[int]) -> Tensor:
    """Sum of the balance losses of each decoder with routers; zero without any."""
    if not shares:
        return torch.zeros(())
    losses = [balance_loss(*each) for each in zip(shares, probs, tokens, strict=True)]
    return torch.stack(losses).sum()


def balance_loss(share_LE: Tensor, prob_LE: Tensor, tokens: int) -> Tensor:
    """E times the sum over experts of f_e P_e, mean over layers: 1 at balance. `share_LE` is the last step's."""
    num_experts = share_LE.shape[1]
    return num_experts * (share_LE * prob_LE).sum(1).mean() / max(1, tokens)


def uniform_share(num_layers: int, num_experts: int) -> Tensor:
    """Expert shares before the first step."""
    return torch.full((num_layers, num_experts), 1.0 / num_experts)


def next_share(count_LE: Tensor) -> Tensor:
    """Expert shares of this step, for the balance loss of the next: rows sum to 1; uniform where nothing was routed."""
    total_L1 = count_LE.sum(1, keepdim=True)
    return torch.where(total_L1 > 0, count_LE / total_L1.clamp(min=1), torch.full_like(count_LE, 1 / count_LE.shape[1]))
