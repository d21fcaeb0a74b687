"""Reading ranges from disk and HTTP: the right bytes, few requests, patience with a bad network, clear refusals."""

from __future__ import annotations

import datetime
import errno
import ipaddress
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.errors import BadSample, DataError
from data.store import GAP, Missing, Store, StoreSettings
from tests.data.fault_server import FaultServer, serve

pytest.importorskip("aiohttp", reason='needs pip install "omniloom[remote]"')
pytest.importorskip("s3fs", reason='needs pip install "omniloom[remote]"')

ROOT = Path(__file__).resolve().parents[2]
SIZE = 2_500_000
BLOB = random.Random(7).randbytes(SIZE)


@pytest.fixture
def web() -> Iterator[FaultServer]:
    with serve(**{"x.tar": BLOB, "small": BLOB[:1000]}) as server:
        yield server


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    (tmp_path / "netrc").touch(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def a_store(cache: Path | None = None, said: list[str] | None = None, **values: float) -> Store:
    """A store that is patient for 60 s, with a cache of 1 MiB blocks in a folder or with none."""
    folder = {"cache": str(cache)} if cache else {"cache_gb": 0}
    chosen = StoreSettings(**{"block_mb": 1, "timeout_s": 20, "retry_s": 60} | folder | values)
    chosen.validate()
    store = Store(chosen, (said if said is not None else []).append)
    if store._cache:
        store._cache.min_free = 0
    return store


# what comes back


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_reads_equal_the_bytes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Local, remote, cached and not, over blocks of odd sizes and a cache that keeps evicting."""
    size = data.draw(st.integers(1, 400_000))
    blob = BLOB[:size]
    ranges = st.tuples(st.integers(0, size), st.integers(0, size)).map(lambda r: (r[0], min(r[1], size - r[0])))
    calls = data.draw(st.lists(st.tuples(st.lists(ranges, min_size=1, max_size=5), st.booleans()), max_size=6))
    folder = tmp_path_factory.mktemp("store")
    (folder / "x").write_bytes(blob)
    with serve(x=blob) as server:
        cached = a_store(folder / "cache")
        cached._block = data.draw(st.sampled_from([777, 65_536, 100_000] if size < 30_000 else [40_000, 100_000]))
        assert cached._cache is not None
        cached._cache.limit = data.draw(st.sampled_from([0, 50_000, 150_000, 1 << 30]))
        stores = [(cached, f"{server.url}/x"), (a_store(), f"{server.url}/x"), (a_store(), str(folder / "x"))]
        for wanted, direct in calls:
            for store, location in stores:
                expected = [blob[start : start + length] for start, length in wanted]
                assert store.read_many(location, wanted, direct) == expected
        assert sum(f.stat().st_size for f in (folder / "cache").glob("*.block")) <= cached._cache.limit


def test_sizes_versions_and_copies(tmp_path: Path, web: FaultServer) -> None:
    (tmp_path / "x").write_bytes(BLOB)
    local, remote = str(tmp_path / "x"), f"{web.url}/x.tar"
    for store in (a_store(), a_store(tmp_path / "cache")):
        assert store.sizes([local, remote]) == [SIZE, SIZE]
        assert store.version(remote) == '"one"'
        assert store.local_copy(local) == Path(local)
        paths = store.local_copies([remote, local, f"{web.url}/small"])
        assert [path.read_bytes() for path in paths] == [BLOB, BLOB, BLOB[:1000]]
        asked = len(web.requests)
        assert store.local_copies([remote, local, f"{web.url}/small"]) == paths
        assert len(web.requests) == asked
    before = a_store().version(local)
    os.utime(local, (1, 1))
    assert a_store().version(local) != before


def test_a_read_beyond_the_end_is_a_bad_sample(tmp_path: Path, web: FaultServer) -> None:
    (tmp_path / "x").write_bytes(BLOB)
    for location in (str(tmp_path / "x"), f"{web.url}/x.tar"):
        with pytest.raises(BadSample, match="the shard ends 7 bytes too early"):
            a_store().read(location, SIZE - 3, 10)


# how it asks


def test_a_sample_is_one_request_and_then_none(tmp_path: Path, web: FaultServer) -> None:
    location = f"{web.url}/x.tar"
    members = [(1024, 300), (2048, 70_000), (73_000, 5000)]
    expected = [BLOB[start : start + size] for start, size in members]
    bare = a_store()
    assert bare.read_many(location, members) == expected
    assert web.requests[1:] == [("/x.tar", "bytes=1024-77999")]
    assert web.headers[1]["Accept-Encoding"] == "identity"
    far = [(0, 10), (10 + GAP + 1, 10)]
    bare.read_many(location, far)
    assert len(web.requests) == 4
    web.requests.clear()
    cached = a_store(tmp_path)
    assert cached.read_many(location, members) == expected
    assert web.requests == [("/x.tar", "bytes=0-0"), ("/x.tar", "bytes=0-1048575")]
    assert cached.read_many(location, members) == expected
    assert a_store(tmp_path).read_many(location, members) == expected  # another process: it asks for the version only
    assert web.requests[2:] == [("/x.tar", "bytes=0-0")]
    cached.read_many(location, [(5000, 10)], direct=True)
    assert web.requests[3:] == [("/x.tar", "bytes=5000-5009")]


def test_bytes_that_proved_wrong_are_fetched_anew(tmp_path: Path, web: FaultServer) -> None:
    store = a_store(tmp_path)
    location = f"{web.url}/x.tar"
    web.files["/x.tar"] = b"\0" * SIZE  # a server that erred for a moment
    assert store.read(location, 0, 5) == b"\0" * 5
    web.files["/x.tar"] = BLOB
    assert store.read(location, 0, 5) == b"\0" * 5
    store.forget(location, [(0, 5)])
    assert store.read(location, 0, 5) == BLOB[:5]


def test_a_file_without_a_version_is_not_cached(tmp_path: Path, web: FaultServer) -> None:
    web.etags["/x.tar"] = ""
    store = a_store(tmp_path / "cache")
    assert store.read(f"{web.url}/x.tar", 5, 5) == BLOB[5:10]
    assert store.local_copy(f"{web.url}/x.tar").read_bytes() == BLOB
    assert not list(tmp_path.glob("cache/*"))
    web.modified = "Sun, 22 Nov 2026 10:00:00 GMT"
    assert a_store().version(f"{web.url}/x.tar") == web.modified


def test_a_new_version_is_never_mixed_with_the_old(tmp_path: Path, web: FaultServer) -> None:
    location, old = f"{web.url}/x.tar", a_store(tmp_path)
    assert old.read(location, 0, 5) == BLOB[:5]
    web.files["/x.tar"], web.etags["/x.tar"] = BLOB[::-1], '"two"'
    with pytest.raises(DataError, match="x.tar: changed while it was being read; start the run again"):
        old.read(location, SIZE - 5, 5)
    assert a_store(tmp_path).read(location, 0, 5) == BLOB[::-1][:5]


def test_a_full_disk_stops_nothing(tmp_path: Path, web: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    store = a_store(tmp_path / "cache", said)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("data.cache.os.pwrite", full)
    for start in range(0, SIZE, 500_000):
        assert store.read(f"{web.url}/x.tar", start, 1000) == BLOB[start : start + 1000]
    assert store.local_copy(f"{web.url}/small").read_bytes() == BLOB[:1000]
    assert len(said) == 1 and "No space left on device" in said[0]
    assert web.requests[2:5] == [("/x.tar", f"bytes={s}-{s + 999}") for s in (500_000, 1_000_000, 1_500_000)]


# a bad network


@pytest.mark.parametrize("fault", ["500", "502", "503", "429", "408", "drop", "torn", "less", "stuck", "slow"])
def test_trouble_that_passes_is_told_once_and_survived(web: FaultServer, fault: str) -> None:
    said: list[str] = []
    store = a_store(said=said)
    location = f"{web.url}/x.tar"
    assert store.size(location) == SIZE
    if fault in ("stuck", "slow"):
        store._servers(location).timeout_s = 0.5
    web.faults += [fault] * 2
    assert store.read(location, 100, 200_000) == BLOB[100:200_100]
    web.faults += [fault]
    assert store.read(location, 300_000, 200_000) == BLOB[300_000:500_000]
    assert len(web.requests) >= 6
    (line,) = said
    assert line.startswith(f"{location}: ") and line.endswith(f"again for up to 60 s (said once for {web.url})")


@pytest.mark.parametrize("fault", ["503", "drop", "stuck"])
def test_trouble_that_stays_ends_the_run_in_time(web: FaultServer, fault: str) -> None:
    store = a_store(retry_s=1.5)
    location = f"{web.url}/x.tar"
    assert store.size(location) == SIZE
    store._servers(location).timeout_s = 0.5
    web.faults += [fault] * 100
    begin = time.monotonic()
    with pytest.raises(DataError, match=r"x.tar: .*; gave up \(tries: \d, seconds: \d, data.store.*resume") as caught:
        store.read(location, 0, 100)
    assert time.monotonic() - begin < 10
    assert not isinstance(caught.value, BadSample)  # or the sample would be left out, and the run go on
    assert len(web.requests) > 2


def test_nobody_at_the_address() -> None:
    with pytest.raises(DataError, match=r"^http://127.0.0.1:1/x.tar: no connection \(Client.*\); gave up \(tries: 1, "):
        a_store(retry_s=0).size("http://127.0.0.1:1/x.tar")


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("403", "access denied (HTTP 403); check ~/.netrc, and the address"),
        ("401", "access denied (HTTP 401); check ~/.netrc, and the address"),
        ("404", "no such file (HTTP 404)"),
        ("410", "the server refused (HTTP 410); check the address"),
        ("whole", "the server sends whole files only (no HTTP ranges); use another server, or copy the file"),
        ("shifted", "the server sends a range from byte 1 where 0 was asked for"),
        ("endless", "the server sends more than the 1 bytes that were asked for"),
        ("gzip", "the server sends it compressed, where ranges mean nothing; switch that off for .tar and .index"),
        ("unsaid", "the server does not say which range it sends, or of what size the file is"),
        ("to file:///etc/passwd", "redirected to an address that is not http; refused"),
        ("to ftp://127.0.0.1/x.tar", "redirected to an address that is not http; refused"),
    ],
)
def test_what_no_patience_mends_is_said_at_once(web: FaultServer, fault: str, line: str) -> None:
    said: list[str] = []
    web.faults += [fault]
    with pytest.raises(DataError) as caught:
        a_store(said=said).size(f"{web.url}/x.tar")
    assert str(caught.value) == f"{web.url}/x.tar: {line}"
    assert isinstance(caught.value, Missing) == (fault == "404")
    assert len(web.requests) == 1 and not said and web.sent < 10_000 + SIZE * (fault == "whole")


def test_a_redirect_to_http_is_followed_and_its_secrets_are_not_told(web: FaultServer) -> None:
    web.faults += [f"to {web.url}/x.tar"]
    assert a_store().size(f"{web.url}/y.tar") == SIZE
    web.faults += [f"to {web.url}/gone?signature=secret"]
    with pytest.raises(DataError) as caught:
        a_store().size(f"{web.url}/y.tar")
    assert str(caught.value) == f"{web.url}/y.tar: no such file (HTTP 404)"


def test_an_empty_file(web: FaultServer) -> None:
    web.files["/empty"] = b""
    with pytest.raises(DataError, match="/empty: is empty"):
        a_store().size(f"{web.url}/empty")


CHECK = "import sys; from tests.data.test_store import a_store; a_store().size(sys.argv[1])"


def test_https_is_verified_and_never_left_for_http(web: FaultServer, tmp_path: Path) -> None:
    with serve(certificate=a_certificate(tmp_path), **{"x.tar": BLOB}) as server:
        location = f"{server.url}/x.tar"
        with pytest.raises(DataError) as caught:
            a_store().size(location)
        assert str(caught.value) == (
            f"{location}: its certificate cannot be verified; check SSL_CERT_FILE or AWS_CA_BUNDLE"
        )
        trusting = os.environ | {"SSL_CERT_FILE": str(tmp_path / "certificate.pem")}
        for fault, outcome in (("", ""), (f"to {web.url}/x.tar", "redirected from https to http; refused")):
            server.faults += [fault]
            done = subprocess.run([sys.executable, "-c", CHECK, location], cwd=ROOT, env=trusting, capture_output=True)
            last = done.stderr.decode().strip().rpartition("\n")[2]
            assert last == (f"data.errors.DataError: {location}: {outcome}" if outcome else "")


def a_certificate(folder: Path) -> Path:
    """A file with a key and a certificate for 127.0.0.1 that nobody signed."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    host = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    now = datetime.datetime.now(datetime.UTC)
    built = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    built = built.serial_number(1).add_extension(host, critical=False).not_valid_before(now)
    signed = built.not_valid_after(now + datetime.timedelta(days=1)).sign(key, hashes.SHA256())
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    path = folder / "certificate.pem"
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
    path.write_bytes(private + signed.public_bytes(pem))
    return path


def test_netrc_is_read(web: FaultServer, tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login ada password pw\n")
    assert a_store().size(f"{web.url}/x.tar") == SIZE
    assert web.headers[0]["Authorization"] == "Basic YWRhOnB3"


def test_an_extra_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "data.remote", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(DataError) as caught:
        a_store().size("s3://bucket/x.tar")
    assert str(caught.value) == 's3://bucket/x.tar: needs s3fs: pip install "omniloom[remote]"'


# local files


def test_local_trouble_is_one_line(tmp_path: Path) -> None:
    store = a_store()
    for read in (store.size, store.version, lambda at: store.read(at, 0, 1)):
        with pytest.raises(Missing) as caught:
            read(str(tmp_path / "none"))
        assert str(caught.value) == f"{tmp_path}/none: no such file"
    with pytest.raises(DataError, match=f"{tmp_path}: cannot be read: Is a directory"):
        store.read(str(tmp_path), 0, 1)


def test_local_files_stay_open_within_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.store.MAX_OPEN", 3)
    store, before = a_store(), len(os.listdir("/proc/self/fd"))
    for number in range(10):
        (tmp_path / str(number)).write_bytes(b"%d" % number)
        assert store.read(str(tmp_path / str(number)), 0, 1) == b"%d" % number
        assert store.read(str(tmp_path / "0"), 0, 1) == b"0"
    assert len(os.listdir("/proc/self/fd")) <= before + 3


# processes


def _read_in_worker(store: Store, location: str, connection) -> None:
    connection.send(store.read(location, 2_000_000, 10) if "://" in location else store.read(location, 3, 10))


@pytest.mark.parametrize("start", ["forkserver", "fork"])
def test_workers_open_their_own(tmp_path: Path, web: FaultServer, start: str) -> None:
    context = multiprocessing.get_context(start)
    settings = StoreSettings(cache=str(tmp_path), cache_gb=0.1, block_mb=1)
    store = Store(settings)
    local = tmp_path / "x"
    local.write_bytes(BLOB[:100])
    location = f"{web.url}/x.tar"
    assert store.read(location, 3, 10) == store.read(str(local), 3, 10) == BLOB[3:13]  # connections are open now
    ports = set(web.clients)
    for at, expected in ((location, BLOB[2_000_000:2_000_010]), (str(local), BLOB[3:13])):
        ours, theirs = context.Pipe()
        worker = context.Process(target=_read_in_worker, args=(store, at, theirs))
        worker.start()
        assert ours.poll(60) and ours.recv() == expected
        worker.join(60)
        assert worker.exitcode == 0
    assert len(set(web.clients) - ports) == 1  # a connection of its own: two processes on one would mix up answers
    assert pickle.loads(pickle.dumps(store)).read(location, 3, 10) == BLOB[3:13]


SHARER = """
    import random, sys
    from data.store import Store, StoreSettings
    store, draw = Store(StoreSettings(cache=sys.argv[1], cache_gb=1, block_mb=1)), random.Random(int(sys.argv[3]))
    store._cache.min_free = 0
    for _ in range(400):
        store.read(sys.argv[2], draw.randrange((40 << 20) - 1000), 1000)
"""


def test_processes_share_what_they_fetch(tmp_path: Path, web: FaultServer) -> None:
    web.files["/big"] = random.Random(1).randbytes(40 << 20)
    command = [sys.executable, "-c", textwrap.dedent(SHARER), str(tmp_path), f"{web.url}/big"]
    workers = [subprocess.Popen([*command, str(seed)], cwd=ROOT) for seed in range(3)]
    assert [worker.wait(120) for worker in workers] == [0, 0, 0]
    blocks = [span for _, span in web.requests if span != "bytes=0-0"]
    assert len(set(blocks)) == 40
    assert len(blocks) < 80  # 120 without sharing; some are fetched twice, in the same moment


def test_local_reads_import_no_network_library(tmp_path: Path) -> None:
    code = (
        "import sys; from data.store import Store; Store().read('pyproject.toml', 0, 10);"
        "print([name for name in ('fsspec', 'aiohttp', 's3fs', 'botocore') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_a_process_ends_quietly_with_connections_open(web: FaultServer) -> None:
    code = f"from data.store import *; print(Store(StoreSettings(cache_gb=0)).size('{web.url}/x.tar'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == (f"{SIZE}\n", "")
