"""Train on a SLURM cluster: one command submits; the job saves and requeues itself, and starts again after a failure.

    python -m launch.slurm recipe=stage2 nodes=8 gpus_per_node=8 time=24:00:00 [KEY=VALUE of the recipe ...]
    --dry-run                      print the script, submit nothing, write nothing
    nodes=N  gpus_per_node=N       0 GPUs: the run trains on CPUs
    processes=N                    on a node; one a GPU, or one
    time=D-HH:MM:SS                limit of an attempt; the job goes on in the next one
    signal_s=300                   seconds before the limit at which the run is asked to save and stop
    restarts=3                     of a run that fails, without a new checkpoint between
    partition= account= qos= constraint= job_name=
    cpus_per_task= mem=            on a node; without cpus_per_task the job takes whole nodes with all of their memory
    setup=FILE                     bash lines for every node, before Python: modules, containers' mounts, NCCL_...
    sbatch='--reservation=x ...'   more options of sbatch
    srun='--container-image=...'   more words for srun: options, or a command before ours (apptainer exec --nv IMAGE)
    python=PATH                    in the container; otherwise the one that runs this
    env=NAME,NAME                  more variables for the job, by name (launch/slurm_script.py has the list)

    settings --check--> RUN/slurm/N/ code/ recipe.yaml recipes/ setup.sh job.sbatch --sbatch--> job, log.txt --> RUN

What is queued runs what was submitted: the code and recipe beside its script, whatever is edited later (docs/slurm.md).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path

from launch.arguments import guarded
from launch.checked import Checked, checked
from launch.slurm_script import Job, read_job, script
from train.checkpoint.saver import COMMIT, commit
from train.config import Recipe
from train.errors import RecipeError
from train.recipe import recipe_groups

ROOT = Path(__file__).resolve().parents[1]
CODE = ("train", "data", "models", "launch", "recipes")
NEVER = ("PartitionConfig", "PartitionNodeLimit", "PartitionTimeLimit")  # reasons of jobs that wait in vain
REASON_S = 2.0  # how long to wait for SLURM's opinion of a job


def main(argv: Sequence[str]) -> None:
    """The command. Raises RecipeError."""
    dry = "--dry-run" in argv
    ours, words = split([word for word in argv if word != "--dry-run"])
    run, job = checked(words), read_job(ours)
    folder = next_folder(run.folder)
    if dry:
        print(script(job, run, folder, pinned(words, folder)), end="")
        return
    if shutil.which("sbatch") is None:
        raise RecipeError("no sbatch here: run this on a login node of the cluster; --dry-run prints the script")
    refuse_second(run.folder)
    try:
        with undone_on_error(folder):
            snapshot(folder, run, job, words)
            number = submit(folder)
    except OSError as error:
        raise RecipeError(f"{folder}: cannot be written: {error.strerror or error}") from None
    print(f"job {number}: {job.nodes} nodes, {job.processes} processes each")
    print(f"  run folder  {run.folder}")
    print(f"  log         {folder / 'log.txt'}")
    print(f"  to end it   scancel {number}")


def split(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Settings of the job, and those of the recipe. Raises RecipeError for a misspelt one of the job."""
    known = [field.name for field in fields(Job)]
    ours, rest = {}, []
    free = {field.name for field in fields(Recipe)} | {"recipe", "model", "engine", "from", "to"}
    for word in words:
        key, equals, value = word.partition("=")
        if equals and key in known:
            ours[key] = value
            continue
        close = get_close_matches(key, known, n=1, cutoff=0.75)
        if close and "." not in key and key not in free:
            raise RecipeError(f"unknown setting {key!r}, did you mean {close[0]!r}?")
        rest.append(word)
    return ours, rest


def next_folder(run: Path) -> Path:
    """Folder of the next submission of a run: RUN/slurm/1 and so on."""
    taken = [int(path.name) for path in run.glob("slurm/*") if path.name.isdigit()]
    return run / "slurm" / str(max(taken, default=0) + 1)


def refuse_second(run: Path) -> None:
    """Raise RecipeError while an earlier job of the run waits or runs: two would write the same checkpoints."""
    jobs = [path.read_text().strip() for path in run.glob("slurm/*/job")]
    if jobs:
        known = _call("squeue", "--noheader", "--format=%i", f"--jobs={','.join(jobs)}").stdout.split()
        if known:
            raise RecipeError(f"{run}: job {known[0]} of this run is in the queue: scancel {known[0]}, or set run=")


@contextmanager
def undone_on_error(folder: Path) -> Iterator[None]:
    """Make a folder; if the block fails, remove it with those above it that were made for it."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True)
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        for path in made[1:]:
            path.rmdir()
        raise


def snapshot(folder: Path, run: Checked, job: Job, words: Sequence[str]) -> None:
    """Everything that the job runs, into its folder."""
    skip = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
    for name in CODE:
        shutil.copytree(ROOT / name, folder / "code" / name, ignore=skip)
    (folder / "code" / COMMIT).write_text(f"{commit(ROOT)}\n")
    (folder / "recipe.yaml").write_text(run.recipe)
    if own := own_recipe(words):
        copy_recipes(own.parent, folder / "recipes")
    if job.setup:
        shutil.copy(job.setup, folder / "setup.sh")
    (folder / "job.sbatch").write_text(script(job, run, folder, pinned(words, folder)))


def own_recipe(words: Sequence[str]) -> Path | None:
    """The file of recipe=FILE.yaml."""
    found = [word.removeprefix("recipe=") for word in words if word.startswith("recipe=") and word.endswith(".yaml")]
    return Path(found[0]) if found else None


def pinned(words: Sequence[str], folder: Path) -> list[str]:
    """Settings of the job's attempts: a recipe file is the copy in the snapshot."""
    own = own_recipe(words)
    copy = f"recipe={folder / 'recipes' / own.name}" if own else ""
    return [copy if own and word.startswith("recipe=") else word for word in words]


def copy_recipes(source: Path, target: Path) -> None:
    """A user's recipe files, with what their defaults may name: files beside them, and in folders for groups."""
    for pattern in ("*.yaml", *(f"{group}/*.yaml" for group in recipe_groups())):
        for path in source.glob(pattern):
            (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target / path.relative_to(source))


def submit(folder: Path) -> str:
    """Hand the script to SLURM; the job's number. Raises RecipeError with SLURM's reason where it will never run."""
    answer = _call("sbatch", "--parsable", str(folder / "job.sbatch"))
    if answer.returncode:
        lines = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in answer.stderr.splitlines()]
        raise RecipeError(f"SLURM refuses the job: {'; '.join(lines) or f'sbatch ended with {answer.returncode}'}")
    number = answer.stdout.strip().partition(";")[0]  # then the cluster's name
    (folder / "job").write_text(f"{number}\n")
    reason, until = "None", time.monotonic() + REASON_S
    while reason == "None" and time.monotonic() < until:
        seen = _call("squeue", "--noheader", f"--jobs={number}", "--format=%T %r").stdout.split()
        state, reason = (seen + ["", ""])[:2]
        if state != "PENDING":
            break
        time.sleep(0.1)
    if reason in NEVER:
        _call("scancel", number)
        raise RecipeError(
            f"SLURM would never start the job ({reason}): its nodes, time or memory are beyond what the partition has; "
            "`sinfo` shows that"
        )
    return number


def _call(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RecipeError(f"{command[0]}: {error}") from None


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
