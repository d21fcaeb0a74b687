"""Tiny models, random packs, and transformers' Thinker with the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.audio_encoder import num_audio_tokens
from models.config import AudioConfig, TextConfig, ThinkerConfig
from models.hf import load_released
from models.init import init_weights
from models.positions import text_audio_positions
from models.thinker import Thinker

AUDIO_TOKEN = 5


def tiny_config(**text: int) -> ThinkerConfig:
    shape = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "mrope_section": (4, 2, 2),
    } | text
    audio = AudioConfig(
        d_model=16,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=32,
        output_dim=shape["hidden_size"],
        downsample_hidden_size=6,
        n_window_infer=200,
    )
    return ThinkerConfig(TextConfig(**shape), audio, AUDIO_TOKEN)


def tiny_thinker(seed: int = 0, config: ThinkerConfig | None = None, **options: bool) -> Thinker:
    thinker = Thinker(config or tiny_config(), **options)
    init_weights(thinker, seed)
    randomize(thinker, seed)
    return thinker


@torch.no_grad()
def randomize(module: nn.Module, seed: int) -> None:
    """Move every parameter off its special values, so that a forgotten bias or norm weight shows."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@dataclass
class Document:
    """Token ids, and the frames of each clip in it."""

    ids: list[int]
    clips: tuple[int, ...]


def document(generator: torch.Generator, num_text: int, clips: Sequence[int] = ()) -> Document:
    def text() -> list[int]:
        return torch.randint(AUDIO_TOKEN + 1, 64, (num_text,), generator=generator).tolist()

    ids = text()
    for frames in clips:
        ids += [AUDIO_TOKEN] * num_audio_tokens(frames) + text()
    return Document(ids, tuple(clips))


class Pack(NamedTuple):
    """The Thinker's arguments."""

    token_ids_T: Tensor
    position_ids_3T: Tensor
    doc_lengths: tuple[int, ...]
    mel_FM: Tensor
    mel_lengths: tuple[int, ...]
    pixels_PX = torch.empty(0, 0)
    grids = ()


def pack(generator: torch.Generator, documents: Sequence[Document]) -> Pack:
    """Documents end to end, with random clips."""
    lengths = tuple(len(d.ids) for d in documents)
    frames = tuple(f for d in documents for f in d.clips)
    ids = torch.tensor([i for d in documents for i in d.ids], dtype=torch.int64)
    return Pack(ids, text_audio_positions(lengths), lengths, torch.randn(sum(frames), 128, generator=generator), frames)


def reference_config(config: ThinkerConfig):
    """The same shapes for transformers."""
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeThinkerConfig

    text = asdict(config.text)
    rope = {
        "rope_type": "default",
        "rope_theta": text.pop("rope_theta"),
        "mrope_section": list(text.pop("mrope_section")),
    }
    vision = {"depth": 1, "hidden_size": 8, "num_heads": 2, "intermediate_size": 8, "deepstack_visual_indexes": [0]}
    return Qwen3OmniMoeThinkerConfig(
        text_config={**text, "rope_parameters": rope},
        audio_config=asdict(config.audio),
        vision_config={**vision, "out_hidden_size": config.text.hidden_size},
        audio_token_id=config.audio_token_id,
        vision_start_token_id=1,  # transformers' class default lacks it, and its position ids read it
    )


def reference_thinker(config: ThinkerConfig, seed: int) -> nn.Module:
    """Transformers' Thinker with random weights, none at a special value; attention far from uniform."""
    from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeThinkerForConditionalGeneration

    reference = Qwen3OmniMoeThinkerForConditionalGeneration(reference_config(config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            std = 0.6 if "q_proj" in name or "k_proj" in name else 0.2
            parameter.normal_(0.0, std, generator=generator).add_(1.0 if "norm" in name and "weight" in name else 0.0)
    return reference.train()


def released_gradients(reference: nn.Module) -> dict[str, Tensor]:
    """Gradients of transformers' Thinker under the released checkpoint's names, experts cut apart."""
    out = {}
    for name, parameter in reference.named_parameters():
        if "visual" in name:
            continue
        released = "thinker." + name.replace("model.audio_tower", "audio_tower").replace(
            "model.language_model", "model"
        )
        if ".experts." not in name:
            out[released] = parameter.grad
            continue
        stem, last = released.rsplit(".", 1)
        parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",)
        for expert, weight in enumerate(parameter.grad):
            for part, piece in zip(parts, weight.chunk(len(parts)), strict=True):
                out[f"{stem}.{expert}.{part}.weight"] = piece
    return out


def with_weights_of(reference: nn.Module, config: ThinkerConfig, folder) -> Thinker:
    """Our Thinker with the weights that transformers saved, by their released names."""
    from safetensors.torch import load_file

    reference.save_pretrained(folder)
    saved = {f"thinker.{name}": w for path in folder.glob("*.safetensors") for name, w in load_file(path).items()}
    thinker = Thinker(config)
    load_released(thinker, saved)
    return thinker
