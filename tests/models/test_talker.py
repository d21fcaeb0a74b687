"""Transformers' Talker and ours on random shapes: hidden states, codes' logits and every gradient, fp32 to 1e-5."""

from __future__ import annotations

import random

import pytest
import torch

from models.layers.cache import KVCache
from models.layers.moe import MoE, SharedMoE
from models.talker import Talker
from tests.models import random_model as r
from tests.models import random_speech as s

TOLERANCE, BF16_TOLERANCE = 1e-5, 0.1


def relative(ours, theirs, scale=None):
    return ((ours - theirs).norm() / (theirs if scale is None else scale).norm().clamp(min=1e-6)).item()


def random_pack(seed, config):
    """Rows for both projections, codes and fractional position ids of documents; `hears` and `predicts` of frames."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    lengths = [rng.randint(3, 20) for _ in range(rng.randint(1, 3))]
    total = sum(lengths)
    rows = [torch.randn(total, config.thinker_hidden_size, generator=generator) for _ in range(2)]
    codes_GT = torch.randint(0, config.code_predictor.vocab_size, (config.num_code_groups, total), generator=generator)
    positions_3T = (torch.rand(3, total, generator=generator) * 40).round(decimals=1)
    return lengths, rows, codes_GT, positions_3T


def run(talker, rows, codes_GT, backbone, residual):
    """All outputs of either Talker: every position hears text, multimodal context and a frame, and predicts a frame."""
    text_TH, hidden_TH = rows
    embeddings = [talker.model.codec_embedding, *talker.code_predictor.model.codec_embedding]
    frames_TD = torch.stack([embed(code_T) for embed, code_T in zip(embeddings, codes_GT, strict=True)]).sum(0)
    inputs_TD = talker.text_projection(text_TH) + talker.hidden_projection(hidden_TH) + frames_TD
    hidden_TD, router_logits = backbone(inputs_TD)
    fed = [hidden_TD, *[embed(code_T) for embed, code_T in zip(embeddings[:-1], codes_GT[:-1], strict=True)]]
    return [hidden_TD, talker.codec_head(hidden_TD), residual(hidden_TD, fed), *router_logits]


def backbone_of(reference, positions_3T, lengths):
    """Transformers' backbone, each document alone."""

    def forward(inputs_TD):
        outs = [
            reference.model(
                inputs_embeds=inputs_D.unsqueeze(0),
                position_ids=ids_3T.unsqueeze(1),
                use_cache=False,
                output_router_logits=True,
            )
            for inputs_D, ids_3T in zip(inputs_TD.split(lengths), positions_3T.split(lengths, 1), strict=True)
        ]
        router = [torch.cat(layer) for layer in zip(*[out.router_logits for out in outs], strict=True)]
        return torch.cat([out.last_hidden_state[0] for out in outs]), router

    return forward


def residual_of(reference):
    def forward(hidden_TD, fed):
        predictor = reference.code_predictor
        states = predictor.model(inputs_embeds=torch.stack(fed, 1), use_cache=False).last_hidden_state
        return torch.stack([head(states[:, g + 1]) for g, head in enumerate(predictor.lm_head)], 1)

    return forward


@pytest.mark.parametrize("seed", range(24))
def test_forward_and_gradients_equal_transformers(seed):
    pytest.importorskip("transformers")
    config = s.random_talker_config(seed)
    reference = s.reference_talker(config, seed)
    ours = s.talker_like(reference, config)
    lengths, rows, codes_GT, positions_3T = random_pack(seed, config)

    def residual(hidden_TD, fed):
        return ours.code_predictor.logits(ours.residual_states(hidden_TD, codes_GT))

    got = run(ours, rows, codes_GT, lambda x: ours(x, positions_3T, lengths), residual)
    want = run(reference, rows, codes_GT, backbone_of(reference, positions_3T, lengths), residual_of(reference))
    assert len(got) == len(want) == 3 + config.text.num_hidden_layers
    generator = torch.Generator().manual_seed(seed)
    losses = [0, 0]
    for mine, theirs in zip(got, want, strict=True):
        assert relative(mine, theirs) < TOLERANCE
        probe = torch.randn(mine.shape, generator=generator)
        losses = [losses[0] + (mine * probe).sum(), losses[1] + (theirs * probe).sum()]
    for loss in losses:
        loss.backward()
    wanted = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert relative(parameter.grad, wanted[name]) < TOLERANCE, name
        assert parameter.grad.abs().sum() > 0 or "experts" in name, name
    assert set(wanted) == {name for name, _ in ours.named_parameters()}


@pytest.mark.parametrize("seed", range(4))
def test_bf16(seed):
    """Ours in bf16 against ours in fp32: within a tenth of the norm, forward and gradients of the heads."""
    config = s.random_talker_config(seed)
    ours = Talker(config)
    r.randomize(ours, seed)
    lengths, rows, codes_GT, positions_3T = random_pack(seed, config)

    def outputs():
        def residual(hidden_TD, fed):
            return ours.code_predictor.logits(ours.residual_states(hidden_TD, codes_GT))

        here = [x.to(ours.codec_head.weight.dtype) for x in rows]
        return run(ours, here, codes_GT, lambda x: ours(x, positions_3T, lengths), residual)[:3]

    with torch.no_grad():
        want = outputs()
        ours.to(torch.bfloat16)
        for mine, theirs in zip(outputs(), want, strict=True):
            assert mine.dtype is torch.bfloat16
            assert relative(mine.float(), theirs) < BF16_TOLERANCE


def test_packing_and_cache_change_nothing():
    """A document gives what it gives alone, whole or row by row after its prefill."""
    config = s.random_talker_config(3)
    talker = Talker(config)
    r.randomize(talker, 3)
    lengths, generator = (7, 5, 9), torch.Generator().manual_seed(0)
    inputs_TD = torch.randn(sum(lengths), config.text.hidden_size, generator=generator)
    positions_3T = torch.cat([torch.arange(float(n)) for n in lengths]).expand(3, -1)
    with torch.no_grad():
        whole_TD, _ = talker(inputs_TD, positions_3T, lengths)
        starts = [0, 7, 12]
        for start, length in zip(starts, lengths, strict=True):
            rows = slice(start, start + length)
            alone_TD, _ = talker(inputs_TD[rows], positions_3T[:, rows], (length,))
            torch.testing.assert_close(alone_TD, whole_TD[rows], rtol=1e-5, atol=1e-5)
        prefill = torch.cat([torch.arange(start, start + n - 2) for start, n in zip(starts, lengths, strict=True)])
        short = tuple(n - 2 for n in lengths)
        cache = KVCache(config.text.num_hidden_layers, short, 2, inputs_TD.device)
        talker(inputs_TD[prefill], positions_3T[:, prefill], short, cache)
        for step in (2, 1):
            rows = torch.tensor([start + n - step for start, n in zip(starts, lengths, strict=True)])
            cache.advance()
            hidden_ND, _ = talker(inputs_TD[rows], positions_3T[:, rows], (1, 1, 1), cache)
            torch.testing.assert_close(hidden_ND, whole_TD[rows], rtol=1e-5, atol=1e-5)


def test_no_rows_give_zero_gradients():
    config = s.random_talker_config(1)
    talker = Talker(config)
    r.randomize(talker, 1)
    none_TH = torch.empty(0, config.thinker_hidden_size)
    codes_GT = torch.empty(config.num_code_groups, 0, dtype=torch.int64)
    inputs_TD = talker.text_projection(none_TH) + talker.hidden_projection(none_TH) + talker.embed_frames(codes_GT)
    hidden_TD, router_logits = talker(inputs_TD, torch.empty(3, 0), ())
    logits = talker.code_predictor.logits(talker.residual_states(hidden_TD, codes_GT))
    (logits.sum() + talker.codec_head(hidden_TD).sum() + sum(x.sum() for x in router_logits)).backward()
    for name, parameter in talker.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_wrong_lengths_are_refused():
    config = s.random_talker_config(0)
    with pytest.raises(ValueError, match="must be positive and sum to the 4 rows"):
        Talker(config)(torch.zeros(4, config.text.hidden_size), torch.zeros(3, 4), (2, 3))


def test_only_the_talker_has_a_shared_expert():
    shape = 8, 4, 2, 6
    plain, shared = MoE(*shape), SharedMoE(*shape, shared_width=5)
    names = [name for name, _ in plain.named_parameters()]
    assert names == ["gate.weight", "experts.gate_up_proj", "experts.down_proj"]
    extra = {f"shared_expert.{part}_proj.weight" for part in ("gate", "up", "down")} | {"shared_expert_gate.weight"}
    assert {name for name, _ in shared.named_parameters()} == extra | set(names)
    r.randomize(shared, 0)
    plain.load_state_dict({name: shared.get_parameter(name) for name in names})
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    (out, logits), (routed, same_logits) = shared(x), plain(x)
    assert torch.equal(logits, same_logits)
    gate = torch.sigmoid(x @ shared.shared_expert_gate.weight.T)
    torch.testing.assert_close(out - routed, gate * shared.shared_expert(x))
