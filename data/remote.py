"""Byte ranges from http, https and S3 servers: tried again while the trouble is the network's, one line when it is not.

    describe(locations) --first byte of each--> size and version      fetch(pieces of files) --16 at once--> bytes

fsspec makes the connections and finds the credentials: botocore's chain for S3 (environment, profile, role;
AWS_ENDPOINT_URL names another server), ~/.netrc and the proxy variables for http.  The requests are made here, since
each answer is held against what was asked: status, range, length, total size, version.  At most one byte more than
asked is ever taken from a server.

Every request has a time limit, and so has the whole of its tries.  Redirects lead to http and https only, never from
https to http.  Messages hold the location as given and a status; never an answer's text or another address, which may
be signed.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp
import fsspec
import s3fs
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError
from fsspec.asyn import get_loop, sync

from data.errors import DataError
from data.locations import Missing, server

CONCURRENCY = 16  # requests of one call
PIECE = 1 << 18  # bytes taken from a socket at a time
CONNECT_S = 10.0
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 20.0
FIRST_S = 30.0  # of trying a server that has not answered yet

_CONNECTION = (
    ConnectionError,
    aiohttp.ClientConnectionError,
    aiohttp.ClientPayloadError,
    boto.HTTPClientError,
    ResponseParserError,
)
_BUSY = {"SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "Throttling", "ThrottlingException"}
T = TypeVar("T")
Answer = tuple[int, Mapping[str, str], AsyncIterator[bytes]]  # status 200 or 206, headers, body


@dataclass(frozen=True)
class RemoteFile:
    """What a server says of a file."""

    size: int
    version: str  # ETag, else Last-Modified, else empty: then nothing tells whether the file was replaced


@dataclass(frozen=True)
class Piece:
    """The bytes [start, stop) of a file that was described before."""

    location: str
    file: RemoteFile
    start: int
    stop: int


class _Refused(Exception):
    """An answer with an HTTP status of 300 or more, and S3's name for it."""

    def __init__(self, status: int, code: str = "") -> None:
        super().__init__(f"HTTP {status}" if code in ("", str(status)) else f"HTTP {status} {code}")
        self.status, self.code = status, code


class _Short(Exception):
    """An answer that breaks off."""


class _Unfit(Exception):
    """An answer that no second try will mend."""


class Remote:
    """Connections of one process. The first request opens them; none may be carried through a fork."""

    def __init__(self, timeout_s: float, retry_s: float, anonymous: bool, warn: Callable[[str], None]) -> None:
        """`timeout_s` limits one request, `retry_s` all tries for a range; `anonymous` sends S3 no credentials."""
        self.timeout_s, self.retry_s, self.anonymous = timeout_s, retry_s, anonymous
        self._warn = warn
        self._warned: set[str] = set()  # servers
        self._answered: set[str] = set()
        self._http: Any = None
        self._s3: Any = None

    def describe(self, locations: Sequence[str]) -> list[RemoteFile]:
        """Size and version of each location. Raises Missing, or DataError where it cannot be read in ranges."""
        return self._gather([lambda at=at: self._range(at, 0, 1, None) for at in locations], lambda got: got[1])

    def fetch(self, pieces: Sequence[Piece]) -> list[bytes]:
        """The bytes of each piece, all within their files, none empty.

        Raises DataError where a server cannot be reached for `retry_s`, refuses, or has another version of the file.
        """
        wanted = [lambda at=at: self._range(at.location, at.start, at.stop, at.file) for at in pieces]
        return self._gather(wanted, lambda got: got[0])

    def glob(self, pattern: str) -> list[str]:
        """Locations that a glob of s3:// matches."""
        path = pattern.removeprefix("s3://")
        found = self._gather([lambda: self._persist(pattern, lambda: self._bucket()._glob(path))], lambda got: got)
        return [f"s3://{name}" for name in found[0]]

    def _gather(self, jobs: Sequence[Callable[[], Awaitable[T]]], pick: Callable[[T], Any]) -> list[Any]:
        """Run jobs, CONCURRENCY at a time, in fsspec's thread; the first error ends them all."""

        async def work() -> list[Any]:
            free = asyncio.Semaphore(CONCURRENCY)

            async def one(job: Callable[[], Awaitable[T]]) -> Any:
                async with free:
                    return pick(await job())

            tasks = [asyncio.ensure_future(one(job)) for job in jobs]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()

        results: Any = sync(get_loop(), work)
        return results

    async def _range(self, location: str, start: int, stop: int, file: RemoteFile | None) -> tuple[bytes, RemoteFile]:
        get = self._get_s3 if location.startswith("s3://") else self._get_http

        async def attempt() -> tuple[bytes, RemoteFile]:
            async with get(location, f"bytes={start}-{stop - 1}") as (status, headers, pieces):
                found = _described(status, headers, start)
                if (file is not None and found != file) or stop > found.size:
                    raise _Unfit("changed while it was being read; start the run again")
                return await _take(pieces, stop - start), found

        return await self._persist(location, attempt)

    async def _persist(self, location: str, attempt: Callable[[], Awaitable[T]]) -> T:
        """The result of `attempt`, tried again, at growing distances, while the trouble may pass."""
        begin = time.monotonic()
        for tries in itertools.count(1):
            # a server that never answered is rather an address that is wrong
            patience = self.retry_s if server(location) in self._answered else min(self.retry_s, FIRST_S)
            left = begin + patience - time.monotonic()
            try:
                result = await asyncio.wait_for(attempt(), min(self.timeout_s, left) if tries > 1 else self.timeout_s)
                self._answered.add(server(location))
                return result
            except Exception as error:
                if not isinstance(error, OSError | TimeoutError):
                    self._answered.add(server(location))  # it spoke, if only to refuse
                problem = self._transient(location, error)
            # full spread would bring some back at once; a generator of its own leaves training's random state alone
            wait = min(FIRST_WAIT_S * 2 ** (tries - 1), LONGEST_WAIT_S) * random.SystemRandom().uniform(0.5, 1.0)
            elapsed = time.monotonic() - begin
            if elapsed + wait >= patience:
                raise DataError(
                    f"{location}: {problem}; gave up (tries: {tries}, seconds: {elapsed:.0f}, data.store.retry_s="
                    f"{self.retry_s:g}); check the network and the server, then resume"
                )
            if server(location) not in self._warned:
                self._warned.add(server(location))
                limit = f"trying again for up to {patience:g} s"
                self._warn(f"{location}: {problem}; {limit} (said once for {server(location)})")
            await asyncio.sleep(wait)
        raise AssertionError

    def _transient(self, location: str, error: Exception) -> str:
        """What went wrong, where it may pass. Raises DataError where it will not."""
        cause = error.__cause__ if isinstance(error.__cause__, boto.ClientError) else error  # s3fs translates
        if isinstance(cause, boto.ClientError):
            cause = _Refused(
                cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0),
                cause.response.get("Error", {}).get("Code", ""),
            )
        if isinstance(cause, _Refused):
            if cause.status in (408, 425, 429) or cause.status >= 500 or cause.code in _BUSY:
                return f"the server answered {cause}"
            raise _refusal(location, cause) from None
        if isinstance(cause, boto.NoCredentialsError | boto.PartialCredentialsError | boto.ProfileNotFound):
            raise DataError(
                f"{location}: no AWS credentials found; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or data.store.anonymous=true for a public bucket"
            ) from None
        if isinstance(cause, _Unfit):
            raise DataError(f"{location}: {cause}") from None
        if "CERTIFICATE_VERIFY_FAILED" in str(cause):
            raise DataError(f"{location}: its certificate cannot be verified; check SSL_CERT_FILE or AWS_CA_BUNDLE")
        if isinstance(cause, aiohttp.NonHttpUrlRedirectClientError):
            raise DataError(f"{location}: redirected to an address that is not http; refused") from None
        if isinstance(cause, TimeoutError):
            return "no answer in time"
        if isinstance(cause, _Short):
            return str(cause)
        if isinstance(cause, _CONNECTION):
            return f"no connection ({type(cause).__name__})"
        raise DataError(f"{location}: cannot be read ({type(cause).__name__}); check the address") from None

    @contextlib.asynccontextmanager
    async def _get_http(self, location: str, span: str) -> AsyncIterator[Answer]:
        if self._http is None:
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=min(CONNECT_S, self.timeout_s))
            options = {"trust_env": True, "auto_decompress": False, "timeout": timeout}
            self._http = fsspec.filesystem("http", skip_instance_cache=True, client_kwargs=options)
        session = await self._http.set_session()
        headers = {"Range": span, "Accept-Encoding": "identity"}  # of a compressed answer, ranges mean nothing
        async with session.get(self._http.encode_url(location), headers=headers) as answer:
            passed = [*(hop.url for hop in answer.history), answer.url]
            if location.startswith("https:") and any(url.scheme != "https" for url in passed):
                raise _Unfit("redirected from https to http; refused")
            if answer.status not in (200, 206):
                raise _Refused(answer.status)
            yield answer.status, answer.headers, answer.content.iter_chunked(PIECE)

    @contextlib.asynccontextmanager
    async def _get_s3(self, location: str, span: str) -> AsyncIterator[Answer]:
        client = await self._bucket().set_session()
        bucket, _, key = location.removeprefix("s3://").partition("/")
        answer = await client.get_object(Bucket=bucket, Key=key, Range=span)
        about = answer["ResponseMetadata"]
        with contextlib.closing(answer["Body"]) as body:
            headers = {name.title(): value for name, value in about["HTTPHeaders"].items()}
            yield about["HTTPStatusCode"], headers, body.iter_chunks(PIECE)

    def _bucket(self) -> Any:
        if self._s3 is None:
            once = {"total_max_attempts": 1}  # the tries are counted here
            connect = min(CONNECT_S, self.timeout_s)
            options = {"retries": once, "connect_timeout": connect, "read_timeout": self.timeout_s}
            options |= {"max_pool_connections": 2 * CONCURRENCY, "response_checksum_validation": "when_required"}
            self._s3 = s3fs.S3FileSystem(
                anon=self.anonymous, config_kwargs=options, skip_instance_cache=True, use_listings_cache=False
            )
            self._s3.retries = 1
        return self._s3


def _described(status: int, headers: Mapping[str, str], start: int) -> RemoteFile:
    """What the headers of an answer say of the file. Raises _Unfit where the answer is not what was asked for."""
    if status == 200:
        raise _Unfit("the server sends whole files only (no HTTP ranges); use another server, or copy the file")
    if headers.get("Content-Encoding", "identity") not in ("identity", "aws-chunked", ""):
        raise _Unfit("the server sends it compressed, where ranges mean nothing; switch that off for .tar and .index")
    match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", headers.get("Content-Range", "").strip())
    if not match:
        raise _Unfit("the server does not say which range it sends, or of what size the file is")
    if int(match[1]) != start:
        raise _Unfit(f"the server sends a range from byte {match[1]} where {start} was asked for")
    return RemoteFile(int(match[3]), headers.get("Etag") or headers.get("Last-Modified") or "")


async def _take(pieces: AsyncIterator[bytes], size: int) -> bytes:
    """The `size` bytes of an answer. Raises _Short for fewer, and _Unfit for more before they fill the memory."""
    taken, length = [], 0
    async for piece in pieces:
        taken.append(piece)
        length += len(piece)
        if length > size:
            raise _Unfit(f"the server sends more than the {size} bytes that were asked for")
    if length < size:
        raise _Short(f"the answer broke off after {length} of {size} bytes")
    return b"".join(taken)


def _refusal(location: str, refused: _Refused) -> DataError:
    if refused.status == 404:
        return Missing(f"{location}: no such file ({refused})")
    if refused.status == 416:
        return DataError(f"{location}: is empty, or changed while it was being read")
    if refused.status in (401, 403) or "Token" in refused.code:
        where = "the AWS credentials and the right to s3:GetObject" if location.startswith("s3:") else "~/.netrc"
        return DataError(f"{location}: access denied ({refused}); check {where}, and the address")
    region = ", and the region" if location.startswith("s3:") else ""
    return DataError(f"{location}: the server refused ({refused}); check the address{region}")
