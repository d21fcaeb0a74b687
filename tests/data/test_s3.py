"""Shards on S3, read from moto's server on loopback, with a proxy in front that can fail on demand."""

from __future__ import annotations

import random
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

from data.corpus import Corpus
from data.errors import BadSample, DataError
from data.loader import stream
from data.plan import Plan, PlanSettings
from data.reader import Reader
from data.shard_index import ShardIndex, index_path
from data.shards import write_shards
from data.store import Missing, Store, StoreSettings
from tests.data import corpus_kit
from tests.data.fault_server import FaultServer, serve
from tests.data.layouts import layout_of
from train.engines import Shard

boto3 = pytest.importorskip("boto3", reason='needs pip install -e ".[dev]"')
pytest.importorskip("s3fs", reason='needs pip install "omniloom[remote]"')
moto_server = pytest.importorskip("moto.server", reason='needs pip install -e ".[dev]"')

BLOB = random.Random(3).randbytes(2_500_000)
SECRET = "wJalrXUtnFEMI-not-a-real-key"


@pytest.fixture(scope="module")
def moto() -> Iterator[tuple[str, int]]:
    """The server; its bucket "shards" has six objects, of which one is public."""
    server = moto_server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    client = a_client(server.get_host_and_port())
    client.create_bucket(Bucket="shards")
    for name in ("x-000.tar", "x-001.tar", "deep/x-002.tar", "odd name+{1}.tar"):
        client.put_object(Bucket="shards", Key=name, Body=BLOB)
    client.put_object(Bucket="shards", Key="x-000.tar.index", Body=BLOB[:5000])
    client.put_object(Bucket="shards", Key="public.tar", Body=BLOB, ACL="public-read")
    yield server.get_host_and_port()
    server.stop()


def a_client(address: tuple[str, int]) -> Any:
    url = f"http://{address[0]}:{address[1]}"
    return boto3.client("s3", "us-east-1", endpoint_url=url, aws_access_key_id="AKIDTEST", aws_secret_access_key=SECRET)


@pytest.fixture
def s3(moto: tuple[str, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FaultServer]:
    """The proxy in front of the server, and an environment that leads to it and nowhere else."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDTEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with serve(upstream=moto) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


def a_store(cache: Path | None = None, said: list[str] | None = None, **values: float) -> Store:
    folder = {"cache": str(cache)} if cache else {"cache_gb": 0}
    chosen = StoreSettings(**{"block_mb": 1, "timeout_s": 20, "retry_s": 60} | folder | values)
    store = Store(chosen, (said if said is not None else []).append)
    if store._cache:
        store._cache.min_free = 0
    return store


def test_ranges_sizes_versions_and_copies(s3: FaultServer, tmp_path: Path) -> None:
    location = "s3://shards/x-000.tar"
    ranges = [(0, 10), (512, 70_000), (1_000_000, 1_200_000), (len(BLOB) - 1, 1), (7, 0)]
    for store in (a_store(), a_store(tmp_path), a_store(tmp_path)):
        assert store.size(location) == len(BLOB) and store.version(location)
        assert store.read_many(location, ranges) == [BLOB[start : start + size] for start, size in ranges]
        assert store.local_copy(f"{location}.index").read_bytes() == BLOB[:5000]
    with pytest.raises(BadSample, match="ends 2 bytes too early"):
        a_store().read(location, len(BLOB) - 1, 3)


def test_names_that_need_quoting(s3: FaultServer) -> None:
    assert a_store().read("s3://shards/odd name+{1}.tar", 1, 9) == BLOB[1:10]


def test_a_cached_block_needs_no_request(s3: FaultServer, tmp_path: Path) -> None:
    a_store(tmp_path).read("s3://shards/x-000.tar", 5, 5)
    s3.requests.clear()
    assert a_store(tmp_path).read("s3://shards/x-000.tar", 500, 5000) == BLOB[500:5500]
    assert [span for _, span in s3.requests] == ["bytes=0-0"]


def test_globs_and_braces(s3: FaultServer) -> None:
    store = a_store()
    assert store.expand(["s3://shards/x-*.tar"]) == ["s3://shards/x-000.tar", "s3://shards/x-001.tar"]
    assert store.expand(["s3://shards/{x,deep/x}-00?.tar"])[2:] == ["s3://shards/deep/x-002.tar"]
    assert store.expand(["s3://shards/x-{000..001}.tar"]) == ["s3://shards/x-000.tar", "s3://shards/x-001.tar"]
    with pytest.raises(DataError, match=r'no file matches "s3://shards/y-\*.tar"'):
        store.expand(["s3://shards/y-*.tar"])


@pytest.mark.parametrize(
    "fault", ["500 InternalError", "503 SlowDown", "429 Throttling", "400 RequestTimeout", "drop", "torn", "slow"]
)
def test_a_server_that_recovers(s3: FaultServer, fault: str) -> None:
    said: list[str] = []
    store = a_store(said=said)
    location = "s3://shards/x-001.tar"
    assert store.size(location) == len(BLOB)
    if fault == "slow":
        store._servers(location).timeout_s = 1
    s3.faults += [fault] * 3
    assert store.read(location, 100, 200_000) == BLOB[100:200_100]
    (line,) = said
    assert line.startswith(f"{location}: ") and line.endswith("trying again for up to 60 s (said once for s3://shards)")
    assert len(s3.requests) >= 5


@pytest.mark.parametrize("fault", ["500 InternalError", "503 SlowDown"])
def test_a_listing_that_recovers(s3: FaultServer, fault: str) -> None:
    said: list[str] = []
    s3.faults += [fault] * 2
    assert len(a_store(said=said).expand(["s3://shards/x-*.tar"])) == 2
    assert len(said) == 1 and f"the server answered HTTP {fault}" in said[0]


def test_a_server_that_does_not_recover(s3: FaultServer) -> None:
    store = a_store(retry_s=1)
    assert store.size("s3://shards/x-001.tar") == len(BLOB)
    s3.faults += ["500 InternalError"] * 100
    with pytest.raises(DataError, match=r"the server answered HTTP 500 InternalError; gave up \(tries: \d") as caught:
        store.read("s3://shards/x-001.tar", 0, 10)
    assert not isinstance(caught.value, BadSample)


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (
            "403 AccessDenied",
            "access denied (HTTP 403 AccessDenied); check the AWS credentials and the right to s3:GetObj",
        ),
        ("403 InvalidAccessKeyId", "access denied (HTTP 403 InvalidAccessKeyId); check the AWS credentials"),
        ("400 ExpiredToken", "access denied (HTTP 400 ExpiredToken); check the AWS credentials"),
        ("400 AuthorizationHeaderMalformed", "the server refused (HTTP 400 Auth"),
    ],
)
def test_refusals_come_at_once_and_show_no_secret(s3: FaultServer, fault: str, line: str) -> None:
    said: list[str] = []
    s3.faults += [fault] * 2
    with pytest.raises(DataError) as caught:
        a_store(said=said).size("s3://shards/x-000.tar")
    assert str(caught.value).startswith(f"s3://shards/x-000.tar: {line}")
    assert "AKID" not in str(caught.value) and SECRET not in str(caught.value) and not said
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("location", "code"), [("s3://shards/y.tar", "NoSuchKey"), ("s3://none/x.tar", "NoSuchBucket")]
)
def test_what_is_not_there(s3: FaultServer, location: str, code: str) -> None:
    with pytest.raises(Missing) as caught:
        a_store().size(location)
    assert str(caught.value) == f"{location}: no such file (HTTP 404 {code})"


def test_no_credentials_and_anonymous(s3: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(DataError, match="no AWS credentials found; set AWS_PROFILE, or .* data.store.anonymous=true"):
        a_store().size("s3://shards/x-000.tar")
    assert not s3.requests
    store = a_store(anonymous=True)
    assert store.read("s3://shards/public.tar", 5, 5) == BLOB[5:10]
    with pytest.raises(DataError, match=r"access denied \(HTTP 403\); check the AWS credentials"):
        store.size("s3://shards/x-000.tar")
    assert all("Authorization" not in headers for headers in s3.headers)


def test_an_object_replaced_under_way(s3: FaultServer, moto: tuple[str, int]) -> None:
    store = a_store()
    client = a_client(moto)
    client.put_object(Bucket="shards", Key="new.tar", Body=BLOB)
    assert store.read("s3://shards/new.tar", 0, 5) == BLOB[:5]
    client.put_object(Bucket="shards", Key="new.tar", Body=BLOB[::-1])
    with pytest.raises(DataError, match="new.tar: changed while it was being read"):
        store.read("s3://shards/new.tar", 0, 5)


def test_training_reads_shards_from_s3(s3: FaultServer, moto: tuple[str, int], tmp_path: Path) -> None:
    """Batches are those of local shards, in this process and in a worker, though the server fails now and then."""
    tokenizer, client = corpus_kit.tokenizer(), a_client(moto)
    paths = write_shards(corpus_kit.mixed(20), tmp_path / "local", tokenizer, 8).paths
    for path in [file for tar in paths for file in (tar, index_path(tar))]:
        client.put_object(Bucket="shards", Key=f"speech/{path.name}", Body=path.read_bytes())
    settings = StoreSettings(cache=str(tmp_path / "cache"), block_mb=1, timeout_s=20, retry_s=60)

    def batches(pattern: str, workers: int) -> list[tuple]:
        corpus = Corpus.open([pattern], tokenizer.fingerprint, settings)
        reader = Reader(corpus, tokenizer, seed=0, layout=layout_of(tokenizer))
        plan = Plan(corpus, PlanSettings(200, 2, window=9), seed=0, sizing=reader.sizing)
        steps = stream(plan, reader, Shard(0, 1), 0, 6, workers)
        return [(step, b.keys, b.skipped, b.mel_FM.sum().item()) for step, own in steps for b in own]

    local = batches(str(tmp_path / "local" / "*.tar"), 0)
    assert not any(skipped for _, _, skipped, _ in local) and sum(len(keys) for _, keys, _, _ in local) > 20
    forkserver._forkserver._stop()  # one that runs since an earlier test has not this test's environment
    s3.faults += ["500 InternalError"] * 3
    assert batches("s3://shards/speech/shard-{000000..000002}.tar", 0) == local
    assert batches("s3://shards/speech/*.tar", 1) == local


def test_a_remote_shard_without_an_index_or_of_another_size_is_one_line(s3: FaultServer, moto: tuple[str, int]) -> None:
    with pytest.raises(DataError, match=r"^s3://shards/x-001.tar: has no index; make it with: python -m data.index"):
        Corpus.open(["s3://shards/x-001.tar"], settings=StoreSettings(cache_gb=0))
    with pytest.raises(DataError, match=r"^s3://shards/gone.tar: no such shard$"):
        Corpus.open(["s3://shards/gone.tar"], settings=StoreSettings(cache_gb=0))


def test_what_rotted_in_the_cache_is_fetched_again(s3: FaultServer, moto: tuple[str, int], tmp_path: Path) -> None:
    tokenizer, client = corpus_kit.tokenizer(), a_client(moto)
    (tar,) = write_shards(corpus_kit.mixed(6), tmp_path / "local", tokenizer).paths
    whole = tar.read_bytes()
    client.put_object(Bucket="shards", Key="rot.tar", Body=whole)
    client.put_object(Bucket="shards", Key="rot.tar.index", Body=index_path(tar).read_bytes())
    corpus = Corpus.open(["s3://shards/rot.tar"], settings=StoreSettings(cache=str(tmp_path / "cache"), block_mb=1))
    store = corpus.store
    store.size("s3://shards/rot.tar")
    assert store._cache is not None
    store._cache.write(store._key("s3://shards/rot.tar", 0), bytes(len(whole)))
    assert corpus.index(0).read(1) == ShardIndex.open(tar).read(1)
