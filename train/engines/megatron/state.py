"""The state of the Megatron engine as fragments of released tensors, and back.

    distributed optimizer: a range of a parameter, its fp32 master and moments  --weights.py-->  ranges of ours
    frozen parameters: fp32 values in host memory, in equal parts over all ranks

Where the optimizer keeps its tensors is not part of Megatron's API: the version is pinned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from train.engines import MOMENTS, WEIGHT, Fragment, StateReader
from train.engines.megatron.passes import Chunks
from train.engines.megatron.weights import Placed
from train.engines.setup import starts_anew

MASTER = "param"  # what the optimizer calls it


class _Range(NamedTuple):
    """Elements of a parameter whose state is on this rank."""

    placed: Placed
    start: int
    length: int
    tensors: Mapping[str, Tensor]  # flat


class State:
    """Reads and writes what this rank holds."""

    def __init__(
        self,
        chunks: Chunks,
        optimizer: Any,
        placed: Mapping[nn.Parameter, Placed],
        shapes: Mapping[str, tuple[int, ...]],
        frozen: Mapping[str, tuple[int, Tensor]],
    ) -> None:
        """`optimizer` is Megatron's, a chain of two; `shapes` are those of all our parameters.

        `frozen`: first element and values of this rank's part of each frozen parameter.
        """
        self.chunks, self.optimizer, self.placed = chunks, optimizer, placed
        self.shapes, self.frozen = shapes, frozen

    def _parts(self) -> Iterator[Any]:
        """Megatron's optimizers here: of the dense parameters, and of the experts."""
        for part in self.optimizer.chained_optimizers:
            if not part.is_stub_optimizer:
                yield part

    def _ranges(self) -> Iterator[_Range]:
        for part in self._parts():
            for parameter in part.model_param_gbuf_map:
                here = part._get_model_param_range_map(parameter)[MASTER]
                if not here.size:
                    continue
                found = part._get_main_param_and_optimizer_states(parameter)
                tensors = {WEIGHT: found[MASTER].detach().view(-1)}
                tensors |= {kind: found[kind].view(-1) for kind in MOMENTS if kind in found}
                yield _Range(self.placed[parameter], here.start, here.size, tensors)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """What the optimizer is to step with: a name of ours and its gradient, of what no other rank gives."""
        for part in self._parts():
            for parameter in part.model_param_gbuf_map:
                placed = self.placed[parameter]
                gradient = part._get_main_param_and_optimizer_states(parameter)[MASTER].grad
                if placed.owned and gradient is not None and gradient.numel():
                    yield placed.runs[0].name, gradient

    def fragments(self) -> Iterator[Fragment]:
        """What this rank owns of the parameters."""
        for found in self._ranges():
            if not found.placed.owned:
                continue
            for name, start, offset, length in found.placed.pieces(found.start, found.length):
                tensors = {kind: tensor.narrow(0, offset, length) for kind, tensor in found.tensors.items()}
                yield Fragment(name, self.shapes[name], start, length, tensors)
        for name, (start, part) in self.frozen.items():
            if part.numel():
                yield Fragment(name, self.shapes[name], start, part.numel(), {WEIGHT: part})

    def restore(self, state: StateReader, optimizer_step: int) -> None:
        """Read every range that this rank holds; the parameters follow. Collective."""

        def load(placed: Placed, start: int, kind: str, tensor: Tensor) -> None:
            for name, first, offset, length in placed.pieces(start, tensor.numel()):
                values = state.read(kind, name, self.shapes[name], first, length)
                tensor.narrow(0, offset, length).copy_(values)

        for part in self._parts():
            part.optimizer.state.clear()
            for group in part.optimizer.param_groups:  # where fused optimizers count steps; torch counts below
                group |= {"step": optimizer_step} if "step" in group else {}
            if optimizer_step:
                part._init_optimizer_states_with_dummy_values()  # torch makes moments in its first step only
                for held in part.optimizer.state.values():
                    held["step"] = torch.full_like(torch.as_tensor(held["step"]), float(optimizer_step))
        for found in self._ranges():
            if starts_anew(state, found.placed.runs[0].name):
                continue
            for kind, tensor in found.tensors.items():
                load(found.placed, found.start, kind, tensor)
        for name, (start, part) in self.frozen.items():
            part.copy_(state.read(WEIGHT, name, self.shapes[name], start, part.numel()))
        for parameter, placed in self.placed.items():
            if not parameter.requires_grad:
                load(placed, 0, WEIGHT, parameter.data.view(-1))
        for part in self._parts():
            part._copy_main_params_to_model_params()
        for chunk in self.chunks:
            chunk.start_param_sync(force_sync=True)


def own_parts(names: Sequence[str], shapes: Mapping[str, tuple[int, ...]], rank: int, world: int) -> dict[str, Any]:
    """Room for this rank's part of each frozen parameter: name -> first element, fp32 values."""
    parts = {}
    for name in names:
        count = torch.Size(shapes[name]).numel()
        size = -(-count // world)
        start = min(rank * size, count)
        parts[name] = start, torch.empty(min(size, count - start))
    return parts
