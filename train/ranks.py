"""The processes of a run, as far as the loop must know them: who am I, do we all agree, what is the sum.

torchrun sets RANK, WORLD_SIZE and LOCAL_RANK; without it there is one process and every call here is the identity.
"""

from __future__ import annotations

import atexit
import json
import os
import secrets
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from train.errors import EngineError


def rank() -> int:
    """This process' number."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process' number on its machine: its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start(device: torch.device, patience_s: float = 600.0) -> None:
    """Join the other processes. A peer that does not answer for so long is an error, not a hang."""
    if world() > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=patience_s))


def ensure_group(device: torch.device) -> None:
    """A process group also for one process without torchrun: sharded engines want one."""
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    os.environ.setdefault("LOCAL_RANK", "0")


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(status: int) -> NoReturn:
    """End this process. Of several, each runs Python's exit handlers and no C++ destructors.

    Threads of gloo and DeepSpeed outlive the interpreter; a destructor that meets one aborts the process, and torchrun
    then calls a run that ended well a failure (seen in one of eighteen runs of two ranks under load).
    """
    if world() == 1:
        sys.exit(status)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def choose_device(name: str) -> torch.device:
    """`auto` is this rank's GPU where there is one. Raises EngineError when cuda is asked for and absent."""
    if name == "cuda" and not torch.cuda.is_available():
        raise EngineError("engine.device=cuda, but torch sees no GPU; set engine.device=cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(local_rank())
    return torch.device("cuda", local_rank())


def agree(flag: bool) -> bool:
    """True when any rank says so. Collective."""
    return bool(total(torch.tensor([float(flag)], dtype=torch.float64))[0] > 0)


def votes(*flags: bool) -> list[bool]:
    """Of each flag whether any rank says so. Collective."""
    return [found > 0 for found in total(torch.tensor(flags, dtype=torch.float64)).tolist()]


def total(values: Tensor) -> Tensor:
    """Sum over ranks, as float64 on the CPU. Collective."""
    values = values.double()
    if world() == 1:
        return values.cpu()
    if dist.get_backend() == "nccl":
        values = values.cuda()
    dist.all_reduce(values)
    return values.cpu()


def gather(rows_NK: Tensor) -> list[Tensor]:
    """The rows of every rank, int64 [N, K] with an N of its own, on the CPU. Collective."""
    if world() == 1:
        return [rows_NK.cpu()]
    on_gpu = dist.get_backend() == "nccl"
    mine = torch.tensor([len(rows_NK)])
    counts = [torch.zeros_like(mine.cuda() if on_gpu else mine) for _ in range(world())]
    dist.all_gather(counts, mine.cuda() if on_gpu else mine)
    lengths = [int(count) for count in counts]
    padded = rows_NK.new_zeros(max(lengths), rows_NK.shape[1], device="cuda" if on_gpu else "cpu")
    padded[: len(rows_NK)] = rows_NK
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return [part[:length].cpu() for part, length in zip(parts, lengths, strict=True)]


def gather_text(lines: Sequence[str]) -> list[list[str]]:
    """The lines of every rank. Collective; for few and rare ones."""
    data = torch.tensor(list(json.dumps(list(lines)).encode()), dtype=torch.int64)
    return [json.loads(bytes(part_N1.flatten().tolist())) for part_N1 in gather(data.unsqueeze(1))]


def exchange(rows_NX: Tensor, rows_out: list[int], rows_in: list[int]) -> Tensor:
    """Send the first rows_out[0] rows to rank 0, the next to rank 1, ...; the rows received, in order of rank.

    Collective, without a gradient.
    """
    if world() == 1:
        return rows_NX.detach().clone()
    received = rows_NX.new_empty(sum(rows_in), rows_NX.shape[1])
    dist.all_to_all_single(received, rows_NX.detach().contiguous(), rows_in, rows_out)
    return received


def barrier() -> None:
    """Wait for all ranks."""
    agree(False)


def shared_number() -> int:
    """A random number, the same on all ranks and new in every call. Collective."""
    return int(total(torch.tensor([float(secrets.randbits(48)) if rank() == 0 else 0.0], dtype=torch.float64))[0])
