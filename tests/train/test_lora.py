"""Adapters: the arithmetic, which parameters learn, every engine, and peft's format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.hf import full_name
from models.init import init_weights
from models.layers.experts import Experts, experts
from models.lora import LoraExperts, LoraLinear, delta, init_lora, is_lora, targets_of
from models.thinker import Thinker
from tests.distributed import spawn
from tests.train import engine_cases as cases
from tests.train import lora_cases
from train.adapter import open_adapter, peft_config, peft_tensors
from train.config import Phase
from train.engines import MOMENTS, WEIGHT
from train.engines.build import build_engine
from train.errors import CheckpointError, EngineError, RecipeError
from train.folder_weights import Weight
from train.lora import LoraState, targets_in
from train.lora_config import LoraConfig


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fill(module: nn.Module) -> None:
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.copy_(0.3 * random(*parameter.shape, seed=index))


def test_a_linear_map_is_the_merged_one() -> None:
    lora = LoraLinear(nn.Linear(12, 7), rank=3, scale=0.5)
    fill(lora)
    a, b = lora.lora_A.weight.detach(), lora.lora_B.weight.detach()
    merged = lora.weight + 0.5 * b @ a
    x = random(5, 12, seed=99)
    torch.testing.assert_close(lora(x), F.linear(x, merged, lora.bias), rtol=1e-5, atol=1e-6)
    flat = (0.5 * b @ a).flatten()
    assert all(torch.allclose(delta(a, b, 0.5, at, n), flat[at : at + n]) for at, n in ((0, 84), (13, 30), (83, 1)))


@pytest.mark.parametrize("names", [("gate_up_proj", "down_proj"), ("down_proj",), ("gate_up_proj",)])
@pytest.mark.parametrize("recompute", [False, True])
def test_experts_are_the_merged_ones(names: tuple[str, ...], recompute: bool) -> None:
    """Forward and gradients, with an expert that nobody chooses and with no tokens at all."""
    lora = LoraExperts(Experts(5, 8, 6, recompute), names, rank=2, scale=1.5)
    fill(lora)
    for name, parameter in lora.named_parameters():
        parameter.requires_grad_(is_lora(f"x.{name}"))
    chosen_TK = torch.tensor([[0, 1], [2, 0], [3, 1], [0, 3]])
    x_TD, weight_TK = random(4, 8, seed=50).requires_grad_(), random(4, 2, seed=51).softmax(-1)
    merged = {}
    for name in ("gate_up_proj", "down_proj"):
        a, b = getattr(lora, f"{name}_lora_A"), getattr(lora, f"{name}_lora_B")
        base = getattr(lora, name)
        merged[name] = base if a is None else base + 1.5 * torch.einsum("eyr,erx->eyx", b, a)
    out = lora(x_TD, chosen_TK, weight_TK)
    expected = experts(x_TD, merged["gate_up_proj"], merged["down_proj"], chosen_TK, weight_TK)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    learn = [x_TD, *(parameter for parameter in lora.parameters() if parameter.requires_grad)]
    aim = random(4, 8, seed=52)
    ours, theirs = (torch.autograd.grad((each * aim).sum(), learn, retain_graph=True) for each in (out, expected))
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    none = lora(x_TD[:0], chosen_TK[:0], weight_TK[:0]).sum()
    assert all(not grad.any() for grad in torch.autograd.grad(none, learn[1:]))


def thinker(lora: bool = True) -> nn.Module:
    setup = lora_cases.setup("local") if lora else cases.setup("local")
    return setup.build_objective().model


def test_only_adapters_learn_and_the_base_keeps_its_names_and_values() -> None:
    adapted, base = thinker(), thinker(lora=False)
    own = {name: p for name, p in adapted.named_parameters() if is_lora(name)}
    rest = {name: p for name, p in adapted.named_parameters() if not is_lora(name)}
    assert [name for name, _ in base.named_parameters()] == list(rest)
    assert all(torch.equal(rest[name], p) for name, p in base.named_parameters())
    assert all(p.requires_grad for p in own.values()) and not any(p.requires_grad for p in rest.values())
    assert len(own) == 2 * len(list(targets_of(base)))
    ends = {name.rsplit("layers.0.", 1)[-1] for name in own if name.startswith("model.layers.0.")}
    assert {"self_attn.q_proj.lora_A.weight", "mlp.experts.gate_up_proj_lora_B", "mlp.experts.down_proj_lora_A"} <= ends
    assert not any(p.any() for name, p in own.items() if "lora_B" in name)
    assert targets_in(list(own)) == [name[: -len(".lora_A")] for name in _stems(own)]


def _stems(own: Any) -> list[str]:
    return [name.removesuffix(".weight") for name in own if "lora_A" in name]


def test_first_values_follow_from_seed_and_name() -> None:
    one, two = torch.empty(4, 16), torch.empty(4, 16)
    init_lora("thinker.model.layers.0.self_attn.q_proj.lora_A.weight", one, 0)
    init_lora("model.layers.0.self_attn.q_proj.lora_A.weight", two, 0)
    assert torch.equal(one, two) and one.abs().max() <= 0.25 < 1.5 * one.abs().max()
    init_lora("model.layers.0.self_attn.q_proj.lora_A.weight", two, 1)
    assert not torch.equal(one, two)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lora")


@pytest.fixture(scope="module")
def local(folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    engine = build_engine(lora_cases.setup("local"))
    before = cases.gather(engine)
    rows = cases.run(engine, str(folder), "lora")
    return {"rows": rows, "before": before, "last": cases.gather(engine)}


def test_a_step_moves_adapters_alone_and_keeps_moments_of_them_alone(local: dict[str, Any]) -> None:
    before, last = local["before"], local["last"]
    for key, tensor in last.items():
        kind, name = key.split("|")
        if kind == WEIGHT:
            assert torch.equal(tensor, before[key]) != is_lora(name), name
        assert kind not in MOMENTS or is_lora(name), key


def test_resume_is_exact(local: dict[str, Any], folder: Path) -> None:
    engine = build_engine(lora_cases.setup("local"))
    engine.restore(cases.load(str(folder), "lora-saved"), optimizer_step=cases.SAVED)
    assert cases.train(engine, cases.SAVED, cases.STEPS) == local["rows"][cases.SAVED :]
    got = cases.gather(engine)
    assert got.keys() == local["last"].keys() and all(torch.equal(got[key], local["last"][key]) for key in got)


@pytest.mark.slow
def test_zero_stages_equal_local(local: dict[str, Any], folder: Path) -> None:
    pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
    ranks = spawn(lora_cases.two_processes, 2, str(folder), timeout=240)
    for found in ranks:
        for zero in lora_cases.STAGES:
            for got, want in ((found[str(zero)]["rows"], local["rows"]),
                              (found[str(zero)]["after"], local["rows"][cases.SAVED :])):  # fmt: skip
                torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=2e-5, atol=1e-6)
    for zero in lora_cases.STAGES:
        got = cases.load(str(folder), f"lora{zero}-last")
        assert got.keys() == local["last"].keys()
        for key, want in local["last"].items():
            assert (got[key] - want).norm() < 2e-5 * want.norm() + 1e-6, (zero, key)


def test_bf16_trains_fp32_masters() -> None:
    engine = build_engine(lora_cases.setup("local", precision="bf16"))
    rows = cases.train(engine, 0, 2)
    assert all(torch.isfinite(torch.tensor(row)).all() for row in rows)
    last = cases.gather(engine)
    learnt = [key for key in last if "lora_B" in key and key.startswith(WEIGHT) and last[key].any()]
    assert learnt


@pytest.mark.parametrize(
    ("setup", "error", "message"),
    [
        (lora_cases.setup("megatron"), EngineError, "engine.name=megatron has no adapters: leave lora out"),
        (lora_cases.setup("deepspeed", ep=2), EngineError, "engine.ep=2: adapters of experts are not sharded"),
        (lora_cases.setup("local", targets=["thinker.model.layrs.*"]), RecipeError, "no linear map and no experts fit"),
        (
            replace(lora_cases.setup("local", targets=["thinker.visual.*"]), phase=Phase(1, train=["model.*"])),
            RecipeError,
            "phases.all: of what train and freeze leave, nothing has an adapter",
        ),
    ],
)
def test_what_cannot_be_is_one_line(setup: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        build_engine(setup)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("settings", [{"rank": 0}, {"alpha": 0.0}, {"targets": []}])
def test_settings_of_adapters_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        LoraConfig(**settings)


def test_scale() -> None:
    assert LoraConfig(rank=16, alpha=32.0).scale == 2.0 and LoraConfig(rank=16, alpha=32.0, rslora=True).scale == 8.0


def write_adapter(folder: Path, targets: list[str], **config: Any) -> dict[str, Tensor]:
    """An adapter of the tiny model with random values, in peft's format; its parameters by released names."""
    import json

    from safetensors.torch import save_file

    setup = lora_cases.setup("local", targets=targets)
    model = setup.build_objective().model
    fill(model)
    own = {full_name(name): p.detach() for name, p in model.named_parameters() if is_lora(name)}
    folder.mkdir()
    save_file(peft_tensors(own, bare=False), folder / "adapter_model.safetensors")
    settings = peft_config(targets_in(list(own)), 4, 8.0, False, bare=False) | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return own


@pytest.mark.parametrize(
    "targets",
    [
        lora_cases.EVERYTHING,
        ["thinker.model.layers.*.mlp.experts.down_proj"],
        ["thinker.model.layers.1.mlp.experts.gate_up_proj", "thinker.model.layers.0.self_attn.q_proj"],
    ],
)
def test_peft_format_out_and_in(tmp_path: Path, targets: list[str]) -> None:
    own = write_adapter(tmp_path / "a", targets)
    found = open_adapter(tmp_path / "a")
    assert (found.rank, found.alpha, found.rslora) == (4, 8.0, False) and set(found.targets) == set(
        targets_in(list(own))
    )
    assert found.weights.keys() == own.keys()
    for name, tensor in own.items():
        weight = found.weights[name]
        assert weight.shape == tuple(tensor.shape) and torch.equal(weight.read(0, weight.numel), tensor.flatten()), name


class Nothing:
    step = 0

    def kinds(self, name: str) -> frozenset[str]:
        return frozenset()

    def read(self, kind: str, name: str, shape: Sequence[int], start: int, length: int) -> Tensor:
        raise AssertionError("the base is not asked for adapters")


def test_what_a_run_starts_from_an_adapter(tmp_path: Path) -> None:
    """Given adapters by the folder, others by their first values, in ranges."""
    own = write_adapter(tmp_path / "a", ["thinker.model.layers.0.*"])
    state = LoraState(Nothing(), LoraConfig(rank=4, alpha=8.0, adapter=str(tmp_path / "a")), seed=0)
    name = "model.layers.0.mlp.experts.gate_up_proj_lora_B"
    whole = own[f"thinker.{name}"]
    got = torch.cat([state.read(WEIGHT, name, whole.shape, at, 8) for at in range(0, whole.numel(), 8)])
    assert torch.equal(got, whole.flatten())
    other = "model.layers.1.self_attn.q_proj.lora_A.weight"
    drawn = torch.empty(4, 32)
    init_lora(other, drawn, 0)
    assert torch.equal(state.read(WEIGHT, other, (4, 32), 0, 128), drawn.flatten())
    with pytest.raises(CheckpointError, match="the model wants"):
        state.read(WEIGHT, "model.layers.0.self_attn.q_proj.lora_A.weight", (8, 32), 0, 1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA is read"),
        ({"use_dora": True}, "use_dora is True, which is not supported"),
        ({"bias": "all"}, "bias is all, which is not supported"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is"),
        ({"r": 3}, "which is not of r=3"),
        ({"lora_alpha": None}, "r and lora_alpha must be above 0"),
    ],
)
def test_a_bad_adapter_is_one_line(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    write_adapter(tmp_path / "a", ["thinker.model.layers.*.self_attn.*"], **config)
    with pytest.raises(CheckpointError) as caught:
        open_adapter(tmp_path / "a")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_an_adapter_without_its_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="adapter_config.json: no such file"):
        open_adapter(tmp_path / "none")
    write_adapter(tmp_path / "a", ["thinker.model.layers.*.self_attn.*"])
    (tmp_path / "a/adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no adapter_model.safetensors"):
        open_adapter(tmp_path / "a")


def test_weights_of_the_thinker_are_untouched_by_adapters() -> None:
    """The model without adapters and the one with fresh ones say the same."""
    plain, adapted = thinker(lora=False), thinker()
    assert isinstance(plain, Thinker)
    init_weights(plain, 0)
    batch = cases.pack(0, (1, 3, 4))
    arguments = batch.token_ids_T, batch.position_ids_3T, batch.doc_lengths, batch.mel_FM, batch.mel_lengths
    with torch.no_grad():
        outs = [m(*arguments, pixels_PX=batch.pixels_PX, grids=batch.grids)[0] for m in (plain, adapted)]
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)


def test_ranges_of_one_weight_merge_like_the_whole() -> None:
    from launch.adapters import merged

    def held(tensor: Tensor) -> Weight:
        flat = tensor.flatten()
        return Weight(tuple(tensor.shape), tensor.dtype, "memory", lambda start, length: flat[start : start + length])

    a, b, base = random(3, 2, 5, seed=1), random(3, 8, 2, seed=2), random(3, 8, 5, seed=3)
    stem = "thinker.model.layers.0.mlp.experts"
    names = [f"{stem}.{e}.{part}.weight" for e in range(3) for part in ("gate_proj", "up_proj")]
    weights = dict(zip(names, (held(each) for each in base.view(6, 4, 5)), strict=True))
    target = f"{stem}.gate_up_proj"
    out = merged(weights, {f"{target}_lora_A": held(a), f"{target}_lora_B": held(b)}, 0.5)
    whole = (base + 0.5 * b @ a).view(6, 20)
    for index, name in enumerate(names):
        parts = torch.cat([out[name].read(at, 7) if at < 14 else out[name].read(14, 6) for at in (0, 7, 14)])
        torch.testing.assert_close(parts, whole[index])
    with pytest.raises(CheckpointError, match="not at all"):
        merged({}, {f"{target}_lora_A": held(a), f"{target}_lora_B": held(b)}, 0.5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_on_a_gpu_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    """torch's grouped GEMM against a loop over the experts, forward and gradients, with an expert without rows."""
    found = []
    for device in ("cpu", "cuda"):
        lora = LoraExperts(Experts(5, 64, 32), ("gate_up_proj", "down_proj"), rank=8, scale=0.5)
        fill(lora)
        lora = lora.to(device, dtype)
        x_TD = random(40, 64, seed=50).to(device, dtype).requires_grad_()
        chosen_TK = torch.tensor([[i % 3, 3] for i in range(40)], device=device)
        weight_TK = random(40, 2, seed=51).softmax(-1).to(device)
        out = lora(x_TD, chosen_TK, weight_TK)
        grads = torch.autograd.grad(out.float().square().sum(), [x_TD, *lora.parameters()])
        found.append([each.float().cpu() for each in (out, *grads)])
    for one, two in zip(*found, strict=True):
        assert (one - two).norm() < (1e-4 if dtype is torch.float32 else 3e-2) * one.norm() + 1e-6
