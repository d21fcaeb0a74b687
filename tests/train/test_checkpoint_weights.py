"""Weights under released names: out of a checkpoint into a folder, and back in."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from launch.weights import checkpoint_weights, write_weights
from models.hf import released_pieces
from tests.train.checkpoint_helpers import SHAPES, make_state, write_steps
from train.checkpoint import CheckpointReader, WeightsReader, candidates, open_weights, verify
from train.engines import WEIGHT
from train.errors import CheckpointError


@pytest.fixture()
def reader(tmp_path: Path) -> CheckpointReader:
    write_steps(tmp_path / "run", [1])
    return CheckpointReader(verify(candidates(tmp_path / "run")[0]), released_pieces)


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "weights"
    folder.mkdir()
    return folder


def test_weights_have_released_names_shapes_and_bfloat16_values(reader: CheckpointReader, folder: Path):
    write_weights(folder, checkpoint_weights(reader), torch.bfloat16, max_file_bytes=100)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 2 and set(index["weight_map"].values()) == set(files)
    tensors = {name: tensor for file in files for name, tensor in load_file(folder / file).items()}
    assert index["metadata"]["total_size"] == 2 * sum(math.prod(shape) for shape in SHAPES.values())
    fused = make_state(1)[WEIGHT, "model.layers.0.mlp.experts.gate_up_proj"].view(3, 10, 4)
    up = tensors["thinker.model.layers.0.mlp.experts.2.up_proj.weight"]
    assert up.dtype == torch.bfloat16 and torch.equal(up, fused[2, 5:].bfloat16())
    assert not any("expert_share" in name for name in tensors)


def test_released_weights_are_read_in_the_models_coordinates(reader: CheckpointReader, folder: Path):
    write_weights(folder, checkpoint_weights(reader), None, max_file_bytes=300)
    weights = open_weights(folder, released_pieces, SHAPES)
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


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "model.bin", 7])
def test_an_index_cannot_lead_outside_its_folder(tmp_path: Path, file: object):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(CheckpointError, match="refused"):
        WeightsReader(tmp_path)


def test_a_pickle_with_the_name_of_weights_is_refused(tmp_path: Path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        WeightsReader(tmp_path)
