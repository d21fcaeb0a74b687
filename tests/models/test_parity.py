"""Transformers' Thinker and ours: the same outputs and gradients from the same weights, fp32 to 1e-5."""

from __future__ import annotations

import pytest
import torch

from models.hf import released_pieces
from tests.models import helpers as h

pytest.importorskip("transformers")
TOLERANCE = 1e-5
SHAPES = [
    {},
    {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "mrope_section": (2, 1, 1), "num_experts": 5},
    {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "mrope_section": (6, 5, 5),
        "num_hidden_layers": 3,
    },
    {
        "hidden_size": 48,
        "num_key_value_heads": 1,
        "num_experts": 4,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 12,
    },
    {"num_experts": 16, "num_experts_per_tok": 1, "head_dim": 24, "mrope_section": (4, 4, 4)},
]
# text alone; one short clip; clips of odd lengths; windows of 2 s crossed by a long clip; two clips of over a second
PACKS = [
    [(9, ())],
    [(3, (41,))],
    [(2, (99,)), (5, (100,)), (1, (101,))],
    [(4, (930,)), (7, ())],
    [(3, (250, 137)), (6, (17,))],
]


def reference_run(reference, documents, mel_FM):
    """Each document alone, as transformers is known to be right: logits and router logits of each layer, joined."""
    logits, router, start = [], [], 0
    for doc in documents:
        arguments = {}
        if doc.clips:
            features = torch.zeros(len(doc.clips), 128, max(doc.clips))
            mask = torch.zeros(len(doc.clips), max(doc.clips), dtype=torch.long)
            for i, frames in enumerate(doc.clips):
                features[i, :, :frames] = mel_FM[start : start + frames].T
                mask[i, :frames] = 1
                start += frames
            arguments = {"input_features": features, "feature_attention_mask": mask}
        ids = torch.tensor([doc.ids])
        out = reference(
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, output_router_logits=True, **arguments
        )
        logits.append(out.logits[0])
        router.append(out.router_logits)
    return torch.cat(logits), [torch.cat(layer) for layer in zip(*router, strict=True)]


def objective(logits_TV, router_logits, seed=0):
    """A loss that reads every output, the router's too."""
    generator = torch.Generator().manual_seed(seed)
    total = (logits_TV * torch.randn(logits_TV.shape, generator=generator)).sum()
    return total + sum((r * torch.randn(r.shape, generator=generator)).sum() for r in router_logits) / 10


def relative(ours, theirs, scale=None):
    scale = theirs if scale is None else scale
    return ((ours - theirs).norm() / scale.norm().clamp(min=1e-6)).item()


@pytest.mark.parametrize("seed,shape,parts", [(i, SHAPES[i % 5], PACKS[(i + i // 5) % 5]) for i in range(15)])
def test_forward_and_gradients_equal_transformers(seed, shape, parts, tmp_path):
    generator = torch.Generator().manual_seed(seed)
    config = h.tiny_config(**shape)
    reference = h.reference_thinker(config, seed)
    ours = h.with_weights_of(reference, config, tmp_path)
    documents = [h.document(generator, num_text, clips) for num_text, clips in parts]
    arguments = h.pack(generator, documents)

    hidden_TD, router_logits = ours(*arguments)
    logits_TV = ours.lm_head(hidden_TD)
    want_TV, want_router = reference_run(reference, documents, arguments[3])
    assert relative(logits_TV, want_TV) < TOLERANCE
    assert max(map(relative, router_logits, want_router)) < TOLERANCE

    objective(logits_TV, router_logits).backward()
    objective(want_TV, want_router).backward()
    want = h.released_gradients(reference)
    seen = set()
    for name, parameter in ours.named_parameters():
        flat = parameter.grad.flatten()
        for released, shape_, _, offset, length in released_pieces(name, tuple(parameter.shape), 0, len(flat)):
            seen.add(released)
            theirs = torch.zeros(shape_) if want[released] is None else want[released]
            # A key's bias shifts all scores of a query alike: its gradient is zero but for rounding.
            scale = want[released.replace("k_proj", "v_proj")] if released.endswith("k_proj.bias") else None
            assert relative(flat[offset : offset + length].view(shape_), theirs, scale) < TOLERANCE, released
    assert seen == set(want)


def test_audio_token_count_equals_transformers():
    from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import _get_feat_extract_output_lengths

    from models.audio_encoder import num_audio_tokens

    frames = torch.arange(1, 5001)
    assert torch.equal(num_audio_tokens(frames), _get_feat_extract_output_lengths(frames))
    assert [num_audio_tokens(n) for n in range(1, 5001)] == num_audio_tokens(frames.numpy()).tolist()
    assert num_audio_tokens(3000) == 390
