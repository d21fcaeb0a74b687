"""Our modules and transformers' on the same weights, and routers that send tokens where a benchmark wants them.

    meta device --> parameters on the GPU, drawn there (models/init.py) --> ours
                                '--the same nn.Parameters--> transformers' module

Both sides hold the very same tensors, so that two models of 8 billion weights fit where one does.

Routing is made by weights and inputs, so that both sides' routers run as they are. A few channels of the residual
stream are marks: the embedding sets them, no layer writes there, and none but the gates reads them. Mark 0 is always
on; its column of the gate is how popular each expert is. Mark 1 + g is on in every E/K-th token; its column sends the
token to the g-th K experts:

    natural   marks do not count: a random gate, nearly even
    skewed    logits fall by ZIPF x log(rank) over the experts, so that the first is chosen nearly always
    balanced  every expert gets exactly as many tokens
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench.moe import thinker_config
from models.config import TextConfig
from models.hf import to_released_config
from models.init import init_tensor
from models.layers.attention import Segments, attend

ROUTINGS = ("natural", "balanced", "skewed")
ZIPF = 1.2  # as bench/moe.py
FIRM = 30.0  # logits by which a balanced token prefers its experts
MARK = 0.1  # of embeddings whose other channels have a standard deviation of 0.02: little of a row's norm
PACKED = "packed"  # name of the attention that hands transformers' layers our kernel
DTYPE = torch.bfloat16


def on_device(build: Callable[[], nn.Module], prefix: str, device: torch.device) -> Any:
    """A module of ours in bf16 with initial weights drawn on the device; `prefix` is its name in the whole model."""
    with torch.device("meta"):
        module = build().to(DTYPE)
    module.to_empty(device=device)
    assert not list(module.buffers())
    for name, parameter in module.named_parameters(prefix):
        init_tensor(name, parameter, seed=0, scale=0.02)
    return module.train()


def same_weights(build: Callable[[], nn.Module], ours: nn.Module, device: torch.device) -> Any:
    """Transformers' module that holds the parameters of ours themselves. The names are the same, every one."""
    with torch.device("meta"):
        theirs: Any = build()
    mine = dict(ours.named_parameters())
    assert mine.keys() == {name for name, _ in theirs.named_parameters()}
    for name, parameter in mine.items():
        owner, _, leaf = name.rpartition(".")
        setattr(theirs.get_submodule(owner), leaf, parameter)
    for name, module in list(theirs.named_modules()):
        if name.endswith("rotary_emb"):  # its table of frequencies is no parameter, and was made on no device
            owner, _, leaf = name.rpartition(".")
            setattr(theirs.get_submodule(owner), leaf, type(module)(module.config).to(device))
    return theirs.train()


def text_model(text: TextConfig) -> nn.Module:
    """Transformers' Thinker decoder as it comes: grouped_mm experts, sdpa attention."""
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeTextConfig
    from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeThinkerTextModel

    shapes = to_released_config(thinker_config(text))["text_config"]
    return as_it_comes(Qwen3OmniMoeThinkerTextModel(Qwen3OmniMoeTextConfig(**shapes)))


def as_it_comes(model: Any) -> nn.Module:
    """The model; checks that transformers' defaults are those that the report names."""
    assert model.config._attn_implementation == "sdpa", model.config._attn_implementation
    experts = getattr(model.config, "_experts_implementation", "grouped_mm")
    assert experts == "grouped_mm", experts
    return model


def attention(model: Any, name: str) -> None:
    """Choose the attention of transformers' model: "sdpa" with its own mask of the pack, or PACKED."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(PACKED, packed_attention)
    model.config._attn_implementation = name


def packed_attention(
    module: nn.Module,
    q_1HTC: Tensor,
    k_1GTC: Tensor,
    v_1GTC: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Our attention in the form that transformers' layers call: [1, T, H, C]."""
    q_THC, k_TGC, v_TGC = (x[0].transpose(0, 1) for x in (q_1HTC, k_1GTC, v_1GTC))
    return attend(q_THC, k_TGC, v_TGC, segments, causal=True)[None], None


def positions_of(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Position ids of packed text, float32 [T]."""
    return torch.cat([torch.arange(length, dtype=torch.float32) for length in lengths]).to(device)


def groups_of(text: TextConfig) -> int:
    """Groups of experts between which balanced tokens go in turn; what is left of the experts stays idle."""
    return text.num_experts // text.num_experts_per_tok


def mark(x_XD: Tensor, group_X: Tensor, groups: int, strength: float) -> None:
    """Set the marks of rows (embeddings or inputs): mark 0, and that of their group."""
    with torch.no_grad():
        x_XD[:, : 1 + groups] = 0.0
        x_XD[:, 0] = strength
        x_XD[torch.arange(len(x_XD), device=x_XD.device), 1 + group_X] = strength


@torch.no_grad()
def protect_marks(decoder: nn.Module, text: TextConfig) -> None:
    """Mark the embeddings by their id, and let no layer write to the marks nor anything but a gate read them."""
    marks = 1 + groups_of(text)
    embedding: Any = decoder.get_submodule("embed_tokens")
    ids_V = torch.arange(text.vocab_size, device=embedding.weight.device)
    mark(embedding.weight, ids_V % groups_of(text), groups_of(text), MARK)
    for name, parameter in decoder.named_parameters():
        if name.endswith("o_proj.weight"):
            parameter[:marks] = 0.0
        elif name.endswith("experts.down_proj"):
            parameter[:, :marks] = 0.0
        elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            parameter[:, :marks] = 0.0
        elif name.endswith("experts.gate_up_proj"):
            parameter[:, :, :marks] = 0.0


@torch.no_grad()
def route(gates: Sequence[nn.Parameter], text: TextConfig, kind: str, strengths: Sequence[float]) -> None:
    """Set the gates' columns of the marks for one of ROUTINGS; `strengths` are the marks' values at the gates."""
    groups, experts = groups_of(text), text.num_experts
    for gate_ED, strength in zip(gates, strengths, strict=True):
        gate_ED[:, : 1 + groups] = 0.0
        if kind == "skewed":
            popularity_E = -ZIPF * torch.arange(1.0, experts + 1).log()
            order_E = torch.randperm(experts, generator=torch.Generator().manual_seed(0))
            gate_ED[:, 0] = (popularity_E[order_E] / strength).to(gate_ED)
        elif kind == "balanced":
            group_E = torch.arange(experts) // text.num_experts_per_tok
            gate_ED[:, 1 : 1 + groups] = (group_E[:, None] == torch.arange(groups)).to(gate_ED) * (FIRM / strength)


def expert_load(router_logits: Sequence[Tensor], top_k: int) -> float:
    """Tokens of the heaviest expert over the mean, mean over layers."""
    loads = []
    for logits_TE in router_logits:
        counts_E = logits_TE.topk(top_k, -1).indices.flatten().bincount(minlength=logits_TE.shape[1]).float()
        loads.append((counts_E.max() / counts_E.mean()).item())
    return sum(loads) / len(loads)
