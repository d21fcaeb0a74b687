"""DeepSpeed: ZeRO 1, 2, 3 and offload for the optimizer's state, AutoEP for the experts; NCCL on GPUs, gloo on CPUs.

    media of the step -> encoders, each rank its share -> features where they are needed   (train/encoders.py)
    for each micro-batch: forward -> local sum / global count * ranks -> engine.backward   (ZeRO averages over ranks)
    gradients of the features -> backward of the encoders
    sums and expert counts of all ranks -> engine.step: finite? clip, AdamW on this rank's part of the fp32 masters

How it keeps the contract:

* bf16 models have fp32 masters, started from the unrounded weights. Gradients are summed in fp32 over micro-batches and
  ranks. At stage 1 DeepSpeed takes its BF16_Optimizer for that, with whole fp32 gradients on every rank; 2 shards them.
* AutoEP only where `engine.ep` > 1 and experts train; else our own fused experts run (models/layers/experts.py).
  Frozen experts under ZeRO 1 and 2 are therefore whole on every rank; ZeRO-3 shards them.
* Frozen parameters are in the model's dtype inside DeepSpeed. Their fp32 values, for the checkpoint, lie in host memory
  in equal parts over the ranks: 4 / ranks bytes per frozen element.

Cost beside DeepSpeed's own: two reductions of a few numbers a step (counts before, sums and expert counts after).
Where DeepSpeed keeps its tensors is not part of its API: the version is pinned.
"""

from __future__ import annotations

import contextlib
import gc
import io
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from data.types import Batch
from train import ranks
from train.encoders import SharedEncoding
from train.engines import MOMENTS, VALUE, WEIGHT, Fragment, Shard, StateReader, StepStats, autoep
from train.engines.deepspeed_config import Initial, configuration, optimizer_factory
from train.engines.scoring import Scoring
from train.engines.setup import (
    AnyObjective,
    EngineSetup,
    continue_greedily,
    first_shares,
    read_shares,
    starts_anew,
    stats_of,
    sums_of_eval,
)
from train.engines.ulysses import Replica
from train.errors import EngineError
from train.loss import balance_losses, next_share, weighted
from train.optim import set_lr
from train.watch import NOTHING, Clock, Look, Tally, Towers


class _Owned(NamedTuple):
    """A range of one of the model's parameters and the storage inside DeepSpeed that holds it on this rank."""

    name: str
    start: int
    tensors: Mapping[str, Tensor]  # flat views; fp32 unless the parameter is frozen


class DeepSpeedEngine(Scoring):
    """Implements train.engines.Engine. Every method but `fragments` is collective."""

    def __init__(self, setup: EngineSetup) -> None:
        deepspeed = import_deepspeed(setup.device)
        ranks.ensure_group(setup.device)
        self.setup, self.device, self.stage = setup, setup.device, setup.engine.zero
        self.replica = Replica.form(setup.engine.cp, setup.thinker) if setup.engine.cp > 1 else None
        self.shard = self.replica.shard if self.replica else Shard(ranks.rank(), ranks.world())
        self.is_main = ranks.rank() == 0
        objective = setup.build_objective()
        for family in objective.families:
            check_degrees(setup.engine.ep, family.experts, ranks.world())
        describe_experts(objective)
        named = dict(objective.model.named_parameters())
        self.shapes = {name: tuple(parameter.shape) for name, parameter in named.items()}
        self.frozen = {n: self._own_part(p.detach()) for n, p in named.items() if not p.requires_grad}
        initial = {name: p.detach().clone() for name, p in named.items()} if self._is_bf16 else None
        self.towers, self._look, self._squares = Towers(objective.model, setup.optim), NOTHING, None
        experts_train = any(p.requires_grad for name, p in named.items() if ".experts." in name)
        ep = setup.engine.ep if experts_train else 1
        with contextlib.redirect_stdout(io.StringIO()):  # BF16_Optimizer prints its memory; warnings are logged
            self.engine, *_ = deepspeed.initialize(
                model=objective,
                model_parameters=setup.param_groups(objective),  # AutoEP's parameters inherit their sources' groups
                optimizer=optimizer_factory(setup),
                config=configuration(setup, ep, sum(p.numel() for p in named.values())),
            )
        self.objective, self.zero = self.engine.module, self.engine.optimizer
        self.optimizer = self.zero.optimizer
        self.optimizer.register_step_pre_hook(self._note_gradients)
        expose_router_logits(self.objective)
        self.shares = first_shares(self.objective, self.device)
        self._sharing = setup.engine.share_encoders and ranks.world() > 1 and setup.encodes
        if initial is not None:
            self.restore(Initial(initial), optimizer_step=0)

    @property
    def _is_bf16(self) -> bool:
        return self.setup.engine.precision == "bf16"

    def _own_part(self, whole: Tensor) -> tuple[int, Tensor]:
        """Start and fp32 copy of this rank's part of a frozen parameter."""
        size = -(-whole.numel() // ranks.world())
        start = min(ranks.rank() * size, whole.numel())
        return start, whole.reshape(-1)[start : start + size].float().cpu().clone()

    def train_step(self, microbatches: Sequence[Batch], lr: float, look: Look = NOTHING) -> StepStats:
        """See train.engines.Engine."""
        self.engine.train()
        self._look, self._squares = look, None
        objective, mine = self.objective, self.objective.totals(microbatches)
        totals = mine.like(ranks.total(mine.vector().to(self.device) * self.shard.leads))
        found_K = torch.zeros(len(objective.terms) + 1, dtype=torch.float64)  # the last is the balance loss
        counts = [torch.zeros_like(share_LE) for share_LE in self.shares]
        clock, tally = Clock(self.device), Tally(objective, look, self.device, self.towers.scales)
        self.setup.beat("encoders" if self._sharing else "forward")
        shared = self._shared(microbatches) if self._sharing else None
        parts = list(shared.parts()) if shared else [(batch, None) for batch in microbatches]
        for number, (batch, features) in enumerate(parts, 1):
            self.setup.beat("forward")
            batch, *part = self.replica.cut(batch) if self.replica else (batch,)
            sums = self.engine(batch.to(self.device), features, *part)
            clock.mark("forward")
            balance_share = balance_losses(self.shares, sums.probs, totals.tokens)
            share = weighted(sums.losses_K, objective.terms, totals) + self.setup.loss.balance * balance_share
            # a loss that is not finite makes every gradient so: DeepSpeed looks at gradients alone before it updates
            self.setup.beat("backward")
            scale = torch.where(share.detach().isfinite(), float(ranks.world()), torch.nan)
            self._backward(share * scale, last=number == len(parts) and not (shared and shared.learns))
            clock.mark("backward")
            tally.add(sums)
            found_K += torch.cat([sums.losses_K, balance_share.to(sums.losses_K).view(1)]).detach().cpu().double()
            counts = [count_LE + more_LE for count_LE, more_LE in zip(counts, sums.counts, strict=True)]
        if shared and shared.learns:
            self.setup.beat("encoders")
            self._backward(shared.loss() + self._nothing(), last=True)
            clock.mark("backward")
        flat = [found_K.to(self.device), *(count_LE.flatten().double() for count_LE in counts), tally.vector()]
        everything = ranks.total(torch.cat(flat))
        clock.mark()
        self.setup.beat("optimizer")
        grad_norm, applied = self._update(lr)
        clock.mark("optimizer")
        if applied and not torch.isfinite(everything).all():
            raise EngineError("the loss is not finite, but DeepSpeed made the update; go back to the last checkpoint")
        found_K, *flat, tallied = everything.split([len(part) for part in flat])
        counts = [values.view(count_LE.shape).float() for values, count_LE in zip(flat, counts, strict=True)]
        if applied:
            self.shares = [next_share(count_LE).to(self.device) for count_LE in counts]
        stats = stats_of(objective, totals, found_K[:-1], float(found_K[-1]), grad_norm, self.shares, applied)
        return replace(stats, seen=tally.seen(clock, self._norms(grad_norm), tallied))

    def _note_gradients(self, *_: Any) -> None:
        """Before AdamW's step, of all parameters or of some: sums of squares of what this rank steps on."""
        if not self._look.norms:
            return
        stepping = {id(flat) for group in self.optimizer.param_groups for flat in group["params"]}
        flats = [flat.grad if id(flat) in stepping else None for flat in self._flats()]
        here = (
            (name.removeprefix(self.objective.prefix), grad.view(-1).narrow(0, offset, length))
            for name, p, _, length, group, offset in self._places()
            if p.requires_grad and (grad := flats[group]) is not None
        )
        found = self.towers.squares(here)
        self._squares = found if self._squares is None else self._squares + found

    def _norms(self, grad_norm: float) -> dict[str, float]:
        """Gradient norm of each tower before clipping, where it was asked for."""
        if self._squares is None:
            return {}
        clip = self.setup.optim.clip
        scale = max(1.0, (grad_norm + 1e-6) / clip) if clip else 1.0  # DeepSpeed has clipped them already
        return self.towers.norms(ranks.total(self._squares * scale**2))

    def _shared(self, batches: Sequence[Batch]) -> SharedEncoding:
        deals = self.replica.deals(batches) if self.replica else None
        mine = self.replica.present(batches) if self.replica else batches
        return SharedEncoding(mine, self.setup.thinker, self.device, self.engine, deals)

    def _nothing(self) -> Tensor | float:
        """Zero, for a backward that no forward precedes and that reaches the encoders only.

        With its optimizer offloaded, DeepSpeed moves only gradients of parameters that the last backward reaches to
        the host: then it reaches all of them, by a batch without tokens.
        """
        if self.setup.engine.offload:
            return self.engine(Batch.empty(self.setup.thinker.audio.num_mel_bins).to(self.device)).losses_K.sum()
        self.zero.clear_backward_seen_flag()  # as a forward does: else the gradients so far would be added once more
        return 0.0

    def _backward(self, loss: Tensor, last: bool) -> None:
        """Add gradients; with the `last` of a step they are ready for the update."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)

    def _update(self, lr: float) -> tuple[float, bool]:
        """Norm of the gradient, and whether the update was made: DeepSpeed's ranks agree about that."""
        set_lr(self.optimizer.param_groups, lr)
        self.engine.step()
        applied = self.engine.was_step_applied()
        return (float(self.engine.get_global_grad_norm()) if applied else math.nan), applied

    @torch.no_grad()
    def eval_step(self, batch: Batch) -> Mapping[str, float]:
        """See train.engines.Engine."""
        self.engine.train(False)
        return sums_of_eval(self.objective, batch.to(self.device))

    @torch.no_grad()
    def generate(self, batch: Batch, max_new_tokens: int, stop_id: int) -> list[list[int]]:
        """See train.engines.Engine."""
        self.engine.train(False)

        def all_done(done: bool) -> bool:
            return not ranks.agree(not done)

        return continue_greedily(self.objective, batch.to(self.device), max_new_tokens, stop_id, all_done)

    def _flats(self) -> Sequence[Tensor]:
        """The fp32 tensors that the torch optimizer steps on, as ZeRO 3, ZeRO 1/2 and BF16_Optimizer call them."""
        names = "fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"
        return next(getattr(self.zero, name) for name in names if hasattr(self.zero, name))

    def _ranges(self) -> Iterator[tuple[str, nn.Parameter, int, int, Mapping[str, Tensor]]]:
        """What lies on this rank, by DeepSpeed's names: name, parameter, start, length, flat views."""
        flats = self._flats()
        for name, p, start, length, group, offset in self._places():
            if p.requires_grad:
                yield name, p, start, length, views(self.optimizer, flats[group], offset, length)
            else:
                storage = p.ds_tensor.data if self.stage == 3 else p.data.view(-1)
                yield name, p, start, length, {WEIGHT: storage.narrow(0, 0, length)}

    def _places(self) -> Iterator[tuple[str, Any, int, int, int, int]]:
        """Name, parameter, start and length of what lies here; of what learns also which of `_flats`, and where."""
        for name, p in self.objective.named_parameters():
            mapping, group, offset = getattr(p, "_hp_mapping", None), 0, 0
            if self.stage == 3:  # equal parts over the ranks of its group; the last parts are padded
                start = dist.get_rank(p.ds_process_group) * p.ds_tensor.numel()
                length = min(p.ds_tensor.numel(), p.ds_numel - start)
                if p.requires_grad:
                    group, offset, _ = self.zero.grad_position[self.zero.get_param_id(p)]
            elif mapping is not None:  # what of p lies in this rank's part of its group's flat buffer
                start, length = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
                group, offset = mapping.param_group_index, mapping.hp_fragment_address.start
            else:  # a frozen parameter is whole on every rank; of a trainable one nothing is here
                start, length = 0, 0 if p.requires_grad else p.numel()
            if length > 0:
                yield name, p, start, length, group, offset

    def _owned(self, trainable: bool) -> Iterator[_Owned]:
        for name, p, start, length, tensors in self._ranges():
            if p.requires_grad is not trainable:
                continue
            experts = getattr(p, "ds_autoep_uc_meta", {}).get("local_experts")
            for piece in autoep.pieces(name.removeprefix(self.objective.prefix), start, length, experts, self.shapes):
                cut = {kind: tensor.narrow(0, piece.offset, piece.length) for kind, tensor in tensors.items()}
                yield _Owned(piece.name, piece.start, cut)

    def fragments(self) -> Iterator[Fragment]:
        """See train.engines.Engine."""
        frozen = (_Owned(name, start, {WEIGHT: part}) for name, (start, part) in self.frozen.items())
        for name, start, tensors in (*self._owned(trainable=True), *frozen):
            if length := tensors[WEIGHT].numel():
                yield Fragment(name, self.shapes[name], start, length, tensors)
        for routers, share_LE in zip(self.objective.routers, self.shares, strict=True):
            shape, values = tuple(share_LE.shape), {VALUE: share_LE.view(-1)}
            yield Fragment(routers.name, shape, 0, share_LE.numel(), values, replicated=True)

    @torch.no_grad()
    def restore(self, state: StateReader, *, optimizer_step: int) -> None:
        """See train.engines.Engine."""

        def load(name: str, start: int, tensors: Mapping[str, Tensor]) -> None:
            for kind, tensor in tensors.items():
                tensor.copy_(state.read(kind, name, self.shapes[name], start, tensor.numel()))

        for flat in self._flats():
            self.optimizer.state.pop(flat, None)
            if optimizer_step:  # torch makes it only in its first step
                moments = {kind: torch.zeros_like(flat) for kind in MOMENTS}
                step = torch.tensor(float(optimizer_step), device=flat.device)
                self.optimizer.state[flat] = {"step": step, **moments}
        if self.stage == 3:
            self.zero._partition_all_parameters()
        for trainable in (True, False):
            for owned in self._owned(trainable):
                if not (trainable and starts_anew(state, owned.name)):
                    load(*owned)
        for name, (start, part) in self.frozen.items():
            load(name, start, {WEIGHT: part})
        if optimizer_step:
            self.shares = read_shares(state, self.objective, self.device)
        self._masters_to_model()

    def _masters_to_model(self) -> None:
        """Copy the fp32 masters into the model's parameters, on all ranks."""
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        for group in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        if persistent := self.zero.persistent_parameters:  # small ones stay gathered: stale without this
            persistent[0].all_gather(persistent)

    def close(self) -> None:
        """See train.engines.Engine. Frees all memory; process groups stay, the next phase's engine uses them again."""
        self.engine.destroy()
        del self.engine, self.objective, self.zero, self.optimizer
        self.frozen.clear()
        forget_modules()


def views(optimizer: torch.optim.Optimizer, flat: Tensor, offset: int, length: int) -> dict[str, Tensor]:
    """Weight and, once they exist, moments of a range of one of the optimizer's tensors."""
    state = optimizer.state.get(flat, {})
    tensors = {WEIGHT: flat.data, **{kind: state[kind] for kind in MOMENTS if kind in state}}
    return {kind: tensor.view(-1).narrow(0, offset, length) for kind, tensor in tensors.items()}


def check_degrees(ep: int, num_experts: int, world: int) -> None:
    """Raise EngineError for an expert-parallel degree that cannot be."""
    if num_experts % ep:
        raise EngineError(f"engine.ep={ep} does not divide the {num_experts} experts of the model")
    if world % ep:
        raise EngineError(f"engine.ep={ep} does not divide the {world} processes of the run")


def import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for this device. It decides at its first import what it runs on."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        import deepspeed
    except ImportError:
        raise EngineError("engine.name=deepspeed needs the package: pip install 'omniloom[deepspeed]'") from None
    # Its shared-memory all-reduce for CPUs is compiled at the first start, and a process that dies while it compiles
    # leaves a lock for which every later start waits for ever. gloo needs neither compiler nor lock.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    return deepspeed


def forget_modules() -> None:
    """Empty the two places where ZeRO-3 remembers modules, and so a closed engine, for the life of the process."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    FWD_MODULE_STACK.clear()
    method = vars(PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]
    for function in (method, *(cell.cell_contents for cell in method.__closure__ or ())):  # lru_cache below a decorator
        if hasattr(function, "cache_clear"):
            function.cache_clear()
    gc.collect()


def describe_experts(objective: AnyObjective) -> None:
    """Give the model the attribute `config` that AutoEP reads; a model type unknown to it takes none of its presets."""
    facts = autoep.register(objective.families)
    objective.__dict__["config"] = SimpleNamespace(**facts, model_type="omniloom")


class _Router(nn.Linear):
    """AutoEP's router in fp32 whatever the model's dtype, as models/layers/moe.py has it."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.float(), self.weight.float())


def expose_router_logits(model: nn.Module) -> None:
    """Make AutoEP's blocks return (output, raw router logits), as our own block does."""
    for layer in model.modules():
        if getattr(layer, "_is_autoep_layer", False):
            layer.return_router_logits = True  # type: ignore[assignment]
            layer.router_logits_capture_target = "router"  # type: ignore[assignment]
            layer.router_logits_capture_mode = "raw"  # type: ignore[assignment]
            layer.router.gate.__class__ = _Router  # type: ignore[union-attr]
