"""The converter as a user types it: out, into transformers, back; counts; and one line for every kind of bad folder."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from launch import weights as streams
from launch.arguments import guarded
from launch.convert import main
from launch.released import counts, expected_shapes, open_released, recipe_config
from launch.weights import Weight, new_folder, write_weights
from models.hf import released_state
from models.hf_config import omni_to_released
from models.init import init_weights
from models.omni import Omni
from tests.run_kit import ROOT
from train.checkpoint.format import safetensors_header
from train.errors import CheckpointError

modeling = pytest.importorskip("transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe")
GATE = "thinker.model.layers.0.mlp.gate.weight"


@pytest.fixture(scope="module")
def theirs() -> Any:
    """Transformers' whole model with random weights, at the sizes of recipe tiny."""
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeConfig

    config = omni_to_released(recipe_config("tiny"))
    model = modeling.Qwen3OmniMoeForConditionalGeneration(Qwen3OmniMoeConfig(**config))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.1, generator=generator)
    return model


@pytest.fixture(scope="module")
def saved(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What transformers writes, with some of the files that lie beside."""
    folder = tmp_path_factory.mktemp("released") / "theirs"
    theirs.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "preprocessor_config.json").write_text('{"feature_size": 128}')
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def in_memory(tensor: Tensor) -> Weight:
    flat = tensor.flatten()
    return Weight(tuple(tensor.shape), tensor.dtype, "memory", lambda start, length: flat[start : start + length])


def load(kind: str, folder: Path) -> Any:
    """By transformers, with nothing missing, nothing unexpected, nothing of another shape."""
    model, info = getattr(modeling, kind).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


def test_check_prints_the_released_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    main(["check", "model=qwen3_omni_30b_a3b"])
    printed = dict(re.findall(r"^  (.+?) {2,}([\d,]+)$", capsys.readouterr().out, re.M))
    assert {part: int(count.replace(",", "")) for part, count in printed.items()} == {
        "audio encoder": 647_927_168,
        "vision encoder": 538_631_408,
        "Thinker decoder": 30_221_219_840,
        "Thinker head": 311_427_072,
        "Talker backbone": 3_167_291_392,
        "Talker head": 3_145_728,
        "Talker projections": 12_589_056,
        "code predictor": 141_570_304,
        "code2wav": 216_016_577,
        "whole": 35_259_818_545,
    }


def test_out_into_transformers_saved_and_back_in_is_bit_identical(tmp_path: Path) -> None:
    ours = Omni(recipe_config("tiny"))
    init_weights(ours, 5)
    state = {name: tensor.contiguous() for name, tensor in released_state(ours)}
    weights = {name: in_memory(tensor) for name, tensor in state.items()}
    with new_folder(tmp_path / "ours") as folder:
        write_weights(folder, weights, None)
        (folder / "config.json").write_text(json.dumps(omni_to_released(ours.config)))
    main(["export", f"from={tmp_path}/ours", f"to={tmp_path}/out", "max_file_gb=0.002"])
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    load("Qwen3OmniMoeForConditionalGeneration", tmp_path / "out").save_pretrained(tmp_path / "again")
    main(["import", f"from={tmp_path}/again", f"to={tmp_path}/back"])
    assert same(tensors(tmp_path / "back"), state)
    assert open_released(tmp_path / "back").config == ours.config
    assert same(tensors(tmp_path / "out"), state)


def in_memory_layout(theirs: Any) -> dict[str, Tensor]:
    """Transformers 5.23: `.model.` names, fused experts."""
    return {name: tensor.clone() for name, tensor in theirs.state_dict().items()}


def earlier_layout(theirs: Any) -> dict[str, Tensor]:
    """Transformers 5.2 to 5.7: released names, fused experts."""
    return {
        re.sub(r"thinker\.model\.(?=audio_tower|visual)", "thinker.", name).replace(".language_model", ""): tensor
        for name, tensor in in_memory_layout(theirs).items()
    }


@pytest.mark.parametrize("layout", [in_memory_layout, earlier_layout])
def test_every_layout_of_transformers_becomes_the_released_one(
    theirs: Any, saved: Path, tmp_path: Path, layout: Callable[[Any], dict[str, Tensor]]
) -> None:
    main(["import", f"from={saved}", f"to={tmp_path}/released"])
    assert same(tensors(tmp_path / "released"), tensors(saved))
    other = tmp_path / "other"
    shutil.copytree(saved, other)
    save_file(layout(theirs), other / "model.safetensors", {"format": "pt"})
    main(["import", f"from={other}", f"to={tmp_path}/imported"])
    assert same(tensors(tmp_path / "imported"), tensors(saved))
    beside = {path.name for path in (tmp_path / "imported").iterdir() if path.suffix != ".safetensors"}
    assert beside == {"config.json", "generation_config.json", "tokenizer.json", "preprocessor_config.json"} | {
        "model.safetensors.index.json"
    }


def test_thinker_and_talker_alone_load_right(theirs: Any, saved: Path, tmp_path: Path) -> None:
    """The Talker too: from keys of single experts transformers would draw its experts anew.

    Of a folder that holds one part alone, all is that part.
    """
    whole = theirs.state_dict()
    for part, kind in (("thinker", "Thinker"), ("talker", "Talker")):
        main(["export", f"from={saved}", f"to={tmp_path}/{part}", f"part={part}"])
        state = load(f"Qwen3OmniMoe{kind}ForConditionalGeneration", tmp_path / part).state_dict()
        assert same(state, {name: whole[f"{part}.{name}"] for name in state})
        main(["check", f"model={tmp_path}/{part}"])
        main(["import", f"from={tmp_path}/{part}", f"to={tmp_path}/{part}-back"])
        released = {name: tensor for name, tensor in tensors(saved).items() if name.startswith(part)}
        assert same(tensors(tmp_path / f"{part}-back"), released)
        main(["export", f"from={tmp_path}/{part}-back", f"to={tmp_path}/{part}-again"])
        assert same(tensors(tmp_path / f"{part}-again"), tensors(tmp_path / part))
        other = {"thinker": "talker", "talker": "thinker"}[part]
        with pytest.raises(CheckpointError, match=f"holds the {kind} alone, no {other}"):
            main(["export", f"from={tmp_path}/{part}", f"to={tmp_path}/none", f"part={other}"])


def test_bfloat16_only_when_asked(saved: Path, tmp_path: Path) -> None:
    main(["export", f"from={saved}", f"to={tmp_path}/half", "dtype=bf16"])
    half = tensors(tmp_path / "half")
    assert same(half, {name: tensor.bfloat16() for name, tensor in tensors(saved).items()})
    assert load("Qwen3OmniMoeForConditionalGeneration", tmp_path / "half").dtype == torch.bfloat16
    main(["import", f"from={tmp_path}/half", f"to={tmp_path}/same"])
    assert same(tensors(tmp_path / "same"), half)
    main(["import", f"from={tmp_path}/half", f"to={tmp_path}/wide", "dtype=fp32"])
    assert same(tensors(tmp_path / "wide"), {name: tensor.float() for name, tensor in half.items()})


def edit_config(*path: str | int, value: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        section = config
        for key in path[:-1]:
            section = section[key]
        section[path[-1]] = value
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def edit_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors", {"format": "pt"})

    return edit


def truncate(size: int) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        with open(folder / "model.safetensors", "r+b") as file:
            file.truncate(size if size > 0 else file.seek(0, 2) + size)

    return edit


def edit_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        raw = (folder / "model.safetensors").read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])

    return edit


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def index_to(file: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {GATE: file}}))

    return edit


TEXT = ("thinker_config", "text_config")


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


BAD = [
    (truncate(-100), ["model.safetensors: truncated: ", " ends at byte "]),
    (truncate(100), ["model.safetensors: not a whole safetensors file"]),
    (truncate(4), ["model.safetensors: not a whole safetensors file"]),
    (edit_tensors(lambda t: t.pop(GATE)), [f"lack {GATE} and 0 more"]),
    (edit_tensors(lambda t: t.update({"thinker.extra.weight": torch.ones(1)})), ["hold thinker.extra.weight"]),
    (edit_tensors(lambda t: t.update({"other.weight": torch.ones(1)})), ["hold thinker.other.weight"]),
    (edit_tensors(lambda t: t.update({GATE: torch.ones(9, 128)})), [GATE, "[9, 128]", "[8, 128]"]),
    (edit_tensors(lambda t: t.update({GATE: torch.ones(8, 128).long()})), [GATE, "I64"]),
    (
        edit_config("dtype", value="bfloat16"),
        ["is float32, and bfloat16 would lose precision", "dtype=bf16"],
    ),
    (
        edit_config(*TEXT, "num_attention_heads", value=8),
        ["thinker.model.layers.0.self_attn.q_proj.weight", "[128, 128]", "[256, 128]"],
    ),
    (edit_config(*TEXT, "num_attention_heads", value=3), ["num_attention_heads (3) must be a multiple of"]),
    (
        edit_config(*TEXT, "num_attention_heads", value="4"),
        ["thinker_config.text_config.num_attention_heads is '4', a value of a wrong type"],
    ),
    (edit_config(*TEXT, "num_experts", value=9), [GATE, "[8, 128]", "[9, 128]"]),
    (edit_config(*TEXT, "num_hidden_layers", value=3), ["lack thinker.model.layers.2."]),
    (edit_config(*TEXT, "hidden_act", value="gelu"), ["thinker_config.text_config.hidden_act is 'gelu'", "'silu'"]),
    (edit_config("talker_config", value=None), ["lacks the key 'talker_config'"]),
    (edit_config("thinker_config", value={}), ["lacks the key"]),
    (index_to("../secret.safetensors"), [f"the file name '../secret.safetensors' of {GATE} is refused"]),
    (index_to("/etc/passwd"), ["'/etc/passwd'", "is refused"]),
    (index_to("model.bin"), ["'model.bin'", "is refused"]),
    (index_to("model.safetensors"), ["model.safetensors: holds ", "but model.safetensors.index.json has it not"]),
    (index_to("model-2.safetensors"), ["the file model-2.safetensors is missing", GATE]),
    (only_a_pickle, ["pytorch_model.bin is a pickle, which is never read"]),
    (edit_header(lambda h: h[GATE].update(shape=[8, 127])), [GATE, "[8, 127]", "4096 bytes"]),
    (edit_header(lambda h: h[GATE].update(shape=[-8, -128])), [GATE, "make no sense"]),
    (edit_header(lambda h: h[GATE].update(data_offsets=[0, 4096])), ["overlap or leave gaps"]),
    (edit_header(lambda h: h.update({GATE: 7})), [GATE, "no dtype, shape and offsets"]),
    (lambda folder: as_folder(folder / "model.safetensors"), ["model.safetensors: cannot be read", "directory"]),
    (lambda folder: (folder / "config.json").unlink(), ["config.json: no such file"]),
    (lambda folder: (folder / "config.json").write_text("{"), ["config.json: not readable JSON"]),
    (lambda folder: (folder / "config.json").write_text("{}"), ["not a Qwen3-Omni"]),
]


@pytest.mark.parametrize(("damage", "messages"), BAD)
@pytest.mark.parametrize("name", ["import", "export"])
def test_bad_input_is_one_line_and_leaves_nothing(
    saved: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    damage: Callable[[Path], Any],
    messages: list[str],
) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(saved, folder)
    damage(folder)
    assert guarded(main, [name, f"from={folder}", f"to={tmp_path}/out"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and len(error.splitlines()) == 1, error
    assert all(message in error for message in messages), error
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_a_missing_shard_is_named_with_its_keys(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["import", f"from={saved}", f"to={tmp_path}/shards", "max_file_gb=0.002"])
    gone = sorted((tmp_path / "shards").glob("*.safetensors"))[1]
    keys = load_file(gone).keys()
    gone.unlink()
    assert guarded(main, ["check", f"model={tmp_path}/shards"]) == 2
    error = capsys.readouterr().err
    named = re.search(rf"the file {gone.name} is missing; \S+ has (\S+) and (\d+) more tensors in it", error)
    assert named and named[1] in keys and int(named[2]) == len(keys) - 1, error


def test_check_compares_dtypes(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(saved, tmp_path / "mixed")
    edit_tensors(lambda t: t.update({GATE: t[GATE].bfloat16()}))(tmp_path / "mixed")
    assert guarded(main, ["check", f"model={tmp_path}/mixed"]) == 2
    assert f"{GATE} is bfloat16, but config.json says float32" in capsys.readouterr().err
    main(["import", f"from={tmp_path}/mixed", f"to={tmp_path}/fp32"])  # loses nothing
    assert tensors(tmp_path / "fp32")[GATE].dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "unknown command ''; give check, import, export, merge, init"),
        (["exprot"], "unknown command 'exprot', did you mean 'export'?"),
        (["check"], "give model=..."),
        (["check", "model=tinny"], "no recipe of a whole model, did you mean 'tiny'?"),
        (["check", "model=tiny", "a.b=3"], "unknown argument 'a.b=3'"),
        (["import", "from=nowhere", "to=x"], "nowhere/config.json: no such file"),
        (["export", "from=SAVED", "to=x", "part=ears"], "part=ears: it is all, thinker or talker"),
        (["export", "from=SAVED", "to=x", "dtype=int8"], "dtype=int8: it is bf16 or fp32"),
        (["export", "from=SAVED", "to=x", "max_file_gb=0"], "max_file_gb=0: out of range"),
        (["export", "from=SAVED", "to=SAVED"], "exists already"),
        (["init", "to=x", "model=tiny", "seed=s"], "seed=s: expected a number"),
    ],
)
def test_wrong_arguments_are_one_line(
    saved: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert guarded(main, [word.replace("SAVED", str(saved)) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("failure", [CheckpointError("read failed"), OSError(28, "No space left"), KeyboardInterrupt()])
def test_a_failed_export_leaves_no_folder(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    blocks, count = streams._blocks, iter(range(1000))

    def failing(weight: Weight) -> Any:
        if next(count) == 50:
            assert len(list(tmp_path.iterdir())) == 1  # it was being written
            raise failure
        return blocks(weight)

    monkeypatch.setattr(streams, "_blocks", failing)
    assert guarded(main, ["export", f"from={saved}", f"to={tmp_path}/out"]) in (2, 130)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_seen_before_writing(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match="bytes are to be written, and 1000 are free"):
        main(["export", f"from={saved}", f"to={tmp_path}/out"])
    assert not list(tmp_path.iterdir())


PEAK = """
import resource, sys
from launch.convert import main
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
main(sys.argv[1:])
print("grown", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def synthetic(folder: Path, vocabulary: int, hidden: int) -> int:
    """A folder of zeros, most of it in two tensors; holes in the file take no disk. Returns its bytes."""
    config = recipe_config("tiny")
    text = replace(config.thinker.text, vocab_size=vocabulary)
    assert text.hidden_size == hidden
    config = replace(config, thinker=replace(config.thinker, text=text))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(omni_to_released(config) | {"dtype": "float32"}))
    shapes = expected_shapes(config)
    entries = [(name, "F32", shape, 4 * torch.Size(shape).numel()) for name, shape in shapes.items()]
    size = 4 * counts(shapes)["whole"]
    with open(folder / "model.safetensors", "wb") as file:
        file.write(safetensors_header(entries, {}))
        file.truncate(file.tell() + size)
    return size


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """300 MB in two tensors: the process grows by a few blocks."""
    assert synthetic(tmp_path / "big", 300_000, 128) > 300e6
    arguments = [sys.executable, "-c", PEAK, "export", f"from={tmp_path}/big", f"to={tmp_path}/out", "dtype=bf16"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split("grown ")[1]) < 100_000, done.stdout  # KB; blocks of 16 MB, and PyTorch's first casts


def test_a_file_that_cannot_be_read_later_is_named(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "gone")
    weight = streams.open_folder(tmp_path / "gone")[GATE]
    as_folder(tmp_path / "gone" / "model.safetensors")
    with pytest.raises(CheckpointError, match="model.safetensors: cannot be read: Is a directory"):
        weight.read(0, 1)


def test_sigterm_leaves_no_folder(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(weight: Weight) -> Any:
        assert len(list(tmp_path.iterdir())) == 1  # it was being written
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("the signal did not end it")

    monkeypatch.setattr(streams, "_blocks", ended)
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)  # not the end of the tests
    try:
        outer = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit) as caught:
            guarded(main, ["export", f"from={saved}", f"to={tmp_path}/out"])
        assert caught.value.code == 143 and not list(tmp_path.iterdir())
        assert signal.getsignal(signal.SIGTERM) is outer
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["export", "from=nowhere", "--help"]])
def test_help_prints_the_usage(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert guarded(main, arguments) == 0
    printed = capsys.readouterr()
    assert "python -m launch.convert export from=" in printed.out and not printed.err


def test_transformers_speaks_the_tiny_model(theirs: Any) -> None:
    """The codes are below the last 1,024 ids, which it never predicts but for the end."""
    config = recipe_config("tiny")
    assert config.talker is not None
    assert config.talker.text.vocab_size == config.talker.code_predictor.vocab_size + 1024
    start, end, user = config.im_start_token_id, config.im_end_token_id, config.user_token_id
    ids = torch.tensor([[start, user, 9, 20, 21, end, 9, start, config.assistant_token_id, 9]])
    torch.manual_seed(0)
    text, wave = theirs.generate(ids, speaker="one", thinker_max_new_tokens=4, talker_max_new_tokens=4)
    assert wave.numel() and wave.isfinite().all()
