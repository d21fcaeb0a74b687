"""launch.slurm against a real SLURM of two nodes on this machine: training, preemption, failures, refusals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.launch.slurm_kit import PRETENDER, call, cluster, ended, job_of, log_of, ranks, submit, wait_until, why_not
from tests.run_kit import ROOT, command, finish, keys, losses, saved_settings, start, write_corpus
from train.checkpoint.saver import commit

if reason := why_not():
    pytest.skip(reason, allow_module_level=True)
NODES = ("nodes=2", "gpus_per_node=0", "time=10", "signal_s=60")
EXPERTS = ("engine=deepspeed", "engine.ep=2")
LONG = "phases.all.steps=40"  # seconds, not a part of one: whoever watches a run for a step is not too late


@pytest.fixture(scope="module", autouse=True)
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with cluster(tmp_path_factory.mktemp("slurm")):
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where pretended runs note what they were given; `plan` says what each attempt does."""
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "python").write_text(PRETENDER)
    (notes / "python").chmod(0o755)
    monkeypatch.setenv("NOTES", str(notes))
    return notes


def words(corpus: Path, run: Path, *settings: str) -> list[str]:
    """Settings of a run, without the launcher."""
    found = command(corpus, run, *settings)
    return found[found.index("recipe=transcribe") :]


def pretended(notes: Path, run: Path, plan: str, *settings: str) -> int:
    """Submit a run that does what the plan says, a word an attempt."""
    (notes / "plan").write_text("\n".join(plan.split()) + "\n")
    recipe = ("recipe=transcribe", f"run={run}")
    return submit(*NODES, f"python={notes / 'python'}", "env=NOTES", *recipe, *settings)


def tell(processes: Sequence[int], number: signal.Signals) -> None:
    for pid in processes:
        os.kill(pid, number)


def attempts(notes: Path) -> int:
    return len(list(notes.glob("*.0.words")))


@pytest.mark.timeout(600)  # three starts of two processes, in series
def test_two_nodes_train_are_preempted_and_finish_as_if_nothing_had_happened(corpus: Path, tmp_path: Path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    settings = (*EXPERTS, LONG, "save.every=1000")
    assert submit(*NODES, *words(corpus, run, *settings)) == 0
    wait_until(lambda: losses(run), run, 200)
    training = ranks(run)
    tell(training, signal.SIGSTOP)  # it is done before SLURM has made up its mind otherwise
    assert call("squeue", "-h", "-o", "%D %T").split() == ["2", "RUNNING"]
    call("sbatch", "--partition=urgent", "--nodes=1", "--exclusive", "--mem=0", "--output=/dev/null", "--wrap=true")
    wait_until(lambda: "CANCELLED" in log_of(run), run, 100)
    tell(training, signal.SIGCONT)
    wait_until(lambda: "attempt 2" in log_of(run), run, 100)
    saved = max(losses(run))
    assert saved < 40, "it came too late to show anything"
    state = ended(run, 200)
    log = log_of(run)
    assert state["JobState"] == "COMPLETED" and state["ExitCode"] == "0:0" and state["Restarts"] == "1", log
    assert "the run has saved and stopped; requeueing" in log and f"resumed at step {saved}" in log
    assert "the run is done" in log and "Traceback" not in log, log
    finish(start(command(corpus, whole, *settings, processes=2)))
    assert losses(run) == pytest.approx(losses(whole), rel=1e-6) and len(losses(run)) == 40
    assert keys(run) == keys(whole)
    assert {path.name for path in run.glob("keys-rank*")} == {"keys-rank0.jsonl", "keys-rank1.jsonl"}
    assert saved_settings(run / "slurm" / "1") == saved_settings(run)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_rank_that_is_killed_brings_all_down_and_the_job_up_again(corpus: Path, tmp_path: Path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    settings = (*EXPERTS, LONG)
    assert submit(*NODES, *words(corpus, run, *settings)) == 0
    wait_until(lambda: max(losses(run), default=0) >= 4, run, 200)
    processes = ranks(run)
    assert len(processes) == 2
    os.kill(processes[1], signal.SIGKILL)
    state = ended(run, 250)
    log = log_of(run)
    assert state["JobState"] == "COMPLETED" and state["Restarts"] == "1", log
    assert "restart 1 of 3 from step-0000000" in log and "resumed at step" in log, log
    finish(start(command(corpus, whole, *settings, processes=2)))
    assert losses(run) == pytest.approx(losses(whole), rel=1e-6)


def test_what_is_given_reaches_both_nodes(pretend: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is in it; the code and environment too, and nothing else of the environment."""
    monkeypatch.setenv("WANDB_API_KEY", "kept-5ecret")
    monkeypatch.setenv("UNRELATED", "1")
    monkeypatch.chdir(tmp_path)
    setup = tmp_path / "lines"
    setup.write_text('export FROM_SETUP="node $SLURM_NODEID"\n')
    run = tmp_path / "a run's [1] 100%"
    odd = [
        "data.shards=[a b/*.tar, \"it's.tar\", c,'{d}.tar']",
        "log.project='$HOME `id` \\n \"x\" #1; *'",
        'phases={a: {steps: 3, train: ["audio_tower.*"]}}',
    ]
    assert pretended(pretend, run, "done", f"setup={setup}", 'job_name=it is "x" [1]', *odd) == 0
    state = ended(run)
    assert state["JobState"] == "COMPLETED", log_of(run)
    assert call("squeue", "-h", "-t", "all", "-j", job_of(run), "-o", "%j").strip() == 'it is "x" [1]'
    for node in (0, 1):
        given = (pretend / f"1.{node}.words").read_text().split("\0")[:-1]
        after = given.index("launch.rank") + 1
        assert given[after:] == ["recipe=transcribe", f"run={run}", *odd]
        assert given[:2] == ["-m", "launch.torchrun"] and {"--nnodes=2", "--nproc-per-node=1"} <= set(given)
        seen = dict(line.split("=", 1) for line in (pretend / f"1.{node}.env").read_text().split("\0") if "=" in line)
        assert (
            seen["WANDB_API_KEY"] == "kept-5ecret" and seen["FROM_SETUP"] == f"node {node}" and "UNRELATED" not in seen
        )
        assert seen["PYTHONPATH"].split(":")[0] == str(run / "slurm" / "1" / "code")
        assert seen["PET_RDZV_CONF"] == f"is_host={1 - node}" and Path(seen["PWD"]) == tmp_path
    for path in (run / "slurm").rglob("*"):
        assert not path.is_file() or b"kept-5ecret" not in path.read_bytes(), path


def test_a_failing_run_is_restarted_up_to_the_limit(pretend: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert pretended(pretend, run, "fail fail done", "restarts=1") == 0
    state = ended(run)
    assert state["JobState"] == "FAILED" and state["ExitCode"] == "1:0" and attempts(pretend) == 2, log_of(run)
    said = [line for line in log_of(run).splitlines() if "the run failed" in line]
    assert len(said) == 2 and said[0].endswith("restart 1 of 1 from the beginning")
    assert "it has failed 2 times without a new checkpoint, restarts=1: not started again" in said[1]


def test_a_users_error_is_not_restarted(pretend: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert pretended(pretend, run, "error done", "partition=small", "nodes=1") == 0
    state = ended(run)
    assert state["JobState"] == "FAILED" and state["ExitCode"] == "2:0" and attempts(pretend) == 1, log_of(run)


def test_the_warning_before_the_time_limit_reaches_the_run(pretend: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert pretended(pretend, run, "wait done") == 0
    wait_until((pretend / "1.0.ready").exists, run, 100)
    call("scancel", "--batch", "--signal=USR1", job_of(run))  # as --signal=B:USR1@N does
    state = ended(run)
    assert state["JobState"] == "COMPLETED" and attempts(pretend) == 2, log_of(run)
    assert "heard" in log_of(run) and "requeueing" in log_of(run)


def test_scancel_is_final(pretend: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert pretended(pretend, run, "wait wait") == 0
    wait_until((pretend / "1.0.ready").exists, run, 100)
    call("scancel", job_of(run))
    state = ended(run)
    assert state["JobState"] == "CANCELLED" and attempts(pretend) == 1, log_of(run)


@pytest.mark.slow
def test_the_time_limit_requeues_a_run_that_did_not_stop_in_time(pretend: Path, tmp_path: Path) -> None:
    """A minute is the shortest limit there is. Line 1 of the plan leaves the pretender deaf to SIGUSR1."""
    run, deaf = tmp_path / "run", pretend / "python"
    deaf.write_text(deaf.read_text().replace("trap 'echo heard; tell stopped; exit 0' USR1", "trap '' USR1"))
    assert pretended(pretend, run, "wait done", "time=1", "signal_s=1") == 0
    state = ended(run, 200)
    assert state["JobState"] == "COMPLETED" and attempts(pretend) == 2, log_of(run)
    assert "the time limit came before the run had stopped" in log_of(run)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["partition=nowhere"], "SLURM refuses the job: invalid partition specified: nowhere"),
        (["nodes=5"], "SLURM would never start the job (PartitionConfig)"),
        (["partition=small"], "SLURM would never start the job (PartitionConfig)"),
        (["partition=small", "nodes=1", "time=1:00:00"], "SLURM would never start the job (Partition"),
        (["gpus_per_node=8"], "SLURM refuses the job: Invalid generic resource (gres) specification"),
        (["constraint=[warp&drive]"], "SLURM refuses the job: Batch job submission failed: Invalid feature"),
        (["mem=900G"], "SLURM refuses the job: Memory specification can not be satisfied"),
    ],
)
def test_what_slurm_cannot_do_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: list[str], message: str
) -> None:
    run = tmp_path / "runs" / "run"
    assert submit(*NODES, *settings, "recipe=transcribe", f"run={run}") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1, error
    assert not run.parent.exists()
    assert not call("squeue", "-h")


def test_a_second_job_of_a_run_is_refused(pretend: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert pretended(pretend, run, "done done", "sbatch=--begin=now+1hour") == 0
    job = job_of(run)
    assert pretended(pretend, run, "done") == 2
    assert f"job {job} of this run is in the queue" in capsys.readouterr().err
    assert sorted(path.name for path in (run / "slurm").iterdir()) == ["1"]
    call("scancel", job)
    wait_until(lambda: not call("squeue", "-h"), run, 100)
    assert pretended(pretend, run, "done") == 0
    wait_until(lambda: "the run is done" in log_of(run, 2), run, 100)


def test_what_is_edited_later_changes_nothing(pretend: Path, tmp_path: Path) -> None:
    """The snapshot runs by itself: its own code answers, from a folder that has none."""
    run = tmp_path / "run"
    assert pretended(pretend, run, "done") == 0
    ended(run)
    code = run / "slurm" / "1" / "code"
    assert (code / "COMMIT").read_text().strip() == commit(ROOT)
    assert not list(code.rglob("__pycache__")) and (code / "recipes" / "model" / "tiny.yaml").is_file()
    (code / "recipes" / "of_the_snapshot.yaml").write_text((code / "recipes" / "transcribe.yaml").read_text())
    environment = os.environ | {"PYTHONPATH": str(code), "PYTHONSAFEPATH": "1"}
    answer = subprocess.run(
        [sys.executable, "-m", "launch.checked", "recipe=of_the_snapshot"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.splitlines()[0] == str(tmp_path / "outputs" / "transcribe")
