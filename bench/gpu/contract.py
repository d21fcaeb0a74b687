"""The engine contract on one device: five steps of every engine against engine `local` in fp32, which it runs first.

    tests/train/engine_cases.py, speech_cases.py: tiny Thinker, tiny Talker --> engine, fp32 and bf16 --> losses, norms

TF32 is off. fp32 must agree to 1e-4, bf16 to 2e-2: rounding sends some tokens to other experts. One process; what
several do is tested on CPUs (tests/train/test_engine_contract.py).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch

from bench.gpu.measure import Clock, figure
from tests.train import engine_cases as cases
from tests.train import speech_cases as speech
from train.engines.build import build_engine

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
ZERO = {"local": ("",), "deepspeed": (1, 2, 3), "megatron": ("",)}
MODELS = ("Thinker", "Talker")
Rows = list[tuple[float, float]]  # loss and gradient norm of each step


def pieces(engine: str, device: torch.device) -> dict[str, Callable[[Clock], dict[str, Any]]]:
    """Measurements by name; each says so where the engine is not there."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if engine == "megatron" and importlib.util.find_spec("train.engines.megatron") is None:
        return {precision: _absent for precision in TOLERANCE}
    references: dict[str, Rows] = {}
    found: dict[str, Callable[[Clock], dict[str, Any]]] = {}
    for zero, model, precision in product(ZERO[engine], MODELS, TOLERANCE):
        options = {"zero": zero} if zero else {}
        label = f"{model}, {precision}" + (f", ZeRO-{zero}" if zero else "")
        found[label] = partial(check, engine, model, precision, options, device, references)
    return found


def _absent(clock: Clock) -> dict[str, Any]:
    return {"status": "skipped: no megatron engine"}


def check(
    name: str,
    model: str,
    precision: str,
    options: dict[str, Any],
    device: torch.device,
    references: dict[str, Rows],
    clock: Clock,
) -> dict[str, Any]:
    """One engine, model and precision; `references` keeps what engine `local` gave."""
    if model not in references:
        references[model] = run("local", model, "fp32", {}, device)
    rows, allowed = run(name, model, precision, options, device), TOLERANCE[precision]
    figures, worst = {}, 0.0
    for place, what in enumerate(("loss", "gradient norm")):
        pairs = zip(rows, references[model], strict=True)
        off = max(abs(mine[place] - right[place]) / right[place] for mine, right in pairs)
        how = f"largest of {cases.STEPS} steps against local in fp32, tolerance {allowed:g}"
        figures[what], worst = figure(off, "relative", how), max(worst, off)
    status = "ok" if worst <= allowed else f"failed: off by {worst:.1e}, above {allowed:g}"
    return {"status": status, "figures": figures, "losses": [loss for loss, _ in rows]}


def run(name: str, model: str, precision: str, options: dict[str, Any], device: torch.device) -> Rows:
    """Loss and gradient norm of each step."""
    if model == "Thinker":
        setup, kit = cases.setup(name, **options, precision=precision), cases
    else:
        setup, kit = speech.setup(name, "live", **options, precision=precision), speech
    splits = [kit.SPLITS[step % len(kit.SPLITS)] for step in range(cases.STEPS)]
    steps = [[kit.pack(step, indices) for half in split for indices in half] for step, split in enumerate(splits)]
    engine = build_engine(replace(setup, device=device, engine=replace(setup.engine, device=device.type)))
    try:
        stats = [engine.train_step(batches, cases.LINEAR["lr"]) for batches in steps]
        return [(step.loss, step.grad_norm) for step in stats]
    finally:
        engine.close()
