"""Talking to a checkpoint by the page of launch.demo: what the server takes and says, and a browser that uses it."""

from __future__ import annotations

import asyncio
import base64
import http.client
import io
import json
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
import uvicorn
from PIL import Image
from starlette.applications import Starlette

from launch import demo
from launch.answering import ANSWER, MODEL, Loaded, answer, open_model, settings_of
from launch.conversation import Medium, Turn, conversation
from launch.demo import app_of
from launch.demo_request import MAX_BODY, MAX_TURNS, limits_of
from launch.sound_file import pcm16
from models.config import VisionConfig
from tests.data.audio_bytes import encode, tone
from tests.launch import tts_kit
from tests.run_kit import ROOT, free_port

SHORT = ANSWER | {"max_seconds": "1", "max_new_tokens": "6"}
LONG = ANSWER | {"max_seconds": "600", "max_new_tokens": "6"}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> Loaded:
    """A run that hears, sees and speaks in two voices, of random weights; it talks to its limit."""
    sets = tts_kit.write_sets(tmp_path_factory.mktemp("sets"))
    model = replace(tts_kit.model(True), vision=VisionConfig(1, 16, 32, 2, 32, (0,)))
    run = tts_kit.write_run(tmp_path_factory.mktemp("runs") / "sees", sets, talks=True, model=model)
    loaded = open_model(MODEL | {"run": str(run)}, [])
    talker = loaded.omni.talker
    assert talker is not None
    for name, weight in talker.model.named_parameters():  # or what was read before hardly matters
        if name.endswith(("codec_embedding.weight", "o_proj.weight", "v_proj.weight")):
            weight.mul_(20)
    end = torch.tensor([talker.config.codec_eos_token_id])
    talker.codec_head.register_forward_hook(lambda head, hidden, logits: logits.index_fill(-1, end, -torch.inf))
    return loaded


@contextmanager
def serving(app: Starlette) -> Iterator[int]:
    """The port of a real server in a thread."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(20)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def short(loaded) -> Iterator[int]:
    with serving(app_of(loaded, ["127.0.0.1"], SHORT)) as port:
        yield port


def part(kind: str, payload: bytes, name: str = "it") -> dict[str, str]:
    return {kind: base64.b64encode(payload).decode(), "name": name}


def user(*parts) -> dict:
    return {"role": "user", "parts": [{"text": each} if isinstance(each, str) else each for each in parts]}


def question(*parts, **more) -> dict:
    return {"turns": [user(*parts)], "speaker": "anna", "temperature": 0, "seed": 3} | more


def clip(seconds: float = 0.3, loudness: float = 1.0) -> bytes:
    return encode(tone(16_000, seconds) * loudness, 16_000)


def picture(kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((64, 64, 3), (200, 30, 30), np.uint8)).save(file, kind)
    return file.getvalue()


def send(port: int, body, **headers: str) -> http.client.HTTPResponse:
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    payload = body if isinstance(body, bytes) else json.dumps(body).encode()
    link.request("POST", "/answer", payload, {"Content-Type": "application/json"} | headers)
    response = link.getresponse()
    response.link = link  # type: ignore[attr-defined] - or it is closed
    return response


def lines(port: int, body) -> list[dict]:
    response = send(port, body)
    assert response.status == 200, response.read()
    return [json.loads(line) for line in response.read().splitlines()]


def test_the_stream_is_the_whole_answer(loaded, short):
    """Text and samples, joined, are those of launch.answering; figures come last."""
    found = lines(short, question(part("audio", clip()), part("image", picture()), "one"))
    assert "done" in found[-1] and found[-1]["done"]["factor"] > 0 and found[-1]["done"]["first_packet"] > 0
    heard = b"".join(base64.b64decode(line["audio"]) for line in found if "audio" in line)
    media = [Medium("audio", "it", clip()), Medium("image", "it", picture()), "one"]
    prompt = conversation(loaded.layout, limits_of(loaded), loaded.tokenizer, [Turn("user", media)])
    how = settings_of(loaded, SHORT | {"speaker": "anna", "temperature": "0"})
    pieces = list(answer(loaded, prompt, how, 3))
    assert heard == b"".join(pcm16(piece) for piece in pieces if isinstance(piece, torch.Tensor))
    assert len(heard) == 2 * 1920 * 12
    assert "".join(line.get("text", "") for line in found) == "".join(p for p in pieces if isinstance(p, str))
    assert sum("audio" in line for line in found) >= 3  # it came in packets


def test_voice_levels_turns_and_system_change_the_answer(short):
    def sound(**more) -> bytes:
        found = lines(short, question("one", **more))
        return b"".join(base64.b64decode(line["audio"]) for line in found if "audio" in line)

    usual = sound()
    assert usual == sound(levels=tts_kit.GROUPS) and usual == sound()
    assert len({usual, sound(speaker="berta"), sound(levels=1), sound(temperature=1), sound(temperature=None)}) == 5
    earlier = [user("two"), {"role": "assistant", "parts": [{"text": "three"}]}, user("one")]
    assert sound(turns=earlier) != usual


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "the request is no JSON object"),
        (b"[1]", "the request is no JSON object"),
        (b"[" * 100_000, "the request is no JSON object"),
        (b'"\xff"', "the request is no JSON object"),
        ({}, f"a conversation has 1 to {MAX_TURNS} turns"),
        ({"turns": [user("a")] * (MAX_TURNS + 1)}, f"a conversation has 1 to {MAX_TURNS} turns"),
        ({"turns": [user()]}, "say, type or drop something first"),
        ({"turns": [{"role": "assistant", "parts": [{"text": "a"}]}]}, "say, type or drop something first"),
        ({"turns": [{"role": "system", "parts": []}]}, "a turn is of the user or the assistant"),
        ({"turns": [user("a")] * 0 + ["a"]}, "a turn is of the user or the assistant"),
        ({"turns": [user(*"abcdefghijklmnopq")]}, "at most 16 parts"),
        ({"turns": [{"role": "assistant", "parts": [part("audio", b"a")]}, user("a")]}, "an assistant's turn is text"),
        (question({"video": "AAAA"}), "a part of a turn is text, audio or image"),
        (question({"audio": 5}), "a part of a turn is text, audio or image"),
        (question({"audio": "a b!", "name": "q.wav"}), "q.wav: it came damaged"),
        (question("a" * 20_001), "text must be text of at most 20000 characters"),
        (question("a", temperature="warm"), "temperature must be a number from 0 to 100"),
        (question("a", temperature=-1), "temperature must be a number from 0 to 100"),
        (question("a", seed=0.5), "seed must be a whole number"),
        (question("a", levels=True), "levels must be a whole number from 1 to 64"),
        (question("a", speaker=["anna"]), "speaker must be text"),
        (b'{"turns": [{"role": "user", "parts": [{"text": "\\ud800"}]}]}', "text must be text"),
        (
            b'{"turns": [{"role": "user", "parts": [{"text": "a"}]}], "temperature": NaN}',
            "temperature must be a number",
        ),
    ],
)
def test_requests_that_are_none(short, body, message):
    response = send(short, body)
    assert response.status == 400 and message in json.loads(response.read())["error"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (question(part("audio", clip(0.3, 0), "q.wav")), "q.wav: is silent"),
        (question(part("audio", clip(61), "q.wav")), "q.wav: audio claims 61 s, the limit is 60 s"),
        (question(part("audio", clip(0.01), "q.wav")), "q.wav: audio is too short"),
        (question(part("audio", clip()[:2000], "q.wav")), "q.wav: audio is cut short"),
        (question(part("audio", b"", "q.wav")), "q.wav: audio is empty"),
        (question(part("audio", picture(), "a.png")), "a.png: audio is none of wav"),
        (question(part("image", clip(), "q.wav")), "q.wav: image is none of"),
        (question(part("image", picture()[:80], "a.png")), "a.png: image"),
        (question("a", speaker="carla"), "speaker 'carla' is unknown: this model has anna, berta"),
        (question("a", levels=9), f"levels=9: 1 to {tts_kit.GROUPS}"),
        (question(*["what is said here " * 1000] * 3), "tokens, at most 8192 fit: start a new one"),
    ],
)
def test_what_cannot_be_answered_is_one_line(short, body, message):
    found = lines(short, body)
    assert len(found) == 1 and message in found[0]["error"] and "\n" not in found[0]["error"]


def test_only_our_own_page_is_answered(short):
    assert send(short, question("a"), **{"Content-Type": "text/plain"}).status == 415
    assert send(short, question("a"), Host="evil.example").status == 400
    response = send(short, b" " * (MAX_BODY + 1))
    assert response.status == 400 and f"larger than {MAX_BODY >> 20} MB" in json.loads(response.read())["error"]
    link = http.client.HTTPConnection("127.0.0.1", short, timeout=30)
    link.request("GET", "/")
    page = link.getresponse()
    rules = page.getheader("Content-Security-Policy") or ""
    text = page.read().decode()
    assert page.status == 200 and "default-src 'none'" in rules and "sha256-" in rules and "<textarea" in text
    assert "http:" not in text and "https:" not in text and "//" not in text.replace("/* --", "").split("<script>")[0]
    for path in ("/docs", "/openapi.json", "/demo.html", "/../demo.py"):
        link.request("GET", path)
        response = link.getresponse()
        assert response.status == 404, path
        response.read()


def wait(true, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_one_at_a_time_and_who_leaves_frees_the_model(loaded):
    """The second is told to wait, and gets its answer once the first has gone."""
    app = app_of(loaded, ["127.0.0.1"], LONG)
    with serving(app) as port:
        first = send(port, question("one"))
        assert "text" in json.loads(first.readline())
        second = send(port, question("one"))
        assert json.loads(second.readline()) == {"waiting": 1}
        third = send(port, question("one"))
        assert json.loads(third.readline()) == {"waiting": 2}
        third.link.close()  # type: ignore[attr-defined]
        third.close()
        wait(lambda: len(app.state.answers._line) == 2)
        first.link.close()  # type: ignore[attr-defined]
        first.close()
        while "waiting" in (line := json.loads(second.readline())):
            pass
        assert "text" in line and len(app.state.answers._line) == 1
        second.link.close()  # type: ignore[attr-defined]
        second.close()
        wait(lambda: not app.state.answers._line)
        assert lines(port, question("a", speaker="carla"))[0]["error"]  # and all goes on


def test_the_queue_has_an_end(loaded):
    app = app_of(loaded, ["127.0.0.1"], LONG)
    with serving(app) as port:
        all_of_them = [send(port, question("one")) for _ in range(9)]
        wait(lambda: len(app.state.answers._line) == 9)
        assert "8 others are waiting already" in lines(port, question("one"))[0]["error"]
        for each in all_of_them:
            each.link.close()  # type: ignore[attr-defined]
            each.close()
        wait(lambda: not app.state.answers._line)


def test_a_failure_is_said_and_the_next_answer_comes(loaded, short, monkeypatch, capfd):
    monkeypatch.setattr(demo, "answer", lambda *_: 1 / 0)
    assert "the model failed: ZeroDivisionError" in lines(short, question("one"))[0]["error"]
    assert "Traceback" in capfd.readouterr().err
    monkeypatch.undo()
    assert "done" in lines(short, question("one"))[-1]


def test_who_takes_nothing_is_given_up(monkeypatch):
    """And what was streamed to them ends."""
    ended = []

    async def lines():
        try:
            while True:
                yield b"more"
        finally:
            ended.append(True)

    async def stuck(message):
        await asyncio.sleep(60 if message["type"] == "http.response.body" else 0)

    async def silent():
        await asyncio.sleep(60)

    monkeypatch.setattr(demo, "SLOW_S", 0.1)
    asyncio.run(asyncio.wait_for(demo.Lines(lines())({"type": "http", "asgi": {}}, silent, stuck), 10))
    assert ended == [True]


def test_without_its_libraries_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(SystemExit) as end, warnings.catch_warnings(action="ignore"):
        runpy.run_module("launch.demo", run_name="__main__")
    assert end.value.code == 2 and 'pip install "omniloom[serve]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give run=FOLDER of a training run"),
        (["run=nowhere"], "nowhere/recipe.yaml: no such file"),
        (["run=nowhere", "port=http"], "port must be a whole number"),
        (["run=nowhere", "port=0"], "port must be from 1 to 65535"),
        (["run=nowhere", "speaker=anna"], "speaker= is chosen on the page"),
        (["run=nowhere", "host=nowhere.invalid"], "host=nowhere.invalid port=7860: cannot listen there"),
        (["run=nowhere", "prot=80"], "unknown argument 'prot', did you mean 'port'?"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, capsys, tmp_path):
    assert demo.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_a_port_that_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert demo.main(["run=nowhere", f"port={listener.getsockname()[1]}"]) == 2
    assert "cannot listen there: Address already in use" in capsys.readouterr().err


# -- the page in a browser ---------------------------------------------------------------------------------------------

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --use-fake-device-for-media-stream --use-fake-ui-for-media-stream "
    "--autoplay-policy=no-user-gesture-required"
).split()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium whose microphone hears a tone."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("chromium is not installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    heard = tmp_path_factory.mktemp("microphone") / "tone.wav"
    heard.write_bytes(encode(tone(48_000, 2.0), 48_000))
    with playwright.sync_playwright() as started:
        context = started.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"),
            executable_path=program,
            args=[*FLAGS, f"--use-file-for-fake-audio-capture={heard}"],
            viewport={"width": 390, "height": 760},
        )
        context.set_default_timeout(15_000)
        yield context
        context.close()


@pytest.fixture
def page(browser, short):
    page = browser.new_page()
    said: list[str] = []
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    page.goto(f"http://127.0.0.1:{short}/")
    page.locator("#speaker option").first.wait_for(state="attached")
    yield page
    page.close()
    assert not [line for line in said if "400 (Bad Request)" not in line]


def answered(page, count: int = 1, state: str = "done"):
    found = page.locator(f"article.theirs[data-state={state}]").nth(count - 1)
    found.wait_for()
    return found


def saved(page, bubble, tmp_path) -> np.ndarray:
    with page.expect_download() as download:
        bubble.get_by_text("Download").click()
    path = tmp_path / "answer.wav"
    download.value.save_as(path)
    wave, rate = soundfile.read(path)
    assert rate == 24_000
    return wave


def test_page_record_send_hear(page, tmp_path):
    page.get_by_role("button", name="Record", exact=True).click()
    page.get_by_text("Recording: 1.").wait_for()
    page.get_by_label("End the recording").click()
    page.get_by_text("recording, 1.").wait_for()
    page.get_by_role("button", name="Send", exact=True).click()
    bubble = answered(page)
    assert "first packet" in bubble.inner_text() and "real-time factor" in bubble.inner_text()
    assert len(saved(page, bubble, tmp_path)) == 12 * 1920  # all packets, in order: 0.96 s, the model's limit
    assert page.locator("article.mine audio").count() == 1 and page.locator("#error").inner_text() == ""
    assert page.evaluate_handle("document.documentElement").get_property("scrollWidth").json_value() <= 390


def ask(page, text: str) -> dict:
    """Type a text and send it with what was attached; what the server gets to read."""
    page.get_by_label("Your message").fill(text)
    with page.expect_request("**/answer") as request:
        page.keyboard.press("Enter")
    return request.value.post_data_json


def test_page_picture_voice_and_a_second_turn(page, tmp_path):
    page.get_by_label("Temperature").select_option("0")
    attach = page.get_by_label("Files to send")
    attach.set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": picture()})
    page.locator(".chip img").wait_for()
    assert ask(page, "what is it?")["turns"] == [user(part("image", picture(), "a.png"), "what is it?")]
    answered(page)
    assert page.locator("article.mine img").count() == 1
    sounds = []
    for voice in ("anna", "berta"):
        page.get_by_text("New chat").click()
        assert page.locator("article").count() == 0
        page.get_by_label("Voice").select_option(voice)
        assert ask(page, "one")["speaker"] == voice
        sounds.append(saved(page, answered(page), tmp_path))
    assert len(sounds[0]) == len(sounds[1]) and not np.array_equal(*sounds)
    page.get_by_label("Codebooks").select_option("1")
    asked = ask(page, "two")
    said = page.locator("article.theirs .text").first.inner_text()
    turns = [user("one"), {"role": "assistant", "parts": [{"text": said}]}, user("two")]
    assert asked["turns"] == turns and asked["levels"] == 1 and asked["temperature"] == 0
    answered(page, 2)


def test_page_says_what_is_wrong(page):
    page.get_by_role("button", name="Send", exact=True).click()
    alert = page.get_by_role("alert")
    assert alert.inner_text() == "Say, type or drop something first."
    attach = page.get_by_label("Files to send")
    attach.set_input_files({"name": "a.txt", "mimeType": "text/plain", "buffer": b"hello"})
    page.get_by_text("a.txt: neither a sound nor a picture").wait_for()
    attach.set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": b"no picture"})
    page.locator(".chip").wait_for()
    page.get_by_role("button", name="Send", exact=True).click()
    answered(page, state="failed")
    assert "a.png: image is none of" in alert.inner_text()
    attach.set_input_files({"name": "q.wav", "mimeType": "audio/wav", "buffer": clip(0.3, 0)})
    page.locator(".chip").wait_for()
    page.get_by_role("button", name="Send", exact=True).click()
    answered(page, 2, "failed")
    assert "q.wav: is silent" in alert.inner_text()
    page.get_by_label("Your message").fill("one")  # what failed is not part of the conversation
    page.keyboard.press("Enter")
    answered(page)
    assert alert.inner_text() == ""


def test_page_stop(browser, loaded):
    app = app_of(loaded, ["127.0.0.1"], LONG)
    with serving(app) as port:
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{port}/")
        page.get_by_label("Your message").fill("one")
        page.keyboard.press("Enter")
        page.locator("article.theirs .text:not(:empty)").wait_for()
        assert len(app.state.answers._line) == 1
        page.get_by_role("button", name="Stop", exact=True).click()
        assert "stopped" in answered(page, state="stopped").inner_text()
        wait(lambda: not app.state.answers._line, 5)
        assert (
            page.get_by_role("button", name="Send", exact=True).is_visible()
            and page.get_by_role("button", name="Stop", exact=True).is_hidden()
        )
        page.close()


def test_the_command_serves_until_ctrl_c(loaded):
    """In the middle of an answer too."""
    port = free_port()
    settings = [f"run={loaded.name}", f"port={port}", "max_new_tokens=4000"]  # it answers for seconds
    words = [sys.executable, "-m", "launch.demo", *settings]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert f"http://127.0.0.1:{port}" in process.stdout.readline()
    response = send(port, question("one"))
    assert "text" in json.loads(response.readline())
    process.send_signal(signal.SIGINT)
    assert json.loads(response.read().splitlines()[-1]) == {"error": "the server was ended"}
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 130 and messages == ""
