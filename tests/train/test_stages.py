"""Which layouts can be, and how layers are dealt to pipeline stages."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.config import AudioConfig, TextConfig, ThinkerConfig, VisionConfig
from models.omni_config import CodePredictorConfig, OmniConfig, TalkerConfig
from train.errors import EngineError
from train.parallel import Layout, check_layout, check_microbatches, check_sequence
from train.stages import encoder_layers, head_layers, stage_layers, stages_of

TEXT = TextConfig(152064, 2048, 48, 32, 4, 128, 128, 8, 768)
AUDIO = AudioConfig(1280, 32, 20, 5120, 2048)
VISION = VisionConfig(27, 1152, 4304, 16, 2048)
RELEASED = ThinkerConfig(TEXT, AUDIO, 1, VISION, 2, 3)
TALKER = TalkerConfig(
    TextConfig(3072, 1024, 20, 16, 2, 128, 128, 6, 384, shared_expert_intermediate_size=768),
    CodePredictorConfig(2048, 1024, 3072, 5, 16, 8, 128),
    2048,
    24,
)


def megatron(**degrees: Any) -> Layout:
    return Layout("megatron", precision="bf16", **({"world": 64} | degrees))


@pytest.mark.parametrize(
    ("degrees", "said"),
    [
        ({"tp": 3}, "engine.tp=3 does not divide the 4 key-value heads of the thinker"),
        ({"tp": 8}, "engine.tp=8 does not divide the 4 key-value heads of the thinker"),
        ({"ep": 3}, "engine.ep=3 does not divide the 128 experts of the thinker"),
        ({"ep": 128}, "engine.ep=128 does not divide the 64 processes of the run"),
        ({"expert_tp": 5}, "engine.expert_tp=5 does not divide moe_intermediate_size=768 of the thinker"),
        ({"cp": 3}, "engine.tp=1 x engine.pp=1 x engine.cp=3 = 3 does not divide the 64 processes of the run"),
        ({"ep": 32, "pp": 4}, "engine.ep=32 x engine.pp=4 does not divide the 64 processes of the run"),
        ({"pp": 64}, "engine.pp=64 is more than the 48 layers of the thinker allow, of which the first 3 stay"),
        ({"interleave": 2}, "engine.interleave=2 needs engine.pp above 1"),
        ({"pp": 32, "interleave": 2}, "engine.pp=32 x engine.interleave=2 does not divide the 48 layers"),
        ({"pp": 8, "interleave": 3}, "leaves 2 layers to the first chunk of the thinker; DeepStack needs 3"),
        ({"tp": 0}, "engine.tp=0: it must be at least 1"),
        ({"offload": True}, "engine.offload=true is deepspeed's"),
    ],
)
def test_layouts_that_cannot_be(degrees: dict[str, Any], said: str) -> None:
    with pytest.raises(EngineError) as caught:
        check_layout(RELEASED, megatron(**degrees))
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (Layout("local", world=2), "engine.name=local is one process"),
        (Layout("local", ep=2), "engine.ep=2 needs engine.name=deepspeed or megatron"),
        (Layout("deepspeed", world=2, tp=2), "engine.tp=2 needs engine.name=megatron"),
        (Layout("deepspeed", world=2, zero=4), "engine.zero=4; it is 1, 2 or 3"),
        (Layout("tensorflow"), "engine.name=tensorflow; it is one of local, deepspeed, megatron"),
    ],
)
def test_engines_that_cannot(layout: Layout, said: str) -> None:
    with pytest.raises(EngineError, match=said):
        check_layout(RELEASED, layout)


def test_layouts_that_can_be() -> None:
    for degrees in ({}, {"tp": 4, "ep": 8, "pp": 4}, {"ep": 64}, {"pp": 4, "interleave": 4}, {"cp": 8, "tp": 2}):
        check_layout(RELEASED, megatron(**degrees))
    layout = megatron(tp=2, cp=2, pp=2, ep=4, expert_tp=2)
    assert (layout.dp, layout.dense_dp, layout.expert_dp) == (8, 16, 4)


def test_the_talker_counts_too() -> None:
    with pytest.raises(EngineError, match="engine.tp=4 does not divide the 2 key-value heads of the talker"):
        check_layout(OmniConfig(RELEASED, TALKER), megatron(tp=4))


def test_sequences_and_microbatches() -> None:
    check_sequence(megatron(cp=4, tp=2), 4096)
    check_sequence(Layout(), 4097)
    with pytest.raises(EngineError, match=r"4100 is not a multiple of 2 x engine.cp=4 x engine.tp=2 = 16; take 4096"):
        check_sequence(megatron(cp=4, tp=2), 4100)
    check_microbatches(megatron(pp=4, interleave=2), 8)
    with pytest.raises(EngineError, match="engine.interleave=2 needs micro-batches"):
        check_microbatches(megatron(pp=4, interleave=2), 6)


@given(
    st.integers(1, 12),
    st.integers(1, 4),
    st.floats(0, 6),
    st.floats(0, 6),
    st.integers(1, 3),
)
def test_no_deal_is_better(layers: int, pp: int, encoders: float, head: float, first: int) -> None:
    """Against every way to cut the layers."""
    if layers < first + pp - 1:
        with pytest.raises(EngineError):
            stage_layers(layers, pp, 1, encoders, head, first)
        return

    def cost(counts: list[int]) -> float:
        costs = [float(count) for count in counts]
        costs[0] += encoders
        costs[-1] += head
        return max(costs)

    found = stage_layers(layers, pp, 1, encoders, head, first)
    assert sum(found) == layers and len(found) == pp and found[0] >= first and min(found) >= 1
    ways = []
    for cuts in combinations(range(1, layers), pp - 1):
        bounds = [0, *cuts, layers]
        counts = [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]
        if counts[0] >= first:
            ways.append(cost(counts))
    assert cost(found) == pytest.approx(min(ways))


def test_interleaved_chunks_are_equal() -> None:
    assert stage_layers(48, 4, 4, encoders=9.0) == [3] * 16
    for pp, interleave, said in ((5, 2, "does not divide 48"), (8, 6, "leaves 1 layers")):
        with pytest.raises(EngineError, match=said):
            stage_layers(48, pp, interleave, least_first=3)


def test_costs_of_the_ends_in_layers() -> None:
    """The head is 311 M weights where a layer meets 56.9 M and attends; encoders grow with the share of media."""
    assert head_layers(RELEASED) == pytest.approx(4.23, abs=0.01)
    assert encoder_layers(RELEASED, 0.0) == 0.0
    assert encoder_layers(RELEASED, 0.4) == pytest.approx(4 * encoder_layers(RELEASED, 0.1))
    deaf = replace(RELEASED, vision=None, image_token_id=None, video_token_id=None)
    assert encoder_layers(deaf, 0.4) < encoder_layers(RELEASED, 0.4)
    counts = stages_of(RELEASED, 4, media_share=0.3)
    assert sum(counts) == 48 and counts[0] < counts[1] > counts[3]
