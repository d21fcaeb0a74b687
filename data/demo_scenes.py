"""Scenes of coloured shapes: what is where, drawn as pictures and as short films.

    Picture (things and their places) --masks with soft edges--> uint8 [H, W, 3]
    Film (what a thing does)          --a picture a frame-->     uint8 [N, H, W, 3], and when its sound comes

A scene's name holds all that can be asked about it and decides on which side of the split it is; the seed moves what
cannot be asked about: sizes of the canvas, shades, small shifts, speed. Cost: 0.3 ms a picture, 5 ms a film.

Shapes: N frames, H rows, W columns; U, V coordinates of pixels from a thing's centre in units of its radius.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np

from data.demo_language import Thing

ACTIONS = ("moves", "appears", "vanishes", "recolours", "collides")
_RGB = {
    "red": (214, 40, 40),
    "blue": (45, 80, 210),
    "green": (40, 155, 65),
    "yellow": (244, 212, 52),
    "black": (24, 24, 26),
    "white": (250, 250, 250),
}
_BACKGROUNDS = ((150, 150, 155), (172, 160, 146), (132, 146, 160), (165, 150, 168), (148, 164, 152))
_CENTRES = {"left": (0.2, 0.5), "right": (0.8, 0.5), "top": (0.5, 0.2), "bottom": (0.5, 0.8), "middle": (0.5, 0.5)}
_RADII = {"big": 0.145, "small": 0.075}  # of the shorter side
_FILM_RADII = {"big": 0.2, "small": 0.11}
_STEPS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "top": (0.0, -1.0), "bottom": (0.0, 1.0)}
_SIDES = ((80, 80), (96, 96), (80, 112), (96, 128), (128, 96), (128, 128))  # height, width
_FILM_SIDES = ((64, 64), (80, 80), (64, 96), (96, 64))


@dataclass(frozen=True)
class Picture:
    """Things in different places."""

    things: tuple[tuple[str, Thing], ...]  # place and thing, places in the order of PLACES

    @property
    def name(self) -> str:
        """All that can be asked about it."""
        return "picture: " + "; ".join(f"{place} {' '.join(thing)}" for place, thing in self.things)


@dataclass(frozen=True)
class Film:
    """What a thing does, and the sound that is heard as it does."""

    action: str  # of ACTIONS
    thing: Thing
    other: Thing | None = None  # what it bumps into
    colour: str = ""  # what it becomes
    direction: str = ""  # of DIRECTIONS
    sound: str = ""  # of SOUNDS, or "1 beeps"; "" is a film without any

    @property
    def name(self) -> str:
        """All that can be asked about it."""
        words = (self.action, *self.thing, *(self.other or ()), self.colour, self.direction, self.sound)
        return "film: " + " ".join(filter(None, words))


def draw_picture(picture: Picture, rng: random.Random) -> np.ndarray:
    """uint8 [H, W, 3], sides of 80 to 128 pixels."""
    height, width = rng.choice(_SIDES)
    canvas_HWC = _canvas(height, width, rng)
    for place, thing in picture.things:
        x, y = (share + 0.04 * (rng.random() - 0.5) for share in _CENTRES[place])
        radius = _RADII[thing.size] * min(height, width) * (0.92 + 0.16 * rng.random())
        _draw(canvas_HWC, thing, x * width, y * height, radius)
    return np.rint(canvas_HWC).astype(np.uint8)


def draw_film(film: Film, rng: random.Random, at_least: float = 0.0) -> tuple[np.ndarray, int, float]:
    """Frames uint8 [N, H, W, 3], frames a second (8 to 12), and the second at which something happens.

    A film lasts 1.6 to 2.8 seconds, or `at_least` so many.
    """
    height, width = rng.choice(_FILM_SIDES)
    fps = rng.choice((8, 10, 12))
    count = math.ceil(max(1.6 + 1.2 * rng.random(), at_least) * fps)
    moment = 0.4 + 0.15 * rng.random()  # share of the film at which something happens
    background_HWC, scale = _canvas(height, width, rng), min(height, width)
    frames = []
    for i in range(count):
        frame_HWC = background_HWC.copy()
        for thing, x, y in _stage(film, i / (count - 1), moment):
            _draw(frame_HWC, thing, width / 2 + x * scale, height / 2 + y * scale, _FILM_RADII[thing.size] * scale)
        frames.append(np.rint(frame_HWC).astype(np.uint8))
    return np.stack(frames), fps, moment * count / fps


def _stage(film: Film, share: float, moment: float) -> list[tuple[Thing, float, float]]:
    """What is on show after `share` of a film: things and their centres from the middle, by the shorter side."""
    happened = share >= moment
    if film.action == "moves":
        dx, dy = _STEPS[film.direction]
        return [(film.thing, 0.56 * dx * (share - 0.5), 0.56 * dy * (share - 0.5))]
    if film.action == "collides" and film.other:
        near = share / moment if not happened else 1 - 0.8 * (share - moment) / (1 - moment)
        touching = (_FILM_RADII[film.thing.size] + _FILM_RADII[film.other.size]) / 2
        shift = 0.34 + (touching - 0.34) * near
        return [(film.thing, -shift, 0.0), (film.other, shift, 0.0)]
    if film.action == "recolours" and happened:
        return [(film.thing._replace(colour=film.colour), 0.0, 0.0)]
    shown = {"appears": happened, "vanishes": not happened}.get(film.action, True)
    return [(film.thing, 0.0, 0.0)] if shown else []


def _canvas(height: int, width: int, rng: random.Random) -> np.ndarray:
    """float32 [H, W, 3] of one quiet shade."""
    shade = [value + 8 * (rng.random() - 0.5) for value in rng.choice(_BACKGROUNDS)]
    return np.broadcast_to(np.array(shade, np.float32), (height, width, 3)).copy()


def _draw(canvas_HWC: np.ndarray, thing: Thing, x: float, y: float, radius: float) -> None:
    """Paint a thing with a thin rim, in place; only the pixels around it are touched."""
    height, width = canvas_HWC.shape[:2]
    rows = slice(max(int(y - radius) - 2, 0), min(int(y + radius) + 4, height))
    columns = slice(max(int(x - radius) - 2, 0), min(int(x + radius) + 4, width))
    v_V1 = (np.arange(rows.start, rows.stop)[:, None] + 0.5 - y) / radius
    u_1U = (np.arange(columns.start, columns.stop)[None, :] + 0.5 - x) / radius
    distance_VU = _outside(thing.shape, u_1U, v_V1) * radius
    part_VUC = canvas_HWC[rows, columns]
    rim = 110 if thing.colour == "black" else 40
    for paint, inset in ((np.full(3, rim), 0.0), (np.array(_RGB[thing.colour]), 1.0)):
        cover_VU1 = np.clip(0.5 - inset - distance_VU, 0, 1)[:, :, None]
        part_VUC += (cover_VU1 * (paint - part_VUC)).astype(np.float32)


def _outside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """How far outside a shape of radius 1 each point lies, about: below 0 within. `v` points down."""
    across, along = np.abs(u), np.abs(v)
    if shape == "circle":
        return np.hypot(u, v) - 1
    if shape == "square":
        return np.maximum(across, along) - 0.85
    if shape == "triangle":
        return np.maximum(v - 0.65, 0.866 * across - 0.5 * v - 0.5)
    if shape == "ring":
        return np.abs(np.hypot(u, v) - 0.72) - 0.26
    if shape == "cross":
        upright = np.maximum(across - 0.3, along - 0.95)
        return np.minimum(upright, np.maximum(across - 0.95, along - 0.3))
    if shape == "heart":
        lobes = np.hypot(across - 0.45, v + 0.3) - 0.53
        point = np.maximum(np.maximum((across + v) * 0.7071 - 0.636, -v - 0.3), across - 0.83)
        return np.minimum(lobes, point)
    if shape == "moon":
        return np.maximum(np.hypot(u, v) - 1, 0.82 - np.hypot(u - 0.5, v))
    return _outside_star(u, v)


def _outside_star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Five points: every tenth of the turn is a mirror image of the first, whose edge is one line."""
    turn = np.arctan2(u, -v)
    fifth = 2 * np.pi / 5
    angle = np.abs((turn + fifth / 2) % fifth - fifth / 2)
    length = np.hypot(u, v)
    across, along = length * np.sin(angle), length * np.cos(angle)
    inner = 0.45
    corner = inner * np.sin(fifth / 2), inner * np.cos(fifth / 2)
    edge = corner[0], corner[1] - 1.0
    norm = np.hypot(*edge)
    return (across * -edge[1] + (along - 1.0) * edge[0]) / norm
