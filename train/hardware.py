"""What the machine can do at best: the denominator of MFU, and what the layout advisor counts with.

A GPU's peak is its data sheet's dense bf16 figure. A CPU's is measured when the run starts: the best of a few fp32
matmuls.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Gpu:
    """Figures of a data sheet, none measured."""

    name: str
    """Part of torch.cuda.get_device_name()."""
    memory: float
    """Bytes."""
    flops: float
    """FLOP/s of dense bf16 products."""
    bandwidth: float
    """Bytes/s of its memory."""
    nvlink: float
    """Bytes/s to and as many from the other GPUs of the machine; PCIe where there is no NVLink."""
    network: float
    """Bytes/s to other machines: of the network card that usually goes with the GPU."""


GPUS = {
    "h200": Gpu("H200", 141e9, 989e12, 4.8e12, 450e9, 50e9),
    "h100": Gpu("H100", 80e9, 989e12, 3.35e12, 450e9, 50e9),
    "h800": Gpu("H800", 80e9, 989e12, 3.35e12, 200e9, 50e9),
    "a100": Gpu("A100", 80e9, 312e12, 2.0e12, 300e9, 25e9),
    "a800": Gpu("A800", 80e9, 312e12, 2.0e12, 200e9, 25e9),
    "b200": Gpu("B200", 180e9, 2250e12, 8e12, 900e9, 50e9),
    "l40s": Gpu("L40S", 48e9, 362e12, 0.864e12, 32e9, 25e9),
    "rtx4090": Gpu("RTX 4090", 24e9, 165e12, 1.008e12, 32e9, 12.5e9),
}


def peak_flops(device: torch.device) -> float:
    """FLOP/s of one device, or 0 where it is unknown (MFU is then not reported)."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((gpu.flops for gpu in GPUS.values() if gpu.name in name), 0.0)
    size = 768
    a, b, best = torch.randn(size, size), torch.randn(size, size), float("inf")
    for _ in range(6):
        began = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
