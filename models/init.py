"""Initial weights. One table names every parameter of the Thinker; a name it does not know is an error.

Each tensor draws from its own generator, seeded by (seed, name): the values do not depend on the order of modules, and
a model with more layers starts with the same first ones.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.thinker import Thinker

Rule = Callable[[Tensor, torch.Generator, float], None]


def _normal(weight: Tensor, generator: torch.Generator, std: float) -> None:
    weight.normal_(0.0, std, generator=generator)


def _conv(weight: Tensor, generator: torch.Generator, std: float) -> None:
    """Keeps the variance through a GELU; at the decoder's fixed std three convolutions would silence the input."""
    fan_in = weight[0].numel()
    weight.normal_(0.0, math.sqrt(2.0 / fan_in), generator=generator)


def _linear(weight: Tensor, generator: torch.Generator, std: float) -> None:
    """Keeps the variance of the encoder's features whatever its width."""
    weight.normal_(0.0, 1.0 / math.sqrt(weight.shape[1]), generator=generator)


def _ones(weight: Tensor, generator: torch.Generator, std: float) -> None:
    weight.fill_(1.0)


def _zeros(weight: Tensor, generator: torch.Generator, std: float) -> None:
    weight.zero_()


RULES: tuple[tuple[str, Rule], ...] = (
    (r"model\.embed_tokens\.weight", _normal),
    (r"model\.layers\.\d+\.self_attn\.[qkvo]_proj\.weight", _normal),
    (r"model\.layers\.\d+\.self_attn\.[qk]_norm\.weight", _ones),
    (r"model\.layers\.\d+\.(input|post_attention)_layernorm\.weight", _ones),
    (r"model\.layers\.\d+\.mlp\.gate\.weight", _normal),
    (r"model\.layers\.\d+\.mlp\.experts\.(gate_up|down)_proj", _normal),
    (r"model\.norm\.weight", _ones),
    (r"lm_head\.weight", _normal),
    (r"audio_tower\.conv2d[123]\.weight", _conv),
    (r"audio_tower\.(conv_out|proj1|proj2)\.weight", _linear),
    (r"audio_tower\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|fc[12])\.weight", _linear),
    (r"audio_tower\.(layers\.\d+\.(self_attn|final)_layer_norm|ln_post)\.weight", _ones),
    (r"audio_tower\..*\.bias", _zeros),
)


@torch.no_grad()
def init_weights(thinker: Thinker, seed: int) -> None:
    """Set every parameter of `thinker` in place. Raises ValueError for one that no rule, or more than one, names."""
    std = thinker.config.text.initializer_range
    for name, parameter in thinker.named_parameters():
        init_tensor(name, parameter, seed, std)


@torch.no_grad()
def init_tensor(name: str, parameter: nn.Parameter | Tensor, seed: int, std: float) -> None:
    """Set one parameter, whole, by its name in the Thinker."""
    rules = [rule for pattern, rule in RULES if re.fullmatch(pattern, name)]
    if len(rules) != 1:
        raise ValueError(f"{len(rules)} initialisation rules name the parameter {name}; there must be one")
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator(parameter.device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    rules[0](parameter, generator, std)
