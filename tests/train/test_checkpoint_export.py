"""Weights under released names: out of a checkpoint, into transformers' layout, and back in."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.hf import released_pieces, to_released_config
from tests.models.helpers import tiny_config, tiny_thinker
from tests.train.checkpoint_helpers import SHAPES, make_state, write_steps
from train.checkpoint import CheckpointReader, Saver, WeightsReader, candidates, export_weights, open_weights, verify
from train.engines import WEIGHT, Fragment
from train.errors import CheckpointError


@pytest.fixture()
def reader(tmp_path: Path) -> CheckpointReader:
    write_steps(tmp_path / "run", [1])
    return CheckpointReader(verify(candidates(tmp_path / "run")[0]), released_pieces)


def test_weights_have_released_names_shapes_and_bfloat16_values(reader: CheckpointReader, tmp_path: Path):
    folder = export_weights(reader, tmp_path / "weights", {"model_type": "toy"}, max_file_bytes=100)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 2 and set(index["weight_map"].values()) == set(files)
    tensors = {name: tensor for file in files for name, tensor in load_file(folder / file).items()}
    assert index["metadata"]["total_size"] == 2 * sum(math.prod(shape) for shape in SHAPES.values())
    assert json.loads((folder / "config.json").read_text()) == {"model_type": "toy"}
    fused = make_state(1)[WEIGHT, "model.layers.0.mlp.experts.gate_up_proj"].view(3, 10, 4)
    up = tensors["thinker.model.layers.0.mlp.experts.2.up_proj.weight"]
    assert up.dtype == torch.bfloat16 and torch.equal(up, fused[2, 5:].bfloat16())
    assert not any("expert_share" in name for name in tensors)
    with pytest.raises(CheckpointError, match="exists already"):
        export_weights(reader, folder, {})


def test_released_weights_are_read_in_the_models_coordinates(reader: CheckpointReader, tmp_path: Path):
    export_weights(reader, tmp_path / "weights", {}, dtype=torch.float32, max_file_bytes=300)
    weights = open_weights(tmp_path / "weights", released_pieces, SHAPES)
    generator = torch.Generator().manual_seed(0)
    for name, shape in SHAPES.items():
        values = make_state(1)[WEIGHT, name]
        assert weights.kinds(name) == {WEIGHT}
        for _ in range(5):
            start, end = torch.randint(0, len(values) + 1, (2,), generator=generator).sort().values.tolist()
            assert torch.equal(weights.read(WEIGHT, name, shape, start, end - start), values[start:end])
    with pytest.raises(CheckpointError, match="hold no exp_avg"):
        weights.read("exp_avg", "model.norm.weight", (4,), 0, 4)
    with pytest.raises(CheckpointError, match="holds no weight thinker.model.other"):
        weights.read(WEIGHT, "model.other", (4,), 0, 4)
    with pytest.raises(CheckpointError, match=r"has shape \[4\], the model wants \[8\]"):
        weights.read(WEIGHT, "model.norm.weight", (8,), 0, 8)


def test_weights_come_from_a_run_a_checkpoint_or_a_single_file(reader: CheckpointReader, tmp_path: Path):
    name, shape = "model.norm.weight", (4,)
    values = make_state(1)[WEIGHT, name]
    for path in (tmp_path / "run", tmp_path / "run/checkpoints/step-00000001"):
        assert torch.equal(open_weights(path, released_pieces).read(WEIGHT, name, shape, 0, 4), values)
    single = tmp_path / "single"
    single.mkdir()
    save_file({f"thinker.{name}": values.bfloat16()}, single / "model.safetensors")
    found = open_weights(single, released_pieces).read(WEIGHT, name, shape, 1, 2)
    assert found.dtype == torch.float32 and torch.equal(found, values[1:3].bfloat16().float())
    with pytest.raises(CheckpointError, match="nothing to read weights from"):
        open_weights(tmp_path)


def test_transformers_loads_what_a_saved_thinker_exports(tmp_path: Path):
    from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as modeling

    config = tiny_config()
    thinker = tiny_thinker(3, config)
    with Saver(tmp_path / "run", rank=0, world=1, launch_id="a", released_pieces=released_pieces) as saver:
        named = [(name, p.detach()) for name, p in thinker.named_parameters()]
        fragments = [Fragment(n, tuple(p.shape), 0, p.numel(), {WEIGHT: p.view(-1)}) for n, p in named]
        saver.save(1, fragments, {"identity": {}})
    reader = CheckpointReader(verify(candidates(tmp_path / "run")[0]), released_pieces)
    folder = export_weights(reader, tmp_path / "weights", to_released_config(config), dtype=torch.float32)
    theirs = modeling.Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(folder).eval()
    ids = torch.arange(10, 40)
    positions = torch.arange(30.0).expand(3, 30)
    with torch.no_grad():
        hidden_TD, _ = thinker(ids, positions, (30,), torch.zeros(0, 128), ())
        logits = theirs(input_ids=ids[None], attention_mask=torch.ones(1, 30, dtype=torch.int64)).logits[0]
    assert torch.allclose(thinker.lm_head(hidden_TD), logits, atol=1e-4)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "model.bin", 7])
def test_an_index_cannot_lead_outside_its_folder(tmp_path: Path, file: object):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(CheckpointError, match="refused"):
        WeightsReader(tmp_path)


def test_a_pickle_with_the_name_of_weights_is_refused(tmp_path: Path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        WeightsReader(tmp_path)
