"""What runs beside the decoder's layers: encoders, embedding, head, and the Talker's front.

* Encoders, on the first stage: a micro-batch's media are dealt over the tensor and context ranks of a replica, window
  by window and frame by frame (both encoders attend within those); features are gathered, their gradients come back.
* Embedding and head are cut by vocabulary. The cross-entropy makes `max_logits` logits at a time.
* The Talker's front, on the last stage: projections, code embeddings and code predictor. One place, because the inputs
  of its first layer and the loss of its residual codes read the same embeddings.

Parameters of ours that are whole on every tensor rank see a part of the tokens there: `made` has Megatron sum their
gradients over tensor ranks, as it does for norms.

Letters: T rows here, S of the context rank, D hidden, V words here, N targets, A audio and W visual tokens, F frames, R
residual codebooks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, VocabParallelEmbedding, vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from models.audio_encoder import num_audio_tokens
from models.config import ThinkerConfig
from models.talker import Talker
from models.talker_inputs import TalkerPlan
from models.thinker import Features, Media, Thinker
from train.encoders import Cuts, audio_cuts, route, vision_cuts
from train.engines.megatron.packs import Cut
from train.layout import work_of
from train.loss import IGNORE, cross_entropy_sum
from train.preference import chunked_logprobs

M = TypeVar("M", bound=nn.Module)


def made(module: M, config: TransformerConfig) -> M:
    """A module of the meta device on this one, unset, its gradients to be summed over tensor ranks."""
    device = torch.device("cpu") if config.use_cpu_initialization else torch.cuda.current_device()
    module = module.to(config.params_dtype).to_empty(device=device)
    for parameter in module.parameters():  # of the parameters as they are now: moving a module may make new ones
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return module


class Encoders(nn.Module):
    """The Thinker's encoders alone, under their names."""

    def __init__(self, thinker: Thinker, group: ProcessGroup) -> None:
        """`thinker` gives up its decoder; `group` are the tensor and context ranks of a replica."""
        super().__init__()
        del thinker.model, thinker.lm_head
        self.thinker, self.group = thinker, group

    def forward(self, media: Media) -> Features:
        """Features of all media on every rank, of which each encodes its share. Collective."""
        return self.thinker.encode(media) if self.group.size() == 1 else self._shared(media)

    def _shared(self, media: Media) -> Features:
        config: ThinkerConfig = self.thinker.config
        frames_M = np.array(media.mel_lengths, np.int64)
        cuts = audio_cuts(frames_M, config.audio.n_window_infer)
        audio = _Deal(cuts, num_audio_tokens, self.group)
        heard = audio.take(media.mel_FM), audio.way.rows_N.tolist()
        vision, seen = None, (None, ())
        if config.vision is not None:
            grid_M3 = np.array(media.grids, np.int64).reshape(-1, 3)
            block = config.vision.spatial_merge_size**2
            vision = _Deal(vision_cuts(grid_M3, work_of(config)), lambda patches: patches // block, self.group)
            pixels_PX = media.pixels_PX
            if pixels_PX is None or not len(pixels_PX):
                pixels_PX = media.mel_FM.new_empty(0, config.vision.patch_dim)
            seen = vision.take(pixels_PX), vision.way.grids(grid_M3)
        made = self.thinker.encode(Media(*heard, *seen))
        audio_AD = audio.gather(made.audio_TD)
        if vision is None or made.visual_VD is None:
            return Features(audio_AD, None, ())
        width = made.visual_VD.shape[1]
        both = vision.gather(torch.cat([made.visual_VD, *made.deepstack], dim=1)).split(width, dim=1)
        return Features(audio_AD, both[0], tuple(both[1:]))


class _Deal:
    """The media of a micro-batch, which every rank of a group holds, dealt over the group."""

    def __init__(self, cuts: Cuts, tokens_of: Callable[[Any], Any], group: ProcessGroup) -> None:
        self.group, size = group, group.size()
        homes_M = np.zeros(len(cuts.rows_M), np.int64)
        everyone = route(cuts, homes_M, tokens_of, rank=0, num_ranks=size)
        ends = list(accumulate(everyone.rows_out))
        self.rows = everyone.own_rows[ends[group.rank()] - everyone.rows_out[group.rank()] : ends[group.rank()]]
        self.tokens = everyone.tokens_in  # that each rank makes
        self.places = everyone.own_tokens  # where these belong, rank by rank
        self.way = route(cuts, homes_M, tokens_of, rank=group.rank(), num_ranks=size)

    def take(self, rows_NX: Tensor) -> Tensor:
        """What this rank encodes."""
        return rows_NX[torch.from_numpy(self.rows).to(rows_NX.device)]

    def gather(self, made_TD: Tensor) -> Tensor:
        """Features of all ranks in the order of the media; gradients are summed where the features were made."""
        most = max(1, *self.tokens)  # ranks send alike
        padded = F.pad(made_TD, (0, 0, 0, most - len(made_TD)))
        all_TD = gather_from_sequence_parallel_region(padded, True, self.group)
        sent = np.concatenate([rank * most + np.arange(count) for rank, count in enumerate(self.tokens)])
        source = np.empty_like(sent)
        source[self.places] = sent
        return all_TD.index_select(0, torch.from_numpy(source).to(all_TD.device))


def embedding(vocab: int, config: TransformerConfig) -> VocabParallelEmbedding:
    """Token embeddings cut by vocabulary; the lookup gives all rows on every tensor rank."""
    return VocabParallelEmbedding(vocab, config.hidden_size, init_method=_unset, config=config)


def _unset(weight: Tensor) -> None:
    """Weights come from weights.py."""


class Head(nn.Module):
    """The output head, cut by vocabulary, with what is asked of its logits."""

    def __init__(self, vocab: int, config: TransformerConfig, max_logits: int) -> None:
        super().__init__()
        self.linear: Any = ColumnParallelLinear(
            config.hidden_size, vocab, config=config, init_method=_unset, bias=False
        )
        self.group, self.max_logits = self.linear.tp_group, max_logits

    def forward(self, hidden_SD: Tensor, labels_S: Tensor, losses_S: Tensor | None = None) -> Tensor:
        """Sum of the cross-entropy over positions with a label, the same on every tensor rank; fp32 scalar.

        `losses_S` takes each position's, without gradient.
        """
        weight_VD = self.linear.weight
        if self.group.size() == 1:
            limit = self.max_logits
            return cross_entropy_sum(hidden_SD, weight_VD, labels_T=labels_S, max_logits=limit, losses_T=losses_S)
        index_N = (labels_S != IGNORE).nonzero().squeeze(1)
        found_N = -self.logprobs(hidden_SD.index_select(0, index_N), labels_S.index_select(0, index_N))
        if losses_S is not None:
            losses_S[index_N] = found_N.detach()
        return found_N.sum()

    def logprobs(self, hidden_ND: Tensor, target_N: Tensor) -> Tensor:
        """Log-probabilities of the targets [N], the same on every tensor rank, fp32."""
        weight_VD = self.linear.weight
        if self.group.size() == 1:
            return chunked_logprobs(target_N, self.max_logits)(hidden_ND, weight_VD)
        if not len(target_N):  # nothing, and gradients of zero
            return hidden_ND.float().sum(1) + weight_VD[:0].float().sum()
        rows = max(1, self.max_logits // (len(weight_VD) * self.group.size()))
        found = [
            checkpoint(_vocab_parallel_losses, hidden_CD, weight_VD, target_C, use_reentrant=False)
            for hidden_CD, target_C in zip(hidden_ND.split(rows), target_N.split(rows), strict=True)
        ]
        return -torch.cat(found)

    @torch.no_grad()
    def logits(self, hidden_ND: Tensor) -> Tensor:
        """All words' logits [N, V] on every tensor rank."""
        mine_NV = F.linear(hidden_ND, self.linear.weight)
        if self.group.size() == 1:
            return mine_NV
        whole = gather_from_sequence_parallel_region(mine_NV.t().contiguous(), True, self.group)
        return whole.t()

    @torch.no_grad()
    def document_losses(self, hidden_SD: Tensor, labels_S: Tensor, documents_S: Tensor, count: int) -> Tensor:
        """Cross-entropy of the targets of each of `count` documents, summed, float64."""
        index_N = (labels_S != IGNORE).nonzero().squeeze(1)
        losses_N = -self.logprobs(hidden_SD.index_select(0, index_N), labels_S.index_select(0, index_N)).double()
        sums = torch.zeros(count, dtype=torch.float64, device=labels_S.device)
        return sums.index_add(0, documents_S[index_N], losses_N)

    @torch.no_grad()
    def sums(self, hidden_SD: Tensor, labels_S: Tensor) -> Tensor:
        """Sum of the cross-entropy, and targets that are the likeliest words, float64 [2]."""
        index_N = (labels_S != IGNORE).nonzero().squeeze(1)
        hidden_ND, target_N = hidden_SD.index_select(0, index_N), labels_S.index_select(0, index_N)
        found = hidden_SD.new_zeros(2, dtype=torch.float64)
        rows = max(1, self.max_logits // (len(self.linear.weight) * self.group.size()))
        for start in range(0, len(target_N), rows):
            logits_CV, target_C = self.logits(hidden_ND[start : start + rows]).float(), target_N[start:][:rows]
            right = (logits_CV.argmax(-1) == target_C).sum()
            found += torch.stack([F.cross_entropy(logits_CV, target_C, reduction="sum"), right])
        return found


def _vocab_parallel_losses(hidden_CD: Tensor, weight_VD: Tensor, target_C: Tensor) -> Tensor:
    logits_C1V = F.linear(hidden_CD, weight_VD).float().unsqueeze(1)
    return vocab_parallel_cross_entropy(logits_C1V, target_C.unsqueeze(1)).squeeze(1)


def shell(talker: Talker) -> Talker:
    """The Talker without its decoder's layers, norm and head: its front."""
    del talker.model.layers, talker.model.norm, talker.codec_head
    return talker


def residual_sums(talker: Talker, hidden_TD: Tensor, plan: TalkerPlan, cut: Cut, max_logits: int) -> Tensor:
    """Cross-entropy sums of the residual codes [R] of the frames whose predicting position is here."""
    places_N, frames_N = cut.places_here(plan.frame_places_F - 1)
    codes_GN = plan.codes_GF[:, frames_N]
    states_NRD = talker.residual_states(hidden_TD.index_select(0, places_N), codes_GN)
    heads = enumerate(talker.code_predictor.lm_head)
    ask = partial(cross_entropy_sum, max_logits=max_logits)
    return torch.stack([head(states_NRD[:, r], partial(ask, labels_T=codes_GN[r + 1])) for r, head in heads])
