"""The trainer's side of a save: copy the fragments into shared memory, send one line, go on.

    Saver(...)    starts the writer process, which shares an anonymous memory file (no name in /dev/shm: no leaks)
    save()        waits for the previous write if it still runs, copies, sends; returns the seconds that it blocked
    poll()        notices a finished or failed write without waiting; wait() waits for it
    close()       waits until everything is published

Cost: one copy of the fragments per save (memory speed), and as much memory as the rank's fp32 weights and moments take.
A failed write is a warning and leaves the last good checkpoint; three in a row, or the last one, are a CheckpointError.
"""

from __future__ import annotations

import importlib.metadata
import json
import mmap
import os
import platform
import re
import select
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from train.checkpoint.format import ITEM_BYTES, ReleasedPieces, folder_step, identity_pieces, step_folder
from train.engines import VALUE, Fragment
from train.errors import CheckpointError

MAX_FAILURES = 3
COMMIT = "COMMIT"  # file in a copy of the code without .git: the commit that it is of
_ROOT = Path(__file__).resolve().parents[2]  # the folder that holds the package `train`, in a checkout and in a wheel


class Saver:
    """One rank's half of saving. `launch_id` is the same on all ranks and new in every launch."""

    def __init__(
        self,
        run_folder: str | os.PathLike[str],
        *,
        rank: int,
        world: int,
        launch_id: str,
        keep: int = 2,
        start_step: int = 0,
        released_pieces: ReleasedPieces = identity_pieces,
        timeout_s: float = 600.0,
        warn: Callable[[str], None] = warnings.warn,
    ) -> None:
        """Start the writer; waits up to `timeout_s` for those of a run that is just dying in the same folder.

        `start_step` is the step resumed from: newer checkpoints are set aside when the first own one is published.
        Raises CheckpointError when the folder is in use, ValueError for a bad argument.
        """
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", launch_id):
            raise ValueError(f"launch_id={launch_id!r}: letters, digits, - and _ only, at most 64")
        if keep < 1:
            raise ValueError(f"keep={keep}: at least 1")
        self.timeout_s = timeout_s
        self.folder = Path(run_folder).absolute() / "checkpoints"
        self._pieces, self._warn = released_pieces, warn
        self._memory = _anonymous_file()
        self._settings = {
            "folder": str(self.folder),
            "rank": rank,
            "world": world,
            "launch": launch_id,
            "keep": keep,
            "memory": self._memory,
            "versions": _versions() if rank == 0 else {},
            "timeout_s": timeout_s,
            "trainer": os.getpid(),
        }
        self._signature: tuple[Any, ...] = ()
        self._layout: list[Any] = []
        self._views: list[Tensor] = []  # of the shared memory, one per fragment and kind, in body order
        self._in_flight: int | None = None
        self._failures: list[str] = []  # since the last good write
        self.saved_step: int | None = None
        self._start_writer()
        # What this run did not start from: newer steps, damaged or of an abandoned continuation. Left in place they
        # would be taken for the newest ones, and keep-last-k would delete this run's instead.
        steps = {path.name: folder_step(path.name) for path in self.folder.iterdir()}
        self._aside = sorted(name for name, step in steps.items() if step is not None and step > start_step)

    def prepare(self, fragments: Iterable[Fragment]) -> None:
        """Allocate for these fragments now, so that the first save blocks no longer than the others. Optional."""
        self._lay_out(list(fragments))

    def save(self, step: int, fragments: Iterable[Fragment], info: Mapping[str, Any]) -> float:
        """Snapshot the fragments [length] fp32 and hand them to the writer; returns the seconds blocked.

        `info` is JSON: what the manifest says of the run, with the key `identity` compared on load; rank 0's counts.
        The same step is saved once. Raises CheckpointError when writing failed three times in a row.
        """
        began = time.perf_counter()
        self._settle(wait=True)
        if step == self.saved_step:
            return time.perf_counter() - began
        self._check_failures(MAX_FAILURES)
        fragments = list(fragments)
        if self._writer.poll() is not None:
            self._start_writer()
        self._lay_out(fragments)
        mine = (f for f in fragments if _is_mine(f, self._settings["rank"]))
        for view, source in zip(self._views, (t for f in mine for t in f.tensors.values()), strict=True):
            view.copy_(source)
        self._send({"step": step, "aside": self._aside, "info": info})
        self._in_flight = step
        return time.perf_counter() - began

    def poll(self) -> int | None:
        """Step of the newest checkpoint that this rank wrote; notices a failed write. Does not wait."""
        self._settle(wait=False)
        return self.saved_step

    def wait(self) -> int | None:
        """As `poll`, after the write under way."""
        self._settle(wait=True)
        return self.saved_step

    def close(self) -> None:
        """Wait for the write under way and end the writer; CheckpointError when the last write failed."""
        if self._writer.poll() is None or self._in_flight is not None:
            self._settle(wait=True)
        self._end_writer()
        self._views = []
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1
        self._check_failures(1)

    def __enter__(self) -> Saver:
        """The saver itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Close; a failed write does not hide the error that ended the block."""
        try:
            self.close()
        except CheckpointError:
            if error is None:
                raise

    def _start_writer(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(_python_path())}
        self._writer = subprocess.Popen(  # -P: a folder named `train` where the user happens to stand is not ours
            [sys.executable, "-P", "-m", "train.checkpoint.writer", json.dumps(self._settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(self._memory,),
            env=environment,
        )
        self._replies = b""
        answer = self._reply(self.timeout_s + 60)
        if not (answer and answer.get("ready")):
            self._end_writer()
            raise CheckpointError((answer or {}).get("error") or f"{self.folder}: the checkpoint writer does not start")
        if self._layout:
            self._send({"layout": self._layout})

    def _end_writer(self) -> None:
        assert self._writer.stdin is not None and self._writer.stdout is not None
        try:
            self._writer.stdin.close()
        except BrokenPipeError:
            pass
        try:
            self._writer.wait(self.timeout_s)
        except subprocess.TimeoutExpired:
            self._writer.kill()
            self._writer.wait()
        self._writer.stdout.close()

    def _lay_out(self, fragments: list[Fragment]) -> None:
        """Allocate and describe the snapshot, when the fragments are not those of the last save."""
        mine = [f for f in fragments if _is_mine(f, self._settings["rank"])]
        signature = tuple((f.name, tuple(f.shape), f.start, f.length, tuple(f.tensors)) for f in mine)
        if signature == self._signature:
            return
        layout = [_layout_row(f, self._pieces) for f in mine]
        sizes = [f.length for f in mine for _ in f.tensors]
        self._views = []  # before the file grows: the old mapping goes with them
        os.ftruncate(self._memory, sum(sizes) * ITEM_BYTES)
        if sizes:
            mapping = mmap.mmap(self._memory, sum(sizes) * ITEM_BYTES)
            whole = torch.frombuffer(mapping, dtype=torch.float32)
            whole.zero_()  # touches every page now: first use costs more than the copy itself
            self._views = list(whole.split(sizes))
        self._layout, self._signature = layout, signature
        self._send({"layout": layout})

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._writer.stdin is not None
        try:
            self._writer.stdin.write(json.dumps(message, allow_nan=False).encode() + b"\n")
            self._writer.stdin.flush()
        except BrokenPipeError:
            pass  # the writer is gone: `_settle` finds that out

    def _reply(self, timeout_s: float | None) -> dict[str, Any] | None:
        """Next line of the writer; None when there is none in time (None: wait for ever) or it is gone."""
        assert self._writer.stdout is not None
        handle = self._writer.stdout.fileno()
        while b"\n" not in self._replies:
            ready, _, _ = select.select([handle], [], [], timeout_s)
            chunk = os.read(handle, 1 << 16) if ready else b""
            if not chunk:
                return None
            self._replies += chunk
        line, self._replies = self._replies.split(b"\n", 1)
        return json.loads(line)

    def _settle(self, wait: bool) -> None:
        """Take note of how the write under way ended."""
        if self._in_flight is None:
            return
        answer = self._reply(None if wait else 0.0)
        if answer is None:
            if not wait and self._writer.poll() is None:
                return
            answer = {"error": f"step {self._in_flight}: the checkpoint writer ended with status {self._writer.wait()}"}
        step, self._in_flight = self._in_flight, None
        if answer["error"] is None:
            self.saved_step, self._failures = step, []
            return
        self._failures.append(answer["error"])
        good = "none" if self.saved_step is None else step_folder(self.saved_step)
        self._warn(f"checkpoint not written: {answer['error']} (last good one of this run: {good})")

    def _check_failures(self, limit: int) -> None:
        if len(self._failures) >= limit:
            count = (
                f"{len(self._failures)} saves in a row failed, the last one: "
                if limit > 1
                else "the last save failed: "
            )
            raise CheckpointError(count + self._failures[-1])


def _is_mine(fragment: Fragment, rank: int) -> bool:
    return fragment.length > 0 and (rank == 0 or not fragment.replicated)


def _layout_row(fragment: Fragment, released_pieces: ReleasedPieces) -> list[Any]:
    """See format.layout_ranges."""
    kinds = list(fragment.tensors)
    cut = identity_pieces if VALUE in kinds else released_pieces
    pieces = sorted(
        cut(fragment.name, tuple(fragment.shape), fragment.start, fragment.length), key=lambda piece: piece[3]
    )
    at = 0
    for _, _, _, offset, length in pieces:
        assert offset == at, f"{fragment.name}: pieces leave a gap at {at} of {fragment.length}"
        at += length
    assert at == fragment.length, f"{fragment.name}: pieces cover {at} of {fragment.length}"
    return [
        fragment.name,
        kinds,
        [[name, list(shape), start, length] for name, shape, start, _, length in pieces],
    ]


def _anonymous_file() -> int:
    """Descriptor of memory without a name: it goes with the last process that holds it, however that ends."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("omniloom-checkpoint")
    with tempfile.TemporaryFile() as file:  # macOS
        return os.dup(file.fileno())


def _python_path() -> list[str]:
    inherited = os.environ.get("PYTHONPATH")
    return [str(_ROOT), *([inherited] if inherited else [])]


def _versions() -> dict[str, str]:
    """Versions and git commit, for people who ask later how a checkpoint was made."""
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    try:
        versions["omniloom"] = importlib.metadata.version("omniloom")
    except importlib.metadata.PackageNotFoundError:
        versions["omniloom"] = "not installed"
    versions["commit"] = commit(_ROOT)
    return versions


def commit(root: Path) -> str:
    """Of a checkout, or the one that a copy of it was made from; "unknown" where nothing says."""
    if (root / COMMIT).is_file():
        return (root / COMMIT).read_text(encoding="utf-8").strip()[:100]
    if not (root / ".git").exists():
        return "unknown"
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.stdout.strip() or "unknown"
