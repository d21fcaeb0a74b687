"""Degrees of parallelism as Megatron-Core takes them: process groups, and the configuration of a decoder.

    engine.tp, ep, pp, cp, expert_tp, interleave  -->  groups of ranks
    TextConfig + EngineConfig                     -->  TransformerConfig
    layers, pp, interleave                        -->  which layers each stage holds (train/stages.py)

Tensor parallelism always comes with sequence parallelism: between the linear maps a rank holds its part of the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.distributed import ProcessGroup

from models.config import TextConfig
from train.config import EngineConfig

mpu: Any = parallel_state  # its groups are typed as anything


@dataclass(frozen=True)
class Peers:
    """This rank's place in the layout. Groups are Megatron's."""

    tp: ProcessGroup
    cp: ProcessGroup
    pp: ProcessGroup
    tp_cp: ProcessGroup
    data: ProcessGroup  # ranks that read different packs
    chunks: int  # of the model on this rank

    @classmethod
    def form(cls, engine: EngineConfig, device: torch.device) -> Peers:
        """Make the groups anew. Collective."""
        if mpu.model_parallel_is_initialized():
            mpu.destroy_model_parallel()  # of an engine that was closed
        mpu.initialize_model_parallel(
            engine.tp,
            engine.pp,
            virtual_pipeline_model_parallel_size=engine.interleave if engine.interleave > 1 else None,
            context_parallel_size=engine.cp,
            expert_model_parallel_size=engine.ep,
            expert_tensor_parallel_size=engine.expert_tp,
            create_gloo_process_groups=device.type == "cpu",
        )
        tensor_parallel.model_parallel_cuda_manual_seed(1)  # Megatron wants one; nothing of ours draws
        return cls(
            tp=mpu.get_tensor_model_parallel_group(),
            cp=mpu.get_context_parallel_group(),
            pp=mpu.get_pipeline_model_parallel_group(),
            tp_cp=mpu.get_tensor_and_context_parallel_group(),
            data=mpu.get_data_parallel_group(),
            chunks=engine.interleave,
        )

    @property
    def is_first(self) -> bool:
        """Whether the first stage, with encoders and embedding, is here."""
        return self.pp.rank() == 0

    @property
    def is_last(self) -> bool:
        """Whether the last stage, with the head, is here."""
        return self.pp.rank() == self.pp.size() - 1

    @property
    def leads(self) -> bool:
        """Whether this is the first rank of its replica: the one whose packs are counted."""
        return self.tp_cp.rank() == 0 and self.is_first

    @property
    def multiple(self) -> int:
        """Of how many tokens a pack must be: halves of context ranks, each cut over tensor ranks."""
        return self.tp.size() * (2 * self.cp.size() if self.cp.size() > 1 else 1)


def stage_of(layers: Sequence[int], layer: int, pp: int) -> int:
    """The pipeline rank of a layer, counted from 0; `layers` are those of each chunk in pipeline order."""
    end = 0
    for chunk, count in enumerate(layers):
        end += count
        if layer < end:
            return chunk % pp
    raise ValueError(f"layer {layer} of {end}")


def decoder_config(
    text: TextConfig, engine: EngineConfig, layers: Sequence[int], device: torch.device
) -> TransformerConfig:
    """Megatron's configuration of a decoder; `layers` of each chunk in pipeline order."""
    dtype = torch.bfloat16 if engine.precision == "bf16" else torch.float32
    stages = [["decoder"] * count for count in layers]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    shared = text.shared_expert_intermediate_size
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return TransformerConfig(
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        num_attention_heads=text.num_attention_heads,
        num_query_groups=text.num_key_value_heads,
        kv_channels=text.head_dim,
        ffn_hidden_size=text.moe_intermediate_size,
        moe_ffn_hidden_size=text.moe_intermediate_size,
        num_moe_experts=text.num_experts,
        moe_router_topk=text.num_experts_per_tok,
        moe_router_load_balancing_type="none",  # ours is in the router, train/engines/megatron/block.py
        moe_token_dispatcher_type="flex" if engine.dispatcher == "deepep" else "alltoall",
        moe_flex_dispatcher_backend="deepep",
        moe_router_dtype="fp32",
        moe_shared_expert_intermediate_size=shared or None,
        moe_shared_expert_gate=bool(shared),
        tensor_model_parallel_size=engine.tp,
        pipeline_model_parallel_size=engine.pp,
        virtual_pipeline_model_parallel_size=engine.interleave if engine.interleave > 1 else None,
        pipeline_model_parallel_layout=stages if engine.pp > 1 else None,
        context_parallel_size=engine.cp,
        expert_model_parallel_size=engine.ep,
        expert_tensor_parallel_size=engine.expert_tp,
        sequence_parallel=engine.tp > 1,
        pipeline_dtype=dtype,
        # between two stages, what goes on and what comes back would be taken for each other unless sent apart, and
        # lengths of packs too: the interleaved schedule gets packs of one length (passes.py)
        variable_seq_lengths=engine.interleave == 1,
        batch_p2p_comm=engine.interleave == 1,
        overlap_p2p_comm=engine.interleave > 1,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        normalization="RMSNorm",
        layernorm_epsilon=text.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        qk_layernorm=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=device.type == "cpu",
        perform_initialization=False,  # weights.py sets every weight
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        calculate_per_token_loss=True,  # gradients are summed, and nothing divides them: the loss is a share already
        **(recompute if engine.recompute_layers else {}),
    )
