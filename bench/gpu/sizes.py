"""What the suite runs: the released shapes with fewer layers, or toy ones that a laptop's CPU walks through in seconds.

recipes/model/qwen3_omni_30b_a3b_talker.yaml --> RELEASED sizes;   TOY here, for every code path
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from models.config import TextConfig
from models.omni_config import CodePredictorConfig, TalkerConfig

RECIPES = Path(__file__).resolve().parents[2] / "recipes/model"
LAYERS = 12  # of the released Thinker's 48: what fits one GPU with its gradients


@dataclass(frozen=True)
class Sizes:
    """Shapes, and tokens of each measurement."""

    name: str
    thinker: TextConfig
    talker: TalkerConfig
    packs: tuple[int, ...]  # tokens of a packed sequence
    moe_tokens: tuple[int, ...]
    talker_tokens: tuple[int, ...]
    frames: int  # of the code predictor
    rounds: int
    median_document: int  # tokens
    gemm: int  # side of the square matrices whose product is the machine's rate


def sizes(toy: bool) -> Sizes:
    """The released sizes, or toy ones."""
    return _toy() if toy else _released()


def _released() -> Sizes:
    model = OmegaConf.merge(
        OmegaConf.load(RECIPES / "qwen3_omni_30b_a3b.yaml"), OmegaConf.load(RECIPES / "qwen3_omni_30b_a3b_talker.yaml")
    )
    found: Any = OmegaConf.to_container(OmegaConf.create({"model": model}), resolve=True)
    talker = found["model"]["talker"]
    talker["text"], talker["code_predictor"] = (
        TextConfig(**talker["text"]),
        CodePredictorConfig(**talker["code_predictor"]),
    )
    thinker = replace(TextConfig(**found["model"]["text"]), num_hidden_layers=LAYERS)
    long = 4_096, 32_768
    speech = TalkerConfig(**talker)
    return Sizes("released", thinker, speech, long, (16_384, 32_768), (4_096, 16_384), 4_096, 7, 400, 8_192)


def _toy() -> Sizes:
    moe: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    thinker = TextConfig(512, 64, mrope_section=(4, 2, 2), **shape, **moe)
    speech = TextConfig(64, 32, mrope_section=(4, 2, 2), shared_expert_intermediate_size=32, **shape, **moe)
    predictor = CodePredictorConfig(32, 32, 64, 2, 2, 1, 16)
    names = ("pad_id", "bos_id", "eos_token_id", "nothink_id", "think_bos_id", "think_eos_id")
    ids = {f"codec_{name}": 40 + place for place, name in enumerate(names)}
    talker = TalkerConfig(speech, predictor, 64, 1, **ids, speaker_id={"one": 50})
    return Sizes("toy", thinker, talker, (128, 512), (256, 512), (128,), 32, 5, 40, 512)


def natural_lengths(tokens: int, middle: int) -> tuple[int, ...]:
    """Documents packed to exactly `tokens`: log-normal lengths of median `middle`; the last one is cut."""
    drawn, left = random.Random(0), tokens
    lengths = []
    while left:
        length = min(left, max(16, int(middle * math.exp(drawn.gauss(0.0, 1.0)))))
        lengths.append(length)
        left -= length
    return tuple(lengths)
