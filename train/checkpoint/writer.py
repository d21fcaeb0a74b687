"""The writer process: one per rank, started once at launch, torch-free, low priority.

    stdin   {"layout": [...]}          what the shared memory holds, when that changes
            {"step", "aside", "info"}  the shared memory is complete: write it
    stdout  {"ready": true}            the lock is held, leftovers are gone
            {"done": step, "error": null | text}

    every rank: rankR.safetensors, fsync, then rankR.json {"size", "sha256", "layout"}, into .step-N.LAUNCH/
    rank 0:     waits for all rankR.json, manifest.json, fsync, rename to step-N, fsync, `latest`, deletes old ones

It ends when its stdin closes or its trainer is gone, but finishes the snapshot that it has: with every rank's snapshot
complete the checkpoint is published, otherwise rank 0's writer removes the folder. Signals meant for the trainer
(Ctrl-C, a scheduler's SIGTERM to the whole job) are ignored here.

Cost per save: one read of the snapshot (SHA-256) and one write, in 8 MiB pieces, at nice 10.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train.checkpoint import lock
from train.checkpoint.format import (
    CHECKSUM,
    ITEM_BYTES,
    MANIFEST,
    best_step,
    build_manifest,
    checksum_line,
    folder_step,
    layout_header,
    layout_ranges,
    name_best,
    rank_file,
    step_folder,
)
from train.errors import CheckpointError

CHUNK_BYTES = 8 << 20
SYNC_BYTES = (
    64 << 20
)  # dirty pages are pushed out steadily: one late flush would stall the trainer's own file system calls
NICE = 10
POLL_S = 0.05
DEAD_AFTER_S = 2.0  # a rank without a report whose lock has been free for so long will not deliver one
RANKS_TIMEOUT_S = 600.0


class Writer:
    """Writes this rank's snapshots; rank 0 publishes."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.folder = Path(settings["folder"])
        self.rank, self.world, self.keep = settings["rank"], settings["world"], settings["keep"]
        self.launch, self.versions, self.memory = settings["launch"], settings["versions"], settings["memory"]
        self.layout: list[Any] = []
        self.header = b""
        self.body = memoryview(b"")

    def prepare(self, timeout_s: float) -> int:
        """Take the lock; rank 0 also waits for the previous run's writers and removes what they left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        _fsync_folder(self.folder.parent)
        handle = lock.acquire(self.folder, self.rank, self.launch, timeout_s)
        if self.rank == 0:
            lock.wait_for_writers(self.folder, timeout_s, launch=self.launch)
            self._remove_leftovers()
        return handle

    def _remove_leftovers(self, published: int = 0) -> None:
        """Unfinished folders: other launches', and this launch's own of steps before `published`, which failed."""
        for path in self.folder.glob(".step-*"):
            _, name, launch = path.name.split(".", 2)
            if launch != self.launch or (folder_step(name) or 0) < published:
                shutil.rmtree(path, ignore_errors=True)
        for path in self.folder.glob(".trash-*"):
            shutil.rmtree(path, ignore_errors=True)
        for path in self.folder.glob(".latest.*"):
            path.unlink()

    def set_layout(self, layout: list[Any]) -> None:
        """What the shared memory holds from now on."""
        self.layout, self.header = layout, layout_header(layout)
        size = sum(length for *_, length in layout_ranges(layout)) * ITEM_BYTES
        self.body = memoryview(mmap.mmap(self.memory, size, prot=mmap.PROT_READ)) if size else memoryview(b"")

    def save(self, step: int, aside: list[str], info: dict[str, Any]) -> str | None:
        """Write one snapshot; returns what went wrong, after removing what was written."""
        folder = self.folder / f".{step_folder(step)}.{self.launch}"
        try:
            folder.mkdir(exist_ok=True)
            report = {**self._write_tensors(folder / rank_file(self.rank)), "layout": self.layout}
            self._write_report(folder, report)
            if self.rank == 0:
                self._publish(folder, step, aside, info)
            return None
        except (OSError, CheckpointError) as error:
            text = f"step {step}: {error}"
        try:
            if self.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
            else:
                (folder / rank_file(self.rank)).unlink(missing_ok=True)  # frees the space that the next line needs
                self._write_report(folder, {"error": text})
        except OSError:
            pass  # rank 0 then finds out by its timeout
        return text

    def _write_tensors(self, path: Path) -> dict[str, Any]:
        digest = hashlib.sha256(self.header)
        with open(path, "wb", buffering=0) as file:
            _write_all(file.fileno(), memoryview(self.header))
            for at in range(0, len(self.body), CHUNK_BYTES):
                chunk = self.body[at : at + CHUNK_BYTES]
                digest.update(chunk)
                _write_all(file.fileno(), chunk)
                if at % SYNC_BYTES == 0:
                    os.fsync(file.fileno())
            os.fsync(file.fileno())
        return {"size": len(self.header) + len(self.body), "sha256": digest.hexdigest()}

    def _write_report(self, folder: Path, report: dict[str, Any]) -> None:
        part = folder / f".rank{self.rank}.json"
        part.write_text(json.dumps(report))
        part.rename(folder / f"rank{self.rank}.json")  # whole or absent

    def _gather(self, folder: Path) -> list[dict[str, Any]]:
        """All ranks' reports, in order of rank."""
        began, reports, free_since = time.monotonic(), [], None
        while len(reports) < self.world:
            rank = len(reports)
            path, alive = folder / f"rank{rank}.json", lock.is_held(lock.lock_path(self.folder, rank))
            if path.exists():  # asked after the lock: a writer that delivers and then ends is never taken for dead
                report = json.loads(path.read_text())
                if "error" in report:
                    raise CheckpointError(f"rank {rank}: {report['error']}")
                reports.append(report)
                free_since = None
                continue
            now = time.monotonic()
            free_since = None if alive else free_since or now
            if free_since is not None and now - free_since > DEAD_AFTER_S:
                raise CheckpointError(f"{folder}: the writer of rank {rank} is gone")
            if now - began > RANKS_TIMEOUT_S:
                raise CheckpointError(f"{folder}: rank {rank} delivered nothing in {RANKS_TIMEOUT_S:.0f} s")
            time.sleep(POLL_S)
        return reports

    def _publish(self, folder: Path, step: int, aside: list[str], info: dict[str, Any]) -> None:
        manifest = build_manifest(step, info, self.versions, self._gather(folder))
        _write_durably(folder / MANIFEST, manifest)
        _write_durably(folder / CHECKSUM, checksum_line(manifest).encode())
        for rank in range(self.world):
            (folder / f"rank{rank}.json").unlink()
        _fsync_folder(folder)
        for name in aside:
            if (self.folder / name).exists():
                (self.folder / name).rename(self.folder / f"aside-{name}.{self.launch}")
        part = self.folder / f".latest.{self.launch}"
        _write_durably(part, f"{step_folder(step)}\n".encode())  # before the rename: nothing after it can fill the disk
        folder.rename(self.folder / step_folder(step))
        _fsync_folder(self.folder)
        part.rename(self.folder / "latest")
        _fsync_folder(self.folder)

    def delete_old(self, published: int, best: int | None = None) -> None:
        """Keep the newest `keep` published checkpoints and that of step `best`; remove what failed before this one."""
        if best is not None:
            with contextlib.suppress(OSError):  # a full disk: the trainer names it again at its end, and says so
                name_best(self.folder, best)
        for step, path in self._published()[: -self.keep]:
            if step == best:
                continue
            trash = self.folder / f".trash-{path.name}.{self.launch}"
            path.rename(trash)  # first out of sight: half a checkpoint must not look like one
        self._remove_leftovers(published)

    def _published(self) -> list[tuple[int, Path]]:
        steps = ((folder_step(path.name), path) for path in self.folder.iterdir() if path.is_dir())
        return sorted((step, path) for step, path in steps if step is not None)


def _write_all(handle: int, data: memoryview) -> None:
    while len(data):  # a full disk may take a part of a piece before it refuses the rest
        data = data[os.write(handle, data) :]


def _write_durably(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _lines(parent: int) -> Iterator[bytes]:
    """Complete lines of stdin, until it closes or the trainer is gone.

    Both are watched: a data worker forked from the trainer inherits the pipe and may hold it open after a kill.
    """
    buffer = bytearray()
    while True:
        ready, _, _ = select.select([0], [], [], 1.0)
        if not ready:
            if os.getppid() != parent:
                return
            continue
        chunk = os.read(0, 1 << 20)
        if not chunk:
            return  # a line cut short is a snapshot that was not complete
        buffer += chunk
        if b"\n" in chunk:
            *lines, rest = bytes(buffer).split(b"\n")
            buffer = bytearray(rest)
            yield from lines


def _answer(reply: dict[str, Any]) -> None:
    try:
        os.write(1, json.dumps(reply).encode() + b"\n")
    except BrokenPipeError:
        pass  # the trainer is gone


def main() -> None:
    """Run until stdin closes."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)
    os.nice(NICE)
    settings = json.loads(sys.argv[1])
    writer = Writer(settings)
    try:
        writer.prepare(settings["timeout_s"])  # the descriptor stays open, and with it the lock, until the process ends
    except (OSError, CheckpointError) as error:
        return _answer({"ready": False, "error": str(error)})
    _answer({"ready": True})
    for line in _lines(settings["trainer"]):
        message = json.loads(line)
        if "layout" in message:
            writer.set_layout(message["layout"])
            continue
        error = writer.save(message["step"], message["aside"], message["info"])
        _answer({"done": message["step"], "error": error})
        if writer.rank == 0 and error is None:
            writer.delete_old(message["step"], best_step(message["info"]))


if __name__ == "__main__":
    main()
