"""The choice of an engine; each is imported only when it is chosen."""

from __future__ import annotations

import torch

from train import ranks
from train.engines import Engine
from train.engines.setup import EngineSetup


def build_engine(setup: EngineSetup) -> Engine:
    """The engine that `engine.name` asks for."""
    if setup.engine.threads:
        torch.set_num_threads(setup.engine.threads)
    ranks.start(setup.device)
    if setup.engine.name == "deepspeed":
        from train.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(setup)
    from train.engines.local import LocalEngine

    return LocalEngine(setup)
