"""The engine contract under Megatron: every layout gives the numbers of one process, and its state goes on anywhere.

See tests/train/engine_cases.py for the model and the batches: ranks without media or tokens, uneven masks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import spawn
from tests.train import engine_cases as cases
from tests.train import megatron_cases, speech_cases
from tests.train.test_engine_contract import assert_close, assert_same_state
from train.engines import MOMENTS, WEIGHT
from train.engines.build import build_engine
from train.errors import EngineError

pytest.importorskip("megatron.core", reason="the extra `megatron` is not installed")
NAMES = [*megatron_cases.TWO, *megatron_cases.FOUR]
BIAS = "audio_tower.layers.0.self_attn.k_proj.bias"  # softmax ignores it: its gradient is rounding


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("megatron")


@pytest.fixture(scope="module")
def local(folder: Path) -> dict[str, Any]:
    """The reference: numbers of the steps, evaluation, and what steps after it give."""
    torch.set_num_threads(1)
    engine = build_engine(cases.setup("local"))
    found = {"rows": cases.run(engine, str(folder), "local"), "look": cases.look(engine)}
    found["after"] = cases.train(engine, cases.STEPS, cases.STEPS + 1)
    found["later"] = cases.train(build_engine(cases.setup("local")), 0, cases.SAVED + megatron_cases.LATER)
    return found


@pytest.fixture(scope="module")
def four(local: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    return spawn(megatron_cases.four_processes, 4, str(folder), timeout=280)


@pytest.fixture(scope="module")
def two(four: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    return spawn(megatron_cases.two_processes, 2, str(folder), timeout=280)


def found_by_rank(name: str, two: list[dict[str, Any]], four: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [found["layouts"][name] for found in (two if name in megatron_cases.TWO else four)]


def check_layout(name: str, found: list[dict[str, Any]], local: dict[str, Any], folder: Path) -> None:
    """Rows and state are local's on every rank, and so they are after a restore."""
    for each in found:
        assert_close(each["rows"], local["rows"])
        assert_close(each["after"], local["after"], rtol=2e-5)
        rows, differing = each["restored"]
        assert not differing
        assert_close(rows, local["rows"][cases.SAVED :])
    assert_same_state(cases.load(str(folder), f"{name}-last"), cases.load(str(folder), "local-last"))


@pytest.mark.parametrize("name", NAMES)
def test_layouts_equal_local(
    name: str, local: dict[str, Any], two: list[dict[str, Any]], four: list[dict[str, Any]], folder: Path
) -> None:
    check_layout(name, found_by_rank(name, two, four), local, folder)


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_equals_local(
    name: str, local: dict[str, Any], two: list[dict[str, Any]], four: list[dict[str, Any]]
) -> None:
    found = found_by_rank(name, two, four)
    answers: dict[int, Any] = {}
    nats = {each["shard"][0]: each["look"]["nats"] for each in found}
    for each in found:
        assert_close(each["look"]["sums"], local["look"]["sums"])
        index, count = each["shard"]
        assert answers.setdefault(index, each["look"]["answers"]) == each["look"]["answers"], "replicas disagree"
    whole = nats[0] if count == 1 else nats[1][:3] + nats[0] + nats[1][3:]
    for mine, expected in zip(whole, local["look"]["nats"], strict=True):
        assert mine == pytest.approx(expected, rel=1e-5)
    if count == 1:
        assert answers[0] == local["look"]["answers"]
    else:  # as the documents are dealt by engine_cases.look
        first, second = answers[0], answers[1]
        assert second[:3] + first + second[3:] == local["look"]["answers"]


@pytest.mark.parametrize("target", ["local", "pp2", "deepspeed-ep2", "ep4"])
def test_another_layout_goes_on(
    target: str, local: dict[str, Any], two: list[dict[str, Any]], four: list[dict[str, Any]], folder: Path
) -> None:
    """Saved at tp=2 x ep=2: state bit-equal, and the next ten losses and norms those of the unbroken local run."""
    if target == "local":
        state = cases.load(str(folder), "tp2-ep2-saved")
        rows, differing = megatron_cases.ten_more(build_engine(cases.setup("local")), state)
    else:
        rows, differing = (four if target == "ep4" else two)[0][target]
    assert not differing
    assert_close(rows, local["later"][cases.SAVED :])


def test_an_expert_without_tokens_keeps_its_state(two: list[dict[str, Any]]) -> None:
    assert two[0]["unused"] == []


@pytest.mark.parametrize("index", range(len(megatron_cases.PHASE_CASES)), ids=str)
def test_phases_with_frozen_parameters(index: int, two: list[dict[str, Any]], folder: Path) -> None:
    """Two phases in one process, with scaled learning rates. Frozen weights keep their bits."""
    label, _, precision = megatron_cases.PHASE_CASES[index]
    expected_rows = cases.phases(f"local-{precision}", str(folder), name="local", precision=precision)
    before = cases.gather(build_engine(cases.setup("local")))
    for number, rows in enumerate(two[0]["phases"][index]):
        got = cases.load(str(folder), f"megatron-{label}-{precision}-{number}")
        expected = cases.load(str(folder), f"local-{precision}-{number}")
        assert got.keys() == expected.keys()
        frozen = {key for key in got if key.startswith(WEIGHT) and not got.kinds(key.split("|")[1]) & set(MOMENTS)}
        assert any(".experts." in key for key in frozen)
        assert not frozen & set(before.differs(got))
        before = cases.State(got)
        # bf16: rounding sends some tokens to other experts; fp32: AdamW makes rounding of a tower's gradients large
        columns = 3 if precision == "bf16" else cases.TOWERS
        theirs = [row[:columns] for row in expected_rows[number]]
        assert_close([row[:columns] for row in rows], theirs, rtol=1e-5 if precision == "fp32" else 1e-2)
        if precision == "fp32":
            assert_close(rows, expected_rows[number], rtol=2e-4)
            for state in (got, expected):
                state.pop(f"{WEIGHT}|{BIAS}")
            assert_same_state(got, expected, rtol=5e-3)  # AdamW makes rounding of small gradients large


@pytest.fixture(scope="module")
def spoken_locally() -> dict[str, Any]:
    torch.set_num_threads(1)
    found = {}
    for way in megatron_cases.WAYS:
        engine = build_engine(speech_cases.setup("local", way))
        found[way] = {"rows": speech_cases.train(engine), "state": speech_cases.gather(engine)}
    return found


def check_speech(world: int, expected: dict[str, Any]) -> None:
    """Terms, norms, shares and the state of the Talker's last layer are local's, for every way the Talker learns."""
    for found in spawn(megatron_cases.speech, world, world, timeout=280):
        for name, each in found.items():
            theirs = expected[name.split("-")[0]]
            assert_close(each["rows"], theirs["rows"])
            assert each["keys"] == sorted(theirs["state"])
            for key, values in each["state"].items():
                right = theirs["state"][key]
                assert (torch.tensor(values) - right).norm() < 1e-5 * right.norm() + 1e-7, (name, key)


def test_speech_on_two_processes(spoken_locally: dict[str, Any]) -> None:
    check_speech(2, spoken_locally)


@pytest.mark.slow
def test_speech_on_four_processes(spoken_locally: dict[str, Any]) -> None:
    check_speech(4, spoken_locally)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_more_layouts(world: int, local: dict[str, Any], folder: Path) -> None:
    found = spawn(megatron_cases.more_layouts, world, str(folder), world, timeout=290)
    for name in found[0]:
        check_layout(name, [each[name] for each in found], local, folder)


def test_interleaved_schedule() -> None:
    torch.set_num_threads(1)
    expected = cases.train(build_engine(megatron_cases.deeper(cases.setup("local"))), 0, cases.STEPS)
    spoken = speech_cases.train(build_engine(megatron_cases.deeper(speech_cases.setup("local", "live"))))
    for found in spawn(megatron_cases.interleaved, 2):
        for rows in found["thinker"]:
            assert_close(rows, expected)
        for rows in found["talker"]:
            assert_close(rows, spoken)


def test_one_process_without_torchrun(local: dict[str, Any]) -> None:
    (rows,) = spawn(one_process, 1)
    assert_close(rows, local["rows"])


def one_process() -> list[list[float]]:
    engine = build_engine(cases.setup("megatron"))
    rows = cases.train(engine, 0, cases.STEPS)
    engine.close()
    return rows


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ({"tp": 4}, "engine.tp=4 does not divide the 2 key-value heads of the thinker"),
        ({"ep": 3}, "engine.ep=3 does not divide the 8 experts of the thinker"),
        ({"tp": 2}, "= 2 does not divide the 1 processes of the run"),
        ({"pp": 2, "cp": 2}, "does not divide the 1 processes of the run"),
        ({"interleave": 2}, "engine.interleave=2 needs engine.pp above 1"),
    ],
)
def test_layouts_that_cannot_be(degrees: dict[str, int], message: str) -> None:
    """Refused before a model is made."""
    with pytest.raises(EngineError, match=message):
        build_engine(cases.setup("megatron", **degrees))
