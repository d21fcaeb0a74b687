"""The engine contract over Megatron-Core.

    counts of all ranks -> zero gradients -> passes over the pipeline (passes.py)
    -> gradients summed over data, context and tensor ranks -> finite? -> clip, AdamW on this rank's part, gather

How it keeps the contract:

* A stage's loss is this rank's share of the global loss, so gradients are sums and Megatron divides nothing.
* Expert shares and balance as everywhere: what routers counted is added over all ranks once a step.
* bf16 models have fp32 masters, started from the unrounded weights; gradients are summed in fp32.
* Frozen parameters are in the model's dtype on their stage; their fp32 values lie in host memory, as under DeepSpeed.
* No rank ever holds the whole model: initial weights are drawn tensor by tensor, by name.

Ranks of one replica (tensor, context and pipeline ranks) read the same packs. Letters: L layers, E experts, K terms.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from torch import Tensor, nn

from data.types import Batch
from models.config import TranscriberConfig
from train import ranks
from train.engines import VALUE, Fragment, Shard, StateReader, StepStats
from train.engines.megatron import answers
from train.engines.megatron.block import BalancedRouter
from train.engines.megatron.build import Built, build_alone, build_parts
from train.engines.megatron.cpu import on_this
from train.engines.megatron.layout import Peers, stage_of
from train.engines.megatron.passes import Passes
from train.engines.megatron.state import State, own_parts
from train.engines.megatron.waveform import Alone, WavePasses, undivided
from train.engines.scoring import document_losses, most_of_all
from train.engines.setup import (
    AnyObjective,
    Drawn,
    EngineSetup,
    continue_greedily,
    first_shares,
    read_shares,
    stats_of,
    sums_of_eval,
)
from train.errors import EngineError
from train.loss import SHARE, Totals, next_share
from train.optim import group_of
from train.speech import SpeechObjective
from train.transcribe import TranscribeObjective
from train.watch import NOTHING, Clock, Look, Tally, Towers
from train.waveform import ADVERSARY


class MegatronEngine:
    """Implements train.engines.Engine. Every method but `fragments` is collective."""

    def __init__(self, setup: EngineSetup) -> None:
        self.setup, self.device = setup, setup.device
        ranks.ensure_group(setup.device)
        # names and flags; weights are in the stages. Outside: torch notes its factories when meta is first asked for
        self.objective: AnyObjective = setup.build_objective(drawn=False)
        self.towers = Towers(self.objective.model, setup.optim)
        with self._megatron():
            self._build(setup)

    def _megatron(self) -> contextlib.AbstractContextManager[None]:
        """Around every call into Megatron."""
        return on_this(self.device)

    def _build(self, setup: EngineSetup) -> None:
        alone = self.objective if isinstance(self.objective, Alone) else None
        self.peers = Peers.form(undivided(setup.engine) if alone else setup.engine, setup.device)
        data = self.peers.data
        self.shard = Shard(data.rank(), data.size(), leads=self.peers.leads)
        self.is_main = ranks.rank() == 0
        named = dict(self.objective.model.named_parameters())
        # discriminators draw their own first weights; kept as they are, before a cast to 16 bits
        given = {name: p.detach().clone() for name, p in named.items() if name.startswith(f"{ADVERSARY}.")}
        built = build_alone(setup, alone) if alone else build_parts(setup, self.objective, self.peers)
        shapes = {name: tuple(parameter.shape) for name, parameter in named.items()}
        overlap = setup.engine.overlap
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=overlap,
            overlap_param_gather=overlap,
        )
        self.parts = built.parts.wrapped(partial(_wrapped, ddp))
        self.optimizer: Any = get_megatron_optimizer(
            _optimizer_config(setup),
            self.parts.all,
            config_overrides=_groups(built, named, setup),
            use_gloo_process_groups=setup.device.type == "cpu",
        )
        frozen = own_parts([n for n, p in named.items() if not p.requires_grad], shapes, ranks.rank(), ranks.world())
        self.state = State(self.parts.all, self.optimizer, built.placed, shapes, frozen)
        self.passes = WavePasses(self.parts) if alone else self._passes(setup, built)
        self.shares = first_shares(self.objective, self.device)
        self.state.restore(Drawn(setup, given), optimizer_step=0)

    def _passes(self, setup: EngineSetup, built: Built) -> Passes:
        assert not isinstance(setup.model, TranscriberConfig)
        way = setup.phase.speech if isinstance(self.objective, SpeechObjective) else "off"
        talker = getattr(setup.model, "talker", None)
        tap = talker.accept_hidden_layer if talker is not None else 1
        return Passes(
            self.parts,
            self.peers,
            setup.model,
            way,
            getattr(self.objective, "plan", lambda batch: batch.speech),
            setup.loss.preference,
            torch.bfloat16 if setup.engine.precision == "bf16" else torch.float32,
            stage_of(built.thinker_layers, tap - 1, setup.engine.pp),
        )

    def train_step(self, microbatches: Sequence[Batch], lr: float, look: Look = NOTHING) -> StepStats:
        """See train.engines.Engine."""
        with self._megatron():
            return self._train_step(microbatches, lr, look)

    def _train_step(self, microbatches: Sequence[Batch], lr: float, look: Look) -> StepStats:
        mine = self.objective.totals(microbatches)
        totals = mine.like(ranks.total(mine.vector() * self.shard.leads))
        for chunk in self.parts.all:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        clock, tally = Clock(self.device), Tally(self.objective, look, self.device, self.towers.scales)
        self._begin(totals)
        self.passes.counts_kinds = tally.kinds is not None
        batches = [batch.to(self.device) for batch in self._even(microbatches)]
        think, speak = self._shares_of_loss(totals)
        self.setup.beat("forward_backward")
        sums = self.passes.step(batches, think, speak)
        losses_K, balance, counts, tallied = self._found(sums, totals, tally)
        self._finalize()
        clock.mark("forward_backward")
        self.setup.beat("optimizer")
        finite = bool(losses_K.isfinite().all()) and math.isfinite(balance)
        grad_norm, applied, norms = self._update(lr, finite, look)
        clock.mark("optimizer")
        if applied:
            self.shares = [next_share(count_LE).to(self.device) for count_LE in counts]
        stats = stats_of(self.objective, totals, losses_K, balance, grad_norm, self.shares, applied)
        return replace(stats, seen=tally.seen(clock, norms, tallied))

    def _even(self, microbatches: Sequence[Batch]) -> list[Batch]:
        """As many as the interleaved schedule wants: a multiple of the stages, by micro-batches without tokens."""
        missing = -len(microbatches) % self.setup.engine.pp if self.setup.engine.interleave > 1 else 0
        return [*microbatches, *[Batch.empty(self.setup.thinker.audio.num_mel_bins)] * missing]

    def _routers(self) -> Iterator[tuple[int, int, BalancedRouter]]:
        """Those here that learn to balance: which of the objective's routers, layer, module."""
        chunks = {f"talker.{SHARE}": self.parts.talker}
        for place, routers in enumerate(self.objective.routers):
            for chunk in chunks.get(routers.name, self.parts.thinker):
                for layer, router in chunk.module.routers().items():
                    yield place, layer, router

    def _begin(self, totals: Totals) -> None:
        for chunk in (*self.parts.thinker, *self.parts.talker):  # also those whose balance does not count
            for router in chunk.module.routers().values():
                router.begin(torch.zeros(router.num_experts, device=self.device))
        for place, layer, router in self._routers():
            share_LE = self.shares[place]
            scale = self.setup.loss.balance * share_LE.shape[1] / (len(share_LE) * max(1, totals.tokens[place]))
            router.begin(share_LE[layer] * scale)

    def _shares_of_loss(self, totals: Totals) -> tuple[Any, Any]:
        """What turns sums of the Thinker's terms, and of the Talker's, into a share of the global loss."""
        scales = [term.weight / max(1, count) for term, count in zip(self.objective.terms, totals.targets, strict=True)]
        text = int(self.objective.terms[0].name == "text")
        return partial(_weighted, scales[:text]), partial(_weighted, scales[text:])

    def _found(
        self, sums: Sequence[Tensor], totals: Totals, tally: Tally
    ) -> tuple[Tensor, float, list[Tensor], Tensor]:
        """Sums of the terms, balance loss, expert counts and the tally of all ranks."""
        terms = len(self.objective.terms)
        found_K = torch.zeros(terms, dtype=torch.float64, device=self.device)
        if sums:
            found_K += torch.cat([each_K.double() for each_K in sums])
        counts = [torch.zeros(2, *share_LE.shape, dtype=torch.float64, device=self.device) for share_LE in self.shares]
        for place, layer, router in self._routers():
            counts[place][:, layer] = torch.stack([router.count_E, router.prob_E]).double()
            if tally.kinds is not None and router.kind_KE is not None:
                tally.kinds[:, layer] = router.kind_KE
        if self.passes.media is not None:
            tally.media += self.passes.media
        everything = ranks.total(torch.cat([found_K, *(count.flatten() for count in counts), tally.vector()]))
        sizes = [terms, *(count.numel() for count in counts)]
        losses_K, *flat, tallied = everything.split([*sizes, len(everything) - sum(sizes)])
        balance, found = 0.0, []
        for values, share_LE, tokens in zip(flat, self.shares, totals.tokens[: len(flat)], strict=True):
            count_LE, prob_LE = values.view(2, *share_LE.shape)
            pull = (share_LE.cpu().double() * prob_LE).sum() / len(share_LE)
            balance += share_LE.shape[1] * float(pull) / max(1, tokens)
            found.append(count_LE.float())
        return losses_K, balance, found, tallied

    def _finalize(self) -> None:
        """Sum gradients over data, context and tensor ranks."""
        finalize_model_grads(self.parts.all)

    def _update(self, lr: float, finite: bool, look: Look) -> tuple[float, bool, dict[str, float]]:
        """Megatron's step, unless loss or norm is not finite: the norm, whether it was made, norms of towers."""
        self.optimizer.prepare_grads()
        grad_norm, norms = float(self.optimizer.get_grad_norm()), {}
        if not (finite and math.isfinite(grad_norm)):
            return grad_norm, False, norms  # the next step begins with zero gradients
        if look.norms:
            norms = self.towers.norms(ranks.total(self.towers.squares(self.state.gradients())))
        for part in self.optimizer.chained_optimizers:
            if self.setup.optim.clip and not part.is_stub_optimizer:
                clip_grad_by_total_norm_fp32(part.get_parameters(), self.setup.optim.clip, grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_mult"]
            group["weight_decay"] = self.setup.optim.weight_decay * group["wd_mult"]
        self.optimizer.step_with_ready_grads()
        return grad_norm, True, norms

    def eval_step(self, batch: Batch) -> Mapping[str, float]:
        """See train.engines.Engine."""
        with self._megatron(), self._evaluating():
            if isinstance(self.objective, TranscribeObjective):
                return sums_of_eval(self.objective, batch.to(self.device))
            assert isinstance(self.passes, Passes), "a phase of the waveform decoder evaluates nothing"
            return answers.sums_of(self.passes, batch.to(self.device))

    def generate(self, batch: Batch, max_new_tokens: int, stop_id: int) -> list[list[int]]:
        """See train.engines.Engine."""
        batch, limits = batch.to(self.device), (max_new_tokens, stop_id, lambda done: not ranks.agree(not done))
        with self._megatron(), self._evaluating():
            if isinstance(self.objective, TranscribeObjective):
                return continue_greedily(self.objective, batch, *limits)
            assert isinstance(self.passes, Passes), "a phase of the waveform decoder evaluates nothing"
            return answers.continue_greedily(self.passes, self.setup.thinker, batch, *limits)

    def losses(self, batch: Batch) -> list[float]:
        """See train.engines.Engine."""
        batch = batch.to(self.device)
        with self._megatron(), self._evaluating():
            if isinstance(self.objective, TranscribeObjective):
                return document_losses(self.objective, batch)
            assert isinstance(self.passes, Passes), "a phase of the waveform decoder evaluates nothing"
            return answers.losses_of(self.passes, batch)[0]

    def likelihoods(self, batch: Batch, choices: Sequence[Sequence[Sequence[int]]]) -> list[list[float]]:
        """See train.engines.Engine."""
        assert isinstance(self.passes, Passes), "a phase of the waveform decoder evaluates nothing"
        (rounds,) = most_of_all([max(map(len, choices), default=0)])
        with self._megatron(), self._evaluating():
            return answers.likelihoods_of(self.passes, batch.to(self.device), choices, rounds)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        for chunk in self.parts.all:
            chunk.train(False)
        tap, self.passes.tap = self.passes.tap, 0
        try:
            yield
        finally:
            self.passes.tap = tap

    def fragments(self) -> Iterator[Fragment]:
        """See train.engines.Engine."""
        yield from self.state.fragments()
        for routers, share_LE in zip(self.objective.routers, self.shares, strict=True):
            shape, values = tuple(share_LE.shape), {VALUE: share_LE.view(-1)}
            yield Fragment(routers.name, shape, 0, share_LE.numel(), values, replicated=True)

    @torch.no_grad()
    def restore(self, state: StateReader, *, optimizer_step: int) -> None:
        """See train.engines.Engine."""
        with self._megatron():
            self.state.restore(state, optimizer_step)
        if optimizer_step:
            self.shares = read_shares(state, self.objective, self.device)

    def close(self) -> None:
        """See train.engines.Engine. Megatron's modules and hooks know each other: only a collection frees them."""
        del self.parts, self.optimizer, self.state, self.passes
        mpu.destroy_model_parallel()
        gc.collect()


def _weighted(scales: Sequence[float], losses_K: Tensor) -> Tensor:
    return (losses_K * losses_K.new_tensor(scales)).sum()


def _wrapped(config: DistributedDataParallelConfig, module: Any) -> DistributedDataParallel:
    return DistributedDataParallel(module.config, config, module)


def _optimizer_config(setup: EngineSetup) -> OptimizerConfig:
    first, second = setup.betas
    bf16 = setup.engine.precision == "bf16"
    return OptimizerConfig(
        optimizer="adam",
        lr=setup.optim.lr,
        min_lr=setup.optim.lr,
        weight_decay=setup.optim.weight_decay,
        adam_beta1=first,
        adam_beta2=second,
        adam_eps=setup.optim.eps,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=True,
        overlap_param_gather=setup.engine.overlap,
        clip_grad=setup.optim.clip,
    )


def _groups(built: Built, named: Mapping[str, nn.Parameter], setup: EngineSetup) -> dict[ParamKey, Any]:
    """Learning-rate multiplier and weight decay of every parameter here, by our names, as Megatron takes them."""
    members: dict[tuple[float, bool], set[nn.Parameter]] = {}
    for parameter, placed in built.placed.items():
        if parameter.requires_grad:
            found = {group_of(run.name, named[run.name], setup.optim) for run in placed.runs}
            if len(found) > 1:
                names = sorted({run.name for run in placed.runs})
                raise EngineError(
                    f"optim.lr_scale: under megatron {', '.join(names)} are one parameter: scale them alike"
                )
            members.setdefault(found.pop(), set()).add(parameter)
    return {
        ParamKey(predicate=ParamPredicate(f"x{scale:g} {decay}", these.__contains__)): {
            "lr_mult": scale,
            "wd_mult": float(decay),
        }
        for (scale, decay), these in members.items()
    }
