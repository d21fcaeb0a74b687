"""Wheels of what the framework needs beside torch, triton and transformers, for a machine that has no network.

    make gpu-wheels [GPU_PYTHON=3.12]        constraints.txt --> wheels/*.whl, below 60 MB together

Such a machine often has torch, triton and transformers and little else, and what is carried to it should be small.
Binary wheels are for Linux on x86_64 and one version of Python; the two packages that have no wheel of their own
are built here, DeepSpeed without its compiled operators. What torch and transformers bring (numpy, tokenizers, ...) is
left out, and so is what only commands beside training import (matplotlib, pandas, playwright). The framework itself
runs from its checkout. Cost: half a minute.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT_MB = 60
FROM_SOURCE = ("antlr4-python3-runtime", "deepspeed")
BINARY = (
    *("megatron-core", "einops", "hjson", "msgpack", "ninja", "psutil", "py-cpuinfo", "pydantic", "pydantic-core"),
    *("annotated-types", "typing-inspection"),  # of pydantic
    *("hydra-core", "omegaconf"),
    *("webdataset", "braceexpand", "isal"),
    *("av", "pillow", "soundfile", "cffi", "pycparser", "soxr"),
    *("jiwer", "rapidfuzz", "click"),
)
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64")


class WheelError(ValueError):
    """Wheels that cannot be had; the message says why."""


def pins(constraints: Path) -> dict[str, str]:
    """Package, in lower case with dashes -> exact version."""
    lines = (line.split("#")[0].strip() for line in constraints.read_text(encoding="utf-8").splitlines())
    pairs = (line.split("==") for line in lines if "==" in line)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pairs}


def pip(*arguments: str) -> None:
    """Run pip of this interpreter. Raises WheelError with its message."""
    env = {**os.environ, "DS_BUILD_OPS": "0"}
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], env=env, capture_output=True, text=True)
    if done.returncode:
        raise WheelError(f"pip {' '.join(arguments)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def build(folder: Path, python: str, pinned: dict[str, str]) -> None:
    """Put every wheel into the empty folder. Raises WheelError."""
    if missing := [name for name in (*BINARY, *FROM_SOURCE) if name not in pinned]:
        raise WheelError(f"constraints.txt has no version of {', '.join(missing)}; add a line NAME==VERSION")
    exact = {name: f"{name}=={pinned[name]}" for name in (*BINARY, *FROM_SOURCE)}
    tags = ["--implementation", "cp", "--python-version", python]
    tags += [word for abi in ("cp" + python.replace(".", ""), "abi3", "none") for word in ("--abi", abi)]
    tags += [word for platform in PLATFORMS for word in ("--platform", platform)]
    common = ["--no-deps", "--quiet"]
    pip("download", *common, "--only-binary=:all:", *tags, "--dest", str(folder), *(exact[name] for name in BINARY))
    sources = [exact[name] for name in FROM_SOURCE]
    pip("wheel", *common, "--no-build-isolation", "--wheel-dir", str(folder), *sources)


def main(argv: Sequence[str]) -> int:
    """Exit status 0, or 2 where the wheels are too large or cannot be had."""
    parser = argparse.ArgumentParser(description="Wheels for a GPU machine without a network.")
    parser.add_argument("--python", default="3.12", help="version of Python on the GPU machine, such as 3.12")
    parser.add_argument("--constraints", type=Path, default=ROOT / "constraints.txt")
    parser.add_argument("--out", type=Path, default=ROOT / "wheels")
    options = parser.parse_args(argv)
    if not re.fullmatch(r"3\.\d+", options.python):
        print(f"error: --python must be a version such as 3.12, not {options.python!r}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(dir=options.out.parent) as name:
        fresh = Path(name) / "wheels"
        fresh.mkdir()
        try:
            build(fresh, options.python, pins(options.constraints))
        except WheelError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        sizes = {path.name: path.stat().st_size / 1e6 for path in fresh.glob("*.whl")}
        for wheel, size in sorted(sizes.items(), key=lambda item: -item[1]):
            print(f"{size:8.2f} MB  {wheel}")
        total = sum(sizes.values())
        print(f"{total:8.2f} MB  {len(sizes)} wheels for Python {options.python}, limit {LIMIT_MB} MB")
        if total > LIMIT_MB:
            print(f"error: the wheels are {total:.1f} MB together, above {LIMIT_MB} MB", file=sys.stderr)
            return 2
        shutil.rmtree(options.out, ignore_errors=True)
        fresh.rename(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
