"""One part of the suite, in a process of its own: bench/gpu/drive.py starts it.

    module.pieces(sizes, device) --> {piece: function of the clock} --each guarded--> FILE, written anew after each

A piece that fails leaves its error and line, and the next one runs; what is not begun in time says "skipped: time".
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.gpu.measure import Clock, free, where
from bench.gpu.sizes import Sizes, sizes

Pieces = dict[str, Callable[[Clock], dict[str, Any]]]
RUNNING, NO_TIME = "running", "skipped: time"
MODULES = ("moe", "thinker", "talker", "loss")


def pieces_of(name: str, found: Sizes, device: torch.device) -> Pieces:
    """The measurements of a part: contract-ENGINE, or the module of that name."""
    if name.startswith("contract-"):
        module = importlib.import_module("bench.gpu.contract")
        return module.pieces(name.removeprefix("contract-"), device)
    return importlib.import_module(f"bench.gpu.{name}").pieces(found, device)


def run(name: str, device: torch.device, toy: bool, seconds: float, out: Path) -> dict[str, Any]:
    """Measure what the time allows. The report is in `out` at every moment."""
    clock, began = Clock(time.monotonic() + seconds), time.monotonic()
    report: dict[str, Any] = {"status": RUNNING, "pieces": {}}

    def save() -> None:
        report["seconds"] = round(time.monotonic() - began, 1)
        fresh = out.with_suffix(".new")
        fresh.write_text(json.dumps(report), encoding="utf-8")
        os.replace(fresh, out)

    save()
    try:
        pieces = pieces_of(name, sizes(toy), device)
    except Exception as error:
        traceback.print_exc()
        report["status"] = where(error)
        save()
        return report
    entries: dict[str, dict[str, Any]] = {piece: {"status": NO_TIME} for piece in pieces}
    report["pieces"] = entries
    for piece, work in pieces.items():
        if clock.left() <= 0:
            continue
        entries[piece] = {"status": RUNNING}
        save()
        start = time.monotonic()
        entries[piece] = guarded(partial(work, clock)) | {"seconds": round(time.monotonic() - start, 1)}
        free(device)
        save()
    report["status"] = "ok"
    save()
    return report


def guarded(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a piece found, or its error."""
    try:
        return work()
    except Exception as error:  # whatever it is, the others go on
        traceback.print_exc()
        return {"status": where(error)}


def main(argv: Sequence[str]) -> int:
    """Exit status 0: errors are in the report."""
    parser = argparse.ArgumentParser(description="One part of the GPU suite.")
    parser.add_argument("name")
    parser.add_argument("--device", required=True)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    if options.device == "cuda":
        device = torch.device("cuda", 0)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(1)
    run(options.name, device, options.toy, options.seconds, options.out)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # destructors of process groups may abort a process that has done its work


if __name__ == "__main__":
    main(sys.argv[1:])
