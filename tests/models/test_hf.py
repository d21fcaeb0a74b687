"""Released names: our flat memory and their tensors, both ways."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.config import ConfigError
from models.hf import (
    fused_name,
    load_released,
    released_name,
    released_pieces,
    released_shapes,
    released_state,
    released_tensors,
)
from models.hf_config import omni_to_released, to_released_config
from models.init import init_weights
from models.omni import Omni
from models.thinker import Thinker
from tests.models import helpers as h
from tests.models.test_hf_config import random_whole

FUSED = "model.layers.0.mlp.experts.gate_up_proj", (3, 8, 5)


@given(st.integers(0, 120), st.integers(0, 120), st.sampled_from([FUSED, ("model.norm.weight", (120,))]))
def test_pieces_tile_any_range(start, length, parameter):
    name, shape = parameter
    length = min(length, 120 - start)
    pieces = released_pieces(name, shape, start, length)
    assert sum(piece[4] for piece in pieces) == length and all(piece[4] > 0 for piece in pieces)
    assert [piece[3] for piece in pieces] == [sum(p[4] for p in pieces[:i]) for i in range(len(pieces))]
    ours = torch.arange(120).view(shape)
    for released, released_shape, begin, offset, count in pieces:
        theirs = ours
        if name == FUSED[0]:
            expert, part = released.split(".")[-3:-1]
            gate, up = ours[int(expert)].chunk(2)
            theirs = gate if part == "gate_proj" else up
        assert tuple(theirs.shape) == released_shape
        assert torch.equal(theirs.flatten()[begin : begin + count], ours.flatten()[start + offset :][:count])


def test_names_of_the_released_checkpoint():
    shapes = released_shapes(Thinker(h.tiny_config()))
    assert shapes["thinker.model.layers.1.mlp.experts.7.up_proj.weight"] == (24, 32)
    assert shapes["thinker.model.layers.1.mlp.experts.7.down_proj.weight"] == (32, 24)
    assert shapes["thinker.model.layers.0.mlp.gate.weight"] == (8, 32)
    assert shapes["thinker.model.layers.0.self_attn.q_norm.weight"] == (16,)
    assert shapes["thinker.audio_tower.layers.0.self_attn.out_proj.bias"] == (16,)
    assert shapes["thinker.lm_head.weight"] == (64, 32)


def test_state_round_trip():
    first, second = h.tiny_thinker(0), h.tiny_thinker(1)
    load_released(
        second, {name: tensor.clone() for name, tensor in released_state(first)} | {"talker.x": torch.ones(1)}
    )
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"thinker.model.norm.weight": None}, "lack thinker.model.norm.weight and 0 more"),
        ({"thinker.model.layers.2.mlp.gate.weight": torch.ones(8, 32)}, "hold thinker.model.layers.2.mlp.gate.weight"),
        (
            {"thinker.model.norm.weight": torch.ones(31)},
            r"norm.weight with shape \(31,\), but this model needs \(32,\)",
        ),
    ],
)
def test_weights_of_another_model_are_refused_untouched(change, message):
    thinker = h.tiny_thinker(0)
    before = [p.clone() for p in thinker.parameters()]
    tensors = {name: torch.zeros_like(tensor) for name, tensor in released_state(thinker)} | change
    with pytest.raises(ConfigError, match=message):
        load_released(thinker, {name: t for name, t in tensors.items() if t is not None})
    assert all(torch.equal(a, b) for a, b in zip(before, thinker.parameters(), strict=True))


@torch.no_grad()
def test_transformers_loads_what_we_write(tmp_path):
    """A folder of our weights and config.json, opened by transformers' own from_pretrained, speaks as ours does."""
    modeling = pytest.importorskip("transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe")
    from safetensors.torch import save_file

    ours = h.tiny_thinker(3)
    state = {name: tensor.contiguous() for name, tensor in released_state(ours)}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(to_released_config(ours.config)))
    theirs = modeling.Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(tmp_path)
    arguments = h.pack(torch.Generator().manual_seed(0), [h.document(torch.Generator().manual_seed(0), 8, (230,))])
    ids = arguments.token_ids_T[None]
    out = theirs(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        input_features=arguments.mel_FM.T[None],
        feature_attention_mask=torch.ones(1, 230, dtype=torch.long),
    )
    torch.testing.assert_close(ours.lm_head(ours(*arguments)[0]), out.logits[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_every_parameter_of_every_module_has_its_released_name(seed, tmp_path):
    """What transformers writes of the whole model is what ours is made of: names and shapes, none more, none less."""
    modeling = pytest.importorskip("transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe")
    from safetensors import safe_open
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeConfig

    config = random_whole(seed)
    theirs = modeling.Qwen3OmniMoeForConditionalGeneration(Qwen3OmniMoeConfig(**omni_to_released(config)))
    theirs.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    with torch.device("meta"):
        ours = Omni(config)
    assert released_shapes(ours) == saved
    in_memory = {released_name(name): tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    assert in_memory == {name: tuple(parameter.shape) for name, parameter in ours.named_parameters()}


def test_names_go_both_ways():
    with torch.device("meta"):
        ours = Omni(random_whole(0))
    for name, parameter in ours.named_parameters():
        tensors = released_tensors(name, tuple(parameter.shape))
        if len(tensors) == 1:
            assert tensors == [(name, tuple(parameter.shape))] and fused_name(name) is None
        else:
            places = [fused_name(released) for released, _ in tensors]
            assert {place[0] for place in places} == {name} and places == sorted(places)


def test_parts_load_by_themselves():
    first, second = Omni(random_whole(2)), Omni(random_whole(2))
    init_weights(first, 0)
    init_weights(second, 1)
    state = {name: tensor.clone() for name, tensor in released_state(first)}
    load_released(second.talker, state, "talker.")
    load_released(second.code2wav, state, "code2wav.")
    assert all(torch.equal(a, b) for a, b in zip(first.talker.parameters(), second.talker.parameters(), strict=True))
    assert not torch.equal(first.thinker.lm_head.weight, second.thinker.lm_head.weight)
    load_released(second, state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    del state["code2wav.code_embedding.weight"]
    load_released(second.talker, state, "talker.")
    with pytest.raises(ConfigError, match="lack code2wav.code_embedding.weight and 0 more"):
        load_released(second, state)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"mrope_section": (24, 20, 20)}, r"such as \(4, 2, 2\); not \(24, 20, 20\)"),
        ({"num_experts_per_tok": 9}, r"num_experts_per_tok \(9\) must not exceed num_experts \(8\)"),
        ({"num_attention_heads": 3}, r"must be a multiple of num_key_value_heads \(2\)"),
        ({"head_dim": 15}, "head_dim must be even"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be above 0"),
    ],
)
def test_shapes_that_do_not_fit(change, message):
    with pytest.raises(ConfigError, match=message):
        h.tiny_config(**change)
