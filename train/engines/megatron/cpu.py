"""What Megatron-Core takes for granted of CUDA, replaced where there is no GPU. On a GPU nothing is.

    with on_this(device):     # every call into Megatron, from its import on
        ...

Replacements live as long as the `with`, so nothing else in the process meets them. Each, and why, in docs/engines.md.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

SUM = dist.ReduceOp.SUM
CPU = torch.device("cpu")
FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "zeros_like", "ones_like", "empty_like")
_entered = threading.local()


class _Stream:
    """Stands for a stream and an event: on a CPU every operation is in order already."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., _Stream]:
        return lambda *args, **kwargs: _Stream()

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *args: Any) -> None:
        pass


def _here(make: Callable[..., Any]) -> Callable[..., Any]:
    """A factory of tensors that takes the literal "cuda" for this device."""

    def made(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = CPU
        return make(*args, **kwargs)

    return made


def _cuda_name(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Tensor.type() as on a GPU: the optimizer compares it with the names of CUDA types."""

    def named(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = plain(self, *args, **kwargs)
        return found if args or kwargs else found.replace("torch.", "torch.cuda.", 1)

    return named


def _itself(value: Any, *args: Any, **kwargs: Any) -> Any:
    return value


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _stream(*args: Any) -> _Stream:
    return _Stream()


def _gathered(plain: Callable[..., Any]) -> Callable[..., Any]:
    """all_gather of unequal parts, which NCCL does by itself and gloo refuses."""

    def gather(parts: Sequence[torch.Tensor], mine: torch.Tensor, group: Any = None, **kwargs: Any) -> Any:
        if len({part.shape for part in parts}) == 1:
            return plain(list(parts), mine, group=group, **kwargs)
        parts[dist.get_rank(group)].copy_(mine)
        for rank, part in enumerate(parts):
            dist.broadcast(part, dist.get_global_rank(group, rank), group=group)
        return None

    return gather


def _scattered(plain: Callable[..., Any]) -> Callable[..., Any]:
    """reduce_scatter to unequal parts, likewise."""

    def scatter(mine: torch.Tensor, parts: Sequence[torch.Tensor], op: Any = SUM, group: Any = None, **kw: Any) -> Any:
        if len({part.shape for part in parts}) == 1:
            return plain(mine, list(parts), op=op, group=group, **kw)
        for rank, part in enumerate(parts):
            summed = part.clone()
            dist.reduce(summed, dist.get_global_rank(group, rank), op=op, group=group)
            if rank == dist.get_rank(group):
                mine.copy_(summed)
        return None

    return scatter


@contextlib.contextmanager
def on_this(device: torch.device) -> Iterator[None]:
    """Make Megatron-Core run on `device`: nothing to do for a GPU."""
    if device.type == "cuda" or getattr(_entered, "now", False):
        yield
        return
    _entered.now = True
    try:
        with contextlib.ExitStack() as stack:
            for target, name, value in (*_torch(), *_gloo(), *_megatron()):
                stack.enter_context(patch.object(target, name, value))
            yield
    finally:
        _entered.now = False


def _torch() -> Iterator[tuple[Any, str, Any]]:
    cuda = torch.cuda
    yield cuda, "current_device", lambda: CPU
    yield cuda, "is_current_stream_capturing", lambda: False
    for owner in (torch.Tensor, torch.nn.Module):
        yield owner, "cuda", _itself
    for name in ("Stream", "Event"):
        yield cuda, name, _Stream
    for name in ("current_stream", "default_stream", "stream"):
        yield cuda, name, _stream
    for owner, name in ((cuda, "synchronize"), (cuda, "empty_cache"), (torch.Tensor, "record_stream")):
        yield owner, name, _nothing
    yield cuda, "manual_seed", torch.manual_seed
    yield cuda, "get_rng_state", lambda *args, **kwargs: torch.get_rng_state()
    for name in FACTORIES:
        yield torch, name, _here(getattr(torch, name))
    yield torch.Tensor, "type", _cuda_name(torch.Tensor.type)


def _gloo() -> Iterator[tuple[Any, str, Any]]:
    yield dist, "all_gather", _gathered(dist.all_gather)
    yield dist, "reduce_scatter", _scattered(dist.reduce_scatter)


def _megatron() -> Iterator[tuple[Any, str, Any]]:
    """Needs the package, which must be imported on a machine as torch describes it: without replacements."""
    import megatron.core.tensor_parallel.random as random
    from megatron.core.transformer.moe import token_dispatcher

    def moved(tensor: torch.Tensor | None, as_numpy: bool = False, **kwargs: Any) -> Any:
        return tensor.numpy() if as_numpy and tensor is not None else tensor

    yield random, "_set_cuda_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state)
    yield random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state()
    yield token_dispatcher, "maybe_move_tensor_to_cpu", moved
