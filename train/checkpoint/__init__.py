"""One checkpoint, any engine, any layout; training goes on while it is written.

    engine.fragments() -> saver.Saver --shared memory, one line--> writer (a process) -> step-00001234/
    step-00001234/ -> resume.choose -> reader.CheckpointReader -> engine.restore()
    safetensors under released names -> reader.WeightsReader   -> engine.restore()

Blocked per save: one copy of the rank's fp32 fragments. Memory: that copy, allocated once. No collectives.
Names are imported on first use, so that the writer process, which imports this package too, starts without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.checkpoint.format import Manifest, ReleasedPieces, identity_pieces, name_best
    from train.checkpoint.reader import CheckpointReader, WeightsReader, open_weights
    from train.checkpoint.resume import best_of, candidates, choose, verify
    from train.checkpoint.saver import Saver

_MODULE_OF = {
    "Manifest": "format",
    "ReleasedPieces": "format",
    "identity_pieces": "format",
    "name_best": "format",
    "CheckpointReader": "reader",
    "WeightsReader": "reader",
    "open_weights": "reader",
    "best_of": "resume",
    "candidates": "resume",
    "choose": "resume",
    "verify": "resume",
    "Saver": "saver",
}

__all__ = [
    "CheckpointReader",
    "Manifest",
    "ReleasedPieces",
    "Saver",
    "WeightsReader",
    "best_of",
    "candidates",
    "choose",
    "identity_pieces",
    "name_best",
    "open_weights",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
