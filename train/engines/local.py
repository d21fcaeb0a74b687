"""One process, plain torch: the executable specification of the engine contract, and what a laptop or one GPU runs.

for each micro-batch: forward -> share of the global loss -> backward (gradients add up)
clip -> AdamW on fp32 masters -> copy into the model where that is bf16
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from data.types import Batch
from train import ranks
from train.engines import MOMENTS, VALUE, WEIGHT, Fragment, Shard, StateReader, StepStats
from train.engines.scoring import Scoring
from train.engines.setup import (
    EngineSetup,
    continue_greedily,
    first_shares,
    read_shares,
    starts_anew,
    stats_of,
    sums_of_eval,
)
from train.errors import EngineError
from train.loss import balance_losses, next_share, weighted
from train.optim import set_lr
from train.watch import NOTHING, Clock, Look, Tally, Towers


class LocalEngine(Scoring):
    """Implements train.engines.Engine in one process."""

    def __init__(self, setup: EngineSetup) -> None:
        if ranks.world() > 1:
            raise EngineError("engine.name=local is one process; with torchrun use engine=deepspeed")
        self.shard, self.is_main = Shard(0, 1), True
        self.device, self.setup = setup.device, setup
        dtype = torch.bfloat16 if setup.engine.precision == "bf16" else torch.float32
        objective = setup.build_objective()
        groups = setup.param_groups(objective)
        self.masters: list[tuple[str, nn.Parameter, Tensor]] = []  # name, model's parameter, fp32 master
        moved = objective.to(self.device)
        master_of: dict[nn.Parameter, Tensor] = {}
        for name, parameter in moved.model.named_parameters():
            master = parameter.detach().clone() if dtype is not torch.float32 else parameter
            master.requires_grad_(parameter.requires_grad)
            parameter.data = parameter.data.to(dtype)
            master_of[parameter] = master
            self.masters.append((name, parameter, master))
        for group in groups:
            group["params"] = [master_of[parameter] for parameter in group["params"]]
        self.objective = moved
        self.optimizer = torch.optim.AdamW(
            groups, betas=setup.betas, eps=setup.optim.eps, fused=True, lr=setup.optim.lr
        )
        self.shares = first_shares(moved, self.device)
        self.towers = Towers(moved.model, setup.optim)

    def train_step(self, microbatches: Sequence[Batch], lr: float, look: Look = NOTHING) -> StepStats:
        """See train.engines.Engine."""
        self.objective.train()
        clock, tally = Clock(self.device), Tally(self.objective, look, self.device, self.towers.scales)
        objective, totals = self.objective, self.objective.totals(microbatches)
        losses_K = torch.zeros(len(objective.terms), dtype=torch.float64)
        balance, counts = 0.0, [torch.zeros_like(share_LE) for share_LE in self.shares]
        for batch in microbatches:
            self.setup.beat("forward")
            sums = objective(batch.to(self.device))
            clock.mark("forward")
            balance_share = balance_losses(self.shares, sums.probs, totals.tokens)
            self.setup.beat("backward")
            (weighted(sums.losses_K, objective.terms, totals) + self.setup.loss.balance * balance_share).backward()
            self._accumulate()
            clock.mark("backward")
            tally.add(sums)
            losses_K += sums.losses_K.detach().cpu().double()
            balance += balance_share.item()
            counts = [count_LE + more_LE for count_LE, more_LE in zip(counts, sums.counts, strict=True)]
        norms = self._norms() if look.norms else {}
        clock.mark()
        self.setup.beat("optimizer")
        grad_norm, applied = self._update(lr, finite=bool(losses_K.isfinite().all()) and math.isfinite(balance))
        clock.mark("optimizer")
        if applied:
            self.shares = [next_share(count_LE) for count_LE in counts]
        stats = stats_of(objective, totals, losses_K, balance, grad_norm, self.shares, applied)
        return replace(stats, seen=tally.seen(clock, norms))

    def _norms(self) -> dict[str, float]:
        """Gradient norm of each tower."""
        found = ((name, master.grad) for name, _, master in self.masters)
        return self.towers.norms(self.towers.squares((name, grad) for name, grad in found if grad is not None))

    def _accumulate(self) -> None:
        """Add bf16 gradients to the masters' fp32 ones, micro-batch by micro-batch."""
        for _, parameter, master in self.masters:
            if parameter.requires_grad and master is not parameter:
                assert parameter.grad is not None
                grad, parameter.grad = parameter.grad.float(), None
                master.grad = grad if master.grad is None else master.grad.add_(grad)

    def _update(self, lr: float, finite: bool) -> tuple[float, bool]:
        """Norm of the gradient, and whether the update was made: not where loss or gradient are not finite."""
        masters = [master for _, parameter, master in self.masters if parameter.requires_grad]
        clip = self.setup.optim.clip or float("inf")
        grad_norm = nn.utils.clip_grad_norm_(masters, clip, foreach=True).item()
        applied = finite and math.isfinite(grad_norm)
        if applied:
            set_lr(self.optimizer.param_groups, lr)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if applied:
            self._sync()
        return grad_norm, applied

    @torch.no_grad()
    def _sync(self) -> None:
        for _, parameter, master in self.masters:
            if master is not parameter:
                parameter.copy_(master)

    @torch.no_grad()
    def eval_step(self, batch: Batch) -> Mapping[str, float]:
        """See train.engines.Engine."""
        self.objective.train(False)
        return sums_of_eval(self.objective, batch.to(self.device))

    @torch.no_grad()
    def generate(self, batch: Batch, max_new_tokens: int, stop_id: int) -> list[list[int]]:
        """See train.engines.Engine."""
        self.objective.train(False)
        return continue_greedily(self.objective, batch.to(self.device), max_new_tokens, stop_id)

    def fragments(self) -> Iterator[Fragment]:
        """See train.engines.Engine. One process owns every tensor whole."""
        for name, _, master in self.masters:
            state = self.optimizer.state.get(master, {})
            tensors = {WEIGHT: master.detach().view(-1)}
            tensors |= {kind: state[kind].view(-1) for kind in MOMENTS if kind in state}
            yield Fragment(name, tuple(master.shape), 0, master.numel(), tensors)
        for routers, share_LE in zip(self.objective.routers, self.shares, strict=True):
            shape, values = tuple(share_LE.shape), {VALUE: share_LE.view(-1)}
            yield Fragment(routers.name, shape, 0, share_LE.numel(), values)

    @torch.no_grad()
    def restore(self, state: StateReader, *, optimizer_step: int) -> None:
        """See train.engines.Engine."""
        for name, _, master in self.masters:
            if master.requires_grad and starts_anew(state, name):
                continue
            shape, size = tuple(master.shape), master.numel()
            master.view(-1).copy_(state.read(WEIGHT, name, shape, 0, size))
            if optimizer_step and master.requires_grad:
                moments = {kind: torch.zeros_like(master) for kind in MOMENTS}
                for kind, moment in moments.items():
                    moment.view(-1).copy_(state.read(kind, name, shape, 0, size))
                step = torch.tensor(float(optimizer_step), device=master.device)
                self.optimizer.state[master] = {"step": step, **moments}
        if optimizer_step:
            self.shares = read_shares(state, self.objective, self.device)
        self._sync()

    def close(self) -> None:
        """See train.engines.Engine."""
