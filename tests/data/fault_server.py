"""An HTTP server on loopback that can misbehave on demand: it serves bytes itself, or passes S3 requests on."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

S3_ERROR = "<?xml version='1.0'?><Error><Code>{}</Code><Message>as asked</Message></Error>"


@dataclass
class FaultServer:
    """`faults` are used up, one for each request: a status, or one of the words that `_Handler` knows."""

    files: dict[str, bytes] = field(default_factory=dict)
    etags: dict[str, str] = field(default_factory=dict)
    modified: str = ""  # the Last-Modified header
    faults: list[str] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)  # path and Range header
    headers: list[dict[str, str]] = field(default_factory=list)
    clients: list[int] = field(default_factory=list)  # their ports: one for each connection
    sent: int = 0  # bytes of bodies
    upstream: tuple[str, int] | None = None
    url: str = ""


@contextlib.contextmanager
def serve(
    upstream: tuple[str, int] | None = None, certificate: Path | None = None, **files: bytes
) -> Iterator[FaultServer]:
    """A running server of /NAME for each file, by TLS where it has a `certificate`."""
    state = FaultServer({f"/{name}": payload for name, payload in files.items()}, upstream=upstream)
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"state": state}))
    state.url = f"http://127.0.0.1:{server.server_port}"
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        state.url = state.url.replace("http:", "https:")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no news."""


class _Handler(BaseHTTPRequestHandler):
    state: FaultServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        state = self.state
        state.requests.append((self.path, self.headers.get("Range", "")))
        state.headers.append(dict(self.headers))
        state.clients.append(self.client_address[1])
        fault = state.faults.pop(0) if state.faults else ""
        if fault == "slow":
            time.sleep(3)
        elif fault == "drop":
            self.close_connection = True
            return self.connection.close()
        elif fault.startswith("to "):
            self.send_response(302)
            self.send_header("Location", fault[3:])
            self.send_header("Content-Length", "0")
            return self.end_headers()
        elif fault[:3].isdigit():
            status, _, code = fault.partition(" ")
            return self._send(int(status), S3_ERROR.format(code).encode(), {})
        if state.upstream:
            return self._forward(state.upstream, fault)
        payload = state.files.get(self.path)
        if payload is None:
            return self._send(404, b"", {})
        etag = state.etags.get(self.path, '"one"')
        about = {"ETag": etag, "Last-Modified": state.modified}
        about = {name: value for name, value in about.items() if value}
        if fault == "whole":
            return self._send(200, payload, about)
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last) + 1, len(payload))
        if start >= len(payload):
            return self._send(416, b"", {"Content-Range": f"bytes */{len(payload)}"})
        if fault == "shifted":
            start, stop = start + 1, stop + 1
        body = payload[start:stop]
        about["Content-Range"] = f"bytes {start}-{stop - 1}/{len(payload)}"
        if fault == "endless":
            body += b"x" * 1000
        if fault == "gzip":
            body, about = gzip.compress(body), about | {"Content-Encoding": "gzip"}
        if fault == "unsaid":
            del about["Content-Range"]
        self._send(206, body, about, fault)

    do_HEAD = do_PUT = do_GET

    def _forward(self, upstream: tuple[str, int], fault: str) -> None:
        connection = http.client.HTTPConnection(*upstream, timeout=10)
        connection.request(self.command, self.path, headers=dict(self.headers))
        answer = connection.getresponse()
        body = answer.read()
        drop = {"transfer-encoding", "connection", "content-length", "date", "server"}
        self._send(answer.status, body, {k: v for k, v in answer.getheaders() if k.lower() not in drop}, fault)
        connection.close()

    def _send(self, status: int, body: bytes, headers: dict[str, str], fault: str = "") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) // 2 if fault == "less" else len(body)))
        self.end_headers()
        sent = body[: len(body) // 2] if fault in ("less", "torn", "stuck") else body
        with contextlib.suppress(ConnectionError):
            self.wfile.write(sent)
            self.wfile.flush()
            self.state.sent += len(sent)
        if fault == "stuck":
            time.sleep(3)
        if fault in ("torn", "stuck"):
            self.close_connection = True
