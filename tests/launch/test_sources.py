"""First weights from other models: what a source computes is what the mixture computes at the start."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.tokenizer import ROLES, load_tokenizer, train_tokenizer
from launch.arguments import guarded
from launch.convert import main
from launch.released import open_released, recipe_config
from launch.sources import initial_weights, with_tokens_of
from models.config import ConfigError, TextConfig
from models.hf import load_released, released_state
from models.init import init_weights
from models.omni import Omni
from models.omni_config import OmniConfig
from models.positions import text_audio_positions
from train.errors import CheckpointError

transformers = pytest.importorskip("transformers")


def randomize(model: Any, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.1, generator=generator).add_(1.0 if "norm" in name and "weight" in name else 0.0)
    return model.eval()


def text_config(text: TextConfig, **more: Any) -> dict[str, Any]:
    """Of a Qwen3 with the decoder's shapes."""
    rope = {"rope_type": "default", "rope_theta": text.rope_theta}
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    return {key: getattr(text, key) for key in same} | {"rope_parameters": rope, "tie_word_embeddings": False} | more


def dense(folder: Path, text: TextConfig, wide: int, **more: Any) -> Any:
    config = transformers.Qwen3Config(**text_config(text, intermediate_size=wide) | more)
    model = randomize(transformers.Qwen3ForCausalLM(config))
    model.save_pretrained(folder)
    return model


def omni(**text: int) -> OmniConfig:
    config = recipe_config("tiny")
    return replace(config, thinker=replace(config.thinker, text=replace(config.thinker.text, **text)))


def held(config: OmniConfig, **sources: Path) -> dict[str, Tensor]:
    """The initial weights as tensors."""
    given = {"text": None, "vision": None, "audio": None, **sources}
    weights, _ = initial_weights(config, 3, **given)
    return {name: weight.read(0, weight.numel).view(weight.shape) for name, weight in weights.items()}


@torch.no_grad()
def logits(config: OmniConfig, weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    model = Omni(config)
    load_released(model, weights)
    thinker = model.thinker
    hidden_TD = thinker(ids, text_audio_positions((len(ids),)), (len(ids),), torch.zeros(0, 128), ())[0]
    return thinker.lm_head(hidden_TD)


IDS = torch.arange(3, 40)


@pytest.mark.parametrize(
    ("width", "experts", "top_k", "wide"), [(96, 8, 2, 96), (96, 8, 2, 192), (32, 12, 6, 96), (24, 8, 4, 48)]
)
@torch.no_grad()
def test_a_mixture_starts_as_the_dense_model(tmp_path: Path, width: int, experts: int, top_k: int, wide: int) -> None:
    config = omni(moe_intermediate_size=width, num_experts=experts, num_experts_per_tok=top_k)
    model = dense(tmp_path / "dense", config.thinker.text, wide)
    weights = held(config, text=tmp_path / "dense")
    theirs = model(input_ids=IDS[None]).logits[0]
    torch.testing.assert_close(logits(config, weights, IDS), theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
    router = weights["thinker.model.layers.1.mlp.gate.weight"]
    assert len(router.unique(dim=0)) == experts * width // wide  # groups differ, or no token would ever choose


@torch.no_grad()
def test_a_mixture_from_a_mixture(tmp_path: Path) -> None:
    config = omni()
    text = config.thinker.text
    sizes = {"num_experts": text.num_experts, "num_experts_per_tok": text.num_experts_per_tok, "norm_topk_prob": True}
    shapes = text_config(text, moe_intermediate_size=text.moe_intermediate_size, **sizes)
    model = randomize(transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**shapes)))
    model.save_pretrained(tmp_path / "moe")
    theirs = model(input_ids=IDS[None]).logits[0]
    ours = logits(config, held(config, text=tmp_path / "moe"), IDS)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


@torch.no_grad()
def test_tied_embeddings_and_a_smaller_vocabulary(tmp_path: Path) -> None:
    config = omni()
    model = dense(tmp_path / "dense", config.thinker.text, 192, vocab_size=1000, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tmp_path / "dense/model.safetensors")
    weights = held(config, text=tmp_path / "dense")
    embed, head = weights["thinker.model.embed_tokens.weight"], weights["thinker.lm_head.weight"]
    assert torch.equal(embed, head) and torch.equal(embed[:1000], model.model.embed_tokens.weight)
    torch.testing.assert_close(embed[1000:], embed[:1000].mean(0).expand(24, -1))
    theirs = model(input_ids=IDS[None]).logits[0]
    torch.testing.assert_close(logits(config, weights, IDS)[:, :1000], theirs, rtol=1e-4, atol=1e-4)


def vision_shapes(config: OmniConfig) -> dict[str, Any]:
    vision = config.thinker.vision
    assert vision is not None
    same = ("depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size", "num_position_embeddings")
    taken = list(vision.deepstack_visual_indexes)
    return {key: getattr(vision, key) for key in same} | {"deepstack_visual_indexes": taken}


@pytest.mark.parametrize("out", [128, 64])
@torch.no_grad()
def test_the_tower_of_qwen_vl(tmp_path: Path, out: int) -> None:
    """Features are equal; in another width the trunk is kept and the mergers' last maps are fresh."""
    config = omni()
    shapes = transformers.Qwen3VLConfig(
        text_config=text_config(config.thinker.text, hidden_size=out, intermediate_size=32, vocab_size=64),
        vision_config=vision_shapes(config) | {"out_hidden_size": out},
    )
    theirs = randomize(transformers.Qwen3VLForConditionalGeneration(shapes))
    theirs.save_pretrained(tmp_path / "vl")
    model = Omni(config)
    load_released(model, held(config, vision=tmp_path / "vl"))
    grids = [(1, 4, 6), (2, 4, 4)]
    pixels_PX = torch.randn(56, 1536, generator=torch.Generator().manual_seed(0))
    ours, deepstack = model.thinker.visual(pixels_PX, grids)
    assert ours.shape == (14, 128) and ours.isfinite().all()
    tower = theirs.model.visual
    if out == 128:
        found = tower(pixels_PX, grid_thw=torch.tensor(grids))
        torch.testing.assert_close(ours, found.pooler_output, rtol=1e-4, atol=1e-4)
        for a, b in zip(deepstack, found.deepstack_features, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(model.thinker.visual.blocks[2].attn.qkv.weight, tower.blocks[2].attn.qkv.weight)
        assert torch.equal(model.thinker.visual.merger.mlp[0].weight, tower.merger.linear_fc1.weight)


@pytest.mark.parametrize("kind", ["Siglip", "Siglip2"])
@torch.no_grad()
def test_the_tower_of_siglip(tmp_path: Path, kind: str) -> None:
    """A still image gets SigLIP's embeddings at the size of its own grid; its blocks have SigLIP's weights."""
    config = omni()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    grid = {"image_size": 128, "patch_size": 16} if kind == "Siglip" else {"num_patches": 64, "patch_size": 16}
    theirs = randomize(getattr(transformers, f"{kind}VisionModel")(
        getattr(transformers, f"{kind}VisionConfig")(**sizes, **grid, hidden_act="gelu_pytorch_tanh")
    ))  # fmt: skip
    theirs.save_pretrained(tmp_path / "siglip")
    weights = held(config, vision=tmp_path / "siglip")
    model = Omni(config)
    load_released(model, weights)
    visual, inner = model.thinker.visual, getattr(theirs, "vision_model", theirs)
    image = torch.randn(3, 128, 128, generator=torch.Generator().manual_seed(0))
    patches = image.view(3, 8, 16, 8, 16)
    if kind == "Siglip":
        wanted = inner.embeddings(image[None])[0]
    else:
        flat = patches.permute(1, 3, 2, 4, 0).reshape(1, 64, -1)
        wanted = inner.embeddings(flat, torch.tensor([[8, 8]]))[0]
    pixels = patches.permute(1, 3, 0, 2, 4).unsqueeze(3).expand(-1, -1, -1, 2, -1, -1)  # [8, 8, 3, 2, 16, 16]
    blocks = pixels.reshape(4, 2, 4, 2, -1).transpose(1, 2).reshape(64, -1)
    ours = visual.patch_embed(blocks) + visual.pos_embed([(1, 8, 8)])
    order = torch.arange(64).view(4, 2, 4, 2).transpose(1, 2).reshape(-1)
    torch.testing.assert_close(ours, wanted[order], rtol=1e-4, atol=1e-4)
    layer, block = inner.encoder.layers[1], visual.blocks[1]
    stacked = torch.cat([getattr(layer.self_attn, f"{q}_proj").weight for q in "qkv"])
    assert torch.equal(block.attn.qkv.weight, stacked)
    assert torch.equal(block.attn.proj.bias, layer.self_attn.out_proj.bias)
    assert torch.equal(block.mlp.linear_fc2.weight, layer.mlp.fc2.weight)
    assert torch.equal(block.norm2.weight, layer.layer_norm2.weight)


def test_all_sources_and_the_seed_in_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = recipe_config("tiny")
    dense(tmp_path / "text", config.thinker.text, 192)
    other = Omni(config)
    init_weights(other, 9)
    tower = {name: tensor.clone() for name, tensor in released_state(other) if "audio_tower" in name}
    (tmp_path / "audio").mkdir()
    save_file(tower, tmp_path / "audio/model.safetensors")
    (tmp_path / "audio/config.json").write_text(json.dumps({"audio_config": {"encoder_attention_heads": 4}}))
    tokenizer = train_tokenizer(["one two three user system assistant"] * 9, 320)
    tokenizer.save(tmp_path / "tokens")
    sources = [f"{key}={tmp_path}/{key}" for key in ("text", "audio")]
    main(["init", f"to={tmp_path}/out", "model=tiny", *sources, f"tokenizer={tmp_path}/tokens", "seed=9"])
    printed = capsys.readouterr().out
    assert f"text: {2 * (8 * 3 + 9) + 3} tensors from {tmp_path}/text\n" in printed
    assert f"audio: {len(tower)} tensors from {tmp_path}/audio\n" in printed and "fresh: " in printed
    released = open_released(tmp_path / "out")
    assert released.config == with_tokens_of(tokenizer, config)
    assert isinstance(released.config, OmniConfig) and released.config.im_end_token_id == tokenizer.id("<|im_end|>")
    found = load_file(tmp_path / "out/model-00001-of-00001.safetensors")
    fresh = {name: tensor for name, tensor in released_state(other)}
    assert found.keys() == fresh.keys()
    text = ("thinker.model.", "thinker.lm_head.")
    assert all(torch.equal(found[n], fresh[n]) for n in fresh if not n.startswith(text))
    kept = [n for n in fresh if n.startswith(text) and torch.equal(found[n], fresh[n])]
    assert kept == []
    model, info = transformers.Qwen3OmniMoeForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3 there and 2 in the recipe"),
        ({"num_attention_heads": 2}, "num_attention_heads is 2 there and 4 in the recipe"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}}, "rope_theta is 5000000.0 there and"),
        ({"intermediate_size": 100}, "its intermediate_size (100) must be G times the recipe's moe_intermediate_size"),
        ({"intermediate_size": 288}, "with G a divisor of num_experts_per_tok (2)"),
        ({"vocab_size": 1100}, "weight has shape [1100, 128], the recipe's model needs [1024, 128]"),
    ],
)
def test_a_text_source_of_another_shape_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    dense(tmp_path / "text", recipe_config("tiny").thinker.text, 192, **change)
    capsys.readouterr()  # transformers' progress bar
    assert guarded(main, ["init", f"to={tmp_path}/out", "model=tiny", f"text={tmp_path}/text"]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1, error
    assert not (tmp_path / "out").exists()


def test_a_tower_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    config = omni()
    shapes = vision_shapes(config)
    for change, message in (
        ({"depth": 4}, "holds thinker.visual.blocks.3"),
        ({"depth": 2}, "lacks thinker.visual.blocks.2"),
        ({"num_heads": 2}, "num_heads is 2 there and 4 in the recipe"),
        ({"hidden_size": 32}, r"has shape \[.*32.*\], the recipe's model needs \[.*64.*\]"),
    ):
        folder = tmp_path / str(change)
        vl = transformers.Qwen3VLConfig(
            text_config=text_config(config.thinker.text, intermediate_size=32, vocab_size=64),
            vision_config=shapes | change,
        )
        transformers.Qwen3VLForConditionalGeneration(vl).save_pretrained(folder)
        with pytest.raises((ConfigError, CheckpointError), match=message):
            held(config, vision=folder)
    with pytest.raises(CheckpointError, match="holds no tensor conv2d1.weight"):
        held(config, audio=folder)


@pytest.mark.parametrize("word", [*ROLES, "\n"])
def test_a_talker_needs_heads_of_turns_of_three_tokens(tmp_path: Path, word: str) -> None:
    tokenizer = train_tokenizer(["one two three"] * 9, 320)
    tokenizer.save(tmp_path)
    definition = json.loads((tmp_path / "tokenizer.json").read_text())
    if word == "\n":  # as two bytes
        definition["normalizer"] = {"type": "Replace", "pattern": {"String": "\n"}, "content": "\r\n"}
    else:
        definition["added_tokens"] = [token for token in definition["added_tokens"] if token["content"] != word]
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    broken, config = load_tokenizer(tmp_path), recipe_config("tiny")
    assert len(broken.encode(word)) > 1
    with pytest.raises(ConfigError, match=re.escape(f"tokens of {word!r}, and a Talker needs one")) as caught:
        with_tokens_of(broken, config)
    assert "\n" not in str(caught.value)
    silent = with_tokens_of(broken, replace(config, talker=None, code2wav=None))
    if word != "\n":
        assert getattr(silent, f"{word}_token_id") == getattr(config, f"{word}_token_id")
