"""Long packs: ranks that hold one together, what is computed again in backward, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models.config import RopeScaling
from models.layers.saving import Saving, again
from tests.distributed import spawn
from tests.train import engine_cases as cases
from tests.train import long_cases
from train.config import Phase
from train.engines.build import build_engine
from train.engines.ulysses import Replica
from train.errors import EngineError
from train.loss import Part
from train.parallel import Layout, check_layout
from train.recipe import load_recipe


def assert_close(got: Any, expected: Any) -> None:
    torch.testing.assert_close(
        torch.tensor(got, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-7
    )


@pytest.fixture(scope="module")
def local() -> dict[str, Any]:
    torch.set_num_threads(1)
    engine = build_engine(cases.setup("local"))
    return {"rows": cases.train(engine, 0, cases.STEPS), "look": cases.look(engine)}


def check(found: list[dict[str, Any]], local: dict[str, Any], names: list[str]) -> None:
    for rank in found:
        for name in names:
            assert_close(rank[name]["rows"], local["rows"])
            rows, differing = rank[name]["restored"]
            assert not differing, name
            assert_close(rows, local["rows"][cases.SAVED :])
            assert_close(rank[name]["look"]["sums"], local["look"]["sums"])
    for name in names:
        if "cp2" in name and len(found) == 2:  # both ranks ask and answer all of it, and one of them counts
            for rank in found:
                assert rank[name]["look"]["answers"] == local["look"]["answers"]


def test_two_ranks_equal_local(local: dict[str, Any]) -> None:
    """Losses, balance, gradient norms, expert shares, evaluation, answers, and a restore that is bit-equal."""
    pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
    names = ["cp2, zero 2", "cp2 x ep2, zero 3, everything recomputed", "zero 3, layers, tiles"]
    found = spawn(long_cases.contract, 2, {name: long_cases.TWO[name] for name in names}, cases.STEPS, timeout=280)
    check(found, local, names)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_layout_of_two_ranks(local: dict[str, Any]) -> None:
    pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
    check(spawn(long_cases.contract, 2, long_cases.TWO, cases.STEPS, timeout=800), local, list(long_cases.TWO))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_four_ranks(local: dict[str, Any]) -> None:
    """Two replicas of two ranks, experts beside them, and four ranks that share two key-value heads."""
    pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
    check(spawn(long_cases.contract, 4, long_cases.FOUR, cases.STEPS, timeout=800), local, list(long_cases.FOUR))


@pytest.mark.parametrize(
    "engine",
    [
        {"recompute_layers": True},
        {"tiles": 3},
        {"recompute_layers": True, "offload_activations": True, "tiles": 2, "recompute": True},
    ],
    ids=str,
)
def test_recomputed_equals_kept(engine: dict[str, Any], local: dict[str, Any]) -> None:
    assert_close(cases.train(build_engine(cases.setup("local", **engine)), 0, cases.STEPS), local["rows"])


def test_a_layer_keeps_its_input_and_offloads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three maps in a row one tensor is kept, and it passes the way to the host once each way."""
    layer, moved = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)), []
    x_TD = torch.randn(5, 8, requires_grad=True)
    packed: list[torch.Size] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        packed.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out_TD = again(layer, x_TD)
    assert packed == [x_TD.shape]

    class Counted(torch.autograd.graph.save_on_cpu):
        def __init__(self, pin_memory: bool) -> None:
            super().__init__(pin_memory)
            moved.append(pin_memory)

    monkeypatch.setattr("models.layers.saving.save_on_cpu", Counted)
    again_TD = Saving(layers=True, offload=True).layer(layer, x_TD)
    assert moved == [False] and torch.equal(out_TD, again_TD)
    (grad,) = torch.autograd.grad(out_TD.sum(), x_TD)
    assert torch.equal(grad, torch.autograd.grad(again_TD.sum(), x_TD)[0])


@pytest.mark.parametrize("step", range(3))
@pytest.mark.parametrize("size", [2, 3, 4])
def test_cuts_are_the_pack(step: int, size: int) -> None:
    """Every token is somewhere once, with its label and position; padding is last, and sees nobody."""
    thinker = cases.setup("local").thinker
    for indices in ((), (2,), (0, 1, 2, 3, 4, 5, 6)):
        batch = cases.pack(step, indices)
        cut = [Replica(rank, size, thinker, None).cut(batch) for rank in range(size)]
        real = sum(part.real for _, part in cut)
        assert real == len(batch.token_ids_T) and len({len(each.token_ids_T) for each, _ in cut}) == 1
        for name, dim in (("token_ids_T", 0), ("labels_T", 0), ("position_ids_3T", 1)):
            whole = torch.cat([getattr(each, name) for each, _ in cut], dim)
            assert torch.equal(whole.narrow(dim, 0, real), getattr(batch, name))
        labels_T, ids_T = (torch.cat([getattr(each, name) for each, _ in cut]) for name in ("labels_T", "token_ids_T"))
        assert (labels_T[real:] == -100).all() and not torch.isin(ids_T[real:], torch.tensor([61, 62, 63])).any()
        assert all(sum(each.doc_lengths) == len(ids_T) and isinstance(part, Part) for each, part in cut)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cp": 3, "world": 3}, "engine.cp=3 must divide the 4 attention heads of the thinker, and divide its 2 key-v"),
        ({"cp": 2, "world": 3}, "engine.cp=2 does not divide the 3 processes"),
        ({"name": "local", "cp": 2}, "engine.cp=2 needs engine.name=deepspeed or megatron, not local"),
        ({"offload_activations": True}, "set engine.recompute_layers=true too"),
        ({"tiles": 0}, "engine.tiles=0: it must be at least 1"),
        ({"name": "megatron", "tiles": 2}, "engine.tiles=2: megatron does not; set engine.recompute=true"),
        (
            {"name": "megatron", "offload_activations": True, "recompute_layers": True},
            "engine.offload_activations=true: megatron does not",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message) as refused:
        given: dict[str, Any] = {"name": "deepspeed", **settings}
        check_layout(cases.setup("local").model, Layout(**given))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("engine", "phase", "message"),
    [
        (
            {},
            {"speech": "live"},
            "phases.all.speech=live: engine.cp=2 under deepspeed is for phases of the Thinker alone",
        ),
        ({"share_encoders": False}, {}, "engine.share_encoders=false: engine.cp=2 under deepspeed needs it"),
    ],
)
def test_what_ulysses_does_not_do(
    engine: dict[str, Any], phase: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.ranks.start", lambda device: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    setup = cases.setup("deepspeed", cp=2, **engine)
    with pytest.raises(EngineError, match=message):
        build_engine(replace(setup, phase=Phase(steps=1, **phase)))


def test_the_recipe_composes_and_builds(tmp_path: Path) -> None:
    """Four times stage2's length, an engine that can be on 64 ranks, and the released model."""
    from models.config import ThinkerConfig
    from models.thinker import Thinker

    fill = ["init=null", "data.shards=[a.tar]", "data.tokenizer=t"]
    recipe = load_recipe(["recipe=stage3", *fill])
    shorter = load_recipe(["recipe=stage2", *fill])
    assert recipe.data.sequence_length == 4 * shorter.data.sequence_length == 32_768
    tokens = [each.data.sequence_length * each.data.sequences_per_step for each in (recipe, shorter)]
    assert tokens[0] == tokens[1]
    config = ThinkerConfig(recipe.model.text, recipe.model.audio, 151675, recipe.model.vision, 151655, 151656)
    engine = recipe.engine
    layout = partial(Layout, "deepspeed", world=64, zero=engine.zero, ep=engine.ep, cp=engine.cp)
    check_layout(config, layout(recompute_layers=True, tiles=engine.tiles))
    with torch.device("meta"):
        assert sum(p.numel() for p in Thinker(config).parameters()) == 31_719_205_488
    yarn = {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 32768}
    words = [f"model.text.rope_scaling.{key}={value}" for key, value in yarn.items()]
    longer = load_recipe(["recipe=stage3", *fill, *words, "data.sequence_length=131072", "engine.cp=8"])
    assert longer.model.text.rope_scaling == RopeScaling("yarn", 4.0, 32_768)
    check_layout(config, replace(layout(), cp=8))
