"""Initial weights. One table names every parameter of every module; a name it does not know is an error.

Each tensor draws from its own generator, seeded by (seed, name): the values do not depend on the order of modules, and
a model with more layers starts with the same first ones. A Thinker has the same weights alone and in the whole model.

Towers, projections and the waveform decoder keep the variance of what passes; decoders draw at the configuration's
`initializer_range`; heads start near the loss of a uniform guess.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from models.config import ThinkerConfig, TranscriberConfig
from models.omni_config import Code2WavConfig, OmniConfig, TalkerConfig

Rule = Callable[[Tensor, torch.Generator, float], None]
HEAD_LOGIT_STD = 0.5  # at inputs of unit variance: 0.12 nats above the loss of a uniform guess
TEXT_GAIN = 10.0  # of the Talker's text: SiLU halves what is small, and it is to be heard beside a frame of many codes
BRANCH_GAIN = 0.1  # of residual branches and of the waveform, which must not saturate


def _normal(weight: Tensor, generator: torch.Generator, scale: float) -> None:
    weight.normal_(0.0, scale, generator=generator)


def _unit(weight: Tensor, generator: torch.Generator, scale: float) -> None:
    weight.normal_(0.0, 1.0, generator=generator)


def _head(weight: Tensor, generator: torch.Generator, scale: float) -> None:
    weight.normal_(0.0, min(scale, HEAD_LOGIT_STD / math.sqrt(weight.shape[1])), generator=generator)


def _gelu_conv(weight: Tensor, generator: torch.Generator, scale: float) -> None:
    """Keeps the variance through a GELU; at the decoder's fixed std three convolutions would silence the input."""
    fan_in = weight[0].numel()
    weight.normal_(0.0, math.sqrt(2.0 / fan_in), generator=generator)


def _linear(weight: Tensor, generator: torch.Generator, scale: float) -> None:
    """Keeps the variance of features whatever their width. Linear maps and convolutions: [out, in, ...]."""
    weight.normal_(0.0, 1.0 / math.sqrt(weight[0].numel()), generator=generator)


def _text(weight: Tensor, generator: torch.Generator, scale: float) -> None:
    """Makes text louder than the frame it is added to; much more quiet than that it is learnt late (docs/log.md)."""
    weight.normal_(0.0, TEXT_GAIN / math.sqrt(weight[0].numel()), generator=generator)


def _branch(weight: Tensor, generator: torch.Generator, scale: float) -> None:
    weight.normal_(0.0, BRANCH_GAIN / math.sqrt(weight[0].numel()), generator=generator)


def _transposed(taps: int) -> Rule:
    """Keeps the variance of a transposed convolution [in, out, kernel], each output the sum of `taps` of its taps."""

    def rule(weight: Tensor, generator: torch.Generator, scale: float) -> None:
        weight.normal_(0.0, 1.0 / math.sqrt(taps * weight.shape[0]), generator=generator)

    return rule


def _ones(weight: Tensor, generator: torch.Generator, scale: float) -> None:
    weight.fill_(1.0)


def _zeros(weight: Tensor, generator: torch.Generator, scale: float) -> None:
    weight.zero_()


def _configured(weight: Tensor, generator: torch.Generator, scale: float) -> None:
    weight.fill_(scale)


def _tiny(weight: Tensor, generator: torch.Generator, scale: float) -> None:
    weight.fill_(1e-6)


_DECODER = r"(talker\.(code_predictor\.)?)?model\."  # the Thinker's, the Talker's or the code predictor's
_LAYER = _DECODER + r"layers\.\d+\."
_PRE = r"code2wav\.pre_transformer\."
_WAVE = r"code2wav\.decoder\.\d+\."

RULES: tuple[tuple[str, Rule], ...] = (
    (r"model\.embed_tokens\.weight", _normal),
    (r"talker\.(code_predictor\.)?model\.codec_embedding\.(\d+\.)?weight", _normal),
    (_LAYER + r"self_attn\.[qkvo]_proj\.weight", _normal),
    (_LAYER + r"self_attn\.[qk]_norm\.weight", _ones),
    (_LAYER + r"(input|post_attention)_layernorm\.weight", _ones),
    (_LAYER + r"mlp\.(gate|shared_expert_gate)\.weight", _normal),
    (_LAYER + r"mlp\.experts\.(gate_up|down)_proj", _normal),
    (_LAYER + r"mlp\.(shared_expert\.)?(gate|up|down)_proj\.weight", _normal),
    (_DECODER + r"norm\.weight", _ones),
    (r"(lm_head|talker\.codec_head|talker\.code_predictor\.lm_head\.\d+)\.weight", _head),
    (r"talker\.(text_projection\.linear_fc1|hidden_projection\.linear_fc[12])\.weight", _linear),
    (r"talker\.text_projection\.linear_fc2\.weight", _text),
    (r"talker\.(text|hidden)_projection\.linear_fc[12]\.bias", _zeros),
    (r"audio_tower\.conv2d[123]\.weight", _gelu_conv),
    (r"audio_tower\.(conv_out|proj1|proj2)\.weight", _linear),
    (r"audio_tower\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|fc[12])\.weight", _linear),
    (r"audio_tower\.(layers\.\d+\.(self_attn|final)_layer_norm|ln_post)\.weight", _ones),
    (r"audio_tower\..*\.bias", _zeros),
    (r"audio_decoder\.(embed_tokens|lm_head)\.weight", _head),  # one matrix where they are tied
    (r"audio_decoder\.layers\.\d+\.(self_attn|cross_attn)\.[qkvo]_proj\.weight", _linear),
    (r"audio_decoder\.layers\.\d+\.mlp\.(gate|up|down)_proj\.weight", _linear),
    (r"audio_decoder\.layers\.\d+\.((self|cross)_attn\.[qk]_norm|(input|cross|post)_layernorm)\.weight", _ones),
    (r"audio_decoder\.(audio_norm|norm)\.weight", _ones),
    (r"visual\.pos_embed\.weight", _normal),
    (r"visual\.(patch_embed\.proj|blocks\.\d+\.(attn\.(qkv|proj)|mlp\.linear_fc[12]))\.weight", _linear),
    (r"visual\.(merger|merger_list\.\d+)\.mlp\.[02]\.weight", _linear),
    (r"visual\.(blocks\.\d+\.norm[12]|(merger|merger_list\.\d+)\.ln_q)\.weight", _ones),
    (r"visual\..*\.bias", _zeros),
    (r"code2wav\.code_embedding\.weight", _unit),
    (_PRE + r"layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj\.weight", _linear),
    (_PRE + r"layers\.\d+\.(self_attn|mlp)_layer_scale\.scale", _configured),
    (_PRE + r"(layers\.\d+\.(input|post_attention)_layernorm|norm)\.weight", _ones),
    (r"code2wav\.upsample\.\d+\.0\.conv\.weight", _transposed(1)),
    (r"code2wav\.upsample\.\d+\.1\.(dwconv\.conv|pwconv[12])\.weight", _linear),
    (r"code2wav\.upsample\.\d+\.1\.norm\.weight", _ones),
    (r"code2wav\.upsample\.\d+\.1\.gamma", _tiny),
    (_WAVE + r"(block\.\d+\.(act[12]\.)?)?(alpha|beta)", _zeros),
    (r"code2wav\.decoder\.0\.conv\.weight", _linear),
    (r"code2wav\.decoder\.([2-9]|[1-9]\d+)\.conv\.weight", _branch),  # the last one: the waveform
    (_WAVE + r"block\.1\.conv\.weight", _transposed(2)),
    (_WAVE + r"block\.[2-4]\.conv1\.conv\.weight", _linear),
    (_WAVE + r"block\.[2-4]\.conv2\.conv\.weight", _branch),
    (r"code2wav\.(upsample|decoder)\..*\.bias", _zeros),
)


@torch.no_grad()
def init_weights(module: nn.Module, seed: int) -> None:
    """Set every parameter of a Thinker, a Talker, a waveform decoder or the whole model, in place.

    Raises ValueError for a parameter that no rule, or more than one, names.
    """
    config: Any = module.config
    prefix = {TalkerConfig: "talker", Code2WavConfig: "code2wav"}.get(type(config), "")
    for name, parameter in module.named_parameters(prefix):
        init_tensor(name, parameter, seed, init_scale(config, name))


@torch.no_grad()
def init_tensor(name: str, parameter: nn.Parameter | Tensor, seed: int, scale: float) -> None:
    """Set one parameter, whole, by its name in the model; `thinker.` may be left out."""
    name = name.removeprefix("thinker.")
    rules = [rule for pattern, rule in RULES if re.fullmatch(pattern, name)]
    if len(rules) != 1:
        raise ValueError(f"{len(rules)} initialisation rules name the parameter {name}; there must be one")
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator(parameter.device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    rules[0](parameter, generator, scale)


def init_scale(
    config: OmniConfig | ThinkerConfig | TranscriberConfig | TalkerConfig | Code2WavConfig, name: str
) -> float:
    """The one number that `init_tensor` takes from the configuration of the part that holds the parameter `name`."""
    if isinstance(config, TranscriberConfig):
        return 1.0  # of which nothing is drawn at a configured scale
    if isinstance(config, OmniConfig):
        parts = {"talker": config.talker, "code2wav": config.code2wav}
        config = parts.get(name.split(".")[0]) or config.thinker
    return config.layer_scale_initial_scale if isinstance(config, Code2WavConfig) else config.text.initializer_range
