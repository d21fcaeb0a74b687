"""launch.slurm without a SLURM: its script, what it refuses, and the count of restarts."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from launch import slurm
from launch.arguments import guarded
from launch.checked import checked
from launch.slurm_script import seconds
from train.errors import RecipeError

ROOT = Path(__file__).resolve().parents[2]
GIVEN = ("nodes=8", "gpus_per_node=8", "time=24:00:00", "recipe=transcribe")


def run(*words: str) -> int:
    return guarded(slurm.main, words)


def test_dry_run_prints_a_script_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("WANDB_API_KEY", "kept-5ecret")
    monkeypatch.chdir(tmp_path)
    extra = ("partition=big one", "account=a", "qos=q", "constraint=[h100&ib]", "cpus_per_task=12", "mem=900G")
    words = ("sbatch=--reservation=x --exclude='n[1-3]'", "srun=--container-image=a.sqsh", "log.project='it''s; $(rm)'")
    assert run(*GIVEN, *extra, *words, "run=out/it's [1]", "--dry-run") == 0
    text = capsys.readouterr().out
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""
    lines = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]
    expected = {
        "--nodes=8", "--gpus-per-node=8", "--ntasks-per-node=1", "--time=24:00:00", '--partition="big one"', "--qos=q",
        "--account=a", '--constraint="[h100&ib]"', "--cpus-per-task=12", "--mem=900G", "--signal=B:USR1@300",
        "--requeue", "--open-mode=append", "--reservation=x", '"--exclude=n[1-3]"', "--job-name=transcribe",
    }  # fmt: skip
    assert expected <= set(lines) and "--exclusive" not in lines, lines
    assert "WANDB_API_KEY" in next(line for line in lines if line.startswith("--export="))
    assert "kept-5ecret" not in text and not list(tmp_path.iterdir())
    assignments = text[text.index("\nrun=") : text.index("\nattempt=")]
    show = ["bash", "-c", assignments + '\nprintf "%s\\n" "$run" "${settings[@]}"']
    shown = subprocess.run(show, capture_output=True, text=True, check=True).stdout.splitlines()
    assert shown == [f"{tmp_path}/out/it's [1]", "recipe=transcribe", "log.project='it''s; $(rm)'", "run=out/it's [1]"]


def test_whole_nodes_unless_cpus_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*GIVEN, "gpus_per_node=0", "--dry-run") == 0
    text = capsys.readouterr().out
    assert "#SBATCH --exclusive\n" in text and "#SBATCH --mem=0\n" in text and "--gpus" not in text
    assert "--nproc-per-node=1 " in text


@pytest.mark.parametrize(
    ("given", "added"), [("auto", ""), ("latest", ""), ("never", "resume=auto"), ("x", "resume=auto")]
)
def test_later_attempts_go_on(given: str, added: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Even where the first one was told where to begin."""
    assert run(*GIVEN, f"resume={given}", "--dry-run") == 0
    assert f"settings+=({added})\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give one recipe=NAME"),
        (("recipe=stage", *GIVEN[:3]), "unknown recipe 'stage', did you mean 'stage"),
        (("recipe=transcribe",), "give nodes=..., for instance nodes=8"),
        ((*GIVEN, "optim.rl=1"), "unknown setting 'optim.rl', did you mean 'optim.lr'?"),
        ((*GIVEN, "node=8"), "unknown setting 'node', did you mean 'nodes'?"),
        ((*GIVEN, "gpu_per_node=8"), "unknown setting 'gpu_per_node', did you mean 'gpus_per_node'?"),
        ((*GIVEN, "nodes=0"), "nodes must be from 1 to"),
        ((*GIVEN, "restarts=many"), "restarts must be a whole number, not 'many'"),
        ((*GIVEN, "time=a day"), "time=a day: write minutes, HH:MM:SS or D-HH:MM:SS"),
        ((*GIVEN, "time=9:59"), "time=9:59 is less than twice signal_s=300"),
        ((*GIVEN, "setup=nowhere"), "setup=nowhere: no such file"),
        ((*GIVEN, "job_name=a\nb"), "job_name='a\\nb': a line for sbatch holds no such characters"),
        ((*GIVEN, "srun='--open"), "srun='--open: No closing quotation"),
        ((*GIVEN, "env=A=1"), "env=A=1: names of variables"),
        ((*GIVEN, "env=NOT_THERE"), "env=NOT_THERE: NOT_THERE is not set"),
    ],
)
def test_mistakes_are_one_line(words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words, "--dry-run") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1, error


def test_no_sbatch_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run(*GIVEN, f"run={tmp_path}/run") == 2
    assert capsys.readouterr().err.startswith("error: no sbatch here: run this on a login node")
    assert not (tmp_path / "run").exists()


def test_a_file_of_ones_own_is_part_of_the_snapshot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "my recipes"
    (mine / "model").mkdir(parents=True)
    (mine / "model" / "small.yaml").write_text((ROOT / "recipes" / "model" / "tiny.yaml").read_text())
    text = (ROOT / "recipes" / "transcribe.yaml").read_text().replace("model: tiny", "model: small")
    assert "model: small" in text
    (mine / "mine.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr(slurm, "submit", lambda folder: "7")
    words = ("recipe=./my recipes/mine.yaml", *GIVEN[:3], "run=run")
    assert run(*words, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert run(*words) == 0
    shutil.rmtree(mine)
    folder = tmp_path / "run" / "slurm" / "1"
    assert (folder / "job.sbatch").read_text() == shown
    settings = next(line for line in shown.splitlines() if line.startswith("settings="))
    assert f"recipe={folder}/recipes/mine.yaml" in settings and "my recipes" not in shown
    assert checked([f"recipe={folder}/recipes/mine.yaml", "run=run"]).recipe == (folder / "recipe.yaml").read_text()


def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr("shutil.copytree", full)
    assert run(*GIVEN, f"run={tmp_path}/runs/run") == 2
    assert (
        capsys.readouterr().err == f"error: {tmp_path}/runs/run/slurm/1: cannot be written: No space left on device\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("90", 5400), ("1:30", 90), ("24:00:00", 86400), ("2-12", 216000), ("1-0:30", 88200), ("1-1:1:1", 90061)],
)
def test_time_limits(limit: str, expected: int) -> None:
    assert seconds(limit) == expected
    assert seconds("UNLIMITED") > 1e9
    with pytest.raises(RecipeError):
        seconds(f"{limit}:")


def count(tmp_path: Path, commands: str) -> list[str]:
    """What launch/restarts.sh says, for a run that may be restarted twice."""
    program = f'run={tmp_path}/run folder={tmp_path} restarts=2; . "{ROOT}/launch/restarts.sh"; {commands}'
    environment = os.environ | {"TZ": "UTC"}
    shown = subprocess.run(["bash", "-uc", program], capture_output=True, text=True, env=environment, timeout=20)
    assert not shown.stderr, shown.stderr
    return [line.split(" launch: ")[-1] for line in shown.stdout.splitlines()]


def save(tmp_path: Path, folder: str, step: int) -> None:
    checkpoints = tmp_path / "run" / folder / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    (checkpoints / "latest").write_text(f"step-{step:08d}\n")


@pytest.mark.parametrize("folder", [".", "stage2"])
def test_failures_are_counted_until_a_checkpoint_is_made(tmp_path: Path, folder: str) -> None:
    """Of a run, or of a curriculum's stage; each line is a start of its own, as after a requeue."""
    one = 'begin && failed "crash" && echo again || echo over'
    assert count(tmp_path, one) == ["crash; restart 1 of 2 from the beginning", "again"]
    save(tmp_path, folder, 100)
    new = count(tmp_path, one)
    assert new[0].startswith("the run has saved step-00000100 since its last failure: counting anew")
    assert new[1:] == ["crash; restart 1 of 2 from step-00000100 ", "again"]
    assert count(tmp_path, one)[-2:] == ["crash; restart 2 of 2 from step-00000100 ", "again"]
    last = count(tmp_path, one)
    assert last[-1] == "over" and "it has failed 3 times without a new checkpoint, restarts=2" in last[-2]


def test_an_attempt_that_ended_without_a_word_counts(tmp_path: Path) -> None:
    assert count(tmp_path, "begin && echo first") == ["first"]
    for number in (1, 2):
        said = count(tmp_path, "begin && echo next")
        assert f"restart {number} of 2" in said[0] and "ended without a word" in said[0] and said[1] == "next"
    assert "not started again" in count(tmp_path, "begin || echo over")[0]
