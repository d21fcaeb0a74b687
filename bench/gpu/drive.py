"""Runs the parts of the GPU suite one after the other, each in a process of its own, and writes one report.

    parts --share of the time left--> process --> its report; killed when its time is over --> OUT/gpu.json, table

A part that ends early leaves its time to the next ones. What did not fit is in the report as "skipped: time", what
failed as an error with its line. Exit status 0, 1 where something failed, 2 for a wrong call.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench.gpu.part import NO_TIME, RUNNING
from bench.gpu.table import table

ROOT = Path(__file__).resolve().parents[2]
SHARES = {  # parts in their order -> weights by which they divide the time
    "contract-local": 25,
    "contract-deepspeed": 80,
    "contract-megatron": 45,
    "moe": 60,
    "thinker": 190,
    "talker": 60,
    "loss": 50,
}
TOTAL = 515.0  # seconds: below nine minutes with the start of this process, too
GRACE = 10.0  # seconds by which a part is asked to be ready before it is killed
QUERY = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu,memory.total"
PACKAGES = ("torch", "triton", "transformers", "deepspeed", "megatron-core")


def main(argv: Sequence[str]) -> int:
    """Run the suite."""
    parser = argparse.ArgumentParser(prog="bench/gpu/run.sh", description="The GPU suite: see bench/gpu/README.md.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(SHARES)}; all by default")
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--toy", action="store_true", help="tiny shapes: every code path, no figure of use")
    parser.add_argument("--seconds", type=float, default=TOTAL, help="time for all of it")
    parser.add_argument("--spent", type=float, default=0.0, help="of that, gone before this started")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "outputs/gpu"))
    parser.add_argument("--commit", help="where there is no git: the commit of this tree")
    options = parser.parse_args(argv)
    chosen = options.parts or list(SHARES)
    if wrong := wrong_call(options, chosen):
        print(f"error: {wrong}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    path, deadline = options.out / "gpu.json", time.monotonic() + options.seconds - options.spent
    report = heading(options) | {"parts": {name: {"status": NO_TIME, "pieces": {}} for name in chosen}}
    for place, name in enumerate(chosen):
        left = deadline - time.monotonic()
        share = left * SHARES[name] / sum(SHARES[later] for later in chosen[place:])
        if share > GRACE:
            report["parts"][name] = run_part(name, options, share)
        save(path, report)
        print(table({name: report["parts"][name]}), flush=True)
    report["state after"] = gpu_state()
    report["seconds"] = round(options.seconds - (deadline - time.monotonic()), 1)
    save(path, report)
    failed = failures(report["parts"])
    print(f"{report['seconds']:.0f} s of {options.seconds:.0f}; {len(failed)} failed; the report is {path}")
    for line in failed:
        print(f"  {line}")
    return 1 if failed else 0


def wrong_call(options: argparse.Namespace, chosen: Sequence[str]) -> str | None:
    """Why the suite cannot run as asked."""
    if unknown := [name for name in chosen if name not in SHARES]:
        return f"no part is called {unknown[0]!r}; parts are {', '.join(SHARES)}"
    if options.device not in ("cuda", "cpu"):
        return f"--device must be cuda or cpu, not {options.device!r}"
    if options.device == "cuda" and not torch.cuda.is_available():
        return "torch sees no GPU; --device cpu --toy walks through the suite without one"
    if options.device == "cpu" and not options.toy:
        return "the released sizes are for a GPU; add --toy"
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed: it is the peer of most parts"
    return None


def run_part(name: str, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """One part in its own process group, killed when its time is over."""
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "part.json", options.out / f"{name}.log"
        command = [sys.executable, "-m", "bench.gpu.part", name, "--device", options.device, "--out", str(out)]
        command += ["--seconds", str(seconds - GRACE), *["--toy"] * options.toy]
        # one growing pool instead of blocks that candidates of other sizes cannot use
        env = {**os.environ, "PYTORCH_ALLOC_CONF": "expandable_segments:True", "PYTHONUNBUFFERED": "1"}
        with log.open("wb") as written:
            process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=written, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                status = process.wait(seconds)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                kill(process)
        report = json.loads(out.read_text()) if out.exists() else {"status": RUNNING, "pieces": {}}
    return settled(report, status, log)


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a part and whatever it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def settled(report: dict[str, Any], status: int | None, log: Path) -> dict[str, Any]:
    """Say of what still ran whether time was over or the process died."""
    if status is None:
        why = f"{NO_TIME}; killed while it ran"
    else:
        last = next((line for line in reversed(log.read_text(errors="replace").splitlines()) if line.strip()), "")
        why = f"error: the process ended with status {status}: {last[:300]}"
    for entry in (report, *report["pieces"].values()):
        if entry["status"] == RUNNING:
            entry["status"] = why
    return report


def failures(parts: dict[str, Any]) -> list[str]:
    """Every part, piece and row that failed, one line each."""
    found = []
    for name, part in parts.items():
        found += [f"{name}: {part['status']}"] * _failed(part["status"])
        for piece, entry in part["pieces"].items():
            found += [f"{name}, {piece}: {entry['status']}"] * _failed(entry["status"])
            for candidate, row in entry.get("rows", {}).items():
                found += [f"{name}, {piece}, {candidate}: {row['status']}"] * _failed(row["status"])
    return found


def _failed(status: str) -> bool:
    return status.startswith(("error", "failed"))


def heading(options: argparse.Namespace) -> dict[str, Any]:
    """What was run, on what."""
    on_gpu = options.device == "cuda"
    facts = torch.cuda.get_device_properties(0) if on_gpu else None
    return {
        "suite": "gpu",
        "toy": options.toy,
        "commit": options.commit or commit(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": facts.name if facts else f"cpu, {platform.machine()}",
        "memory": {"value": round(facts.total_memory / 1e9, 2), "unit": "GB"} if facts else None,
        "capability": f"{facts.major}.{facts.minor}" if facts else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in PACKAGES},
        "state before": gpu_state(),
    }


def installed(name: str) -> str | None:
    """Version of a package, None where it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit() -> str:
    """The commit of this tree, with "+" where files differ from it."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown: no git here; give it by --commit"
    return head.stdout.strip() + "+" * bool(dirty.stdout.strip())


def gpu_state() -> dict[str, str] | None:
    """Clocks, power and temperature as nvidia-smi has them."""
    try:
        command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    first = done.stdout.splitlines()[0] if done.stdout else ""
    return dict(zip(QUERY.split(","), (value.strip() for value in first.split(",")), strict=False))


def save(path: Path, report: dict[str, Any]) -> None:
    """Write the report in one go."""
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(fresh, path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
