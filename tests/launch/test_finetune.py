"""Finetuning as docs/finetune.md has it: conversations to shards, a released folder to a run, and to transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe")

from launch.arguments import guarded
from launch.convert import main as convert
from launch.loading import load_model
from launch.run_engine import omni_of, open_run
from models.hf import released_pieces, released_state
from models.lora import is_lora
from tests.launch.finetune_kit import finetune, load, logits, modeling, write_chats, write_released
from tests.run_kit import losses
from train.checkpoint import CheckpointReader, choose
from train.engines import MOMENTS, WEIGHT
from train.folder_weights import open_folder

IDS = list(range(5, 40))
LORA = ("lora.rank=4", "lora.targets=[thinker.model.layers.*,thinker.audio_tower.*,thinker.visual.*]")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finetune")


@pytest.fixture(scope="module")
def base(root: Path) -> Path:
    return write_released(root / "base")


@pytest.fixture(scope="module")
def shards(root: Path, base: Path) -> Path:
    return write_chats(root / "chats", base)


@pytest.fixture(scope="module")
def full(root: Path, base: Path, shards: Path) -> Path:
    assert finetune("sft", base, shards, root / "full") == 0
    return root / "full"


@pytest.fixture(scope="module")
def lora(root: Path, base: Path, shards: Path) -> Path:
    assert finetune("sft_lora", base, shards, root / "lora", *LORA, steps=4) == 0
    return root / "lora"


def ours(model: Any) -> torch.Tensor:
    """What our Thinker says to the prompt, [T, V]."""
    positions_3T = torch.arange(len(IDS)).float().expand(3, -1)
    with torch.no_grad():
        thinker = model.thinker
        hidden_TD, *_ = thinker(torch.tensor(IDS), positions_3T, (len(IDS),), torch.zeros(0, 128), ())
        return thinker.lm_head(hidden_TD)


def of_run(run: Path) -> torch.Tensor:
    """What the model of a run says, adapters beside the base."""
    engine, _ = open_run(run, []).engine()
    return ours(omni_of(engine))


def checkpoint(run: Path) -> CheckpointReader:
    manifest = choose(run, "latest", wait_s=0)
    assert manifest is not None
    return CheckpointReader(manifest, released_pieces)


def test_full_finetuning_comes_out_as_transformers_has_it(full: Path, base: Path, tmp_path: Path) -> None:
    convert([*"export".split(), f"from={full}", f"to={tmp_path / 'out'}"])
    theirs = logits(load(tmp_path / "out"), IDS)
    torch.testing.assert_close(of_run(full), theirs, rtol=1e-5, atol=1e-5)
    assert (theirs - logits(load(base), IDS)).abs().max() > 0.1, "nothing was learnt"
    assert (tmp_path / "out/preprocessor_config.json").read_bytes() == (base / "preprocessor_config.json").read_bytes()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("hello world").input_ids == AutoTokenizer.from_pretrained(base)("hello world").input_ids


def test_the_resolved_recipe_is_whole_and_says_whose_sizes_it_has(full: Path, base: Path) -> None:
    text = (full / "recipe.yaml").read_text()
    assert text.startswith(f"# model: its sizes are those of {base}/config.json\n")
    saved = yaml.safe_load(text)
    assert saved["model"]["weights"] == saved["init"] == str(base)
    assert saved["model"]["text"]["hidden_size"] == 64 and saved["model"]["talker"]["speaker_id"] == {"ethan": 74}
    assert saved["data"]["tokenizer"] == str(full / "base")


def test_what_starts_is_the_folder(base: Path, shards: Path, tmp_path: Path) -> None:
    """A step of learning rate zero: out comes what went in, the Talker and the decoder too, bit for bit."""
    assert finetune("sft", base, shards, tmp_path / "run", "optim.lr=0", steps=1) == 0
    convert(["export", f"from={tmp_path / 'run'}", f"to={tmp_path / 'out'}"])
    before, after = load_model(base), load_model(tmp_path / "out")
    for (name, one), (_, two) in zip(released_state(before), released_state(after), strict=True):
        assert torch.equal(one, two), name


def test_adapters_merged_are_adapters_beside_the_base(lora: Path, base: Path, tmp_path: Path) -> None:
    convert(["export", f"from={lora}", f"to={tmp_path / 'out'}"])
    beside, merged = of_run(lora), logits(load(tmp_path / "out"), IDS)
    torch.testing.assert_close(beside, merged, rtol=1e-5, atol=1e-5)
    assert (merged - logits(load(base), IDS)).abs().max() > 0.1, "nothing was learnt"


@pytest.mark.parametrize("part", ["all", "thinker"])
def test_adapters_in_peft(lora: Path, base: Path, tmp_path: Path, part: str) -> None:
    """peft puts the exported adapter on transformers' model, experts included, and it says the same; merged too."""
    peft = pytest.importorskip("peft")
    convert(["export", f"from={lora}", f"to={tmp_path / 'adapter'}", "adapter=true", f"part={part}"])
    if part == "all":
        model: Any = load(base)
    else:
        convert(["export", f"from={base}", f"to={tmp_path / 'thinker'}", "part=thinker"])
        model = modeling.Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(tmp_path / "thinker")
    own = sum(1 for name in checkpoint(lora).names() if is_lora(name))
    adapted = peft.PeftModel.from_pretrained(model, str(tmp_path / "adapter"))
    assert sum("lora_" in name for name, _ in adapted.named_parameters()) == own
    thinker = adapted.base_model.model.thinker if part == "all" else adapted.base_model.model
    with torch.no_grad():
        theirs = thinker(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]
    torch.testing.assert_close(of_run(lora), theirs, rtol=1e-5, atol=1e-5)
    merged = adapted.merge_and_unload()
    with torch.no_grad():
        thinker = merged.thinker if part == "all" else merged
        again = thinker(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]
    torch.testing.assert_close(again, theirs, rtol=1e-5, atol=1e-5)


@pytest.fixture
def made_by_peft(base: Path, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """An adapter that peft made and saved, and what its model says."""
    peft = pytest.importorskip("peft")
    stem = "thinker.model.language_model.layers"
    fused = [f"{stem}.{layer}.mlp.experts.{name}" for layer in range(3) for name in ("gate_up_proj", "down_proj")]
    config = peft.LoraConfig(
        r=2,
        lora_alpha=6,
        use_rslora=True,
        target_modules=[f"{stem}.{layer}.self_attn.{name}" for layer in range(3) for name in ("q_proj", "v_proj")],
        target_parameters=fused[:5],
    )
    model = peft.get_peft_model(load(base), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.1, generator=generator)
        said = model.base_model.model.thinker(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", said


def test_an_adapter_of_peft_is_merged(made_by_peft: tuple[Path, torch.Tensor], base: Path, tmp_path: Path) -> None:
    adapter, said = made_by_peft
    convert(["merge", f"from={base}", f"adapter={adapter}", f"to={tmp_path / 'out'}"])
    torch.testing.assert_close(logits(load(tmp_path / "out"), IDS), said, rtol=1e-5, atol=1e-5)


def test_a_run_goes_on_from_an_adapter_of_peft(
    made_by_peft: tuple[Path, torch.Tensor], base: Path, shards: Path, tmp_path: Path
) -> None:
    adapter, said = made_by_peft
    run = tmp_path / "run"
    assert finetune("sft_lora", base, shards, run, f"lora.adapter={adapter}", "optim.lr=0", steps=1) == 0
    saved = yaml.safe_load((run / "recipe.yaml").read_text())["lora"]
    assert (saved["rank"], saved["alpha"], saved["rslora"], len(saved["targets"])) == (2, 6.0, True, 6 + 5)
    torch.testing.assert_close(of_run(run), said, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [(), LORA])
def test_a_run_goes_on_when_the_folder_is_gone(
    base: Path, shards: Path, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    """Stopped, the folder removed, the same command again: the losses and weights of a run that was never stopped."""
    recipe = "sft_lora" if settings else "sft"
    source = shutil.copytree(base, tmp_path / "base")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert finetune(recipe, source, shards, whole, *settings, steps=4) == 0
    assert finetune(recipe, source, shards, cut, *settings, "max_steps=2", steps=4) == 0
    shutil.rmtree(source)
    assert finetune(recipe, source, shards, cut, *settings, steps=4) == 0
    assert losses(cut) == losses(whole) and len(losses(whole)) == 4
    one, two = checkpoint(whole), checkpoint(cut)
    assert one.names() == two.names()
    for name, shape in one.names().items():
        size = torch.Size(shape).numel()
        a, b = (reader.read_released(WEIGHT, name, 0, size) for reader in (one, two))
        assert torch.equal(a, b), name
    convert(["export", f"from={cut}", f"to={tmp_path / 'out'}"])
    load(tmp_path / "out")


@pytest.mark.parametrize(
    ("train", "learns"),
    [
        ("[thinker.model.*,thinker.lm_head.*]", lambda name: name.startswith(("thinker.model.", "thinker.lm_head."))),
        ("[thinker.model.layers.*.mlp.experts.*]", lambda name: ".mlp.experts." in name and "thinker." in name),
        (
            "[thinker.visual.merger*,thinker.audio_tower.proj*]",
            lambda name: "visual.merger" in name or "audio_tower.proj" in name,
        ),
    ],
)  # fmt: skip
def test_a_part_alone(base: Path, shards: Path, tmp_path: Path, train: str, learns: Callable[[str], bool]) -> None:
    """Only it has moments; all else is the folder's, bit for bit."""
    run = tmp_path / "run"
    assert finetune("sft", base, shards, run, f"phases.all.train={train}", steps=2) == 0
    reader = checkpoint(run)
    before = dict(released_state(load_model(base)))
    moved = set()
    for name, entry in reader.manifest.tensors.items():
        if WEIGHT not in entry.ranges:
            continue
        assert (set(MOMENTS) <= entry.ranges.keys()) == learns(name), name
        if not torch.equal(reader.read_released(WEIGHT, name, 0, before[name].numel()), before[name].flatten()):
            moved.add(name)
    assert all(learns(name) for name in moved)
    assert moved or "visual" in train, "the conversations have no media"


def test_a_run_with_adapters_answers(lora: Path, shards: Path, tmp_path: Path, capsys: Any) -> None:
    from launch.evaluate import evaluate
    from launch.generate import generate

    generate([f"run={lora}", "text=hello world", "max_new_tokens=4", "max_seconds=0.2", f"out={tmp_path / 'a.wav'}"])
    assert "tokens of prompt" in capsys.readouterr().err
    evaluate([f"run={lora}", f"shards={shards}/*.tar", "eval.max_samples=2", "eval.max_new_tokens=4"])
    assert "written to" in capsys.readouterr().out


def test_a_run_with_adapters_is_not_taken_for_one_without(
    lora: Path, base: Path, shards: Path, tmp_path: Path, capsys: Any
) -> None:
    assert finetune("sft", None, shards, tmp_path / "a", *_sizes(lora), f"init={lora}", steps=1) == 2
    assert "that run has adapters; export it" in capsys.readouterr().err
    assert finetune("sft_lora", base, shards, lora, "lora.rank=8", *LORA[1:], steps=5) == 2
    assert "lora.rank is 4 there and 8 in this recipe" in capsys.readouterr().err
    settings = (*_sizes(lora), *LORA, f"init={lora}", "optim.lr=0")
    assert finetune("sft_lora", None, shards, tmp_path / "b", *settings, steps=1) == 0  # goes on with its adapters
    torch.testing.assert_close(of_run(tmp_path / "b"), of_run(lora), rtol=0, atol=0)


def _sizes(run: Path) -> list[str]:
    saved = yaml.safe_load((run / "recipe.yaml").read_text())
    sizes = {f"model.{part}": value for part, value in saved["model"].items() if part != "weights"}
    return [f"{key}={json.dumps(value)}" for key, value in sizes.items()] + [
        f"data.tokenizer={saved['data']['tokenizer']}"
    ]


def _break(folder: Path, how: str) -> None:
    if how == "no config":
        (folder / "config.json").unlink()
    elif how == "not ours":
        (folder / "config.json").write_text('{"model_type": "llama"}')
    elif how == "another size":
        config = json.loads((folder / "config.json").read_text())
        config["thinker_config"]["text_config"]["num_experts"] = 4
        (folder / "config.json").write_text(json.dumps(config))
    elif how == "no weights":
        for path in folder.glob("*.safetensors"):
            path.unlink()
    elif how == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif how == "another tokenizer":
        config = json.loads((folder / "config.json").read_text())
        config["thinker_config"]["audio_token_id"] = 7
        (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no config", "config.json: no such file"),
        ("not ours", "not a Qwen3-Omni"),
        ("another size", "but config.json makes it"),
        ("no weights", "model.weights: "),
        ("no tokenizer", "data.tokenizer is not set, and "),
        ("another tokenizer", "audio_token_id is 7 in its config.json, and "),
    ],
)
def test_a_bad_folder_is_one_line(
    base: Path, shards: Path, tmp_path: Path, capsys: Any, how: str, message: str
) -> None:
    folder = shutil.copytree(base, tmp_path / "base")
    _break(folder, how)
    capsys.readouterr()
    assert finetune("sft", folder, shards, tmp_path / "run") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], errors
    assert not (tmp_path / "run/recipe.yaml").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("init=elsewhere",), "give one, both are what to start from"),
        (("lora.adapter=nowhere",), "lora.adapter: nowhere/adapter_config.json: no such file"),
        (("lora.targets=[thinker.layers.*]",), "lora.targets: no linear map and no experts fit 'thinker.layers.*'"),
        (("lora.rank=0",), "lora: rank must be at least 1, not 0"),
        (("lora.dropout=0.1",), "unknown setting 'lora.dropout'"),
    ],
)
def test_bad_settings_are_one_line(
    base: Path, shards: Path, tmp_path: Path, capsys: Any, settings: tuple[str, ...], message: str
) -> None:
    assert finetune("sft_lora", base, shards, tmp_path / "run", *settings) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("export from=FULL to=OUT adapter=true", "has no lora"),
        ("export from=LORA to=OUT adapter=yes", "adapter=yes: it is true or false"),
        ("export from=LORA to=OUT adapter=true part=talker", "part=talker: adapters are written for"),
        ("merge from=BASE adapter=BASE to=OUT", "adapter_config.json: no such file"),
    ],
)
def test_bad_exports_are_one_line(
    full: Path, lora: Path, base: Path, tmp_path: Path, capsys: Any, words: str, message: str
) -> None:
    for name, path in {"FULL": full, "LORA": lora, "BASE": base, "OUT": tmp_path / "out"}.items():
        words = words.replace(name, str(path))
    assert guarded(convert, words.split()) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_an_exported_folder_is_the_next_base(lora: Path, shards: Path, tmp_path: Path) -> None:
    convert(["export", f"from={lora}", f"to={tmp_path / 'out'}", "dtype=bf16"])
    assert finetune("sft", tmp_path / "out", shards, tmp_path / "run", steps=1) == 0
    assert open_folder(tmp_path / "out")["thinker.lm_head.weight"].dtype is torch.bfloat16


def test_a_thinker_alone(base: Path, shards: Path, tmp_path: Path) -> None:
    """Its folder is finetuned by adapters under the same names, and comes out for transformers' class of it."""
    convert(["export", f"from={base}", f"to={tmp_path / 'base'}", "part=thinker"])
    assert finetune("sft_lora", tmp_path / "base", shards, tmp_path / "run", *LORA, steps=2) == 0
    assert yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())["model"]["talker"] is None
    convert(["export", f"from={tmp_path / 'run'}", f"to={tmp_path / 'out'}"])
    kind: Any = modeling.Qwen3OmniMoeThinkerForConditionalGeneration
    model, info = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    engine, _ = open_run(tmp_path / "run", []).engine()
    omni = type("Whole", (), {"thinker": engine.objective.model})()  # type: ignore[attr-defined]
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]
    torch.testing.assert_close(ours(omni), theirs, rtol=1e-5, atol=1e-5)
