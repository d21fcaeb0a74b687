"""A run that is killed and goes on is the run that was never killed."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest

from tests.run_kit import command, finish, keys, kill, losses, start, wait_for_step, write_corpus
from train.main import main


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


LONG = "phases.all.steps=60"  # seconds, not a part of one: whoever watches a run for a step is not too late


@pytest.fixture(scope="module")
def unbroken(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("unbroken") / "run"
    finish(start(command(corpus, run, LONG)))
    assert len(losses(run)) == 60
    return run


def test_kill_9_and_resume_is_bit_identical(corpus: Path, unbroken: Path, tmp_path: Path) -> None:
    run, rng = tmp_path / "run", random.Random(4)
    for _ in range(2):  # killed twice, at random steps
        process = start(command(corpus, run, LONG))
        wait_for_step(process, run, max(losses(run), default=0) + rng.randint(1, 4))
        kill(process)
    output = finish(start(command(corpus, run, LONG)))
    assert "resumed at step" in output
    assert losses(run) == losses(unbroken)
    assert keys(run) == keys(unbroken)


def test_other_worker_counts_change_nothing(corpus: Path, unbroken: Path, tmp_path: Path) -> None:
    finish(start(command(corpus, tmp_path / "run", LONG, "data.workers=2")))
    assert losses(tmp_path / "run") == losses(unbroken) and keys(tmp_path / "run") == keys(unbroken)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_exits_0(
    corpus: Path, unbroken: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    process = start(command(corpus, run, LONG, "save.every=1000"))
    wait_for_step(process, run, 2)
    os.kill(process.pid, number)
    output = finish(process)
    assert "stopped as asked" in output and "Traceback" not in output
    step = max(losses(run))
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step-{step:08d}"
    assert step < 60, "the signal came too late to show anything"
    finish(start(command(corpus, run, LONG)))
    assert losses(run) == losses(unbroken) and keys(run) == keys(unbroken)


def test_phases_train_what_they_say(corpus: Path, tmp_path: Path) -> None:
    """Adapter, then encoder: frozen parameters stay bit-equal, the phase boundary survives a kill."""
    from train.checkpoint import CheckpointReader, candidates, verify

    settings = [
        "phases={adapter: {steps: 3, train: [audio_tower.proj1.*, audio_tower.proj2.*, audio_tower.ln_post.*]}, "
        "encoder: {steps: 3, train: [audio_tower.*], freeze: [audio_tower.proj*, audio_tower.ln_post.*]}}",
        "save.every=100",
        "save.keep=5",
    ]
    start_run, run = tmp_path / "zero", tmp_path / "run"
    finish(start(command(corpus, start_run, *settings, "optim.lr=1e-30", "max_steps=1")))
    output = finish(start(command(corpus, run, *settings)))
    assert "resumed at step 3" in output and len(losses(run)) == 6
    states = [CheckpointReader(verify(folder)) for folder in (candidates(start_run)[0], *reversed(candidates(run)))]
    assert [state.step for state in states] == [1, 3, 6]

    def changed(before: CheckpointReader, after: CheckpointReader) -> set[str]:
        names = before.names()
        read = [
            {name: state.read_released("weight", name, 0, _size(shape)) for name, shape in names.items()}
            for state in (before, after)
        ]
        return {name for name in names if (read[0][name] - read[1][name]).abs().max() > 1e-12}

    assert {name.split(".")[2] for name in changed(states[0], states[1])} == {"proj1", "proj2", "ln_post"}
    second = {name.split(".")[2] for name in changed(states[1], states[2])}
    assert {"conv2d1", "layers"} <= second and not second & {"proj1", "proj2", "ln_post"}
    assert all(name.startswith("thinker.audio_tower.") for name in changed(states[0], states[2]))


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def test_deepspeed_to_local_to_deepspeed(corpus: Path, unbroken: Path, tmp_path: Path) -> None:
    """Two processes with EP=2 and ZeRO-2, then one plain process, then two with ZeRO-3 and EP=1."""
    run = tmp_path / "run"
    layouts = [
        (["engine=deepspeed", "engine.zero=2", "engine.ep=2", "max_steps=4"], 2),
        (["engine=local", "max_steps=8"], 1),
        (["engine=deepspeed", "engine.zero=3", "engine.ep=1", "max_steps=12"], 2),
    ]
    for settings, processes in layouts:
        finish(start(command(corpus, run, LONG, *settings, processes=processes)))
    first = range(1, 13)
    assert losses(run) == pytest.approx({step: losses(unbroken)[step] for step in first}, rel=1e-5)
    assert keys(run) == {step: keys(unbroken)[step] for step in first}


@pytest.mark.slow
def test_megatron_to_local_to_megatron(corpus: Path, tmp_path: Path) -> None:
    """Tensor parallel, then one plain process, then experts on two ranks that share every pack."""
    pytest.importorskip("megatron.core", reason="the extra `megatron` is not installed")
    run, unbroken, heads = tmp_path / "run", tmp_path / "unbroken", "model.text.num_key_value_heads=2"
    finish(start(command(corpus, unbroken, heads)))
    layouts = [
        (["engine=megatron", "engine.tp=2", "max_steps=4"], 2),
        (["engine=local", "max_steps=8"], 1),
        (["engine=megatron", "engine.ep=2", "engine.cp=2"], 2),
    ]
    for settings, processes in layouts:
        output = finish(start(command(corpus, run, heads, *settings, processes=processes)))
        assert "Warning" not in output, output
    assert losses(run) == pytest.approx(losses(unbroken), rel=1e-5)
    assert keys(run) == keys(unbroken)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["engine.tp=2"], "engine.tp=2 does not divide the 1 key-value heads of the thinker"),
        (["engine.ep=3"], "engine.ep=3 does not divide the 4 experts of the thinker"),
        (["engine.pp=2"], "does not divide the 1 processes of the run"),
        (["engine.memory_gb=0.001"], "engine.name=megatron needs 0.0 GB a rank for packs of 96 tokens and has 0.0"),
        (["engine.dispatcher=deep"], "engine.dispatcher=deep, did you mean 'deepep'"),
        (["engine.dispatcher=deepep"], "engine.dispatcher=deepep needs the package deep_ep: install it, or set"),
        (["engine.transformer_engine=true"], "engine.transformer_engine=true needs the package transformer_engine"),
    ],
)
def test_layouts_of_megatron_that_cannot_be(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: list[str], message: str
) -> None:
    """One line, before a model is made."""
    arguments = command(corpus, tmp_path / "run", "engine=megatron", *settings)
    assert main(arguments[arguments.index("recipe=transcribe") :]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error, error


def test_another_models_checkpoint_is_refused_before_a_model_is_made(
    corpus: Path, unbroken: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.main.build_engine", lambda setup: pytest.fail("a model was made"))
    arguments = command(corpus, unbroken, "model.text.moe_intermediate_size=32", "phases.all.steps=61")
    assert main(arguments[arguments.index("recipe=transcribe") :]) == 2
    assert "moe_intermediate_size" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("settings", [["engine.zero=1"], ["engine.zero=2", "engine.ep=2"], ["engine.zero=3"]])
def test_kill_9_under_deepspeed(corpus: Path, tmp_path: Path, settings: list[str]) -> None:
    """Identical to 1e-6 to an unbroken run of the same layout."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    settings = ["engine=deepspeed", LONG, *settings]
    finish(start(command(corpus, whole, *settings, processes=2)))
    process = start(command(corpus, run, *settings, processes=2))
    wait_for_step(process, run, random.Random(str(settings)).randint(4, 9))
    kill(process)
    finish(start(command(corpus, run, *settings, processes=2)))
    assert losses(run) == pytest.approx(losses(whole), rel=1e-6)
    assert keys(run) == keys(whole)


def test_what_was_read_cannot_be_changed_between_phases(corpus: Path, tmp_path: Path) -> None:
    """Neither the settings of data that phases share, nor a phase that is over; what comes next can."""

    def run(*settings: str) -> tuple[int, str]:
        phases = "phases={a: {steps: 1}, b: {steps: 2}}"
        process = start(command(corpus, tmp_path / "run", phases, "save.every=1", *settings))
        output, _ = process.communicate(timeout=200)
        return process.returncode, output

    assert run("max_steps=1")[0] == 0
    over = "phases={a: {steps: 1, mixture: {}}, b: {steps: 2}}"
    for change in ("seed=7", over, "data.video.min_frames=6"):
        code, output = run("max_steps=2", change)
        assert code == 2 and "the data up to here is not the checkpoint's" in output, output
    code, output = run("phases={a: {steps: 1}, b: {steps: 2, mixture: {temperature: 2.0}}}")
    assert code == 0 and "realised" in output, output
