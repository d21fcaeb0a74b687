"""Initial weights: every tensor named, the statistics meant, the same values for the same seed."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.audio_decoder import AudioDecoder
from models.code2wav import Code2Wav
from models.config import AudioDecoderConfig
from models.init import RULES, TEXT_GAIN, init_weights
from models.omni import Omni
from models.positions import text_audio_positions
from models.talker import Talker
from models.thinker import Thinker
from tests.models import helpers as h
from tests.models.test_hf_config import random_whole


def initialised(seed, **text):
    thinker = Thinker(h.tiny_config(**text))
    for parameter in thinker.parameters():
        nn.init.constant_(parameter, float("nan"))  # what is left unset shows
    init_weights(thinker, seed)
    return thinker


def test_every_tensor_has_the_statistics_meant():
    thinker = initialised(0, hidden_size=128, num_experts=32)
    for name, p in thinker.state_dict().items():
        if "norm" in name or name.endswith("ln_post.weight") or name.endswith("bias"):
            assert bool((p == (0.0 if name.endswith("bias") else 1.0)).all()), name
            continue
        std = thinker.config.text.initializer_range
        if "conv2d" in name:
            std = math.sqrt(2 / p[0].numel())
        elif name.startswith("audio_tower"):
            std = p.shape[1] ** -0.5
        sampling = 5 / math.sqrt(p.numel())
        assert p.std() == pytest.approx(std, rel=max(0.02, sampling)), name
        assert abs(p.mean()) < sampling * std, name


def whole(seed, **scales):
    """Wide enough for its statistics to show."""
    config = random_whole(1)
    text = replace(config.thinker.text, vocab_size=512, **scales)
    talker_text = replace(config.talker.text, vocab_size=1100, **scales)
    code2wav = replace(config.code2wav, hidden_size=64, decoder_dim=128, upsample_rates=(8, 5, 4, 3))
    talker = replace(config.talker, text=talker_text)
    config = replace(config, thinker=replace(config.thinker, text=text), talker=talker, code2wav=code2wav)
    model = Omni(config)
    for parameter in model.parameters():
        nn.init.constant_(parameter, float("nan"))
    init_weights(model, seed)
    return model


def test_rules_are_all_used_and_none_overlaps():
    names = [name.removeprefix("thinker.") for name, _ in whole(0).named_parameters()]
    decoder = AudioDecoder(AudioDecoderConfig(16, 1, 2, 16, tie_word_embeddings=False), 64, 16)
    names += [name for name, _ in decoder.named_parameters("audio_decoder")]
    assert all(any(re.fullmatch(pattern, name) for name in names) for pattern, _ in RULES)
    assert all(sum(bool(re.fullmatch(pattern, name)) for pattern, _ in RULES) == 1 for name in names)


def test_every_parameter_of_the_whole_model_is_set():
    model = whole(3)
    special = {"alpha": 0.0, "beta": 0.0, "gamma": 1e-6, "scale": model.config.code2wav.layer_scale_initial_scale}
    for name, p in model.named_parameters():
        last = name.rsplit(".", 1)[-1]
        if last in special or last == "bias":
            assert bool((p == torch.tensor(special.get(last, 0.0))).all()), name
        elif "norm" in name or "ln_" in name:
            assert bool((p == 1.0).all()), name
        elif name == "talker.text_projection.linear_fc2.weight":
            assert p.std().item() == pytest.approx(TEXT_GAIN / math.sqrt(p.shape[1]), rel=0.1)
        else:
            assert bool(p.isfinite().all()) and 1e-3 < p.std() < 1.5, name


def test_a_part_starts_the_same_alone_and_in_the_whole():
    model = whole(4)
    for part, module in (("thinker", Thinker), ("talker", Talker), ("code2wav", Code2Wav)):
        alone = module(getattr(model.config, part))
        init_weights(alone, 4)
        found = dict(getattr(model, part).named_parameters())
        assert all(torch.equal(p, found[name]) for name, p in alone.named_parameters())


@pytest.mark.parametrize("initializer_range", [0.02, 0.2])
def test_the_talker_hears_text_beside_frames(initializer_range):
    """Text much more quiet than the frame it is added to is learnt late: unseen sentences are misread."""
    model = whole(6, initializer_range=initializer_range)
    codes_GN = torch.arange(50).repeat(model.talker.config.num_code_groups, 1) % 16
    with torch.no_grad():
        text_ND = model.talker.text_projection(model.thinker.model.embed_tokens.weight[:50])
        frames_ND = model.talker.embed_frames(codes_GN)
    assert 1.0 < text_ND.std() / frames_ND.std() < 4.0


@pytest.mark.parametrize("initializer_range", [0.02, 0.2])
def test_every_head_starts_at_the_loss_of_a_uniform_guess(initializer_range):
    """ln of its vocabulary, to 5 %, whatever the decoder's initial range."""
    model = whole(5, initializer_range=initializer_range)
    thinker, talker = model.thinker, model.talker
    generator = torch.Generator().manual_seed(0)

    def guess(high, *size):
        return torch.randint(20, high, size, generator=generator)

    N = 400
    positions_3T = text_audio_positions((N,))
    inputs_ND = torch.randn(N, talker.config.text.hidden_size, generator=generator)
    codes_GN = guess(talker.config.code_predictor.vocab_size + 20, talker.config.num_code_groups, N) - 20
    with torch.no_grad():
        read_ND = thinker(guess(512, N), positions_3T, (N,), torch.zeros(0, 128), ())[0]
        spoken_ND = talker(inputs_ND, positions_3T, (N,))[0]
        residual_NRD = talker.residual_states(spoken_ND, codes_GN)
        heads = {"lm_head": thinker.lm_head(read_ND), "codec_head": talker.codec_head(spoken_ND)}
        logits_NRV = talker.code_predictor.logits(residual_NRD)
        heads |= {f"residual head {index}": logits_NV for index, logits_NV in enumerate(logits_NRV.unbind(1))}
    assert len(heads) == 1 + talker.config.num_code_groups
    for name, logits_NV in heads.items():
        vocabulary = logits_NV.shape[1]
        target_N = torch.randint(vocabulary, (N,), generator=generator)
        assert F.cross_entropy(logits_NV, target_N).item() == pytest.approx(math.log(vocabulary), rel=0.05), name


def test_a_fresh_voice_is_heard_and_does_not_clip():
    model = whole(6)
    codes = torch.randint(model.config.code2wav.codebook_size, (2, model.config.code2wav.num_quantizers, 20))
    with torch.no_grad():
        wave = model.code2wav(codes)
    assert 1e-3 < wave.std() < 0.3 and (wave.abs() >= 1).float().mean() < 0.01


def test_signal_survives_the_vision_encoder():
    visual = whole(7).thinker.visual
    config = visual.config
    merge = config.spatial_merge_size
    grids = [(1, 4 * merge, 6 * merge), (2, 2 * merge, 2 * merge)]
    pixels_PX = torch.randn(sum(t * h * w for t, h, w in grids), config.patch_dim)
    features_TD, deepstack = visual(pixels_PX, grids)
    for found in (features_TD, *deepstack):
        assert 0.05 < found.std(0).mean() < 20


def test_an_unknown_tensor_is_an_error():
    thinker = Thinker(h.tiny_config())
    thinker.model.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"0 initialisation rules name the parameter model\.extra\.weight"):
        init_weights(thinker, 0)


def test_seed_decides_and_depth_does_not():
    a, b, c = initialised(7), initialised(7, num_hidden_layers=3), initialised(8)
    deeper = dict(b.named_parameters())
    assert all(torch.equal(p, deeper[name]) for name, p in a.named_parameters())
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)
    layers = a.model.layers
    assert not torch.equal(layers[0].self_attn.q_proj.weight, layers[1].self_attn.q_proj.weight)


def test_signal_survives_the_encoder():
    """Features of a fresh encoder differ between sounds: std near the decoder's embeddings' order, not vanishing."""
    thinker = initialised(0)
    features_TD = thinker.audio_tower(torch.randn(500, 128), (200, 300))
    assert 0.05 < features_TD.std(0).mean() < 20
