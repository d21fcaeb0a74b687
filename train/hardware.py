"""What the machine can do at best: the denominator of MFU.

A GPU's peak is its data sheet's dense bf16 figure. A CPU's is measured when the run starts: the best of a few fp32
matmuls.
"""

from __future__ import annotations

import time

import torch

PEAK_BF16 = {  # part of torch.cuda.get_device_name() -> dense bf16 FLOP/s
    "H200": 989e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def peak_flops(device: torch.device) -> float:
    """FLOP/s of one device, or 0 where it is unknown (MFU is then not reported)."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((peak for part, peak in PEAK_BF16.items() if part in name), 0.0)
    size = 768
    a, b, best = torch.randn(size, size), torch.randn(size, size), float("inf")
    for _ in range(6):
        began = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
