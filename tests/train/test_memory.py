"""The memory model against what training really takes, and what is said where something does not fit."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from models.config import AudioConfig, TextConfig, ThinkerConfig, VisionConfig
from models.layers.experts import _grouped_experts
from models.omni_config import CodePredictorConfig, OmniConfig, TalkerConfig
from models.talker import Talker
from models.thinker import Thinker
from tests.distributed import spawn
from tests.train.memory_cases import CASES, Case, expected, measure, measure_all
from train.activations import Cut, Pack, grouped_experts
from train.engine_state import Job
from train.errors import EngineError
from train.fits import check_fits, usual_pack
from train.memory import PARTS, in_flight, memory_of, stage_memory, talker_pieces, weights_of
from train.parallel import Layout, check_layout

RELEASED = ThinkerConfig(
    TextConfig(152064, 2048, 48, 32, 4, 128, 128, 8, 768),
    AudioConfig(1280, 32, 20, 5120, 2048),
    1,
    VisionConfig(27, 1152, 4304, 16, 2048),
    2,
    3,
)
GB = 1e9
WITHIN = 0.05
TOGETHER = [case for case in CASES if case.world > 1]
ALONE = [case for case in CASES if case.world == 1]


@pytest.mark.parametrize("case", ALONE, ids=[case.name for case in ALONE])
def test_peak_of_one_process(case: Case) -> None:
    if case.engine.get("name") == "megatron":
        pytest.importorskip("megatron.core")
    assert expected(case).total == pytest.approx(measure(case.name), rel=WITHIN)


@pytest.mark.slow
@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("engine", "package"), [("deepspeed", "deepspeed"), ("megatron", "megatron.core")])
def test_peaks_of_two_processes(engine: str, package: str, slow: bool) -> None:
    """ZeRO 1, 2 and 3, slow AutoEP; TP, EP, PP and CP. Of the two ranks the worst counts. One start for all cases."""
    if find_spec(package.split(".")[0]) is None:
        pytest.skip(f"needs {package}")
    cases = [case for case in TOGETHER if case.engine["name"] == engine and case.slow == slow]
    ranks = spawn(measure_all, 2, [case.name for case in cases])
    for case, *peaks in zip(cases, *ranks, strict=True):
        assert expected(case).total == pytest.approx(max(peaks), rel=case.within), case.name


def test_a_wrong_model_would_be_seen() -> None:
    """Each of a model's parts is more than the tolerance in some case: leaving it out fails a test above."""
    share = {part: max(expected(case).parts[part] / expected(case).total for case in CASES) for part in PARTS}
    assert min(share.values()) > WITHIN, share


def test_parameters_are_the_models() -> None:
    with torch.device("meta"):
        truth = sum(parameter.numel() for parameter in Thinker(RELEASED).parameters())
    assert sum(weights_of(RELEASED, Layout())) == truth
    dense, experts = weights_of(RELEASED, Layout("megatron", world=64, tp=4, ep=8))
    assert experts == 48 * 3 * 2048 * 768 * 128 // 8
    assert dense < weights_of(RELEASED, Layout())[0]


SPEECH = TalkerConfig(
    TextConfig(3072, 1024, 20, 16, 2, 128, 128, 6, 384, shared_expert_intermediate_size=768),
    CodePredictorConfig(2048, 1024, 3072, 5, 16, 8, 128),
    2048,
    24,
)
OMNI = OmniConfig(replace(RELEASED, audio_token_id=151675, image_token_id=151676, video_token_id=151677), SPEECH)


@pytest.mark.parametrize("pp", [1, 4])
def test_parameters_of_the_talker_are_the_models(pp: int) -> None:
    with torch.device("meta"):
        truth = sum(parameter.numel() for parameter in Talker(SPEECH).parameters())
    layout, job = Layout("megatron", pp, pp=pp), Job(Pack((64,)))
    stages = [talker_pieces(OMNI, layout, job, stage) for stage in range(pp)]
    assert sum(piece.weights for front, rest in stages for piece in front + rest) == truth
    assert [bool(front) for front, _ in stages] == [False] * (pp - 1) + [True]


def test_a_talker_is_counted_and_so_is_what_it_says() -> None:
    layout = Layout("megatron", "bf16", world=8, ep=8)
    alone, both = (memory_of(model, layout, Job(Pack((4096,)))) for model in (RELEASED, OMNI))
    for part, each in (("weights", 2), ("gradients", 4)):
        assert both.parts[part] - alone.parts[part] > each * 3e9 / 8
    silent = memory_of(OMNI, layout, Job(Pack((4096,)), train=("decoder", "audio", "vision")))
    assert silent.parts["weights"] == both.parts["weights"]
    assert silent.parts["optimizer"] == alone.parts["optimizer"]
    said = [
        memory_of(OMNI, layout, Job(Pack((512,)), spoken=Pack((4096,), targets=frames))).parts["head"]
        for frames in (2048, 4096)
    ]
    assert said[1] > 1.7 * said[0] > 0


def test_grouped_products_keep_what_the_model_says() -> None:
    """The path of GPUs, run here: the tensors that autograd saves for backward."""
    tokens, hidden, width, experts, chosen = 64, 48, 32, 4, 2
    x_TD = torch.randn(tokens, hidden, requires_grad=True)
    weights = torch.randn(experts, 2 * width, hidden), torch.randn(experts, hidden, width)
    routing = torch.rand(tokens, experts).topk(chosen).indices, torch.rand(tokens, chosen, requires_grad=True)
    outside = {tensor.untyped_storage()._cdata for tensor in (x_TD, *weights, *routing)}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in outside:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    for weight in weights:
        weight.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out_TD = _grouped_experts(x_TD, *weights, *routing)
    del out_TD
    rows = tokens * chosen
    (piece,) = grouped_experts(rows, tokens * hidden * 4, 0, hidden, width, Cut(4))
    assert piece.kept == pytest.approx(sum(kept.values()), rel=0.02)


def memory(layout: Layout, tokens: int = 32768, **job: Any) -> dict[str, int]:
    return memory_of(RELEASED, layout, Job(usual_pack(RELEASED, tokens), **job)).parts


def test_degrees_divide_what_they_should() -> None:
    def megatron(**degrees: Any) -> dict[str, int]:
        return memory(Layout("megatron", "bf16", world=64, **degrees))

    one, two = megatron(), megatron(cp=2)
    assert two["attention"] < 0.7 * one["attention"] and two["experts"] == pytest.approx(one["experts"] / 2, rel=0.01)
    assert two["weights"] == one["weights"]
    assert megatron(ep=8)["weights"] < 0.21 * one["weights"]
    assert megatron(tp=4)["norms"] == pytest.approx(one["norms"] / 4, rel=0.01)
    assert megatron(recompute=True)["experts"] < 0.5 * one["experts"]
    assert megatron(recompute_layers=True)["attention"] < 0.2 * one["attention"]
    sharded = memory(Layout("deepspeed", "bf16", world=64, zero=3))
    assert sharded["weights"] == pytest.approx(one["weights"] / 64, rel=0.01)


def test_micro_batches_in_flight() -> None:
    """1F1B: as many as stages follow. Interleaved, with 4 stages of 2 chunks and 8 micro-batches: 11 chunks to 5."""
    layout = Layout("megatron", world=4, pp=4)
    assert [in_flight(layout, stage, 8) for stage in range(4)] == [4, 3, 2, 1]
    assert [in_flight(layout, stage, 2) for stage in range(4)] == [2, 2, 2, 1]
    layout = replace(layout, interleave=2)
    assert [in_flight(layout, stage, 8) for stage in range(4)] == [11, 9, 7, 5]
    assert in_flight(layout, 0, 4) == 8


def test_the_first_stage_has_the_encoders_and_the_last_the_head() -> None:
    layout = Layout("megatron", "bf16", world=8, pp=4)
    job = Job(usual_pack(RELEASED, 8192, 0.3), microbatches=8)
    stages = [stage_memory(RELEASED, layout, job, stage, [9, 14, 15, 10]).parts for stage in range(4)]
    assert stages[0]["encoders"] > 0 and not any(parts["encoders"] for parts in stages[1:])
    assert [parts["head"] > 0 or parts["logits"] > 0 for parts in stages[:3]] == [False] * 3
    assert stages[0]["norms"] / 9 > stages[1]["norms"] / 14 > stages[2]["norms"] / 15  # fewer micro-batches each


def test_media_of_the_usual_pack() -> None:
    pack = usual_pack(RELEASED, 32768, 0.3)
    heard = sum(frames // 100 * 13 for frames in pack.mel_lengths)
    assert heard == pytest.approx(0.15 * 32768, rel=0.03) and pack.patches / 4 == pytest.approx(0.15 * 32768, rel=0.03)
    assert usual_pack(RELEASED, 100) == Pack((100,), targets=100)


def test_a_layout_that_does_not_fit_says_what_would() -> None:
    layout = Layout("megatron", "bf16", world=64, ep=8)
    check_layout(RELEASED, layout)
    with pytest.raises(EngineError) as caught:
        check_fits(RELEASED, layout, 32768, 1, 40_000_000, 80 * GB)
    said = str(caught.value)
    assert "\n" not in said and said.startswith("engine.name=megatron needs ") and "and has 80.0: experts " in said
    assert said.endswith("GB") and "engine." in said.split(";")[1] and " fits in " in said
    words = [word.removeprefix("engine.").split("=") for word in said.split(";")[1].split() if "=" in word]
    changed = replace(layout, **{key: int(value) if value.isdigit() else value == "true" for key, value in words})
    assert memory_of(RELEASED, changed, Job(usual_pack(RELEASED, 32768))).total <= 80 * GB


def test_what_fits_is_returned_and_what_never_will_is_said() -> None:
    layout = Layout("megatron", "bf16", world=64, ep=8, recompute_layers=True)
    assert check_fits(RELEASED, layout, 8192, 4, 40_000_000, 141 * GB).total < 141 * GB
    with pytest.raises(EngineError, match="take more GPUs or a shorter data.sequence_length"):
        check_fits(RELEASED, Layout("local", precision="bf16"), 8192, 1, 40_000_000, 80 * GB)


def test_training_less_needs_less() -> None:
    layout = Layout("megatron", "bf16", world=8, ep=8)
    whole, encoders = memory(layout), memory(layout, train=("audio", "vision"))
    assert encoders["optimizer"] < 0.3 * whole["optimizer"] and encoders["weights"] == whole["weights"]
