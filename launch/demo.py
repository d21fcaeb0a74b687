"""A page on which one talks to a checkpoint: by microphone, files and text; it answers in text and voice, as they come.

    python -m launch.demo run=RUN [port=7860] [host=127.0.0.1] [checkpoint=latest] [codec=FOLDER] [KEY=VALUE ...]
    python -m launch.demo model=FOLDER [codec=FOLDER] [device=cpu] [dtype=bf16] [max_seconds=60] [max_new_tokens=256]

    browser --POST /answer: the conversation, JSON--> queue --one at a time: launch/answering.py--> lines of JSON
      {"waiting": 2}  {"text": "se"}  {"audio": BASE64 of 16-bit samples}  ...  {"done": {figures}} | {"error": LINE}

One thread owns the model, one answer is made at a time, the others wait and are told so. A line is made when the one
before it has been taken: closing the connection, as the Stop button does, stops the model at its next token or frame.
Nothing of a visitor is kept or written; the page holds the conversation. It is for you and people whom you trust: there
is no login, so keep host=127.0.0.1 or put a proxy that has one in front. Other sites' pages are refused.

Cost: that of launch/answering.py, and a third more bytes than the sound has. Needs the extra "serve". docs/generate.md.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import socket
import sys
import traceback
from collections.abc import AsyncGenerator, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from data.errors import DataError
from launch.answering import ANSWER, MODEL, SAMPLE_RATE, Loaded, Timing, answer, open_model, settings_of
from launch.arguments import guarded, parse, whole
from launch.conversation import conversation
from launch.demo_request import MAX_BODY, MAX_SECONDS, MAX_TOKENS, Request, limits_of, read_request
from launch.sound_file import pcm16
from train.errors import RecipeError
from train.main import USER_ERRORS

try:
    import uvicorn
    from fastapi import FastAPI
    from fastapi import Request as Call
    from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
    from starlette.middleware.trustedhost import TrustedHostMiddleware
except ImportError:
    print('error: the page needs FastAPI and uvicorn: pip install "omniloom[serve]"', file=sys.stderr)
    sys.exit(2)

PAGE = Path(__file__).with_name("demo.html")
MOST_WAITING = 8
WAIT_S = 0.25  # between two looks at how many are before oneself
SLOW_S = 30.0  # a browser that takes nothing for so long is gone
LIMITS = {"bytes": MAX_BODY, "seconds": MAX_SECONDS}


class Answers:
    """Answers of one model, one at a time, as lines of JSON."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded, self.limits = loaded, limits_of(loaded)
        self._worker = ThreadPoolExecutor(1, "model")  # one thread: a step of one answer, then one of the next
        self._line: list[object] = []  # who is there; the first is being answered
        self.closing = False

    async def lines(self, request: Request) -> AsyncGenerator[bytes]:
        """An answer, when its turn has come; what goes wrong in it is its last line."""
        if len(self._line) > MOST_WAITING:
            yield _line(error=f"{MOST_WAITING} others are waiting already: try again later")
            return
        me, pieces, loop = object(), self._pieces(request), asyncio.get_running_loop()
        self._line.append(me)
        try:
            while (ahead := self._line.index(me)) and not self.closing:
                yield _line(waiting=ahead)
                await asyncio.sleep(WAIT_S)
            while not self.closing and (line := await loop.run_in_executor(self._worker, next, pieces, None)):
                yield line
            if self.closing:
                yield _line(error="the server was ended")
        finally:  # without awaiting, as whoever has left cancels that too: the thread does it after the step it is at
            self._worker.submit(pieces.close)
            self._line.remove(me)

    def _pieces(self, request: Request) -> Generator[bytes]:
        """Runs in the model's thread."""
        loaded, timing = self.loaded, Timing()
        try:
            how = settings_of(loaded, request.given)
            codec = None if request.levels is None else loaded.at_levels(request.levels)
            prompt = conversation(loaded.layout, self.limits, loaded.tokenizer, request.turns)
            if (tokens := len(prompt.token_ids_T)) > MAX_TOKENS:
                raise DataError(f"the conversation has {tokens} tokens, at most {MAX_TOKENS} fit: start a new one")
            for piece in answer(loaded, prompt, how, request.seed, codec):
                timing.note(piece)
                if isinstance(piece, Tensor):
                    yield _line(audio=base64.b64encode(pcm16(piece)).decode())
                else:
                    yield _line(text=piece)
            yield _line(done=timing.figures())
        except USER_ERRORS as error:
            yield _line(error=str(error))
        except Exception as error:
            traceback.print_exc()
            yield _line(error=f"the model failed: {type(error).__name__}; the terminal of launch.demo says more")


class Server(uvicorn.Server):
    """Ends answers too when it is ended."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        app: Any = self.config.app
        app.state.answers.closing = True
        await super().shutdown(sockets)


class Lines(StreamingResponse):
    """Streams, and ends what it streams at once when nobody reads it."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """As StreamingResponse does."""

        async def patient(message: Any) -> None:
            async with asyncio.timeout(SLOW_S):
                await send(message)

        lines: Any = self.body_iterator
        try:
            await super().__call__(scope, receive, patient)
        except TimeoutError:
            pass  # the server closes the connection
        finally:
            await lines.aclose()


def app_of(loaded: Loaded, hosts: Iterable[str], given: Mapping[str, str] = ANSWER) -> FastAPI:
    """The page, what it needs to know, and the answers, with settings `given` where the page chooses none.

    Requests must be for one of `hosts`: no other site's page can send any by giving its own name our address.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)  # FastAPI's own pages load from elsewhere
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    answers = app.state.answers = Answers(loaded)
    text = PAGE.read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": policy(text),
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-store",
    }
    about = {
        "name": Path(loaded.name).name,
        "speakers": loaded.speakers,
        "codebooks": loaded.codebooks,
        "sees": loaded.layout.patching is not None,
        "sounds": loaded.sounds,
        "rate": SAMPLE_RATE,
        "limits": LIMITS,
    }

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(text, headers=headers)

    @app.get("/about")
    async def info() -> JSONResponse:
        return JSONResponse(about)

    @app.post("/answer")
    async def reply(call: Call) -> Response:
        if call.headers.get("content-type") != "application/json":  # else another site's page could send a form
            return JSONResponse({"error": "the request must be application/json"}, 415)
        try:
            request = read_request(await _body(call), given)
        except DataError as error:
            return JSONResponse({"error": str(error)}, 400)
        return Lines(answers.lines(request), media_type="application/x-ndjson", headers={"Cache-Control": "no-store"})

    return app


def policy(text: str) -> str:
    """What the page may do: run its own script, show and play what it made itself, and ask this server."""
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(each.encode()).digest()).decode()}'" for each in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes} blob:; style-src 'unsafe-inline'; img-src blob: data:; "
        "media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


async def _body(call: Call) -> bytes:
    """All of a request. Raises DataError for more bytes than are allowed, as soon as they have come."""
    chunks, size = [], 0
    async for chunk in call.stream():
        size += len(chunk)
        if size > MAX_BODY:
            raise DataError(f"the conversation is larger than {MAX_BODY >> 20} MB: start a new one")
        chunks.append(chunk)
    return b"".join(chunks)


def _line(**message: Any) -> bytes:
    return json.dumps(message).encode() + b"\n"


def demo(argv: Sequence[str]) -> None:
    """Run the command, until Ctrl-C. Raises this project's errors."""
    given, settings = parse(argv, MODEL | ANSWER | {"port": "7860", "host": "127.0.0.1"})
    for key in ("speaker", "temperature", "seed"):
        if given[key] != ANSWER[key]:
            raise RecipeError(f"{key}= is chosen on the page")
    port, host = whole(given, "port", 1, 65_535), given["host"]
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise RecipeError(
            f"host={host} port={port}: cannot listen there: {error.strerror}; give another port="
        ) from None
    with listener:
        loaded = open_model(given, settings)
        settings_of(loaded, given)  # says now what is wrong with them
        anywhere = host in ("0.0.0.0", "::", "")
        app = app_of(loaded, ["*"] if anywhere else ["localhost", "127.0.0.1", host], given)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2, lifespan="off")
        print(f"{loaded.name}: http://{'localhost' if anywhere else host}:{port}  (Ctrl-C ends it)", flush=True)
        if anywhere:
            print(
                "whoever reaches this machine can use it; the microphone works over https or on localhost", flush=True
            )
        Server(config).run(sockets=[listener])


def main(argv: Sequence[str]) -> int:
    """The command; its exit status."""
    return guarded(demo, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
