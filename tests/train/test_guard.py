"""What the guard decides, on numbers: spikes, routing, stragglers, steps left out, lines that are valid JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from data.types import Batch
from tests.distributed import spawn
from tests.train import guard_cases
from train.engines import Shard, StepStats
from train.errors import EngineError, RecipeError
from train.guard import Back, Guard, named
from train.guard_config import GuardConfig, SpikeConfig, StragglerConfig
from train.journal import Journal
from train.recipe import load_recipe, spans
from train.routing_watch import RoutingWatch
from train.spikes import SpikeDetector
from train.stragglers import Stragglers, probe
from train.watch import NOTHING

SPAN = spans(load_recipe(["recipe=transcribe", "phases={a: {steps: 400}}"]))[0]
CPU = torch.device("cpu")


def stats(loss: float = 1.0, norm: float = 1.0, applied: bool = True) -> StepStats:
    return StepStats(loss, {"text": loss}, 1.0, norm, 1, 1, 0, {}, applied=applied)


class Run:
    """Notes what the guard says and asks for."""

    def __init__(self, checkpoints: tuple[int, ...] = ()) -> None:
        self.folder, self.events, self.saved, self.checkpoints = Path("RUN"), [], [], checkpoints

    def event(self, step: int, kind: str, text: str, **more: Any) -> None:
        json.dumps(more, allow_nan=False)
        self.events.append((step, kind, text))

    def save(self, engine: Any, step: int) -> None:
        self.saved.append(step)

    def checkpoint_before(self, step: int, first: int) -> Path | None:
        found = [each for each in self.checkpoints if first <= each <= step]
        return Path(f"step-{max(found):08d}") if found else None


def feed(guard: Guard, run: Run, step: int, found: StepStats) -> bool:
    """One step of the loop."""
    batch = dataclasses.replace(Batch.empty(128), keys=(f"a.tar:{step}", f"a.tar:{step}b"))
    guard.note(run, step, found, [batch], 0.0)
    return guard.odd and guard.act(run, None, step)  # type: ignore[arg-type]


def noisy(rng: random.Random, step: int) -> tuple[float, float]:
    """A loss that falls, and a norm that scatters by factors."""
    return 3 + 5 * math.exp(-step / 80) + rng.gauss(0, 0.1), math.exp(rng.gauss(0, 0.5))


def test_spikes_are_found_once_and_noise_is_none() -> None:
    for seed in range(5):
        rng, detector = random.Random(seed), SpikeDetector(SpikeConfig())
        assert not [found for step in range(1000) if (found := detector.take(*noisy(rng, step)))]
        values = [detector.take(8.0, 300.0) for _ in range(6)]
        assert [sorted(found) for found in values] == [[], [], ["loss", "norm"], [], [], []]
        assert values[2]["loss"] > 10 and values[2]["norm"] > 6
        assert not detector.take(3.0, 1.0)


def test_a_single_odd_step_and_a_falling_loss_are_no_spike() -> None:
    rng, detector = random.Random(0), SpikeDetector(SpikeConfig())
    for step in range(300):
        loss, norm = noisy(rng, step)
        assert not detector.take(loss * 3 if step % 50 == 49 else loss, norm)
    assert not detector.take(0.1, 1e-9)
    assert not SpikeDetector(SpikeConfig(steps=1)).take(1e9, 1e9), "nothing to compare with yet"


def test_a_detector_goes_on_where_its_state_was_taken() -> None:
    rng = random.Random(1)
    values = [noisy(rng, step) for step in range(60)] + [(9.0, 1.0)] * 5
    whole = SpikeDetector(SpikeConfig(window=40))
    expected = [whole.take(*value) for value in values]
    for cut in (10, 59, 61, 62):
        first = SpikeDetector(SpikeConfig(window=40))
        for value in values[:cut]:
            first.take(*value)
        second = SpikeDetector(SpikeConfig(window=40), json.loads(json.dumps(first.state())))
        assert [second.take(*value) for value in values[cut:]] == expected[cut:]


def test_skips_are_said_counted_and_stop_the_run() -> None:
    run, guard = Run(), Guard(GuardConfig(max_skipped=3, skip_window=10), SPAN, CPU)
    for step in (1, 2, 13, 16):
        assert not feed(guard, run, step, stats(math.nan, math.nan, applied=False))
    assert [event[:2] for event in run.events] == [(step, "skipped_step") for step in (1, 2, 13, 16)]
    assert "the loss is not finite: no update was made (1 of the last 10 steps" in run.events[0][2]
    assert run.events[0][2].endswith("Samples: a.tar:1, a.tar:1b")
    with pytest.raises(EngineError, match=r"in 3 of the last 10 steps \(guard.max_skipped=3\).*saved as step 17"):
        feed(guard, run, 17, stats(1.0, math.inf, applied=False))
    assert run.saved == [17] and guard.left_out == 5 and "the gradient is not finite" in run.events[-1][2]
    again = Guard(guard.config, SPAN, CPU, memory=json.loads(json.dumps(guard.state())))
    assert again.left_out == 5 and again.state() == guard.state()


def test_a_spike_goes_back_passes_over_and_gives_up() -> None:
    config = GuardConfig(spike=SpikeConfig(rewind=True, steps=2, before=3, after=4, max_rewinds=2, window=20, least=10))
    run, guard, rng = Run((10, 20, 30)), Guard(config, SPAN, CPU), random.Random(0)
    for step in range(1, 31):
        assert not feed(guard, run, step, stats(1 + rng.gauss(0, 0.01)))
    assert not feed(guard, run, 31, stats(9.0))
    assert feed(guard, run, 32, stats(9.0))
    back = guard.back
    assert back is not None and back.checkpoint == Path("step-00000020")  # that of 30 is not before the data of 28
    assert back.passed == (27, 28, 29, 30, 31, 32, 33) and "past the data of steps 28 to 34" in back.text
    second = Guard(config, SPAN, CPU, back=back)
    assert second.passed == {*back.passed} and second.rewinds == 1
    assert Guard(config, SPAN, CPU, memory=second.state()).passed == second.passed
    third = Guard(config, SPAN, CPU, back=dataclasses.replace(back, rewinds=2))
    for step in range(1, 31):
        feed(third, run, step, stats(1 + rng.gauss(0, 0.01)))
    feed(third, run, 31, stats(9.0))
    with pytest.raises(EngineError, match="spiked again after 2 returns"):
        feed(third, run, 32, stats(9.0))


def test_passed_over_steps_run_without_an_update() -> None:
    class Engine:
        shard = Shard(0, 1)

        def train_step(self, microbatches: Any, lr: float, look: Any) -> StepStats:
            return stats()

    guard = Guard(GuardConfig(), SPAN, CPU, back=Back(None, (4,), 1, ""))
    batch = dataclasses.replace(Batch.empty(128), skipped=("a line",))
    assert guard.step(Engine(), 3, [batch], 0.1, NOTHING).applied  # type: ignore[arg-type]
    found = guard.step(Engine(), 4, [batch], 0.1, NOTHING)  # type: ignore[arg-type]
    assert not found.applied and found.num_skipped == 1
    run = Run()
    guard.note(run, 5, found, [batch], 0.0)
    assert guard.left_out == 1 and not guard.odd and not run.events


def test_dead_experts_are_named_once() -> None:
    watch, said = RoutingWatch(5, 0.0, 0), []
    for step in range(1, 40):
        share_LE = torch.full((2, 4), 0.25)
        if step > 3:
            share_LE[1, 2] = 0
        if step > 12:
            share_LE[0, 1] = 0
        if step == 30:
            share_LE[1, 2] = 0.1  # it lives for a step
        said += [(step, event) for event in watch.take({"talker.router.expert_share": share_LE})]
    assert [step for step, _ in said] == [8, 17, 35]
    assert said[0][1].kind == "dead_experts" and said[0][1].more["experts"] == {"1": [2]}
    assert said[0][1].text.startswith("talker: experts (layer.expert) 1.2 have received no token for 5 steps; 1 of 8")


def test_many_dead_experts_are_one_line() -> None:
    watch = RoutingWatch(3, 0.0, 0)
    said = [event for _ in range(50) for event in watch.take({"router.expert_share": torch.eye(4, 64)})]
    assert len(said) == 1 and "and 232 more" in said[0].text and said[0].more["dead"] == 252


def test_collapse_is_named_by_layer() -> None:
    watch, even = RoutingWatch(0, 0.3, 4), torch.full((3, 16), 1 / 16)
    narrow = even.clone()
    narrow[1] = torch.tensor([0.5, 0.5] + [0.0] * 14)
    said = [list(watch.take({"router.expert_share": share})) for share in [even, *[narrow] * 9, even, *[narrow] * 4]]
    assert [index for index, events in enumerate(said) if events] == [4, 14]
    assert said[4][0].text == (
        "thinker: routers have collapsed for 4 steps: layer 1 uses its experts as if it had 2.0, expert 0 takes 50%"
    )


def test_no_false_alarm_on_even_ranks_in_200_windows() -> None:
    """Recorded: two ranks that share two busy cores with others (tests/train/guard_cases.py, `record`)."""
    windows = json.loads((Path(__file__).parent / "straggler_windows.json").read_text())
    judge = Stragglers(StragglerConfig(), 2)
    assert len(windows) == 200
    for own, probes, step_s in windows:
        assert not judge.take(own, probes, step_s)


@pytest.mark.parametrize("what", ["data", "arithmetic"])
def test_a_slow_rank_is_named_within_three_windows(what: str) -> None:
    rng, judge, named_in = random.Random(0), Stragglers(StragglerConfig(), 4), []
    for window in range(20):
        own = [rng.uniform(0.1, 0.12) for _ in range(4)]
        probes = [rng.uniform(1e-3, 1.1e-3) for _ in range(4)]
        (own if what == "data" else probes)[2] *= 1.8 if window >= 10 else 1
        named_in += [(window, slow.rank, slow.what) for slow in judge.take(own, probes, 0.5)]
    assert named_in == [(12, 2, what)]  # once


def test_a_sleeping_rank_is_named() -> None:
    """Two processes, windows of three steps: named by both, once, at the end of the third."""
    for said in spawn(guard_cases.sleeper, 2, 0.05, 5, 3):
        data = [each for each in said if each[3]["in"] == "data"]
        assert [each[:2] for each in data] == [[9, "straggler"]]
        assert "rank 1 on host n2 is slow: it waits for its data 0.05" in data[0][2]


def test_the_probe_is_short() -> None:
    assert 0 < probe(CPU) < 0.1


def test_the_journal_is_valid_json_and_survives_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    path, write = tmp_path / "metrics.jsonl", os.write
    journal = Journal(path, said.append)
    journal.write({"step": 1, "loss": math.nan, "loads": [1.0, math.inf], "terms": {"text": -math.inf}})
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:5]))  # room for a part of a line
    assert not journal.write({"step": 2}) and not journal.write({"step": 3})
    monkeypatch.setattr(os, "write", write)
    assert journal.write({"step": 4})
    journal.close()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert lines == [{"step": 1, "loss": None, "loads": [1.0, None], "terms": {"text": None}}, {"step": 4}]
    assert len(said) == 2 and "no space left" in said[0] and "2 were left out" in said[1]


def test_keys_in_a_line() -> None:
    assert named([]) == "none" and named(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("guard.max_skipped=0", "guard.max_skipped=0: it must be at least 1"),
        ("guard.max_skipped=200", "cannot be above guard.skip_window=100"),
        ("guard.spike.least=500", "guard.spike.least=500: it cannot be above guard.spike.window=128"),
        ("guard.straggler.factor=0.5", "guard.straggler.factor=0.5: it must be at least 1"),
        ("guard.hang_s=-1", "guard.hang_s=-1.0: it must be at least 0"),
        ("guard.hangs=3", "unknown setting 'guard.hangs', did you mean 'guard.hang_s'"),
    ],
)
def test_settings_that_cannot_be(setting: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(["recipe=transcribe", setting])
