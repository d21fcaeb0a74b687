"""The script of a job: the template launch/slurm.sbatch with the settings of a job and a run filled in, all quoted.

    Job, Checked, folder, words --script--> text for sbatch

Variables of the environment are named in it, never written: SLURM keeps their values from submission to requeue.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.arguments import whole
from launch.checked import Checked
from train.errors import RecipeError

TEMPLATE = Path(__file__).with_name("slurm.sbatch")
NEEDED = (
    ("HOME", "PATH", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "TERM", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH")
    + ("PYTHONPATH", "MODULEPATH", "CC", "CXX", "SSL_CERT_FILE", "http_proxy", "https_proxy", "no_proxy")
)  # fmt: skip
PREFIXES = (
    ("AWS_", "CONDA_", "CUDA_HOME", "DS_", "FI_", "FSSPEC_", "GLOO_", "HF_", "MKL_", "NCCL_", "NVTE_", "OMNILOOM_")
    + ("OMP_", "PYTORCH_", "TORCH_", "TRITON_", "UCX_", "WANDB_", "XDG_CACHE_HOME")
)  # fmt: skip
TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


@dataclass(frozen=True)
class Job:
    """What launch.slurm takes beside the recipe; its docstring is the reference."""

    nodes: int
    gpus_per_node: int
    processes: int
    time: str
    signal_s: int = 300
    restarts: int = 3
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    job_name: str = ""
    cpus_per_task: int = 0
    mem: str = ""
    setup: str = ""
    sbatch: str = ""
    srun: str = ""
    python: str = sys.executable
    env: str = ""


def read_job(given: Mapping[str, str]) -> Job:
    """Check what was given. Raises RecipeError."""
    for key in ("nodes", "gpus_per_node", "time"):
        if key not in given:
            raise RecipeError(f"give {key}=..., for instance nodes=8 gpus_per_node=8 time=24:00:00")
    gpus = whole(given, "gpus_per_node", 0, 1024)
    counts: Mapping[str, tuple[int, int, int]] = {  # default, least, most
        "nodes": (1, 1, 1 << 17),
        "gpus_per_node": (gpus, 0, 1024),
        "processes": (gpus or 1, 1, 1024),
        "signal_s": (300, 1, 65535),
        "restarts": (3, 0, 1 << 20),
        "cpus_per_task": (0, 1, 1 << 20),
    }
    numbers = {
        key: whole(given, key, least, most) if key in given else default
        for key, (default, least, most) in counts.items()
    }
    job = Job(**{**given, **numbers})  # pyright: ignore[reportArgumentType]
    if job.setup and not Path(job.setup).is_file():
        raise RecipeError(f"setup={job.setup}: no such file")
    if seconds(job.time) < 2 * job.signal_s:
        raise RecipeError(
            f"time={job.time} is less than twice signal_s={job.signal_s}: the job would be asked to stop before it has "
            "trained; give more time, or a smaller signal_s"
        )
    return job


def seconds(limit: str) -> float:
    """A time limit as SLURM writes it: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S, or UNLIMITED. Raises RecipeError."""
    if limit.upper() in ("UNLIMITED", "INFINITE"):
        return float("inf")
    found = TIME.fullmatch(limit)
    if not found:
        raise RecipeError(f"time={limit}: write minutes, HH:MM:SS or D-HH:MM:SS")
    days, *parts = [None if part is None else int(part) for part in found.groups()]
    first, second, third = parts
    if days is not None:
        return 86400 * days + 3600 * (first or 0) + 60 * (second or 0) + (third or 0)
    if second is None:
        return 60 * (first or 0)
    return 60 * (first or 0) + second if third is None else 3600 * (first or 0) + 60 * second + third


def script(job: Job, run: Checked, folder: Path, words: Sequence[str]) -> str:
    """The text for sbatch. Raises RecipeError for what SLURM's own lines cannot hold."""
    resume = [word for word in words if word.startswith("resume=") and word not in ("resume=auto", "resume=latest")]
    values = {
        "OPTIONS": "\n".join(f"#SBATCH {line}" for line in options(job, run, folder)),
        "RUN": shlex.quote(str(run.folder)),
        "FOLDER": shlex.quote(str(folder)),
        "PYTHON": shlex.quote(job.python),
        "RESTARTS": str(job.restarts),
        "SETTINGS": shlex.join(words),
        "RESUME": "resume=auto" if resume else "",
        "SRUN": shlex.join(_words("srun", job.srun)),
        "NODES": str(job.nodes),
        "PROCESSES": str(job.processes),
    }
    return re.sub("@([A-Z]+)@", lambda found: values[found[1]], TEMPLATE.read_text())


def options(job: Job, run: Checked, folder: Path) -> list[str]:
    """The options of sbatch, one a line."""
    output = str(folder / "log.txt").replace("%", "%%")  # SLURM fills in %j and others
    found: dict[str, str | int | None] = {
        "job-name": job.job_name or run.name,
        "nodes": job.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": job.gpus_per_node or None,
        "cpus-per-task": job.cpus_per_task or None,
        "mem": job.mem or (None if job.cpus_per_task else "0"),
        "time": job.time,
        "partition": job.partition or None,
        "account": job.account or None,
        "qos": job.qos or None,
        "constraint": job.constraint or None,
        "signal": f"B:USR1@{job.signal_s}",
        "open-mode": "append",
        "chdir": os.getcwd(),
        "output": output,
        "export": ",".join(variables(job, os.environ)),
    }
    lines = [
        f"--{name}={_quoted(name.replace('-', '_'), str(value))}" for name, value in found.items() if value is not None
    ]
    lines += ["--requeue"] + ["--exclusive"] * (not job.cpus_per_task)
    return lines + [_quoted("sbatch", word) for word in _words("sbatch", job.sbatch)]


def variables(job: Job, environment: Mapping[str, str]) -> list[str]:
    """Names of the variables that the job gets: what Python, libraries and credentials need, and those of `env`."""
    asked = [name for name in job.env.split(",") if name]
    for name in asked:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise RecipeError(
                f"env={job.env}: names of variables with commas between, no values: they stay out of files"
            )
        if name not in environment:
            raise RecipeError(f"env={job.env}: {name} is not set")
    found = {name for name in environment if name in NEEDED or name.startswith(PREFIXES)}
    return sorted(found | set(asked))


def _words(key: str, text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise RecipeError(f"{key}={text}: {error}") from None


def _quoted(key: str, value: str) -> str:
    """A value for an #SBATCH line: sbatch reads quotes as a shell does, and a line ends at a # outside of them."""
    if not value.isprintable() or "\\" in value or ('"' in value and "'" in value):
        raise RecipeError(f"{key}={value!r}: a line for sbatch holds no such characters; choose another")
    if re.fullmatch(r"[\w@%+=:,./-]*", value):
        return value
    return f"'{value}'" if '"' in value else f'"{value}"'
