"""The released Talker and its code predictor under teacher forcing, forward and backward, beside transformers' modules.

    input rows [T, D] --20 MoE layers with a shared expert--> hidden --codec_head, cross-entropy--> loss
    hidden [N, D], codes [16, N] --embed, 5 dense layers over the 16 positions of a frame--> 15 heads --> loss

bf16, the same weights on both sides, natural routing. "transformers" is as it comes: sdpa with its mask of the pack,
full logits; "transformers +" has our attention kernel for the pack. The code predictor's peer, too, runs one causal
pass for all heads, which transformers' own forward does not offer (bench/code_predictor.py measures a pass per head).
FLOPs as models/flops.py counts, with the shared expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.gpu import peers
from bench.gpu.measure import Clock, Work, compared, figure
from bench.gpu.sizes import Sizes, natural_lengths
from models.flops import text_flops
from models.layers.attention import make_segments
from models.omni_config import CodePredictorConfig, TalkerConfig
from models.talker import Talker
from train.loss import cross_entropy_sum


def pieces(sizes: Sizes, device: torch.device) -> dict[str, Callable[[Clock], dict[str, Any]]]:
    """Measurements by name."""
    config = sizes.talker
    ours = peers.on_device(lambda: Talker(config), "talker", device)
    theirs = peers.same_weights(lambda: transformers_talker(config), ours, device)
    found: dict[str, Callable[[Clock], dict[str, Any]]] = {
        f"{tokens} positions": partial(backbone, sizes, device, ours, theirs, tokens) for tokens in sizes.talker_tokens
    }
    return found | {f"code predictor, {sizes.frames} frames": partial(predictor, sizes, device, ours, theirs)}


def transformers_talker(config: TalkerConfig) -> nn.Module:
    """Transformers' Talker of these shapes."""
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeTalkerConfig
    from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeTalkerForConditionalGeneration

    def rope(theta: float, **more: Any) -> dict[str, Any]:
        return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **more}}

    text, dense = asdict(config.text), asdict(config.code_predictor)
    section = list(text.pop("mrope_section"))
    text |= rope(text.pop("rope_theta"), mrope_section=section, mrope_interleaved=True)
    text |= {"intermediate_size": config.thinker_hidden_size, "norm_topk_prob": True}
    dense |= rope(dense.pop("rope_theta"))
    shapes = {name: value for name, value in asdict(config).items() if name not in ("text", "code_predictor")}
    shapes |= {"spatial_merge_size": 2, "num_code_groups": config.num_code_groups}
    talker = Qwen3OmniMoeTalkerForConditionalGeneration(
        Qwen3OmniMoeTalkerConfig(**shapes, text_config=text, code_predictor_config=dense)
    )
    for part in (talker.model, talker.code_predictor.model):
        peers.as_it_comes(part)
    return talker


def gradient_of(x: Tensor) -> Tensor:
    """What a backward left there."""
    assert x.grad is not None
    return x.grad


def talker_flops(config: TalkerConfig, lengths: tuple[int, ...]) -> int:
    """Forward and backward of backbone and head."""
    text = config.text
    shared = 3 * text.hidden_size * text.shared_expert_intermediate_size + text.hidden_size
    return text_flops(text, lengths) + 6 * sum(lengths) * text.num_hidden_layers * shared


def predictor_flops(config: CodePredictorConfig, frames: int) -> int:
    """Forward and backward of all positions of all frames, and each head once a frame."""
    groups, heads = config.num_code_groups, 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    layer = config.hidden_size * (config.head_dim * heads + 3 * config.intermediate_size)
    scores = 4 * config.num_attention_heads * config.head_dim * groups * groups // 2
    logits = 2 * (groups - 1) * config.hidden_size * config.vocab_size
    return 3 * frames * (config.num_hidden_layers * (2 * groups * layer + scores) + logits)


def backbone(sizes: Sizes, device: torch.device, ours: Any, theirs: Any, tokens: int, clock: Clock) -> dict[str, Any]:
    """Backbone and codec head over a pack."""
    text, lengths = sizes.talker.text, natural_lengths(tokens, sizes.median_document)
    torch.manual_seed(0)
    x_TD = torch.randn(tokens, text.hidden_size, device=device).to(peers.DTYPE).requires_grad_()
    labels_T = torch.randint(0, sizes.talker.code_predictor.vocab_size, (tokens,), device=device)
    positions_T = peers.positions_of(lengths, device)

    def clean() -> None:
        ours.zero_grad()
        x_TD.grad = None

    def our_step() -> Tensor:
        hidden_TD, _ = ours(x_TD, positions_T.expand(3, -1), lengths)
        (ours.codec_head(hidden_TD, partial(cross_entropy_sum, labels_T=labels_T)) / tokens).backward()
        return gradient_of(x_TD)

    def their_step(attention: str) -> Tensor:
        peers.attention(theirs.model, attention)
        extra = {"segments": make_segments(lengths, device)} if attention == peers.PACKED else {}
        ids_41T = positions_T.long().expand(4, 1, -1)
        out = theirs.model(inputs_embeds=x_TD[None], position_ids=ids_41T, use_cache=False, **extra)
        F.cross_entropy(theirs.codec_head(out.last_hidden_state[0]).float(), labels_T).backward()
        return gradient_of(x_TD)

    works = {
        "ours": our_step,
        "transformers +": partial(their_step, peers.PACKED),
        "transformers": partial(their_step, "sdpa"),
    }
    with torch.no_grad():
        load = peers.expert_load(ours(x_TD, positions_T.expand(3, -1), lengths)[1], text.num_experts_per_tok)
    found = compared(
        works,
        device,
        sizes.rounds,
        clock,
        clean=clean,
        done=Work(tokens, talker_flops(sizes.talker, lengths)),
        side=sizes.gemm,
        gradient="the input's gradient",
    )
    found["figures"]["load"] = figure(load, "x mean", "tokens of the heaviest expert over the mean, mean over layers")
    return found


def predictor(sizes: Sizes, device: torch.device, ours: Any, theirs: Any, clock: Clock) -> dict[str, Any]:
    """The code predictor and its heads. Speed counts frames."""
    config, frames = sizes.talker.code_predictor, sizes.frames
    torch.manual_seed(0)
    hidden_ND, first_ND = (torch.randn(frames, config.hidden_size, device=device).to(peers.DTYPE) for _ in range(2))
    hidden_ND.requires_grad_()
    codes_RN = torch.randint(0, config.vocab_size, (config.num_code_groups - 1, frames), device=device)
    count = codes_RN.numel()

    def clean() -> None:
        ours.zero_grad()
        hidden_ND.grad = None

    def our_step() -> Tensor:
        states_NRD = ours.code_predictor(hidden_ND, first_ND, codes_RN)
        sums = [
            head(states_NRD[:, r], partial(cross_entropy_sum, labels_T=codes_RN[r]))
            for r, head in enumerate(ours.code_predictor.lm_head)
        ]
        (torch.stack(sums).sum() / count).backward()
        return gradient_of(hidden_ND)

    def their_step() -> Tensor:
        module = theirs.code_predictor
        embeddings = module.model.codec_embedding
        fed = [embed(code_N) for embed, code_N in zip(embeddings[:-1], codes_RN[:-1], strict=True)]
        inputs_NSD = torch.stack([hidden_ND, first_ND, *fed], dim=1)
        states_NSD = module.model(inputs_embeds=inputs_NSD, use_cache=False).last_hidden_state
        logits_NRV = torch.stack([head(states_NSD[:, r + 1]) for r, head in enumerate(module.lm_head)], dim=1)
        F.cross_entropy(logits_NRV.float().flatten(0, 1), codes_RN.T.flatten()).backward()
        return gradient_of(hidden_ND)

    return compared(
        {"ours": our_step, "transformers": their_step},
        device,
        sizes.rounds,
        clock,
        clean=clean,
        done=Work(frames, predictor_flops(config, frames), "frames"),
        side=sizes.gemm,
        gradient="the input's gradient",
    )
