"""What DeepSpeed is told: its configuration, and the optimizer that it steps.

EngineSetup --configuration--> DeepSpeed's dictionary
            --optimizer_factory--> AdamW over the groups as AutoEP has changed them
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from train.engines import WEIGHT
from train.engines.setup import EngineSetup

BUCKET = 50_000_000  # elements reduced together; DeepSpeed's default would allocate 2 GB of fp32
PERSISTENT = 100_000  # elements


def optimizer_factory(setup: EngineSetup) -> Callable[[list[dict[str, Any]]], torch.optim.Optimizer]:
    """AdamW as the local engine builds it. DeepSpeed calls it after AutoEP has put its parameters into the groups."""

    def build(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        from deepspeed.moe.utils import is_moe_param, split_params_into_different_moe_groups_for_optimizer

        if any(is_moe_param(p) for group in groups for p in group["params"]):
            groups = split_params_into_different_moe_groups_for_optimizer(groups)
        groups = [group for group in groups if group["params"]]
        return torch.optim.AdamW(groups, betas=setup.betas, eps=setup.optim.eps, fused=True, lr=setup.optim.lr)

    return build


def configuration(setup: EngineSetup, ep: int, num_parameters: int) -> dict[str, Any]:
    """DeepSpeed's configuration."""
    zero: dict[str, Any] = {
        "stage": setup.engine.zero,
        "overlap_comm": setup.device.type == "cuda",
        "reduce_bucket_size": min(BUCKET, num_parameters),
        # smaller ones stay whole on every rank; with DeepSpeed's constant that would be all of a small model
        "stage3_param_persistence_threshold": min(PERSISTENT, num_parameters // 1000),
        # the default replaces torch.nn.functional.linear for the whole process and changes bf16 rounding
        "memory_efficient_linear": False,
    }
    if setup.engine.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": setup.device.type == "cuda"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # micro-batches are counted by train_step
        "gradient_clipping": setup.optim.clip,  # always set: DeepSpeed's default is 1.0
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on the CPU too, and needs no compiler
        "zero_optimization": zero,
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "bf16": {"enabled": setup.engine.precision == "bf16", "check_grad_overflow": True},
    }
    if ep > 1:
        config["expert_parallel"] = {"enabled": True, "autoep_size": ep}
    return config


class Initial:
    """The initial weights as a StateReader."""

    step = 0

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        """By the names of the model in memory, whole."""
        self.weights = weights

    def kinds(self, name: str) -> frozenset[str]:
        """See train.engines.StateReader."""
        return frozenset({WEIGHT}) if name in self.weights else frozenset()

    def read(self, kind: str, name: str, shape: Sequence[int], start: int, length: int) -> Tensor:
        """See train.engines.StateReader."""
        return self.weights[name].view(-1)[start : start + length]
