"""The passes of a step over Megatron's pipeline schedules: what runs after what, for each way the Talker may learn.

    off        Thinker forward and backward
    detached   Thinker forward and backward, tapped on the way; Talker forward and backward
    frozen     Thinker forward up to the tap; Talker forward and backward; preference, the same on pairs
    cached     Talker forward and backward
    live       Thinker forward up to the tap; Talker forward and backward; Thinker forward and backward with the
               Talker's gradient put in at the tap and at the embedding

A Talker's pass: its front makes the inputs of all micro-batches on the last stage, where its weights are; the first
stage takes them as leaves; after the schedule their gradients go back and the front runs backward. So a weight lives
on one stage, and a schedule moves hidden states alone.

Cost beside the schedules: inputs and their gradients once over the pipeline group, [T, D] a micro-batch each; `live`
repeats the Thinker's forward up to the tap. Letters as in stages.py, X text rows, M rows that the Talker reads, H
hidden of the Thinker, K terms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from data.types import Batch, SpeechPairs
from models.config import ThinkerConfig
from models.omni_config import OmniConfig
from models.talker_inputs import TalkerPlan, multimodal_rows, talker_inputs
from train.engines.megatron.layout import Peers
from train.engines.megatron.packs import Cut, TalkerPack, ThinkerPack
from train.engines.megatron.stages import Share
from train.media import kinds_of
from train.preference import PreferenceConfig, media_counts, twice

Chunks = Sequence[Any]  # Megatron's DistributedDataParallel around stages: their attributes lie in `.module`


@dataclass(frozen=True)
class Parts:
    """What of the model is on this rank."""

    thinker: Chunks
    talker: Chunks = ()
    front: Any = None  # the Talker's, on the last stage

    def wrapped(self, wrap: Callable[[Any], Any]) -> Parts:
        """The same with every module in Megatron's data parallelism."""
        thinker, talker = [wrap(module) for module in self.thinker], [wrap(module) for module in self.talker]
        for chunks in (thinker, talker):
            if chunks:  # reductions begin with a chunk's last micro-batch; with nothing to overlap this does nothing
                hooks = [chunk.no_sync for chunk in chunks]
                chunks[0].config.no_sync_func = hooks if len(hooks) > 1 else hooks[0]
        return Parts(thinker, talker, None if self.front is None else wrap(self.front))

    @property
    def all(self) -> list[Any]:
        """Every part."""
        return [*self.thinker, *self.talker, *([self.front] if self.front is not None else [])]


@dataclass
class _Spoken:
    """A micro-batch on its way to the Talker. On the last stage: leaves that its front reads, and what it makes."""

    pack: TalkerPack
    rows_M: Tensor  # int64, of the Thinker's pack
    text_XH: Tensor
    media_MH: Tensor
    made_TD: Tensor | None


class Passes:
    """Runs the passes of one step. Every method is collective."""

    def __init__(
        self,
        parts: Parts,
        peers: Peers,
        model: ThinkerConfig | OmniConfig,
        way: str,
        plan: Callable[[Batch], TalkerPlan],
        preference: PreferenceConfig,
        dtype: torch.dtype,
        tap_stage: int,
    ) -> None:
        """`plan` says what the Talker is to say of a batch; `tap_stage` holds the layer that it reads."""
        self.parts, self.peers, self.model, self.way, self.plan = parts, peers, model, way, plan
        self.preference, self.dtype, self.tap_stage = preference, dtype, tap_stage
        talker = model.talker if isinstance(model, OmniConfig) else None
        self.thinker = model.thinker if isinstance(model, OmniConfig) else model
        self.text = self.thinker.text
        self.media: Tensor | None = None  # of a step: the Thinker's losses found here, train.media.by_media
        self.counts_kinds = False  # whether its experts are counted by kind of token
        self.tap = talker.accept_hidden_layer if talker is not None and way != "off" else 0

    def step(self, batches: Sequence[Batch], think: Share, speak: Share) -> list[Tensor]:
        """Forward and backward over micro-batches on the device; sums of the terms found here, [K] a decoder."""
        thought: Sequence[ThinkerPack] = ()
        spoken: Sequence[_Spoken] = ()
        if self.way in ("off", "detached"):
            thought = self.think(self.packs(batches), think)
        if self.way != "off":
            heard = self.listen(batches) if self.way in ("frozen", "live", "preference") else thought
            spoken = self.talk(batches, heard, speak)
        if self.way == "live":
            thought = self.think(self._with_gradients(batches, spoken), think)
        media = [pack.media for pack in thought if pack.media is not None]
        self.media = torch.stack(media).sum(0) if media else None
        found = [[pack.losses_K for pack in thought], [each.pack.losses_K for each in spoken]]
        return [torch.stack(sums).sum(0) for sums in found if sums and sums[0] is not None]  # type: ignore[arg-type]

    def packs(self, batches: Sequence[Batch], purpose: str = "loss") -> list[ThinkerPack]:
        """Micro-batches cut for this rank."""
        least = self._least([len(batch.token_ids_T) for batch in batches])
        found = [ThinkerPack.of(batch, self.text, self.peers, self.dtype, purpose, least) for batch in batches]
        for pack in found:
            pack.tokens.tap, pack.tokens.stop = self.tap, purpose == "tap"
            if self.counts_kinds and purpose == "loss":
                pack.tokens.kinds_T = pack.cut.pad(kinds_of(self.thinker, pack.batch.token_ids_T))[pack.cut.rows_T]
        return found

    def think(self, packs: Sequence[ThinkerPack], share: Share | None) -> Sequence[ThinkerPack]:
        """The Thinker over packs: forward and backward, or without `share` forward alone."""
        self._run(self.parts.thinker, packs, (share,))
        return packs

    def listen(self, batches: Sequence[Batch]) -> Sequence[ThinkerPack]:
        """The Thinker forward up to the layer that the Talker reads."""
        return self.think(self.packs(batches, "tap"), None)

    def talk(self, batches: Sequence[Batch], heard: Sequence[ThinkerPack], share: Share) -> list[_Spoken]:
        """The Talker, forward and backward."""
        packs: Sequence[ThinkerPack | None] = heard or [None] * len(batches)
        plans = [self.plan(batch).to(batch.token_ids_T.device) for batch in batches]
        least = self._least([sum(plan.doc_lengths) for plan in plans])
        parts = zip(batches, plans, packs, strict=True)
        spoken = [self._front(batch, plan, pack, least) for batch, plan, pack in parts]
        front = self.parts.front
        # its gradients come in many backwards, so none is known to be the last before the step's end
        with front.no_sync() if front is not None else nullcontext():
            talker = front.module.talker if front is not None else None
            self._run(self.parts.talker, [each.pack for each in spoken], (share, talker))
            for each in spoken:
                grad_TD = self._send(each.pack.inputs_TD.grad, each.pack.inputs_TD, 0, self.last)
                if each.made_TD is not None and each.made_TD.requires_grad:
                    each.made_TD.backward(grad_TD)
        return spoken

    def _run(self, chunks: Chunks, packs: Sequence[Any], arguments: tuple[Any, ...]) -> None:
        """One schedule over all packs; learns where there is a share of the loss to give."""
        learns = arguments[0] is not None

        def forward_step(packs: Any, chunk: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
            return chunk(next(packs), *arguments), as_loss

        with nullcontext() if learns else torch.no_grad():
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=[iter(packs) for _ in chunks],
                model=list(chunks),
                num_microbatches=len(packs),
                seq_length=max(pack.cut.padded for pack in packs),
                micro_batch_size=1,
                forward_only=not learns,
            )

    @property
    def last(self) -> int:
        """Pipeline rank of the last stage."""
        return self.peers.pp.size() - 1

    def _send(self, x: Tensor | None, like: Tensor, source: int, target: int) -> Tensor:
        """`x` of one stage on another; `like` has its shape and dtype everywhere. Other stages' result is of no use."""
        if source == target or not like.numel():
            return torch.zeros_like(like) if x is None else x
        here = self.peers.pp.rank() == source
        moved = x.contiguous() if here and x is not None else torch.zeros_like(like)
        dist.broadcast(moved, dist.get_global_rank(self.peers.pp, source), group=self.peers.pp)
        return moved

    def share_last(self, x: Tensor) -> Tensor:
        """What the last stage has, on every stage."""
        if self.peers.pp.size() > 1 and x.numel():
            dist.broadcast(x, dist.get_global_rank(self.peers.pp, self.last), group=self.peers.pp)
        return x

    def _least(self, lengths: Sequence[int]) -> int:
        """What packs are padded to: the interleaved schedule wants one length."""
        return max(1, *lengths) if self.peers.chunks > 1 else 1

    def _front(self, batch: Batch, plan: TalkerPlan, pack: ThinkerPack | None, least: int) -> _Spoken:
        """The inputs of the Talker's first layer, made on the last stage and sent to the first."""
        assert isinstance(self.model, OmniConfig) and self.model.talker is not None
        device, width = batch.token_ids_T.device, self.text.hidden_size
        text_XH = torch.zeros(len(plan.text_ids_X), width, dtype=self.dtype, device=device)
        embedded = None
        if self.peers.is_first:
            with torch.no_grad():
                embedded = self.parts.thinker[0].module.embedding(plan.text_ids_X).to(self.dtype)
        text_XH = self._send(embedded, text_XH, 0, self.last)
        rows_M, media_MH = plan.multimodal_places_M[:0], batch.media_RH.reshape(-1, width).to(self.dtype)
        if pack is not None:
            rows_M = multimodal_rows(self.model, batch.token_ids_T, batch.doc_lengths)
            tapped = None
            if self.peers.pp.rank() == self.tap_stage:
                assert pack.tokens.tapped_TD is not None
                with torch.no_grad():
                    tapped = pack.cut.gather(pack.tokens.tapped_TD).index_select(0, rows_M)
            pack.tokens.tapped_TD = None
            media_MH = torch.zeros(len(rows_M), width, dtype=self.dtype, device=device)
            media_MH = self._send(tapped, media_MH, self.tap_stage, self.last)
        pairs = None
        if self.way == "preference":
            media_MH = twice(media_MH, media_counts(plan))
            pairs = _reference(batch), self.preference
        cut = Cut.of(sum(plan.doc_lengths), self.peers, device, least)
        talker, made_TD = self.model.talker.text, None
        inputs_TD = torch.zeros(len(cut.rows_T), talker.hidden_size, dtype=self.dtype, device=device)
        text_XH, media_MH = (x.detach().requires_grad_(self.way == "live") for x in (text_XH, media_MH))
        if self.parts.front is not None:
            made_PD = talker_inputs(self.parts.front.module.talker, plan, text_XH, media_MH)
            made_TD = cut.pad(made_PD, dim=0).index_select(0, cut.rows_T)
        inputs_TD = self._send(None if made_TD is None else made_TD.detach(), inputs_TD, self.last, 0).requires_grad_()
        spoken = TalkerPack.of(plan, talker, cut, inputs_TD)
        spoken.pairs = pairs
        return _Spoken(spoken, rows_M, text_XH, media_MH, made_TD)

    def _with_gradients(self, batches: Sequence[Batch], spoken: Sequence[_Spoken]) -> list[ThinkerPack]:
        """Packs that give the Thinker the Talker's gradient, at the tap and at the embedding."""
        packs = self.packs(batches)
        for pack, each in zip(packs, spoken, strict=True):
            found = []
            # of the rows here: tensor ranks see other rows of the same text, and so do context ranks of the same media
            for leaf, group, target in (
                (each.text_XH, self.peers.tp, 0),
                (each.media_MH, self.peers.tp_cp, self.tap_stage),
            ):
                grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
                if self.peers.pp.rank() == self.last and group.size() > 1:
                    dist.all_reduce(grad, group=group)
                found.append(self._send(grad, leaf, self.last, target).float())
            text_grad_XH, media_grad_MH = found
            if self.peers.is_first:
                pack.text_ids_X, pack.text_grad_XH = each.pack.plan.text_ids_X, text_grad_XH
            places, which = pack.cut.places_here(each.rows_M)
            grad_TD = media_grad_MH.new_zeros(len(pack.cut.rows_T), media_grad_MH.shape[1])
            pack.tokens.tap_grad_TD = grad_TD.index_copy(0, places, media_grad_MH.index_select(0, which))
        return packs


def _reference(batch: Batch) -> Tensor:
    """What the reference found for a batch's pairs, [N, 2]; a batch without tokens has none."""
    return batch.speech.logprobs_N2 if isinstance(batch.speech, SpeechPairs) else batch.mel_FM.new_empty(0, 2)


def as_loss(out: Tensor) -> tuple[Tensor, Tensor, None]:
    """As a schedule wants it: the loss, a count that is not used, nothing to log."""
    return out, torch.zeros((), dtype=torch.int, device=out.device), None
