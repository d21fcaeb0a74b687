"""The GPU suite on a CPU: its driver's promises, its routings, its wheels' pins, and all of it at toy size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import drive, measure, part, peers, thinker, wheels
from bench.gpu.sizes import natural_lengths, sizes

pytest.importorskip("transformers", reason="transformers is the suite's peer")
CPU, ROOT = torch.device("cpu"), Path(__file__).resolve().parents[1]
LATER = 600.0


def figures(report: Any) -> Iterator[dict[str, Any]]:
    """Everything in a report that is a number with a unit."""
    if isinstance(report, list):
        report = dict(enumerate(report))
    if isinstance(report, dict):
        if "value" in report:
            yield report
        for entry in report.values():
            yield from figures(entry)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "cpu", "--toy", "mow"], "no part is called 'mow'; parts are contract-local,"),
        (["--device", "cpu"], "the released sizes are for a GPU; add --toy"),
        (["--device", "tpu"], "--device must be cuda or cpu, not 'tpu'"),
    ],
)
def test_wrong_calls(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert drive.main([*words, "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()


def test_without_a_gpu_the_call_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert drive.main(["--out", str(tmp_path)]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err


def test_a_piece_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def slow(clock: measure.Clock) -> dict[str, Any]:
        object.__setattr__(clock, "deadline", time.monotonic())  # as if it had taken all the time there is
        return {"status": "ok"}

    pieces = {"bad": lambda clock: {}["no"], "good": lambda clock: {"status": "ok"}, "slow": slow, "late": slow}
    monkeypatch.setattr(part, "pieces_of", lambda *_: pieces)
    out = tmp_path / "part.json"
    report = part.run("any", CPU, True, LATER, out)
    assert json.loads(out.read_text()) == report and report["status"] == "ok"
    found = {name: entry["status"] for name, entry in report["pieces"].items()}
    assert found.pop("bad").startswith("error: KeyError: 'no' (test_gpu_suite.py:")
    assert found == {"good": "ok", "slow": "ok", "late": "skipped: time"}


def test_a_candidate_that_fails_leaves_the_others() -> None:
    def fails() -> torch.Tensor:
        raise torch.OutOfMemoryError("too much\nand more")

    def lacks() -> torch.Tensor:
        raise RuntimeError("no kernel")

    works = {"fails": fails, "lacks": lacks, "good": lambda: torch.ones(4), "other": lambda: 1.5 * torch.ones(4)}
    clock = measure.Clock(time.monotonic() + LATER)
    done = measure.Work(10, 1e9)
    found = measure.compared(works, CPU, 5, clock, clean=lambda: None, done=done, side=8, gradient="it")
    rows = found["rows"]
    assert rows["fails"] == {"status": "out of memory: too much"}
    assert rows["lacks"]["status"].startswith("error: RuntimeError: no kernel")
    assert rows["good"]["status"] == "ok" and rows["good"]["speed"]["unit"] == "tokens/s"
    assert found["status"] == "failed: the candidates differ by 5.0e-01, above 0.05"
    failed = drive.failures({"part": {"status": "ok", "pieces": {"piece": found}}})
    assert len(failed) == 2 and failed[1].startswith("part, piece, lacks: error")


def test_time_that_is_over_is_said() -> None:
    works = {"one": lambda: torch.ones(4)}
    clock, done = measure.Clock(time.monotonic() - 1), measure.Work(10, 1e9)
    found = measure.compared(works, CPU, 5, clock, clean=lambda: None, done=done, side=8, gradient="it")
    assert found["rows"] == {"one": {"status": "skipped: time"}}


@pytest.mark.parametrize(("status", "said"), [(None, "skipped: time; killed while it ran"), (-9, "status -9: Aborted")])
def test_a_part_that_does_not_end(status: int | None, said: str, tmp_path: Path) -> None:
    (tmp_path / "log").write_text("much\nAborted (core dumped)\n\n")
    pieces = {"done": {"status": "ok"}, "now": {"status": "running"}, "next": {"status": "skipped: time"}}
    report = drive.settled({"status": "running", "pieces": pieces}, status, tmp_path / "log")
    assert said in report["status"] and said in pieces["now"]["status"]
    assert (pieces["done"]["status"], pieces["next"]["status"]) == ("ok", "skipped: time")


def test_a_part_is_killed_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The import of torch alone takes longer than this part may."""
    monkeypatch.setattr(drive, "GRACE", 0.0)
    monkeypatch.setattr(drive, "SHARES", {"moe": 1})
    began = time.monotonic()
    assert drive.main(["--device", "cpu", "--toy", "--seconds", "0.3", "--out", str(tmp_path)]) == 0
    assert time.monotonic() - began < 10
    assert json.loads((tmp_path / "gpu.json").read_text())["parts"]["moe"]["status"].startswith("skipped: time")


def test_released_sizes_are_those_of_the_recipe() -> None:
    found = sizes(toy=False)
    thinker_text, talker = found.thinker, found.talker
    assert (thinker_text.num_hidden_layers, thinker_text.vocab_size, thinker_text.num_experts) == (12, 152_064, 128)
    assert (talker.text.num_hidden_layers, talker.num_code_groups, talker.code_predictor.hidden_size) == (20, 16, 1024)
    assert found.packs == (4_096, 32_768) and found.rounds >= measure.LEAST_ROUNDS


def test_documents_fill_a_pack() -> None:
    lengths = natural_lengths(32_768, 400)
    assert sum(lengths) == 32_768 and min(lengths) > 0 and lengths == natural_lengths(32_768, 400)
    assert sorted(lengths)[len(lengths) // 2] in range(250, 600)


def test_routings_do_what_they_say() -> None:
    """Balanced is exact, skewed is heavy, natural lies between; and both sides share every weight."""
    models = next(iter(thinker.pieces(sizes(toy=True), CPU).values())).args[0]  # type: ignore[attr-defined]
    batch = thinker.pack(models.sizes, 512, CPU)
    load = {kind: thinker.set_routing(models, batch, kind) for kind in peers.ROUTINGS}
    assert load["balanced"] == 1.0
    assert 1.0 < load["natural"] < 2.0 < load["skewed"]
    mine = {parameter.data_ptr() for parameter in models.ours.parameters()}
    assert {parameter.data_ptr() for parameter in models.theirs.parameters()} == mine


def test_both_sides_see_the_same_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that attends across documents is found out by its gradient."""
    right = thinker.make_segments
    models = next(iter(thinker.pieces(sizes(toy=True), CPU).values())).args[0]  # type: ignore[attr-defined]
    clock = measure.Clock(time.monotonic() + LATER)
    assert thinker.measure(models, 512, "natural", clock)["status"] == "ok"
    monkeypatch.setattr(thinker, "make_segments", lambda lengths, device: right((sum(lengths),), device))
    assert thinker.measure(models, 512, "natural", clock)["status"].startswith("failed: the candidates differ")


def test_wheels_need_exact_versions(tmp_path: Path) -> None:
    path = tmp_path / "constraints.txt"
    path.write_text("# exact\nRapidFuzz==3.14.6\nmegatron_core==0.16.1  # why\nloose>=2\n")
    found = wheels.pins(path)
    assert found == {"rapidfuzz": "3.14.6", "megatron-core": "0.16.1"}
    with pytest.raises(wheels.WheelError, match="constraints.txt has no version of einops"):
        wheels.build(tmp_path, "3.12", found)


def run_suite(device: str, out: Path) -> dict[str, Any]:
    """The whole suite at toy size, with the libraries of this environment instead of wheels."""
    command = [sys.executable, "-m", "bench.gpu.drive", "--device", device, "--toy", "--out", str(out)]
    command += ["--seconds", "1200"]  # the machine may be busy
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads((out / "gpu.json").read_text())


def check_report(report: dict[str, Any]) -> None:
    """Every part is there and ran without error; every figure has its unit and how it was measured."""
    assert list(report["parts"]) == list(drive.SHARES)
    assert report["commit"] and report["versions"]["torch"] and report["toy"]
    for name, entry in report["parts"].items():
        assert entry["status"] == "ok" and entry["pieces"], name
        for piece, found in entry["pieces"].items():
            assert found["status"] in ("ok", "skipped: no megatron engine"), (name, piece)
            assert all(row["status"] == "ok" for row in found.get("rows", {}).values()), (name, piece)
    numbers = list(figures(report["parts"]))
    assert len(numbers) > 300 and all(number["unit"] and number["how"] for number in numbers)


@pytest.mark.slow
@pytest.mark.timeout(1300)
def test_the_whole_suite_at_toy_size(tmp_path: Path) -> None:
    check_report(run_suite("cpu", tmp_path))


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_whole_suite_at_toy_size_on_a_gpu(tmp_path: Path) -> None:
    check_report(run_suite("cuda", tmp_path))
