"""The cache folder: right bytes or none, within its limit whoever writes, and never a reason to stop."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.cache import CHUNK, BlockCache

ROOT = Path(__file__).resolve().parents[2]
BLOCK = 1000
ON_DISK = BLOCK + 4  # with the crc32 of its only chunk


def key(name: object) -> str:
    return hashlib.sha256(repr(name).encode()).hexdigest()


def block(name: object, size: int = BLOCK) -> bytes:
    return random.Random(repr(name)).randbytes(size)


def a_cache(folder: Path, limit: int = 10 * ON_DISK, said: list[str] | None = None) -> BlockCache:
    return BlockCache(folder, limit, (said if said is not None else []).append, min_free=0)


def held(folder: Path) -> int:
    """Bytes of all files but the one that holds the sum."""
    total = 0
    for entry in os.scandir(folder):
        if entry.name != "used":
            try:
                total += entry.stat().st_size
            except FileNotFoundError:
                continue
    return total


def age(folder: Path, name: object, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(folder / f"{key(name)}.block", (then, then))


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3 * CHUNK + 5), data=st.data())
def test_any_range_comes_back(tmp_path_factory: pytest.TempPathFactory, size: int, data: st.DataObject) -> None:
    cache = a_cache(tmp_path_factory.mktemp("cache"), 1 << 20)
    payload = block(size, size)
    cache.write(key(1), payload)
    start = data.draw(st.integers(0, size - 1))
    stop = data.draw(st.integers(start + 1, size))
    assert cache.read(key(1), size, start, stop) == payload[start:stop]
    assert cache.read(key(2), size, start, stop) is None
    assert cache.read(key(1), size + 1, start, stop) is None  # another length: not the block that is meant


@pytest.mark.parametrize("damage", ["torn", "empty", "zeros", "longer", "flipped", "other name"])
def test_a_damaged_block_is_a_miss_and_goes(tmp_path: Path, damage: str) -> None:
    cache = a_cache(tmp_path, 1 << 20)
    size = 2 * CHUNK + 100
    cache.write(key(1), block(1, size))
    path = tmp_path / f"{key(1)}.block"
    whole = bytearray(path.read_bytes())
    if damage == "flipped":
        whole[CHUNK + 7] ^= 1
    if damage == "other name":
        path = path.rename(tmp_path / f"{key(2)}.block")
    damaged = {"torn": whole[: size // 2], "empty": b"", "zeros": bytes(len(whole)), "longer": whole + b"x"}
    path.write_bytes(damaged.get(damage, whole))
    name = 2 if damage == "other name" else 1
    if damage == "flipped":  # the chunks around it are still good
        assert cache.read(key(1), size, 0, 10) == block(1, size)[:10]
    assert cache.read(key(name), size, CHUNK + 1, CHUNK + 20) is None
    assert not path.exists()
    cache.write(key(name), block(1, size))
    assert cache.read(key(name), size, CHUNK + 1, CHUNK + 20) == block(1, size)[CHUNK + 1 : CHUNK + 20]


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    cache = a_cache(tmp_path, 10 * ON_DISK)
    for name in range(10):
        cache.write(key(name), block(name))
        age(tmp_path, name, 1000 - name)
    assert cache.read(key(0), BLOCK, 0, 1) is not None  # makes the oldest the newest
    cache.write(key(10), block(10))
    left = [name for name in range(11) if cache.read(key(name), BLOCK, 0, 1) is not None]
    assert left == [0, *range(3, 11)]  # down to nine tenths with the new one
    assert held(tmp_path) == 9 * ON_DISK


def test_nothing_is_scanned_until_the_limit_is_near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = a_cache(tmp_path, 100 * ON_DISK)
    scans = []
    real = os.scandir
    monkeypatch.setattr("data.cache.os.scandir", lambda path: scans.append(path) or real(path))
    for name in range(100):
        cache.write(key(name), block(name))
    assert len(scans) == 1  # each process counts once
    for name in range(100, 200):
        cache.write(key(name), block(name))
    assert len(scans) <= 12


def test_a_new_process_counts_what_is_there(tmp_path: Path) -> None:
    for name in range(10):
        a_cache(tmp_path).write(key(name), block(name))
    (tmp_path / "used").write_bytes(bytes(8))  # as after a crash of the machine
    a_cache(tmp_path).write(key(10), block(10))
    assert held(tmp_path) == 9 * ON_DISK


def test_a_leftover_of_a_killed_process_goes_and_a_live_one_stays(tmp_path: Path) -> None:
    cache = a_cache(tmp_path, 4 * ON_DISK)
    dead, alive = tmp_path / "dead.tmp", tmp_path / "alive.tmp"
    for path in (dead, alive):
        path.write_bytes(bytes(ON_DISK))
    os.utime(dead, (0, 0))
    for name in range(3):
        cache.write(key(name), block(name))
    assert not dead.exists() and alive.exists()
    assert held(tmp_path) <= 4 * ON_DISK


def test_a_block_above_the_limit_is_not_kept(tmp_path: Path) -> None:
    said: list[str] = []
    cache = a_cache(tmp_path, 100, said)
    cache.write(key(1), block(1))
    assert cache.read(key(1), BLOCK, 0, 1) is None and not said and cache.writable


def test_whole_files(tmp_path: Path) -> None:
    cache = a_cache(tmp_path)
    assert cache.whole(key(1), BLOCK) is None
    path = cache.write_whole(key(1), block(1))
    assert path is not None and path.read_bytes() == block(1)
    assert cache.whole(key(1), BLOCK) == path
    path.write_bytes(b"torn")
    assert cache.whole(key(1), BLOCK) is None


WRITER = """
    import random, sys
    from pathlib import Path
    from tests.data.test_cache import BLOCK, a_cache, block, held, key
    said = []
    cache = a_cache(Path(sys.argv[1]), int(sys.argv[2]), said)
    draw, worst, hits = random.Random(int(sys.argv[3])), 0, 0
    for _ in range(400):
        name = min(draw.randrange(60), draw.randrange(60))
        payload = cache.read(key(name), BLOCK, 3, 700)
        hits += payload is not None
        assert payload is None or payload == block(name)[3:700]
        if payload is None:
            cache.write(key(name), block(name))
        with cache._locked() as fd:  # a listing is not atomic
            assert fd is not None
            worst = max(worst, held(cache.folder))
    assert not said, said
    print(worst, hits)
"""


def test_three_processes_stay_within_the_limit(tmp_path: Path) -> None:
    limit = 20 * ON_DISK
    arguments = [sys.executable, "-c", textwrap.dedent(WRITER), str(tmp_path), str(limit)]
    processes = [subprocess.Popen([*arguments, str(seed)], cwd=ROOT, stdout=subprocess.PIPE) for seed in range(3)]
    outcomes = [process.communicate(timeout=120)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert all(0 < int(worst) <= limit for worst, _ in outcomes), outcomes
    assert all(int(hits) > 50 for _, hits in outcomes), outcomes  # it does cache
    assert not list(tmp_path.glob("*.tmp"))


def test_a_held_lock_costs_a_second_and_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.cache.LOCK_S", 0.05)
    cache, other = a_cache(tmp_path), a_cache(tmp_path)
    cache.write(key(1), block(1))
    with other._locked() as fd:
        assert fd is not None
        cache.write(key(2), block(2))
    assert cache.read(key(1), BLOCK, 0, 5) == block(1)[:5] and cache.read(key(2), BLOCK, 0, 5) is None
    cache.write(key(2), block(2))
    assert cache.read(key(2), BLOCK, 0, 5) == block(2)[:5]


@pytest.mark.parametrize("call", ["pwrite", "ftruncate", "replace", "open", "statvfs"])
def test_a_full_disk_is_told_once_and_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    said: list[str] = []
    cache = a_cache(tmp_path, said=said)
    cache.write(key(1), block(1))

    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(f"data.cache.os.{call}", full)
        cache.write(key(2), block(2))
        cache._paused_until = 0.0  # a minute later
        assert cache.write_whole(key(3), block(3)) is None
    assert said == [f"data.store.cache: {tmp_path}: not written (No space left on device); going on, reading from afar"]
    assert not cache.writable and not list(tmp_path.glob("*.tmp"))
    assert cache.read(key(1), BLOCK, 0, 9) == block(1)[:9] and cache.read(key(2), BLOCK, 0, 9) is None
    cache._paused_until = 0.0
    cache.write(key(2), block(2))
    assert cache.read(key(2), BLOCK, 0, 9) == block(2)[:9]


def test_room_is_left_on_the_disk(tmp_path: Path) -> None:
    said: list[str] = []
    cache = BlockCache(tmp_path / "new", 1 << 20, said.append, min_free=1 << 60)
    cache.write(key(1), block(1))
    assert len(said) == 1 and "would stay free" in said[0]


SMALL_DISK = """
    import os, resource, sys
    from pathlib import Path
    from tests.data.test_cache import block, key
    from data.cache import BlockCache
    folder, said, size = Path(sys.argv[1]), [], 300_000
    if sys.argv[2] == "files":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    cache = BlockCache(folder, 1 << 30, said.append, min_free=-(1 << 40))  # let the writes themselves fail
    for name in range(10):
        cache._paused_until = 0.0
        cache.write(key(name), block(name, size))
    kept = [name for name in range(10) if cache.read(key(name), size, 5, 9) is not None]
    assert all(cache.read(key(name), size, 0, size) == block(name, size) for name in kept)
    print(len(kept), len(said), *said, *(path.name for path in folder.glob("*.tmp")))
"""


def test_a_limit_on_file_sizes(tmp_path: Path) -> None:
    code = textwrap.dedent(SMALL_DISK)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), "files"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stderr == ""
    assert done.stdout.strip().startswith("0 1 data.store.cache: ") and "File too large" in done.stdout


def test_a_real_disk_that_fills_up(tmp_path: Path) -> None:
    """A tmpfs of 1 MB, where a namespace may mount one."""
    mount = f"mount -t tmpfs -o size=1000k none {tmp_path}"
    namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    try:
        if subprocess.run([*namespace, mount], capture_output=True).returncode:
            pytest.skip("no file system can be mounted here")
    except FileNotFoundError:
        pytest.skip("no unshare here")
    command = [*namespace, f'{mount} && exec "$@"', "sh", sys.executable, "-c", textwrap.dedent(SMALL_DISK)]
    done = subprocess.run([*command, str(tmp_path), "disk"], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.strip() == (
        f"3 1 data.store.cache: {tmp_path}: not written (No space left on device); going on, reading from afar"
    )


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    (tmp_path / "file").write_text("in the way")
    cache = a_cache(tmp_path / "file" / "cache", said=said)
    assert cache.read(key(1), BLOCK, 0, 1) is None and cache.whole(key(1), BLOCK) is None
    cache.write(key(1), block(1))
    assert len(said) == 1 and "Not a directory" in said[0]


def test_a_folder_deleted_under_way_comes_back(tmp_path: Path) -> None:
    cache = a_cache(tmp_path / "cache")
    cache.write(key(1), block(1))
    for path in (tmp_path / "cache").iterdir():
        path.unlink()
    (tmp_path / "cache").rmdir()
    assert cache.read(key(1), BLOCK, 0, 1) is None
    cache.write(key(1), block(1))
    assert cache.read(key(1), BLOCK, 0, 1) == block(1)[:1]
