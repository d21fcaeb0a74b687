"""Vision encoder: equal to transformers' from the same weights, fp32 to 1e-5, over random shapes and grids."""

from __future__ import annotations

import random
from dataclasses import asdict

import pytest
import torch

from models.config import VisionConfig
from models.vision_encoder import VisionEncoder, num_vision_tokens

TOLERANCE = 1e-5


def random_config(choose: random.Random) -> VisionConfig:
    heads, depth = choose.randint(1, 4), choose.randint(1, 4)
    return VisionConfig(
        depth=depth,
        hidden_size=heads * 4 * choose.randint(2, 5),
        intermediate_size=choose.randint(5, 40),
        num_heads=heads,
        out_hidden_size=choose.randint(3, 24),
        deepstack_visual_indexes=tuple(sorted(choose.sample(range(depth), choose.randint(0, depth)))),
        num_position_embeddings=choose.randint(1, 9) ** 2,
        patch_size=choose.randint(1, 5),
        temporal_patch_size=choose.randint(1, 3),
        spatial_merge_size=choose.choice((1, 2, 2, 3)),
        in_channels=choose.choice((1, 3)),
    )


def random_grids(choose: random.Random, merge: int) -> list[tuple[int, int, int]]:
    """One to four images and videos; the last may be too long a frame to share a bucket of attention."""
    grids = [
        (choose.choice((1, 1, 2, 5)), merge * choose.randint(1, 5), merge * choose.randint(1, 7))
        for _ in range(choose.randint(1, 4))
    ]
    return grids + [(2, 12, 48)] * (choose.random() < 0.3)


def released(config: VisionConfig, seed: int):
    """Transformers' encoder with random weights, none at a special value.

    Attention is far from uniform, and no hotter: rounding would drown the comparison.
    """
    pytest.importorskip("transformers")
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeVisionEncoderConfig
    from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeVisionEncoder

    reference = Qwen3OmniMoeVisionEncoder(Qwen3OmniMoeVisionEncoderConfig(**asdict(config)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            norm = name.endswith("weight") and ("norm" in name or "ln_q" in name)
            matrix = parameter.dim() > 1 and "pos_embed" not in name
            std = (1.5 if "qkv" in name else 0.8) / parameter[0].numel() ** 0.5 if matrix else 0.2
            parameter.normal_(0.0, std, generator=generator).add_(float(norm))
    return reference


def encoder_like(reference, config: VisionConfig) -> VisionEncoder:
    ours = VisionEncoder(config)
    ours.load_state_dict(reference.state_dict())  # strict: the names are the released ones
    return ours


def pixels_for(grids, config: VisionConfig, seed: int) -> torch.Tensor:
    patches = sum(frames * rows * columns for frames, rows, columns in grids)
    return torch.randn(patches, config.patch_dim, generator=torch.Generator().manual_seed(seed))


def weighted_sum(outputs, seed: int = 0) -> torch.Tensor:
    """A loss that reads every output."""
    generator = torch.Generator().manual_seed(seed)
    return sum((x.float() * torch.randn(x.shape, generator=generator)).sum() for x in outputs)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours.float() - theirs.float()).norm() / theirs.float().norm().clamp(min=1e-6)).item()


def both(config, grids, seed, dtype=torch.float32):
    """Outputs, features first, and gradients by name, of ours and of transformers'."""
    reference = released(config, seed)
    ours, pixels_PX = encoder_like(reference, config).to(dtype), pixels_for(grids, config, seed)
    features_TD, deepstack = ours(pixels_PX, grids)
    assert len(features_TD) == sum(num_vision_tokens(grid, config.spatial_merge_size) for grid in grids)
    out = reference.to(dtype)(pixels_PX, grid_thw=torch.tensor(grids))
    results = []
    for module, outputs in (
        (ours, [features_TD, *deepstack]),
        (reference, [out.pooler_output, *out.deepstack_features]),
    ):
        weighted_sum(outputs).backward()
        results.append((outputs, {name: p.grad for name, p in module.named_parameters()}))
    return results


@pytest.mark.parametrize("seed", range(32))
def test_features_and_gradients_equal_transformers(seed):
    choose = random.Random(seed)
    config = random_config(choose)
    (ours, our_grads), (theirs, their_grads) = both(config, random_grids(choose, config.spatial_merge_size), seed)
    assert len(ours) == len(theirs) == 1 + len(config.deepstack_visual_indexes)
    assert max(map(relative, ours, theirs)) < TOLERANCE
    assert list(our_grads) == [name for name in our_grads if name in their_grads] and len(our_grads) == len(their_grads)
    for name, grad in our_grads.items():
        assert relative(grad, their_grads[name]) < TOLERANCE, name


@pytest.mark.parametrize("seed", range(100, 104))
def test_bf16_strays_from_fp32_no_further_than_transformers(seed):
    choose = random.Random(seed)
    config = random_config(choose)
    grids = random_grids(choose, config.spatial_merge_size)
    exact, _ = both(config, grids, seed)[1]
    (ours, _), (theirs, _) = both(config, grids, seed, torch.bfloat16)
    for got, reference, want in zip(ours, theirs, exact, strict=True):
        assert got.dtype is torch.bfloat16
        assert relative(got, want) < max(1.5 * relative(reference, want), 0.02)
        assert relative(got, want) < 0.1


CONFIG = VisionConfig(2, 32, 48, 2, 12, (0,), num_position_embeddings=25, patch_size=4)


def test_an_image_gives_the_same_beside_others():
    encoder, grids = VisionEncoder(CONFIG), [(1, 4, 6), (3, 2, 4), (1, 8, 2)]
    pixels_PX = pixels_for(grids, CONFIG, 0)
    whole_TD, (deep_TD,) = encoder(pixels_PX, grids)
    row = token = 0
    for frames, rows, columns in grids:
        frame = rows * columns
        for _ in range(frames):  # frames do not see each other, and know no time
            alone_TD, (alone_deep_TD,) = encoder(pixels_PX[row : row + frame], [(1, rows, columns)])
            torch.testing.assert_close(alone_TD, whole_TD[token : token + frame // 4], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(alone_deep_TD, deep_TD[token : token + frame // 4], rtol=1e-5, atol=1e-5)
            row, token = row + frame, token + frame // 4


def test_no_images_give_zero_gradients():
    encoder = VisionEncoder(CONFIG)
    features_TD, deepstack = encoder(torch.zeros(0, CONFIG.patch_dim), [])
    assert features_TD.shape == (0, 12) and [x.shape for x in deepstack] == [(0, 12)]
    (features_TD.sum() + sum(x.sum() for x in deepstack)).backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_every_parameter_learns():
    encoder = VisionEncoder(CONFIG)
    features_TD, deepstack = encoder(pixels_for([(2, 8, 8)], CONFIG, 0), [(2, 8, 8)])
    weighted_sum([features_TD, *deepstack]).backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


@pytest.mark.parametrize(
    "shape,grids,message",
    [
        ((16, 96), [(1, 4, 6)], r"must be \(24, 96\).*not \(16, 96\)"),
        ((16, 95), [(1, 4, 4)], r"must be \(16, 96\).*not \(16, 95\)"),
        ((4, 96), [], r"must be \(0, 96\)"),
        ((12, 96), [(1, 3, 4)], r"\(1, 3, 4\).*merge size 2"),
        ((12, 96), [(1, 4, 3)], r"\(1, 4, 3\).*merge size 2"),
        ((0, 96), [(0, 4, 4)], r"\(0, 4, 4\) must be of positive"),
        ((4, 96), [(-1, -2, 2)], r"positive"),
    ],
)
def test_grids_that_do_not_fit(shape, grids, message):
    with pytest.raises(ValueError, match=message):
        VisionEncoder(CONFIG)(torch.zeros(shape), grids)


def test_released_size():
    with torch.device("meta"):
        encoder = VisionEncoder(VisionConfig(27, 1152, 4304, 16, 2048))
    assert sum(p.numel() for p in encoder.parameters()) == 538_631_408
    assert num_vision_tokens((3, 28, 46)) == 3 * 14 * 23
