"""What the processes of the long-context tests run: packs that several ranks hold together, and what is not kept.

The model, the batches and the way to compare are those of engine_cases.py; documents cross the cuts there.
"""

from __future__ import annotations

from typing import Any

from tests.train.engine_cases import close, gather, go_on, look, setup, train
from train import ranks
from train.engines.build import build_engine

# settings of engine.*: ZeRO stage, experts' ranks and packs' ranks, and what is recomputed
TWO = {
    "cp2, zero 1": {"zero": 1, "cp": 2},
    "cp2, zero 2": {"zero": 2, "cp": 2},
    "cp2, zero 3": {"zero": 3, "cp": 2},
    "cp2 x ep2, zero 2": {"zero": 2, "cp": 2, "ep": 2},
    "cp2 x ep2, zero 3, everything recomputed": {
        "zero": 3,
        "cp": 2,
        "ep": 2,
        "recompute_layers": True,
        "offload_activations": True,
        "tiles": 3,
    },
    "zero 1, layers": {"zero": 1, "recompute_layers": True},
    "zero 3, layers, tiles": {"zero": 3, "recompute_layers": True, "tiles": 2},
    "zero 2 x ep2, layers, tiles": {"zero": 2, "ep": 2, "recompute_layers": True, "tiles": 2},
    "zero 3, tiles, experts": {"zero": 3, "recompute": True, "tiles": 2},
}
FOUR = {
    "cp2, two replicas, zero 2": {"zero": 2, "cp": 2},
    "cp2, two replicas, ep2, zero 3": {"zero": 3, "cp": 2, "ep": 2},
    "cp4: key-value heads repeated, zero 2": {"zero": 2, "cp": 4},
    "cp2, two replicas, ep4, zero 2, layers": {"zero": 2, "cp": 2, "ep": 4, "recompute_layers": True},
}


def contract(cases: dict[str, dict[str, Any]], steps: int) -> dict[str, Any]:
    """Numbers of the steps under each layout, evaluation, and the steps after a restore of what was gathered."""
    out: dict[str, Any] = {}
    for name, settings in cases.items():
        engine = build_engine(setup("deepspeed", **settings))
        rows = train(engine, 0, 3)
        state = gather(engine)
        rows += train(engine, 3, steps)
        out[name] = {"rows": rows, "look": look(engine) if steps == 5 else None, "restored": go_on(engine, state)}
        close(engine)
    ranks.stop()
    return out
