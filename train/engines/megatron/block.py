"""The decoder layer as a Megatron-Core specification: what of it is ours.

    x --Norm--> SelfAttention( qkv -> q, k norms -> PackedAttention -> proj ) --+--> Norm -> MoELayer --+--> x
    '--------------------------------------------------------------------------'  '---------------------'
                                                     MoELayer: Router, dispatcher, GroupedExperts [, shared expert]

* PackedAttention rotates queries and keys (interleaved TM-RoPE, float positions) and attends within documents. Under
  context parallelism it gathers keys and values; queries stay.
* Router is in fp32 and carries our balance loss: linear in the tokens, so it does not depend on the layout.
* GroupedExperts is models.layers.experts on tokens that the dispatcher has sorted.
* Layer adds DeepStack's features and hands the Talker its hidden states.

What a layer must know of its tokens comes with them, as `packed_seq_params`: nothing is remembered between
micro-batches, so pipelines and recomputation may run them in any order. DeepStack's features come as `context`, an
argument of the layer: recomputation sends gradients to arguments only.

Letters: S tokens of a context rank, T of them here under sequence parallelism, H heads here, G key-value heads here, C
head_dim, D hidden, E experts, K chosen experts, R rows that reached an expert here, F expert width here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import AttnMaskType, SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from models.layers.attention import Segments, attend
from models.layers.experts import experts
from models.layers.moe import linear32
from models.layers.norm import RMSNorm
from models.layers.ragged import Pieces, attend_pieces
from models.layers.rope import rotate
from train.media import KINDS


@dataclass
class Tokens(PackedSeqParams):
    """What the layers must know of the tokens here."""

    # Megatron's other formats would cut the angles by themselves
    qkv_format: str = "sbhd"
    cos_SC: Tensor | None = None
    sin_SC: Tensor | None = None
    segments: Segments | None = None  # without context parallelism
    pieces: Pieces | None = None  # with it
    pack_order: Tensor | None = None  # with it, int64: rows of all context ranks, end to end, in the order of the pack
    visual_rows: Tensor | None = None  # int64: rows here that DeepStack's features are added to
    tap: int = 0  # the layer, counted from 1, whose output the Talker reads; 0 for none
    stop: bool = False  # layers after it do not run
    tapped_TD: Tensor | None = None  # what it gave
    kinds_T: Tensor | None = None  # int64, where experts are counted by kind of token: train.media.kinds_of
    tap_grad_TD: Tensor | None = None  # the Talker's gradient of it


class Norm(RMSNorm):
    """RMSNorm whose gradient is summed over tensor ranks, each of which sees its part of the tokens."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: Any) -> None:
        super().__init__(hidden_size, eps)
        self.weight.data = self.weight.data.to(config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class PackedAttention(nn.Module):
    """Causal attention within documents: no mask of the size tokens x tokens."""

    def __init__(self, config: TransformerConfig, pg_collection: Any = None, **_: Any) -> None:
        super().__init__()
        self.group = pg_collection.cp

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, attention_mask: None, *, packed_seq_params: Tokens, **_: Any
    ) -> Tensor:
        """q [S, 1, H, C], k and v [S, 1, G, C] -> [S, 1, H C]."""
        tokens = packed_seq_params
        assert tokens.cos_SC is not None and tokens.sin_SC is not None
        q_SHC, k_SGC, v_SGC = (x.squeeze(1) for x in (q, k, v))
        q_SHC, k_SGC = (rotate(x, tokens.cos_SC, tokens.sin_SC) for x in (q_SHC, k_SGC))
        if tokens.pieces is None:
            assert tokens.segments is not None
            out_SHC = attend(q_SHC, k_SGC, v_SGC, tokens.segments, causal=True)
        else:
            assert tokens.pack_order is not None
            both = torch.cat([k_SGC, v_SGC], dim=1)  # backward reduces and scatters
            both = gather_from_sequence_parallel_region(both, True, self.group).index_select(0, tokens.pack_order)
            k_SGC, v_SGC = both.chunk(2, dim=1)  # of the whole pack
            out_SHC = attend_pieces(q_SHC, k_SGC, v_SGC, tokens.pieces)
        return out_SHC.reshape(len(out_SHC), 1, -1)


class BalancedRouter(Router):
    """Softmax top-k router in fp32, with the balance loss of train.loss.balance_loss.

    `scale_E` is what the loss multiplies each expert's summed probability by: weight * E * last step's share / (layers
    * tokens of the global batch). Sums of the step are collected where gradients are made: once a micro-batch, with
    recomputation as without.
    """

    def __init__(self, config: TransformerConfig, pg_collection: Any = None) -> None:
        super().__init__(config, pg_collection)
        assert config.num_moe_experts is not None
        self.topk = config.moe_router_topk
        self.begin(torch.zeros(config.num_moe_experts))

    def begin(self, scale_E: Tensor) -> None:
        """Start a step."""
        self.scale_E, self.prob_E, self.count_E = scale_E, torch.zeros_like(scale_E), torch.zeros_like(scale_E)
        self.kinds_T: Tensor | None = None
        self.kind_KE: Tensor | None = None  # assignments by kind of token, where the layer sets `kinds_T`

    def routing(self, logits: Tensor) -> Any:
        """Not used: `forward` is ours."""
        raise NotImplementedError

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[T, 1, D], padding [T, 1] -> weights float32 [T, E] and whether each expert was chosen, bool [T, E]."""
        logits_TE = linear32(input.reshape(-1, input.shape[-1]), self.weight)
        best_TK, chosen_TK = logits_TE.topk(self.topk, dim=-1, sorted=False)
        weight_TK, nothing_TE = best_TK.softmax(-1), torch.zeros_like(logits_TE)
        chosen_TE = nothing_TE.bool().scatter(1, chosen_TK, True)
        if torch.is_grad_enabled():
            assert padding_mask is not None
            real_T = (~padding_mask).reshape(-1).to(logits_TE.dtype)
            prob_E = real_T @ logits_TE.softmax(-1)
            weight_TK = MoEAuxLossAutoScaler.apply(weight_TK, (self.scale_E * prob_E).sum())
            self.prob_E, self.count_E = (
                self.prob_E + prob_E.detach(),
                self.count_E + real_T @ chosen_TE.to(real_T.dtype),
            )
            if self.kinds_T is not None:
                kind_TK = real_T.unsqueeze(1) * F.one_hot(self.kinds_T, len(KINDS))
                kind_KE = kind_TK.double().t() @ chosen_TE.double()
                self.kind_KE = kind_KE if self.kind_KE is None else self.kind_KE + kind_KE
        return nothing_TE.scatter(1, chosen_TK, weight_TK), chosen_TE


class GroupedExperts(nn.Module):
    """This rank's experts in two fused parameters, as in models.layers.experts; their width is cut by expert_tp."""

    def __init__(self, num_local_experts: int, config: TransformerConfig, pg_collection: Any = None, **_: Any) -> None:
        super().__init__()
        self.recompute = False  # the engine sets it
        assert config.moe_ffn_hidden_size is not None and config.expert_tensor_parallel_size is not None
        width = config.moe_ffn_hidden_size // config.expert_tensor_parallel_size
        options: dict[str, Any] = {"dtype": config.params_dtype}
        if not config.use_cpu_initialization:
            options["device"] = torch.cuda.current_device()
        hidden = config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(num_local_experts, 2 * width, hidden, **options))
        self.down_proj = nn.Parameter(torch.empty(num_local_experts, hidden, width, **options))
        for parameter in self.parameters():
            parameter.allreduce = False  # type: ignore[attr-defined]  # its own buffers, summed over expert data ranks

    def forward(self, x_RD: Tensor, tokens_per_expert: Any, weight_R: Tensor) -> tuple[Tensor, None]:
        """Rows sorted by expert and the weight of each -> [R, D]; with expert_tp a part of a sum."""
        if not len(x_RD):  # no token of any rank chose an expert of this one; all that backward sends is still sent
            return x_RD + (self.gate_up_proj.sum() + self.down_proj.sum() + weight_R.sum()) * 0, None
        counts = torch.as_tensor(tokens_per_expert, device=x_RD.device)
        ids = torch.arange(len(counts), device=x_RD.device)
        chosen_R1 = ids.repeat_interleave(counts, output_size=len(x_RD)).unsqueeze(1)
        arguments = x_RD, self.gate_up_proj, self.down_proj, chosen_R1, weight_R.unsqueeze(1)
        return experts(*arguments, recompute=self.recompute), None


class Layer(TransformerLayer):
    """Megatron's layer, with DeepStack's features and the Talker's tap behind it."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        hidden_states: Tensor,
        *args: Any,
        context: Tensor | None = None,
        packed_seq_params: Tokens | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden [T, 1, D] -> the same; `context` [layers, V, D] are DeepStack's features of the rows here."""
        tokens = packed_seq_params
        assert tokens is not None
        number = self.layer_number  # counts over all stages, from 1
        if tokens.stop and number > tokens.tap:
            return hidden_states, context
        self.mlp.router.kinds_T = tokens.kinds_T  # type: ignore[union-attr]
        x: Tensor
        x, _ = super().forward(hidden_states, *args, context=None, packed_seq_params=tokens, **kwargs)  # type: ignore[assignment]
        self.mlp.token_dispatcher.probs = None  # type: ignore[union-attr]  # it would keep the layer's graph alive
        if number == tokens.tap < self.config.num_layers:
            x = tap(x, tokens)
        if context is not None and number <= len(context):
            assert tokens.visual_rows is not None
            x = x.index_add(0, tokens.visual_rows, context[number - 1].to(x.dtype).unsqueeze(1))
        return x, context


def tap(x: Tensor, tokens: Tokens) -> Tensor:
    """Note the hidden states [T, 1, D] that the Talker reads, and give them its gradient."""
    tokens.tapped_TD = x.detach().squeeze(1)
    if tokens.tap_grad_TD is None or not torch.is_grad_enabled():
        return x
    return MoEAuxLossAutoScaler.apply(x, (x.squeeze(1).float() * tokens.tap_grad_TD).sum())


def block_spec(config: TransformerConfig, layers: int, transformer_engine: bool) -> TransformerBlockSubmodules:
    """The specification of `layers` layers and the norm after them."""
    ours = ColumnParallelLinear, RowParallelLinear, Norm
    modules: Any = _transformer_engine() if transformer_engine else ours
    column, row, norm = modules
    core: Any = PackedAttention
    add: Any = get_bias_dropout_add
    attention = SelfAttentionSubmodules(
        linear_qkv=column, core_attention=core, linear_proj=row, q_layernorm=norm, k_layernorm=norm
    )
    shared: Any = ModuleSpec(SharedExpertMLP, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row))
    moe = MoESubmodules(
        experts=ModuleSpec(GroupedExperts),
        router=BalancedRouter,
        shared_experts=shared,  # built where the configuration has a width for it
    )
    layer = TransformerLayerSubmodules(
        input_layernorm=norm,
        self_attention=ModuleSpec(SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention),
        self_attn_bda=add,
        pre_mlp_layernorm=norm,
        mlp=ModuleSpec(MoELayer, submodules=moe),
        mlp_bda=add,
    )
    return TransformerBlockSubmodules(layer_specs=[ModuleSpec(Layer, submodules=layer)] * layers, layer_norm=norm)


def _transformer_engine() -> tuple[type, type, type]:
    """TransformerEngine's linear maps and norm."""
    from megatron.core.extensions import transformer_engine as te

    return te.TEColumnParallelLinear, te.TERowParallelLinear, te.TENorm  # pyright: ignore
