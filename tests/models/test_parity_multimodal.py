"""Transformers' whole Thinker and ours on random shapes and random mixes of media: fp32 to 1e-5, bf16 loosely."""

from __future__ import annotations

import random

import pytest
import torch

from models.thinker import Thinker
from tests.models import random_model as r

pytest.importorskip("transformers")
TOLERANCE, BF16_TOLERANCE = 1e-5, 0.1


def relative(ours, theirs, scale=None):
    return ((ours - theirs).norm() / (theirs if scale is None else scale).norm().clamp(min=1e-6)).item()


def build(seed):
    config = r.random_thinker_config(seed)
    reference = r.reference_thinker(config, seed)
    ours = Thinker(config)
    ours.load_state_dict(r.our_names(reference.state_dict()))
    return config, reference, ours


@pytest.mark.parametrize("seed", range(20))
def test_forward_and_gradients_equal_transformers(seed):
    config, reference, ours = build(seed)
    samples = [r.random_sample(100 * seed + i, config) for i in range(3)]
    inputs = [r.reference_inputs(sample) for sample in samples]
    positions = [r.reference_positions(reference, kwargs) for kwargs in inputs]
    tap = random.Random(seed).randint(1, config.text.num_hidden_layers)
    positional, keywords = r.packed(samples, positions, config)

    hidden_TD, _, tapped_TD = ours(*positional, **keywords, tap=tap)
    logits_TV = ours.lm_head(hidden_TD)
    outs = [
        reference(**kwargs, position_ids=ids.unsqueeze(1), use_cache=False, output_hidden_states=True)
        for kwargs, ids in zip(inputs, positions, strict=True)
    ]
    assert relative(logits_TV, want_TV := torch.cat([out.logits[0] for out in outs])) < TOLERANCE
    assert relative(tapped_TD, want_tap := torch.cat([out.hidden_states[tap][0] for out in outs])) < TOLERANCE
    with torch.no_grad():
        stopped_TD = ours(*positional, **keywords, tap=tap, stop=True)[2]
    assert torch.equal(stopped_TD, tapped_TD)

    generator = torch.Generator().manual_seed(seed)
    probe_TV = torch.randn(logits_TV.shape, generator=generator)
    probe_TD = torch.randn(tapped_TD.shape, generator=generator)
    ((logits_TV * probe_TV).sum() + (tapped_TD * probe_TD).sum()).backward()
    ((want_TV * probe_TV).sum() + (want_tap * probe_TD).sum()).backward()
    want = r.our_names({name: p.grad for name, p in reference.named_parameters()})
    for name, parameter in ours.named_parameters():
        theirs = torch.zeros_like(parameter) if want[name] is None else want[name]
        if name.endswith("k_proj.bias"):  # shifts all scores of a query alike: zero but for rounding
            scale = want[name.replace("k_proj", "v_proj")]
        elif name.endswith("gate.weight") and config.text.num_experts_per_tok == 1:  # a weight of one, whatever it says
            scale = want[name.replace("gate.weight", "experts.down_proj")]
        else:
            scale = theirs
        assert relative(parameter.grad, theirs, scale) < TOLERANCE, name
    assert set(want) == {name for name, _ in ours.named_parameters()}


@pytest.mark.parametrize("seed", range(4))
def test_bf16(seed):
    """Ours in bf16 against ours in fp32, media and all: within a tenth of the logits' norm (0.07 seen)."""
    config, reference, ours = build(seed)
    sample = r.random_sample(seed, config, "aiv")
    kwargs = r.reference_inputs(sample)
    positions = r.reference_positions(reference, kwargs)
    positional, keywords = r.packed([sample], [positions], config)
    with torch.no_grad():
        want_TV = ours.lm_head(ours(*positional, **keywords)[0])
        ours.to(torch.bfloat16)
        logits_TV = ours.lm_head(ours(*positional, **keywords)[0])
    assert relative(logits_TV.float(), want_TV) < BF16_TOLERANCE


@pytest.mark.parametrize("kinds", ["", "a", "i", "v", "aiv"])
def test_every_parameter_gets_a_gradient(kinds):
    """Finite and not zero where its modality is there; zero, never None, where it is not."""
    config, _, ours = build(3)
    sample = r.random_sample(0, config, kinds)
    positions = torch.arange(len(sample.ids)).float().expand(3, -1)
    positional, keywords = r.packed([sample], [positions], config)
    hidden_TD, router_logits = ours(*positional, **keywords)
    (ours.lm_head(hidden_TD).logsumexp(-1).sum() + sum(x.square().sum() for x in router_logits)).backward()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        present = ("a" in kinds) if name.startswith("audio_tower") else kinds.strip("a") != ""
        if name.startswith(("audio_tower", "visual")) and not present:
            assert not parameter.grad.any(), name
        elif not name.endswith("k_proj.bias") and "experts" not in name:
            assert parameter.grad.any(), name


def test_says_what_does_not_fit():
    config, _, ours = build(1)
    sample = r.random_sample(1, config, "i")
    positions = torch.zeros(3, len(sample.ids))
    positional, keywords = r.packed([sample], [positions], config)
    with pytest.raises(ValueError, match="visual placeholders in the tokens, but 0 visual tokens from 0 images"):
        ours(*positional)
    with pytest.raises(ValueError, match="pixels must be"):
        ours(*positional, pixels_PX=keywords["pixels_PX"][1:], grids=keywords["grids"])
    with pytest.raises(ValueError, match="tap"):
        ours(*positional, **keywords, tap=9)
