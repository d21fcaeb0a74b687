"""Configurations, documents and reference models drawn at random: every shape of the whole model, every modality."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from models.audio_encoder import num_audio_tokens
from models.config import AudioConfig, TextConfig, ThinkerConfig, VisionConfig, scaled_mrope_section
from models.vision_encoder import num_vision_tokens

AUDIO, IMAGE, VIDEO, VISION_START, VISION_END, AUDIO_START, AUDIO_END = range(5, 12)
FIRST_TEXT, VOCAB = 20, 96
SECONDS_PER_GRID = 0.5


def random_text_config(rng: random.Random, **fixed: Any) -> TextConfig:
    groups, head_dim, experts = rng.choice([1, 2]), rng.choice([8, 16, 24]), rng.choice([4, 6, 8])
    drawn = {
        "vocab_size": VOCAB,
        "hidden_size": rng.choice([24, 32, 48]),
        "num_hidden_layers": rng.choice([2, 3, 4]),
        "num_attention_heads": groups * rng.choice([1, 2, 3]),
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "num_experts": experts,
        "num_experts_per_tok": rng.randint(1, 3),
        "moe_intermediate_size": rng.choice([8, 12, 20]),
        "mrope_section": scaled_mrope_section(head_dim),
    }
    return TextConfig(**drawn | fixed)


def random_thinker_config(seed: int) -> ThinkerConfig:
    rng = random.Random(seed)
    text = random_text_config(rng)
    heads, depth = rng.choice([1, 2]), rng.randint(1, 4)
    taken = sorted(rng.sample(range(depth), rng.randint(1, min(depth, text.num_hidden_layers))))
    vision = VisionConfig(
        depth=depth,
        hidden_size=heads * rng.choice([8, 16]),
        intermediate_size=rng.choice([12, 20]),
        num_heads=heads,
        out_hidden_size=text.hidden_size,
        deepstack_visual_indexes=tuple(taken),
        num_position_embeddings=rng.choice([4, 9, 16]) ** 2,
        patch_size=rng.choice([2, 4]),
    )
    audio_heads = rng.choice([1, 2])
    audio = AudioConfig(
        d_model=audio_heads * 8,
        encoder_layers=rng.randint(1, 3),
        encoder_attention_heads=audio_heads,
        encoder_ffn_dim=rng.choice([16, 24]),
        output_dim=text.hidden_size,
        downsample_hidden_size=rng.choice([3, 5]),
        n_window_infer=rng.choice([100, 200, 400]),
    )
    return ThinkerConfig(text, audio, AUDIO, vision, IMAGE, VIDEO)


def to_reference(config: TextConfig) -> dict[str, Any]:
    """The decoder's shapes under transformers' names."""
    text = asdict(config)
    section = list(text.pop("mrope_section"))
    rope = {"rope_type": "default", "rope_theta": text.pop("rope_theta"), "mrope_section": section}
    if not text["shared_expert_intermediate_size"]:
        del text["shared_expert_intermediate_size"]
    return text | {"rope_parameters": rope, "norm_topk_prob": True}


def reference_thinker(config: ThinkerConfig, seed: int) -> Any:
    """Transformers' Thinker of the same shapes; no weight at a special value, attention far from uniform."""
    from transformers.models.qwen3_omni_moe import configuration_qwen3_omni_moe as configuration
    from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as modeling

    assert config.vision is not None
    shapes = configuration.Qwen3OmniMoeThinkerConfig(
        text_config=to_reference(config.text),
        audio_config=asdict(config.audio),
        vision_config=asdict(config.vision)
        | {"deepstack_visual_indexes": list(config.vision.deepstack_visual_indexes)},
        audio_token_id=AUDIO,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        audio_start_token_id=AUDIO_START,
        audio_end_token_id=AUDIO_END,
        position_id_per_seconds=13,
    )
    reference = modeling.Qwen3OmniMoeThinkerForConditionalGeneration(shapes)
    randomize(reference, seed)
    return reference.train()


@torch.no_grad()
def randomize(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        std = 0.3 if "q_proj" in name or "k_proj" in name else 0.2
        norm = "norm" in name or "ln_" in name
        parameter.normal_(0.0, std, generator=generator).add_(1.0 if norm and "weight" in name else 0.0)


def our_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names inside transformers' Thinker to ours."""
    return {
        name.replace("model.language_model.", "model.")
        .replace("model.audio_tower", "audio_tower")
        .replace("model.visual.", "visual."): value
        for name, value in state.items()
    }


@dataclass
class Sample:
    """A document with its media; pictures and clips in the order of their placeholders."""

    ids: list[int] = field(default_factory=list)
    mels: list[Tensor] = field(default_factory=list)
    pictures: list[tuple[int, tuple[int, int, int], Tensor]] = field(default_factory=list)

    def of_kind(self, token: int) -> list[tuple[tuple[int, int, int], Tensor]]:
        return [(grid, pixels) for kind, grid, pixels in self.pictures if kind == token]


def random_sample(seed: int, config: ThinkerConfig, kinds: str | None = None) -> Sample:
    """Text, audio clips (a), images (i) and videos (v) in random order; `kinds` fixes which."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    assert config.vision is not None
    sample = Sample()

    def text() -> None:
        sample.ids += [rng.randrange(FIRST_TEXT, VOCAB) for _ in range(rng.randint(1, 5))]

    text()
    drawn = rng.choices("aiv", k=rng.randint(1, 4)) if kinds is None else kinds
    # transformers pads chunks to the longest of a document: beside longer clips, those below a second differ a little
    lengths = [17, 99, 100, 101, 250, 430] if list(drawn).count("a") == 1 else [100, 101, 250, 430]
    for kind in drawn:
        if kind == "a":
            frames = rng.choice(lengths)
            sample.mels.append(torch.randn(frames, 128, generator=generator))
            sample.ids += [AUDIO_START, *[AUDIO] * num_audio_tokens(frames), AUDIO_END]
        else:
            token, frames = (IMAGE, 1) if kind == "i" else (VIDEO, rng.randint(1, 4))
            grid = frames, 2 * rng.randint(1, 4), 2 * rng.randint(1, 4)
            patches = grid[0] * grid[1] * grid[2]
            pixels = torch.randn(patches, config.vision.patch_dim, generator=generator)
            sample.pictures.append((token, grid, pixels))
            sample.ids += [VISION_START, *[token] * num_vision_tokens(grid), VISION_END]
        text()
    return sample


def reference_inputs(sample: Sample) -> dict[str, Any]:
    """Arguments of transformers' Thinker for one document."""
    out: dict[str, Any] = {"input_ids": torch.tensor([sample.ids])}
    out["attention_mask"] = torch.ones_like(out["input_ids"])
    if sample.mels:
        longest = max(map(len, sample.mels))
        out["input_features"] = torch.zeros(len(sample.mels), 128, longest)
        out["feature_attention_mask"] = torch.zeros(len(sample.mels), longest, dtype=torch.long)
        for i, mel in enumerate(sample.mels):
            out["input_features"][i, :, : len(mel)] = mel.T
            out["feature_attention_mask"][i, : len(mel)] = 1
    for token, pixels, grid in ((IMAGE, "pixel_values", "image"), (VIDEO, "pixel_values_videos", "video")):
        if found := sample.of_kind(token):
            out[pixels] = torch.cat([p for _, p in found])
            out[f"{grid}_grid_thw"] = torch.tensor([g for g, _ in found])
    if found := sample.of_kind(VIDEO):
        out["video_second_per_grid"] = torch.full((len(found),), SECONDS_PER_GRID)
    return out


def reference_positions(reference: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Position ids [3, T] as transformers makes them."""
    frames = inputs.get("feature_attention_mask")
    ids, _ = reference.get_rope_index(
        inputs["input_ids"],
        inputs.get("image_grid_thw"),
        inputs.get("video_grid_thw"),
        inputs["attention_mask"],
        False,
        None if frames is None else frames.sum(1),
        inputs.get("video_second_per_grid"),
    )
    return ids[:, 0].float()


def packed(
    samples: list[Sample], positions: list[Tensor], config: ThinkerConfig
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of our Thinker for documents end to end."""
    assert config.vision is not None
    mels = [mel for sample in samples for mel in sample.mels]
    pictures = [picture for sample in samples for picture in sample.pictures]
    inputs = (
        torch.tensor([token for sample in samples for token in sample.ids]),
        torch.cat(positions, dim=1),
        tuple(len(sample.ids) for sample in samples),
        torch.cat([torch.empty(0, 128), *mels]),
        tuple(map(len, mels)),
    )
    pixels_PX = torch.cat([torch.empty(0, config.vision.patch_dim), *[pixels for _, _, pixels in pictures]])
    return inputs, {"pixels_PX": pixels_PX, "grids": tuple(grid for _, grid, _ in pictures)}
