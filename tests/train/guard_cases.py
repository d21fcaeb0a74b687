"""What the processes of the guard's tests run: a step that is not finite, under every engine."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.train import engine_cases as cases
from train import ranks
from train.engines import Engine
from train.engines.build import build_engine

KINDS = ("loss", "gradient", "expert")
DEEPSPEED: tuple[dict[str, Any], ...] = (
    {"zero": 1},
    {"zero": 2, "ep": 2},
    {"zero": 3, "ep": 2},
    {"zero": 2, "offload": True},
    {"zero": 3, "offload": True},
    {"zero": 2, "precision": "bf16"},
    {"zero": 3, "ep": 2, "precision": "bf16"},
    {"zero": 1, "precision": "bf16"},
)
MEGATRON: tuple[dict[str, Any], ...] = ({"tp": 2}, {"ep": 2}, {"pp": 2}, {"cp": 2}, {"ep": 2, "overlap": True})


def steps_of(engine: Any) -> list[float]:
    """Every count of updates that the optimizer of an engine keeps."""
    optimizers = [engine.optimizer]
    if hasattr(engine.optimizer, "chained_optimizers"):
        optimizers = [part.optimizer for part in engine.optimizer.chained_optimizers if not part.is_stub_optimizer]
    return [float(state["step"]) for each in optimizers for state in each.state.values()]


def spoil(engine: Any, kind: str) -> Any:
    """Make a gradient infinite on the last rank alone: that of the output head, or of one expert there."""
    named = [(name, p) for name, p in _named(engine) if p.requires_grad]
    words = {"gradient": ("lm_head", "head.linear"), "expert": (".experts.", "local_experts", "mlp.experts")}[kind]
    found = [p for name, p in named if any(word in name for word in words)]
    if not found or ranks.rank() != ranks.world() - 1:
        return None

    def hook(grad: Tensor) -> Tensor:
        worse = grad.clone()
        worse.view(-1)[-1] = torch.inf
        return worse

    return found[-1].register_hook(hook)


def _named(engine: Any) -> list[tuple[str, Any]]:
    if hasattr(engine, "parts"):
        return [pair for chunk in engine.parts.all for pair in chunk.module.named_parameters()]
    return list(engine.objective.named_parameters())


def bad_step(engine: Engine, step: int, kind: str) -> Any:
    """A step in which something is not finite on one rank."""
    batches = cases.microbatches(step, engine.shard)
    handle = None
    if kind == "loss":
        if engine.shard.index == 0 and any(len(batch.mel_FM) for batch in batches):
            next(batch for batch in batches if len(batch.mel_FM)).mel_FM[0, 0] = torch.nan
    else:
        handle = spoil(engine, kind)
    stats = engine.train_step(batches, lr=1.0)
    if handle is not None:
        handle.remove()
    return stats


def skips(**settings: Any) -> dict[str, Any]:
    """What differs after bad steps, and from an engine that never met one; what the steps said."""
    clean = build_engine(cases.setup(**settings, linear=False))
    cases.train(clean, 0, 1)
    rows = cases.train(clean, 2, 4)
    expected, count = cases.gather(clean), steps_of(clean)
    clean.close()
    engine = build_engine(cases.setup(**settings, linear=False))
    said, differing = [], []
    first = bad_step(engine, 2, "loss")  # before the optimizer has any state
    said.append([first.applied, math.isfinite(first.loss)])
    cases.train(engine, 0, 1)
    for kind in KINDS:
        before, steps = cases.gather(engine), steps_of(engine)
        stats = bad_step(engine, 2, kind)
        said.append([stats.applied, math.isfinite(stats.loss)])
        differing += [f"{kind}: {key}" for key in before.differs(cases.gather(engine))]
        differing += [] if steps == steps_of(engine) else [f"{kind}: {steps} -> {steps_of(engine)}"]
    after = cases.train(engine, 2, 4)
    differing += [f"later: {key}" for key in expected.differs(cases.gather(engine))]
    differing += [] if count == steps_of(engine) else [f"later: {count} -> {steps_of(engine)}"]
    engine.close()
    return {"said": said, "differing": differing, "rows": [rows, after]}


def all_of(name: str, quick: bool) -> list[dict[str, Any]]:
    """Of every layout of an engine, or of the two that differ most."""
    layouts = DEEPSPEED if name == "deepspeed" else MEGATRON
    chosen = (layouts[2], layouts[-1]) if quick else layouts
    out = [skips(name=name, **layout) for layout in chosen]
    ranks.stop()
    return out


def record(windows: int = 200, steps: int = 5) -> list[list[Any]]:
    """Windows of stragglers as two even ranks give them: what `train.stragglers` is judged by, from a real loop."""
    import time
    from statistics import median

    from train.stragglers import probe

    ranks.start(torch.device("cpu"))
    found, cpu = [], torch.device("cpu")
    x_NN = torch.randn(128, 128)
    for _ in range(windows):
        own, began = [], time.monotonic()
        for step in range(steps):
            asked = time.monotonic()
            sum(len(str(number)) for number in range(2000))  # stands for reading
            own.append(time.monotonic() - asked)
            for _ in range(10 + step % 3):
                x_NN = torch.nn.functional.normalize(x_NN @ x_NN)
            ranks.total(x_NN[0])
        step_s = (time.monotonic() - began) / steps
        mine = torch.zeros(2, ranks.world(), dtype=torch.float64)
        mine[:, ranks.rank()] = torch.tensor([median(own), probe(cpu)], dtype=torch.float64)
        found.append([*(row for row in ranks.total(mine).tolist()), step_s])
    ranks.stop()
    return [[[round(v, 6) for v in own], [round(v, 7) for v in probes], round(s, 5)] for own, probes, s in found]


def sleeper(nap_s: float, windows: int, every: int) -> list[list[Any]]:
    """A loop in which rank 1 comes late to its first collective: what the guard says, with windows of `every` steps."""
    import time

    from data.types import Batch
    from train.engines import StepStats
    from train.guard import Guard
    from train.guard_config import GuardConfig, StragglerConfig
    from train.recipe import load_recipe, spans

    ranks.start(torch.device("cpu"))
    said: list[list[Any]] = []

    class Run:
        folder = None

        def event(self, step: int, kind: str, text: str, **more: Any) -> None:
            said.append([step, kind, text, more])

    span = spans(load_recipe(["recipe=transcribe"]))[0]
    config = GuardConfig(straggler=StragglerConfig(every=every))
    guard = Guard(config, span, torch.device("cpu"), hosts=["n1", "n2"])
    for step in range(1, windows * every + 1):
        asked = time.monotonic()
        time.sleep(nap_s if ranks.rank() else 0.0)
        waited = time.monotonic() - asked
        ranks.barrier()
        guard.note(Run(), step, StepStats(1.0, {}, 1.0, 1.0, 1, 1, 0, {}), [Batch.empty(128)], waited)  # type: ignore[arg-type]
    ranks.stop()
    return said
