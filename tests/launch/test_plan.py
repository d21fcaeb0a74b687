"""The layout advisor as a command."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest

from launch.arguments import guarded
from launch.plan import main, read
from launch.plan_search import choose, layouts
from models.config import AudioConfig, TextConfig, ThinkerConfig
from train.config import EngineConfig
from train.fits import RESERVE, usual_pack
from train.hardware import GPUS
from train.parallel import Layout, check_layout
from train.throughput import bubble, estimate, expert_exchange

ASK = ["model=qwen3_omni_30b_a3b", "gpus=64", "gpu=h200", "seq=32768"]
QWEN3 = ThinkerConfig(TextConfig(151936, 2048, 48, 32, 4, 128, 128, 8, 768), AudioConfig(1280, 32, 20, 5120, 2048), 1)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = guarded(main, words)
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, *ASK, "top=3")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert not [line for line in lines if len(line) > 120 and "train.py" not in line]
    assert "ESTIMATES" in out and "not measured" in out and "56.91 GFLOP a token" in out
    assert "local: engine.name=local is one process" in out
    for engine in ("deepspeed", "megatron"):
        assert f"{engine}: best " in out
    commands = [line.split(". ", 1)[1] for line in lines if " train.py " in line]
    assert 4 <= len(commands) <= 6
    for command in commands:
        settings = dict(word.split("=", 1) for word in shlex.split(command) if "=" in word)
        assert settings["recipe"] == "stage2" and settings["model"] == "qwen3_omni_30b_a3b"
        assert "engine.ep" in settings  # the recipe has one of its own


def test_listed_layouts_can_be_and_fit() -> None:
    question = read([*ASK, "engine=megatron", "media=0.3", "top=4"])
    best, count = choose("megatron", question)
    assert len(best) == 4 < count
    assert [choice.estimate.seconds for choice in best] == sorted(choice.estimate.seconds for choice in best)
    for choice in best:
        check_layout(question.model, choice.layout)
        assert choice.memory.total <= 141e9 * (1 - RESERVE)
        assert question.sequences % choice.layout.dp == 0
        assert question.seq % (2 * choice.layout.cp * choice.layout.tp) == 0


def test_degrees_that_are_given_are_kept() -> None:
    question = read([*ASK, "engine.tp=2", "engine.pp=4", "engine.interleave=2"])
    found = list(layouts("megatron", question))
    assert found and all((layout.tp, layout.pp, layout.interleave) == (2, 4, 2) for layout in found)
    assert not list(layouts("deepspeed", question))


def test_an_audio_encoder_with_its_decoder(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model=audio_encoder_30b_a3b", "gpus=64", "gpu=h100", "seq=8192", "sequences_per_step=256", "media=0.85"]
    status, out, err = run(capsys, *words, "top=9")
    assert (status, err) == (0, "") and "megatron:" not in out and "deepspeed: best 9 of 12" in out
    (command,) = [line for line in out.splitlines() if "train.py" in line and " 1. " in line]
    assert "recipe=audio_encoder" in command and "engine.zero=1" in command
    best, _ = choose("deepspeed", read([*words, "engine.zero=1", "engine.recompute_layers=false"]))
    less, _ = choose("deepspeed", read([*words, "engine.zero=1", "engine.recompute_layers=true"]))
    assert best[0].memory.parts["encoders"] > 5 * less[0].memory.parts["encoders"] > 0
    assert best[0].estimate.experts == 0


def test_a_talker_that_learns(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model=qwen3_omni_30b_a3b_talker", "gpus=64", "gpu=h100", "seq=8192", "sequences_per_step=256"]
    words += [
        "train=talker",
        "engine=deepspeed",
        "engine.zero=3",
        "engine.ep=8",
        "engine.recompute_layers=true",
        "top=1",
    ]
    status, out, err = run(capsys, *words, "frames=4096")
    assert (status, err) == (0, "") and "8,192 tokens, 4,096 of them frames" in out and "recipe=talker" in out
    sizes = [choose("deepspeed", read([*words, f"frames={frames}"]))[0][0].memory for frames in (0, 2048, 4096)]
    assert sizes[0].total < sizes[1].total < sizes[2].total
    assert sizes[2].parts["head"] > 1.8 * sizes[1].parts["head"]  # the code predictor: sixteen rows a frame


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model=audio_encoder_30b_a3b", "engine=megatron"], "no engine divides their layers; take deepspeed or local"),
        (["model=audio_encoder_30b_a3b", "engine.ep=2"], "engine.ep: an audio encoder and its decoder have no experts"),
        (["frames=9"], "frames=9: model=qwen3_omni_30b_a3b has no Talker"),
        (["train=talker"], "train=talker: model=qwen3_omni_30b_a3b has no Talker"),
        (["model=qwen3_omni_30b_a3b_talker", "frames=32768"], "frames must be from 0 to 32767"),
        (["engine.tp=3"], "engine.tp=3 does not divide the 4 key-value heads of the thinker"),
        (["engine.ep=5"], "engine.ep=5 does not divide the 128 experts of the thinker"),
        (["engine.pp=64"], "engine.pp=64 is more than the 48 layers of the thinker allow"),
        (["engine.cp=3"], "engine.cp=3 = 3 does not divide the 64 processes"),
        (["engine.tp=x"], "engine.tp must be a whole number, not 'x'"),
        (["engine.tpp=2"], "unknown setting 'engine.tpp', did you mean 'engine.tp'?"),
        (["engine.recompute=yes"], "engine.recompute must be true or false"),
        (["model=qwen3_omni_30b_a3"], "unknown model=qwen3_omni_30b_a3, did you mean 'qwen3_omni_30b_a3b'?"),
        (["gpu=h20"], "unknown gpu=h20, did you mean 'h200'?"),
        (["engine=megatro"], "engine=megatro, did you mean 'megatron'?"),
        (["gpus=0"], "gpus must be from 1"),
        (["media=2"], "media must be from 0 to 0.95"),
        (["train=some"], "train=some; it is one of everything, decoder, encoders"),
        (["precision=fp8"], "precision=fp8; it is one of bf16, fp32"),
        (["seqq=1"], "unknown argument 'seqq', did you mean 'seq'?"),
        (["batch_tokens=1000000", "sequences_per_step=4"], "not both"),
        (
            ["seq=32766", "engine=megatron", "engine.cp=8"],
            "data.sequence_length=32766 is not a multiple of 2 x engine.cp=8",
        ),
        (["gpus=1", "gpu=rtx4090", "engine=local"], "engine.name=local needs "),
        (
            ["sequences_per_step=3", "engine=deepspeed"],
            "data.sequences_per_step=3 is not a multiple of the 64 data-parallel ranks",
        ),
    ],
)
def test_what_cannot_be_is_one_line(capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    given = [word for word in ASK if word.split("=")[0] not in {each.split("=")[0] for each in words}]
    status, out, err = run(capsys, *given, *words)
    assert status == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and said in err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--help")
    assert status == 0 and "python -m launch.plan model=" in out


def test_the_published_exchange() -> None:
    """Qwen3-30B-A3B: 6.29 MB a token over 48 layers, forward and backward, without deduplication."""
    found = expert_exchange(QWEN3, Layout("megatron", "bf16", world=16, ep=16), tokens=4096, per_node=8)
    assert found.token == 48 * 4 * 8 * 2048 * 2 == pytest.approx(6.29e6, rel=1e-3)
    assert found.leaving == pytest.approx(found.token * 15 / 16) and found.nodes == pytest.approx(found.token / 2)
    assert found.step == pytest.approx(found.leaving * 4096)
    inside = expert_exchange(QWEN3, Layout("megatron", "bf16", world=16, ep=8), tokens=4096, per_node=8)
    assert inside.nodes == 0.0
    assert expert_exchange(QWEN3, Layout("megatron", "bf16", world=16), tokens=4096, per_node=8).leaving == 0.0


def test_bubble() -> None:
    assert bubble(1, 8, 1) == 0.0
    assert bubble(4, 8, 1) == pytest.approx(3 / 11) and bubble(4, 8, 2) == pytest.approx(3 / 19)


def test_more_of_what_costs_costs_more() -> None:
    def seconds(layout: Layout, microbatches: int = 8) -> float:
        pack = usual_pack(QWEN3, 4096)
        return estimate(QWEN3, layout, pack, microbatches, 8 * layout.dp, GPUS["h200"], 8).seconds

    plain = Layout("megatron", "bf16", world=64, ep=8)
    assert seconds(replace(plain, recompute_layers=True)) > seconds(replace(plain, recompute=True)) > seconds(plain)
    assert seconds(replace(plain, ep=16)) > seconds(plain)  # over the network
    zero = Layout("deepspeed", "bf16", world=64, zero=3)
    assert seconds(zero) > seconds(replace(zero, zero=1))


def test_names_are_those_of_the_recipe() -> None:
    """Settings that a command line may have: those of the recipe, and those of the megatron engine."""
    known = set(EngineConfig.__dataclass_fields__)
    later = {"tp", "pp", "cp", "expert_tp", "interleave", "recompute_layers"}
    assert set(Layout.__dataclass_fields__) - later - {"world"} <= known
