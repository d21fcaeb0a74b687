"""Which checkpoint to go on from, the same on every rank, and whether it can be trusted.

    candidates, newest first -> each rank checks its part of the files -> agree -> take it, or warn and try the next

Each file is read once by one rank (SHA-256, about 1.5 GB/s), before any tensor is used.
"""

from __future__ import annotations

import hashlib
import os
import stat
import warnings
from collections.abc import Callable
from pathlib import Path

from train.checkpoint.format import (
    CHECKSUM,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    Manifest,
    checksum_line,
    folder_step,
    parse_manifest,
)
from train.checkpoint.lock import wait_for_writers
from train.errors import CheckpointError


def candidates(run_folder: str | os.PathLike[str]) -> list[Path]:
    """Published checkpoints of a run, newest first."""
    folder = Path(run_folder) / "checkpoints"
    if not folder.is_dir():
        return []
    steps = ((folder_step(path.name), path) for path in folder.iterdir() if path.is_dir())
    return [path for _, path in sorted(((s, p) for s, p in steps if s is not None), reverse=True)]


def verify(folder: str | os.PathLike[str], rank: int = 0, world: int = 1) -> Manifest:
    """Check the manifest and every `world`-th file from `rank` on; CheckpointError names the file that is damaged."""
    folder = Path(folder)
    text = _read_small(folder / MANIFEST, MAX_MANIFEST_BYTES)
    if _read_small(folder / CHECKSUM, 4096) != checksum_line(text).encode():
        raise CheckpointError(f"{folder / MANIFEST}: damaged: its SHA-256 is not the one in {CHECKSUM}")
    manifest = parse_manifest(text, folder)
    if folder_step(folder.name) not in (None, manifest.step):
        raise CheckpointError(f"{folder / MANIFEST}: is of step {manifest.step}")
    for entry in manifest.files[rank::world]:
        path = folder / entry.name
        size = _regular_size(path)
        if size != entry.size:
            raise CheckpointError(f"{path}: damaged: {size} bytes, the manifest says {entry.size}")
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
                raise CheckpointError(f"{path}: damaged: its SHA-256 is not the one in {MANIFEST}")
    return manifest


def choose(
    run_folder: str | os.PathLike[str],
    resume: str,
    *,
    agree: Callable[[bool], bool] = bool,
    rank: int = 0,
    world: int = 1,
    wait_s: float = 600.0,
    warn: Callable[[str], None] = warnings.warn,
) -> Manifest | None:
    """Checkpoint to go on from, verified by all ranks together. Collective through `agree` (True if any rank says so).

    resume: "auto", the newest that verifies, None when the run has none; "latest", the same, but there must be one;
    "best": the one of the best evaluation (eval.best); "never": None, and there must be none; or the path of one
    checkpoint, which must verify.
    First waits up to `wait_s` for the writers of a run that is just dying: they may publish one more. So choose before
    this launch's Saver is made, and pass wait_s=0 to look into a run that is alive.
    Raises CheckpointError, on all ranks. Rank 0 warns about each damaged checkpoint that is passed over.
    """
    if wait_s and (folder := Path(run_folder) / "checkpoints").is_dir():
        wait_for_writers(folder, wait_s, tell=warn if rank == 0 else None)
    agree(False)  # all ranks are past the wait before any of them starts a writer of its own
    found = candidates(run_folder)
    if resume == "never":
        if found:
            raise CheckpointError(f"{run_folder}: has {found[0].name} already; set resume=auto, or another run folder")
        return None
    if resume == "best":
        resume = str(best_of(run_folder))
    if resume not in ("auto", "latest"):
        return _choose_path(Path(resume), agree, rank, world)
    for path in found:
        manifest, problem = _verify_together(path, agree, rank, world)
        if manifest is not None:
            return manifest
        if rank == 0:
            warn(f"{problem}; going back to the checkpoint before {path.name}")
    if found:
        raise CheckpointError(f"{run_folder}: all {len(found)} checkpoints are damaged; nothing was changed")
    if resume == "latest":
        raise CheckpointError(
            f"{run_folder}: resume=latest, but there is no checkpoint; set resume=auto to start afresh"
        )
    return None


def best_of(run_folder: str | os.PathLike[str]) -> Path:
    """The checkpoint that checkpoints/best names. Raises CheckpointError where there is none."""
    folder = Path(run_folder) / "checkpoints"
    name = _read_small(folder / "best", 4096).decode(errors="replace").strip() if (folder / "best").exists() else ""
    if folder_step(name) is None or not (folder / name).is_dir():
        raise CheckpointError(f"{run_folder}: has no best checkpoint: eval.best names the metric that chooses it")
    return folder / name


def _choose_path(path: Path, agree: Callable[[bool], bool], rank: int, world: int) -> Manifest:
    if not (path / MANIFEST).exists():
        raise CheckpointError(f"resume={path}: no checkpoint there ({MANIFEST} is missing)")
    manifest, problem = _verify_together(path, agree, rank, world)
    if manifest is not None:
        return manifest
    step = folder_step(path.name)
    for older in candidates(path.absolute().parent.parent):
        if step is not None and (folder_step(older.name) or 0) < step:
            if _verify_together(older, agree, rank, world)[0] is not None:
                raise CheckpointError(f"{problem}; {older} is good")
    raise CheckpointError(f"{problem}; no older checkpoint beside it is good")


def _verify_together(
    path: Path, agree: Callable[[bool], bool], rank: int, world: int
) -> tuple[Manifest | None, CheckpointError | None]:
    """The manifest when every rank's part is sound, otherwise what is wrong: the same on all ranks."""
    manifest, problem = None, None
    try:
        manifest = verify(path, rank, world)
    except CheckpointError as error:
        problem = error
    if not agree(problem is not None):
        return manifest, None
    try:  # the flag does not say which file: every rank looks at all of them, in the same order
        verify(path)
        return None, problem or CheckpointError(f"{path}: damaged, as read by another rank")
    except CheckpointError as error:
        return None, error


def _regular_size(path: Path) -> int:
    try:
        status = path.lstat()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: not a regular file")
    return status.st_size


def _read_small(path: Path, limit: int) -> bytes:
    size = _regular_size(path)
    if size > limit:
        raise CheckpointError(f"{path}: {size} bytes, the limit is {limit}")
    return path.read_bytes()
