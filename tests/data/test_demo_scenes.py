"""What the demo draws, plays and says is what its texts say of it."""

from __future__ import annotations

import dataclasses
import io
import itertools
import random
import time
from collections.abc import Iterator

import av
import numpy as np
import pytest

from data.audio import decode
from data.demo_language import COLOURS, DIRECTIONS, PLACES, SHAPES, SINGLE_SOUNDS, SIZES, SOUNDS, Thing
from data.demo_media import encode_film, encode_image, encode_sound
from data.demo_render import render
from data.demo_scenes import _RGB, Film, Picture, draw_film, draw_picture
from data.demo_sounds import make_sound
from data.demo_studio import Medium, Narrated, Recording, Speech
from data.demo_words import GRAMMARS, LANGUAGES
from data.errors import DataError
from data.espeak import Synthesizer
from data.video import load_sound
from data.vision import decode_image

RED = Thing("circle", "red", "big")


@pytest.fixture
def espeak() -> Iterator[Synthesizer]:
    pytest.importorskip("espeakng_loader", reason="espeak-ng (the optional extra demo) is absent")
    with Synthesizer() as synthesizer:
        yield synthesizer


def painted(frame: np.ndarray, colour: str) -> np.ndarray:
    """Which pixels have a colour, bool [H, W]."""
    return np.abs(frame.astype(int) - np.array(_RGB[colour])).max(axis=2) < 60


def centre(frame: np.ndarray, colour: str) -> tuple[float, float]:
    """Mean place of a colour, across and down, as shares of the sides."""
    rows, columns = np.nonzero(painted(frame, colour))
    return columns.mean() / frame.shape[1], rows.mean() / frame.shape[0]


@pytest.mark.parametrize("place", PLACES)
def test_things_are_where_the_picture_says(place: str) -> None:
    for colour, seed in itertools.product(COLOURS, range(3)):
        x, y = centre(draw_picture(Picture(((place, Thing("circle", colour, "big")),)), random.Random(seed)), colour)
        across = {"left": 0.2, "right": 0.8}.get(place, 0.5)
        down = {"top": 0.2, "bottom": 0.8}.get(place, 0.5)
        assert abs(x - across) < 0.06 and abs(y - down) < 0.06


def test_shapes_and_sizes_differ() -> None:
    drawn = {}
    for shape, size in itertools.product(SHAPES, SIZES):
        frame = draw_picture(Picture((("middle", Thing(shape, "yellow", size)),)), random.Random(4))
        drawn[shape, size] = painted(frame, "yellow")
    for shape in SHAPES:
        assert drawn[shape, "big"].sum() > 2 * drawn[shape, "small"].sum() > 20
    for one, two in itertools.combinations(SHAPES, 2):
        differ = (drawn[one, "big"] ^ drawn[two, "big"]).sum()
        assert differ > 0.15 * min(drawn[one, "big"].sum(), drawn[two, "big"].sum()), (one, two)


@pytest.mark.parametrize("extension", ["png", "jpg", "webp"])
def test_images_survive_their_format(extension: str) -> None:
    frame = draw_picture(Picture((("left", RED), ("right", Thing("star", "blue", "small")))), random.Random(1))
    payload = encode_image(frame, extension)
    assert payload == encode_image(frame, extension)
    decoded = decode_image(payload)
    assert decoded.shape == frame.shape and np.abs(decoded.astype(int) - frame).mean() < 4
    assert centre(decoded, "red")[0] < 0.3 and centre(decoded, "blue")[0] > 0.7


def frames_of(payload: bytes) -> np.ndarray:
    with av.open(io.BytesIO(payload)) as film:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)])


@pytest.mark.parametrize("direction, encoders", [*((way, {"libx264"}) for way in DIRECTIONS), ("left", set())])
def test_films_move(direction: str, encoders: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if "libx264" not in av.codecs_available and encoders:
        pytest.skip("this FFmpeg has no libx264")
    monkeypatch.setattr(av, "codecs_available", encoders)  # without libx264 it takes FFmpeg's own MPEG-4
    film = Film("moves", Thing("square", "white", "big"), direction=direction)
    frames, fps, _ = draw_film(film, random.Random(0))
    decoded = frames_of(encode_film(frames, fps))
    assert len(decoded) == len(frames)
    (x0, y0), (x1, y1) = centre(decoded[0], "white"), centre(decoded[-1], "white")
    moved = {"left": x0 - x1, "right": x1 - x0, "top": y0 - y1, "bottom": y1 - y0}
    assert moved[direction] > 0.25 and sum(abs(way) > 0.1 for way in moved.values()) == 2


def test_films_show_what_they_tell() -> None:
    def shown(film: Film) -> tuple[list[int], list[int]]:
        frames, _, _ = draw_film(film, random.Random(2))
        return tuple([int(painted(frame, colour).sum()) for frame in frames] for colour in ("red", "blue"))

    red, _ = shown(Film("appears", RED))
    assert red[0] == 0 < red[-1]
    red, _ = shown(Film("vanishes", RED))
    assert red[0] > 0 == red[-1]
    red, blue = shown(Film("recolours", RED, colour="blue"))
    assert red[0] > 0 == red[-1] and blue[0] == 0 < blue[-1]
    frames, fps, moment = draw_film(Film("collides", RED, Thing("star", "blue", "small")), random.Random(2))
    gaps = [centre(frame, "blue")[0] - centre(frame, "red")[0] for frame in frames]
    assert abs(int(np.argmin(gaps)) - moment * fps) <= 1 and min(gaps) < 0.6 * gaps[0]


def rendered(medium: Medium, extension: str) -> bytes:
    pytest.importorskip("espeakng_loader", reason="espeak-ng (the optional extra demo) is absent")
    with Synthesizer() as espeak:
        return render(medium, extension, espeak)


def test_sound_of_a_film_comes_when_it_happens() -> None:
    film = Film("collides", RED, Thing("star", "blue", "small"), sound="1 beeps")
    payload = rendered(Medium(film, 7), "0.mp4")
    assert payload == rendered(Medium(film, 7), "0.mp4")
    frames, wave = frames_of(payload), load_sound(payload)
    assert wave is not None
    gaps = [centre(frame, "blue")[0] - centre(frame, "red")[0] for frame in frames]
    heard = np.flatnonzero(np.abs(wave) > 0.1)[0] / 16_000
    fps = round(len(frames) / (len(wave) / 16_000))
    assert abs(heard - np.argmin(gaps) / fps) < 1.5 / fps
    told = Narrated(Film("appears", RED), Speech("A big red circle appears in the film.", "en-us", 150, 50))
    wave = load_sound(rendered(Medium(told, 1), "0.mp4"))
    assert wave is not None and len(wave) / 16_000 > 2 and np.abs(wave[:2000]).max() < 0.01 < np.abs(wave).max()


def loud(wave: np.ndarray, seconds: float = 0.02) -> int:
    """How often a wave goes from silence to sound."""
    block = round(seconds * 16_000)
    level = np.abs(wave[: len(wave) // block * block]).reshape(-1, block).max(axis=1) > 0.05
    return int(np.count_nonzero(np.diff(level.astype(int), prepend=0) == 1))


@pytest.mark.parametrize("seed", range(4))
def test_sounds_are_what_they_are_called(seed: int) -> None:
    waves = {name: make_sound(name, random.Random(seed)) for name in SOUNDS}
    for name, wave in waves.items():
        assert wave.dtype == np.float32 and 0.15 < len(wave) / 16_000 < 1.3 and 0.1 < np.abs(wave).max() <= 1
        if "beeps" in name:
            assert loud(wave) == int(name[0])

    def pitch(wave: np.ndarray) -> float:
        return float(np.argmax(np.abs(np.fft.rfft(wave))) / len(wave) * 16_000)

    for name, rises in (("rising", True), ("falling", False)):
        third = len(waves[name]) // 3
        assert (pitch(waves[name][-third:]) > 1.3 * pitch(waves[name][:third])) == rises
    spectrum = np.abs(np.fft.rfft(waves["noise"]))
    assert np.exp(np.log(spectrum + 1e-9).mean()) / spectrum.mean() > 0.5  # flat, which no tone is
    assert np.abs(waves["bell"][-2000:]).max() < 0.3 * np.abs(waves["bell"]).max()


def test_a_minute_of_a_recording_holds_its_event() -> None:
    recording = Recording(("3 beeps", Speech("There is a big red circle.", "en-us", 170, 50), "noise"))
    wave = decode(rendered(Medium(recording, 3), "0.flac"))
    assert len(wave) == 3 * 60 * 16_000
    beeps, speech, noise = wave.reshape(3, -1)
    assert loud(beeps) == 12 and 4 <= loud(speech, 0.25) < 20 and loud(noise, 0.1) == 4
    for minute in (beeps, speech, noise):
        assert all(np.abs(quarter).max() > 0.1 for quarter in minute.reshape(4, -1))
    assert len(rendered(Medium(recording, 3), "0.mp3")) < 800_000


def test_speech_does_not_depend_on_what_was_said_before() -> None:
    pytest.importorskip("espeakng_loader", reason="espeak-ng (the optional extra demo) is absent")
    texts = ["a big red circle", "there is a small blue star", "what is on the left?"]
    heard, clock = [], time.time()
    for order in (texts, texts[::-1], texts):
        while int(time.time()) == int(clock):  # the library seeds its noise by the second
            time.sleep(0.05)
        clock = time.time()
        heard.append({})
        for text in order:
            with Synthesizer(5) as fresh:
                heard[-1][text] = fresh.speak(text, "en-us+f2").tobytes()
    assert heard[0] == heard[1] == heard[2]


def test_espeak_speaks_and_refuses_what_it_lacks() -> None:
    pytest.importorskip("espeakng_loader", reason="espeak-ng (the optional extra demo) is absent")
    with Synthesizer() as espeak:
        assert espeak.sample_rate == 22_050
        slow, fast = (espeak.speak("three red dogs", "en-us+f2", rate=rate) for rate in (120, 240))
        assert slow.dtype == np.int16 and len(slow) > 1.5 * len(fast)
        german = espeak.speak("drei", "de")
        for voice in ("fr-fr", "xx", "en-us+nobody", "en-us+../../en_dict"):
            with pytest.raises(DataError, match="espeak-ng has no voice"):
                espeak.speak("trois", voice)
            with pytest.raises(DataError, match="espeak-ng has no voice"):
                espeak.phonemes("trois", voice)
        assert abs(len(espeak.speak("drei", "de")) - len(german)) < 2_000
        with pytest.raises(DataError, match="no sound"):
            espeak.speak("", "en-us")
    with Synthesizer() as again:
        assert len(again.speak("red", "en-us")) > 1_000


def spoken_texts(code: str) -> list[str]:
    words = LANGUAGES[code]
    things = [Thing(shape, colour, size) for shape in SHAPES for colour in COLOURS for size in SIZES]
    texts = [words.say("here", thing=thing, place=PLACES[i % 5]) for i, thing in enumerate(things)]
    texts += [words.say("moves", thing=RED, direction=direction) for direction in DIRECTIONS]
    texts += [words.say(name, thing=RED) for name in ("appears", "vanishes", "recolours", "is_there")]
    texts += [words.say("collides", thing=RED, other=things[0]), words.sequence([words.heard(s) for s in SOUNDS])]
    texts += [words.say(name, place=place) for name in ("what_at", "colour_at", "shape_at") for place in PLACES]
    texts += [words.say(name) for name in ("how_many", "watch", "hear", "how_many_beeps", "describe")]
    texts += [words.yes, words.no]
    texts += [words.say("is_there", thing=words.heard(sound)) for sound in SINGLE_SOUNDS]
    return [*texts, *GRAMMARS[code].sentences(), *GRAMMARS[code].words()]


@pytest.mark.parametrize("code", LANGUAGES)
def test_every_language_is_spoken_and_not_spelled(code: str, espeak: Synthesizer) -> None:
    """A script that a voice does not know is read by another voice's rules, which phonemes mark by "(en)"."""
    texts = spoken_texts(code)
    said = {text: espeak.phonemes(text, LANGUAGES[code].voice) for text in texts}
    assert all(phonemes and "(" not in phonemes for phonemes in said.values())
    assert "(" in espeak.phonemes("赤い丸", "ja")  # the test can fail
    assert len(set(said.values())) == len(set(texts))  # nothing is swallowed
    seconds = len(espeak.speak(texts[0], LANGUAGES[code].voice)) / 22_050
    assert 1 < seconds < 5


@pytest.mark.parametrize("code", LANGUAGES)
def test_every_language_has_every_word(code: str) -> None:
    words = LANGUAGES[code]
    for field, count in (
        *(("shapes", 8), ("colours", 6), ("colour_names", 6), ("sizes", 2), ("places", 5), ("directions", 4)),
        *(("sounds", 10), ("counts", 3), ("beep_counts", 4), ("ordinals", 2)),
    ):
        found = getattr(words, field).split(", ")
        assert len(found) == count and len(set(found)) == count, field
    texts = spoken_texts(code)
    assert not any(mark in text for text in texts for mark in "{}<>/") and not any("  " in text for text in texts)
    things = {words.phrase(Thing(*names)) for names in itertools.product(SHAPES, COLOURS, SIZES)}
    assert len(things) == len(SHAPES) * len(COLOURS) * len(SIZES)
    assert all(
        getattr(words, field.name) for field in dataclasses.fields(words) if field.name not in ("article", "gap")
    )
    assert len(GRAMMARS[code].sentences()) == 80


@pytest.mark.parametrize(
    "code, thing, phrase",
    [
        ("de", Thing("cross", "black", "small"), "ein kleines schwarzes Kreuz"),
        ("fr", Thing("star", "white", "big"), "une grande étoile blanche"),
        ("es", Thing("cross", "red", "small"), "una cruz roja pequeña"),
        ("it", Thing("moon", "yellow", "small"), "una piccola luna gialla"),
        ("pt", Thing("heart", "black", "small"), "um coração preto pequeno"),
        ("nl", Thing("square", "red", "big"), "een groot rood vierkant"),
        ("ru", Thing("ring", "blue", "big"), "большое синее кольцо"),
        ("pl", Thing("star", "blue", "small"), "mała niebieska gwiazda"),
        ("tr", Thing("star", "green", "big"), "büyük yeşil bir yıldız"),
        ("hi", Thing("heart", "blue", "small"), "एक छोटा नीला दिल"),
        ("zh", Thing("heart", "red", "big"), "一个红色的大爱心"),
    ],
)
def test_words_agree(code: str, thing: Thing, phrase: str) -> None:
    assert LANGUAGES[code].phrase(thing) == phrase


def test_particles_and_capitals() -> None:
    korean = LANGUAGES["ko"]
    assert korean.say("appears", thing=RED) == "큰 빨간 원이 나타납니다."
    assert korean.say("appears", thing=Thing("ring", "red", "big")) == "큰 빨간 고리가 나타납니다."
    assert LANGUAGES["es"].say("what_at", place="left") == "¿Qué hay a la izquierda?"
    assert LANGUAGES["tr"].sequence(["iki bip sesi"]) == "İki bip sesi."
    assert LANGUAGES["en"].sequence(["noise", "a bell"]) == "First noise, then a bell."


@pytest.mark.parametrize("extension", ["flac", "mp3"])
def test_sound_bytes_are_the_same_twice(extension: str) -> None:
    wave = make_sound("bell", random.Random(0))
    payload = encode_sound(wave, extension)
    assert payload == encode_sound(wave, extension)
    assert abs(len(decode(payload)) - len(wave)) < 2_000
