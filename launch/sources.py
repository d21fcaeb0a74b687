"""First weights of a whole model from several sources, each a local folder of safetensors.

    text=    Qwen3 or Qwen3-MoE --------------------> thinker.model, thinker.lm_head
    vision=  Qwen3-VL, Qwen3-Omni, SigLIP or SigLIP2 -> thinker.visual
    audio=   an audio encoder of this framework's ---> thinker.audio_tower
    everything else: models/init.py, by the seed

A source's configuration must be the recipe's where weights depend on it; what stays fresh is reported. Rules:

* dense to MoE: with G = intermediate_size / moe_intermediate_size, expert e is slice e mod G of the dense MLP, its
  down_proj times G, and the router's row is drawn once for each G experts in a row. These tie, so top-k always
  takes whole groups; weights sum to 1, so at the start the mixture is the dense MLP exactly. Needs G to divide
  num_experts_per_tok and num_experts (1 copies the MLP into every expert).
* a larger vocabulary: added rows, of embeddings and head alike, are the mean of the source's.
* SigLIP: q, k and v are stacked; a patch of two frames is half of one frame's twice, so that a still image gives the
  same features; the grid of positions is interpolated with its corners in place. Mergers are fresh.
* a feature width that is not the recipe's: the last map of the mergers, or of the audio encoder, is fresh.

Memory: the largest fresh parameter, plus blocks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data.tokenizer import AUDIO_PAD, VISION, Tokenizer
from launch.released import model_on_meta
from launch.weights import Weight, join, open_folder, read_json, released_weights
from models.config import ConfigError, TextConfig, VisionConfig
from models.hf import fused_name
from models.init import init_scale, init_tensor
from models.omni_config import OmniConfig
from train.errors import CheckpointError
from train.layout import joining_ids

Weights = dict[str, Weight]
TEXT, VISUAL, AUDIO = ("thinker.model.", "thinker.lm_head."), "thinker.visual.", "thinker.audio_tower."
# Names of other vision towers -> ours.
QWEN_VL = (
    (r"(merger)\.norm\.(\w+)", r"\1.ln_q.\2"),
    (r"(merger)\.linear_fc1\.(\w+)", r"\1.mlp.0.\2"),
    (r"(merger)\.linear_fc2\.(\w+)", r"\1.mlp.2.\2"),
    (r"deepstack_merger_list\.(\d+)\.norm\.(\w+)", r"merger_list.\1.ln_q.\2"),
    (r"deepstack_merger_list\.(\d+)\.linear_fc1\.(\w+)", r"merger_list.\1.mlp.0.\2"),
    (r"deepstack_merger_list\.(\d+)\.linear_fc2\.(\w+)", r"merger_list.\1.mlp.2.\2"),
    (r"((?:blocks|patch_embed|pos_embed|merger|merger_list)\..+)", r"\1"),
)
SIGLIP = (
    (r"embeddings\.patch_embedding\.(\w+)", r"patch_embed.proj.\1"),
    (r"embeddings\.position_embedding\.weight", r"pos_embed.weight"),
    (r"encoder\.layers\.(\d+)\.layer_norm([12])\.(\w+)", r"blocks.\1.norm\2.\3"),
    (r"encoder\.layers\.(\d+)\.self_attn\.out_proj\.(\w+)", r"blocks.\1.attn.proj.\2"),
    (r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(\w+)", r"blocks.\1.attn.\2.\3"),
    (r"encoder\.layers\.(\d+)\.mlp\.fc([12])\.(\w+)", r"blocks.\1.mlp.linear_fc\2.\3"),
)
_LAST_MAPS = re.compile(r"thinker\.(visual\.(merger|merger_list\.\d+)\.mlp\.2|audio_tower\.proj2)\.(weight|bias)")


def initial_weights(
    config: OmniConfig, seed: int, text: Path | None, vision: Path | None, audio: Path | None
) -> tuple[Weights, list[str]]:
    """Every tensor of the model under its released name, and lines that say where they come from.

    Raises CheckpointError or ConfigError where a source does not fit, naming the key and both values.
    """
    weights = fresh_weights(config, seed)
    report = []
    for key, prefix, folder, read in (
        ("text", TEXT, text, text_weights),
        ("vision", VISUAL, vision, visual_weights),
        ("audio", AUDIO, audio, audio_weights),
    ):
        if folder is None:
            continue
        wanted = {name: weight for name, weight in weights.items() if name.startswith(prefix)}
        if not wanted:
            raise ConfigError(f"{key}={folder}: the recipe's model has no {key} part")
        found = read(folder, config, wanted)
        fresh = _fit(found, wanted, folder)
        weights |= found
        report.append(f"{key}: {len(found)} tensors from {folder}" + (f"; fresh: {', '.join(fresh)}" if fresh else ""))
    made = [weight for weight in weights.values() if weight.source == _fresh_source(seed)]
    report.append(f"fresh: {sum(w.numel for w in made):,} parameters in {len(made)} tensors, seed {seed}")
    return weights, report


def fresh_weights(config: OmniConfig, seed: int) -> Weights:
    """models/init.py tensor by tensor: nothing is made before it is read, and one parameter at a time is kept."""
    shapes = {name: tuple(p.shape) for name, p in model_on_meta(config).named_parameters()}

    @lru_cache(maxsize=1)
    def made(name: str) -> Tensor:
        values = torch.empty(shapes[name])
        init_tensor(name, values, seed, init_scale(config, name))
        return values.view(-1)

    def read(name: str, start: int, length: int) -> Tensor:
        return made(name)[start : start + length]

    source = _fresh_source(seed)
    found = {name: Weight(shape, torch.float32, source, partial(read, name), False) for name, shape in shapes.items()}
    return released_weights(found, "")


def text_weights(folder: Path, config: OmniConfig, wanted: Mapping[str, Weight]) -> Weights:
    """Decoder and head from a text-only Qwen3 or Qwen3-MoE."""
    source, text = read_json(folder / "config.json"), config.thinker.text
    source.setdefault("num_experts", source.get("num_local_experts"))  # transformers 5
    dense = not source["num_experts"]
    _check_text(source, text, dense, folder)
    found = {name: weight for name, weight in open_folder(folder).items() if not name.endswith("inv_freq")}
    found = released_weights(found, "thinker.")
    embed, head = "thinker.model.embed_tokens.weight", "thinker.lm_head.weight"
    if source.get("tie_word_embeddings") and embed in found:
        found[head] = found[embed]
    for name in (embed, head):
        if name in found and found[name].shape[0] < text.vocab_size:
            found[name] = _grown(found[name], text.vocab_size)
    return upcycled(found, text, wanted, folder) if dense else found


def upcycled(found: Weights, text: TextConfig, wanted: Mapping[str, Weight], folder: Path) -> Weights:
    """A dense decoder as a mixture that computes the same. `wanted` has the fresh routers."""
    first = "thinker.model.layers.0.mlp.gate_proj.weight"
    if first not in found:
        raise CheckpointError(f"{folder}: lacks {first.removeprefix('thinker.')} of a dense Qwen3")
    wide, width = found[first].shape[0], text.moe_intermediate_size
    groups = wide // width
    if wide % width or text.num_experts_per_tok % groups or text.num_experts % groups:
        raise ConfigError(
            f"{folder}: its intermediate_size ({wide}) must be G times the recipe's moe_intermediate_size ({width}), "
            f"with G a divisor of num_experts_per_tok ({text.num_experts_per_tok}) and num_experts ({text.num_experts})"
        )
    out = {name: w for name, w in found.items() if not re.search(r"\.mlp\.(gate|up|down)_proj\.", name)}
    for name, weight in wanted.items():
        if place := fused_name(name):
            stem, part = name.rsplit(".experts.", 1)[0], name.split(".")[-2]
            dense = found.get(f"{stem}.{part}.weight")
            if dense is None:
                raise CheckpointError(f"{folder}: lacks {f'{stem}.{part}.weight'.removeprefix('thinker.')}")
            if part == "down_proj":
                out[name] = _columns(dense, place[1] % groups * width, width, float(groups))
            else:
                out[name] = dense.part(place[1] % groups * width * dense.shape[1], (width, dense.shape[1]))
        elif name.endswith(".mlp.gate.weight"):
            rows = [
                weight.part(e // groups * groups * weight.shape[1], weight.shape[1:]) for e in range(text.num_experts)
            ]
            out[name] = join(rows, weight.shape)
    return out


def visual_weights(folder: Path, config: OmniConfig, wanted: Mapping[str, Weight]) -> Weights:
    """The vision encoder from a Qwen3-VL or a SigLIP model."""
    found, ours = open_folder(folder), config.thinker.vision
    assert ours is not None  # there are parameters of it
    anchors = {"patch_embed.proj.weight": QWEN_VL, "embeddings.patch_embedding.weight": SIGLIP}
    prefix, table = _prefix(found, anchors, folder)
    source = _vision_section(folder)
    heads = source.get("num_heads", source.get("num_attention_heads"))
    same: dict[str, tuple[Any, Any]] = {"num_heads": (heads, ours.num_heads)}
    if table is QWEN_VL:
        taken = source.get("deepstack_visual_indexes")
        same["deepstack_visual_indexes"] = (taken, list(ours.deepstack_visual_indexes))
    _same(same, "vision", folder)
    out: Weights = {}
    for name, weight in found.items():
        if name.startswith(prefix):
            for pattern, meant in table:
                if match := re.fullmatch(pattern, name.removeprefix(prefix)):
                    out[VISUAL + match.expand(meant)] = weight
                    break
    return out if table is QWEN_VL else _from_siglip(out, ours)


def audio_weights(folder: Path, config: OmniConfig, wanted: Mapping[str, Weight]) -> Weights:
    """The audio encoder of any folder that has one under the released names, whatever the prefix."""
    found = open_folder(folder)
    prefix, _ = _prefix(found, {"conv2d1.weight": None}, folder)
    source = read_json(folder / "config.json")
    source = source.get("thinker_config", source)
    heads = source.get("audio_config", source).get("encoder_attention_heads")
    same = {"encoder_attention_heads": (heads, config.thinker.audio.encoder_attention_heads)}
    _same(same, "audio", folder)
    return {AUDIO + name.removeprefix(prefix): weight for name, weight in found.items() if name.startswith(prefix)}


def with_tokens_of(tokenizer: Tokenizer, config: OmniConfig) -> OmniConfig:
    """The model with the tokenizer's ids. Without a Talker, roles that are more than one token keep the recipe's.

    Raises ConfigError where the vocabulary is too large, or a Talker would find a head of a turn of another length.
    """
    if config.thinker.text.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"the recipe's vocab_size ({config.thinker.text.vocab_size}) is less than the tokenizer's "
            f"{tokenizer.vocab_size}"
        )
    thinker: dict[str, Any] = {"audio_token_id": tokenizer.id(AUDIO_PAD)}
    if config.thinker.vision is not None:
        thinker |= {"image_token_id": tokenizer.id(VISION[3]), "video_token_id": tokenizer.id(VISION[4])}
    changes = joining_ids(tokenizer, speaks=config.talker is not None)
    return replace(config, thinker=replace(config.thinker, **thinker), **changes)


def _fresh_source(seed: int) -> str:
    return f"models/init.py, seed {seed}"


def _fit(found: Weights, wanted: Mapping[str, Weight], folder: Path) -> list[str]:
    """Refuse tensors that do not fit; take out those that may stay fresh, and return what does."""
    for name in list(found):
        if name not in wanted:
            raise CheckpointError(f"{folder}: holds {name}, for which the recipe's model has no place")
        if found[name].shape != wanted[name].shape:
            if not _LAST_MAPS.fullmatch(name):
                raise CheckpointError(
                    f"{folder}: {name} has shape {list(found[name].shape)}, the recipe's model needs "
                    f"{list(wanted[name].shape)}"
                )
            del found[name]
    missing = [name for name in wanted if name not in found]
    mergers = all(".merger" in name for name in missing)  # what SigLIP has none of
    if missing and not mergers and not all(_LAST_MAPS.fullmatch(name) for name in missing):
        first = next(name for name in missing if ".merger" not in name and not _LAST_MAPS.fullmatch(name))
        raise CheckpointError(f"{folder}: lacks {first} and {len(missing) - 1} more that the recipe's model has")
    return sorted({re.sub(r"\.(weight|bias)$", "", name) for name in missing})


def _check_text(source: Mapping[str, Any], text: TextConfig, dense: bool, folder: Path) -> None:
    """What shapes alone do not show."""
    rope = source.get("rope_parameters") or {
        "rope_theta": source.get("rope_theta"),
        **(source.get("rope_scaling") or {}),
    }
    head_dim = source.get("head_dim") or source.get("hidden_size", 0) // (source.get("num_attention_heads") or 1)
    same: dict[str, tuple[Any, Any]] = {
        key: (source.get(key), getattr(text, key))
        for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "rms_norm_eps")
    }
    same |= {"head_dim": (head_dim, text.head_dim), "rope_theta": (rope.get("rope_theta"), text.rope_theta)}
    same |= {"rope_type": (rope.get("rope_type", "default"), "default")}
    same |= {"attention_bias": (bool(source.get("attention_bias")), False)}
    same |= {"use_sliding_window": (bool(source.get("use_sliding_window")), False)}
    if not dense:
        same |= {key: (source.get(key), getattr(text, key)) for key in ("num_experts", "num_experts_per_tok")}
        same |= {"norm_topk_prob": (source.get("norm_topk_prob"), True)}
    _same(same, "text", folder)


def _same(pairs: Mapping[str, tuple[Any, Any]], key: str, folder: Path) -> None:
    for name, (there, here) in pairs.items():
        if there != here:
            raise ConfigError(f"{key}={folder}: {name} is {there} there and {here} in the recipe; they must be equal")


def _prefix(found: Weights, anchors: Mapping[str, Any], folder: Path) -> tuple[str, Any]:
    """What stands before the names of a tower, and what belongs to the anchor that showed it."""
    for anchor, value in anchors.items():
        for name in found:
            if name == anchor or name.endswith(f".{anchor}"):
                return name.removesuffix(anchor), value
    raise CheckpointError(f"{folder}: holds no tensor {' or '.join(anchors)}: not a tower that is known here")


def _vision_section(folder: Path) -> Mapping[str, Any]:
    source = read_json(folder / "config.json")
    source = source.get("thinker_config", source)
    return source.get("vision_config", source)


def _from_siglip(found: Weights, ours: VisionConfig) -> Weights:
    out = {name: weight for name, weight in found.items() if not re.search(r"\.attn\.[qkv]\.", name)}
    for name, weight in found.items():
        if match := re.fullmatch(r"(.*\.attn)\.q\.(\w+)", name):
            parts = [found.get(f"{match[1]}.{which}.{match[2]}", weight) for which in "qkv"]
            out[f"{match[1]}.qkv.{match[2]}"] = join(parts, (3 * weight.shape[0], *weight.shape[1:]))
    patch, grid = f"{VISUAL}patch_embed.proj.weight", f"{VISUAL}pos_embed.weight"
    size, frames = ours.patch_size, ours.temporal_patch_size
    if math.prod(out[patch].shape[1:]) == ours.in_channels * size**2:
        values = out[patch].read(0, out[patch].numel).float()
        if len(out[patch].shape) == 2:  # SigLIP2's patches are rows x columns x channels
            values = values.view(-1, size, size, ours.in_channels).permute(0, 3, 1, 2)
        values = values.reshape(-1, ours.in_channels, 1, size, size)
        out[patch] = _held(values.expand(-1, -1, frames, -1, -1) / frames, out[patch])
    side = round(out[grid].shape[0] ** 0.5)
    if out[grid].shape[0] != ours.num_position_embeddings and side * side == out[grid].shape[0]:
        values = out[grid].read(0, out[grid].numel).float().view(1, side, side, -1).permute(0, 3, 1, 2)
        to = round(ours.num_position_embeddings**0.5)
        values = F.interpolate(values, size=(to, to), mode="bilinear", align_corners=True)
        out[grid] = _held(values[0].flatten(1).t(), out[grid])
    return out


def _held(values: Tensor, origin: Weight) -> Weight:
    """A small tensor in memory, made from one of a file."""
    flat = values.contiguous().view(-1)
    return Weight(tuple(values.shape), flat.dtype, origin.source, lambda start, n: flat[start : start + n], False)


def _columns(weight: Weight, first: int, width: int, factor: float) -> Weight:
    """Columns [first, first + width) of a matrix times `factor`."""
    rows, columns = weight.shape

    def read(start: int, length: int) -> Tensor:
        low, high = start // width, -(-(start + length) // width)
        block = weight.read(low * columns, (high - low) * columns).view(-1, columns)[:, first : first + width]
        return (block.float() * factor).reshape(-1)[start - low * width :][:length]

    dtype = weight.dtype if factor == 2 ** round(math.log2(factor)) else torch.float32  # a power of two loses nothing
    return Weight((rows, width), dtype, weight.source, lambda start, n: read(start, n).to(dtype))


def _grown(weight: Weight, rows: int) -> Weight:
    """More rows: each the mean of those that there are."""
    before, width = weight.shape

    @lru_cache(maxsize=1)
    def mean() -> Tensor:
        step = max(1, (1 << 22) // width)
        total = torch.zeros(width, dtype=torch.float64)
        for row in range(0, before, step):
            count = min(step, before - row)
            total += weight.read(row * width, count * width).view(-1, width).double().sum(0)
        return (total / before).to(weight.dtype)

    def read(start: int, length: int) -> Tensor:
        end, known = start + length, weight.numel
        kept = weight.read(min(start, known), max(0, min(end, known) - min(start, known)))
        at = torch.arange(max(start, known), max(end, known)) % width
        return torch.cat([kept, mean()[at]]) if len(at) else kept

    return replace(weight, shape=(rows, width), read=read)
