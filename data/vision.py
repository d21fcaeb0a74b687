"""Image bytes to patches for the vision encoder: the only place where a compressed image is opened.

    bytes --header--> limits --decode, EXIF upright, RGB on white--> [H, W, 3] --bicubic to whole blocks-->
      [N, H, W, 3] --table: (x / 255 - 0.5) / 0.5--> values --cut in merge-block order--> pixels [P, X], grid

The size that the header claims is checked before anything is decoded. Values equal transformers' Qwen2-VL image
processor (its Pillow form) bit for bit on the same RGB image. A video's frames take the same way. Memory is the
decoded image and the result; cost: about 30 ms for a photograph of a megapixel, most of it Pillow's.

Shapes: N frames, H rows and W columns of pixels, C colours, P patches, X values of a patch.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from data.errors import BadSample

# No TIFF: its decoder, libtiff, has the longest record of holes, its many encodings (tiles, planes, floats, several
# pages) make limits hard to state, and corpora for training hardly hold any: convert them.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
EXTENSIONS = ("jpg", "jpeg", "mpo", "png", "webp", "gif", "bmp")  # mpo: jpegs of two cameras, of which one is taken
MAX_ASPECT = 200
_PNG_TAGS = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
Grid = tuple[int, int, int]  # frames, rows and columns, in patches


@dataclass(frozen=True)
class Patching:
    """How frames are cut: the encoder's patch size in pixels, frames of a patch, and side of a merge block."""

    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2

    @property
    def factor(self) -> int:
        """Sides of a resized frame are multiples of this many pixels."""
        return self.patch_size * self.merge_size


@dataclass(frozen=True)
class ImageLimits:
    """What an image may be at most, and the range of pixels that it is resized into."""

    max_bytes: int = 1 << 28
    max_source_pixels: int = 64_000_000
    min_pixels: int = 3_136
    max_pixels: int = 12_845_056


def load_image(
    payload: bytes, limits: ImageLimits | None = None, patching: Patching | None = None
) -> tuple[Tensor, Grid]:
    """An encoded image -> pixels float32 [P, X] and its grid (1, rows, columns). Raises BadSample."""
    limits, patching = limits or ImageLimits(), patching or Patching()
    frame_HWC = decode_image(payload, limits)
    height, width = frame_HWC.shape[:2]
    size = smart_resize(height, width, patching.factor, limits.min_pixels, limits.max_pixels)
    return to_patches(resize(frame_HWC, size)[None], patching)


def decode_image(payload: bytes, limits: ImageLimits | None = None) -> np.ndarray:
    """Decode a jpeg, png, webp, gif (its first frame) or bmp: uint8 [H, W, 3], upright, transparency on white.

    Raises BadSample, with the reason, for anything that is not a whole image within the limits.
    """
    limits = limits or ImageLimits()
    with _opened(payload, limits) as image:
        image.load()
        with contextlib.suppress(Exception):  # a damaged tag turns nothing; its parser raises nearly anything
            ImageOps.exif_transpose(image, in_place=True)
        return _rgb(image)


def measure_image(payload: bytes, limits: ImageLimits | None = None, *, check: bool = False) -> tuple[int, int]:
    """Height and width as `decode_image` gives them, from the header; `check` decodes it too. Raises BadSample.

    Without `check` a png is decoded all the same where its turning may be written behind its pixels.
    """
    limits = limits or ImageLimits()
    if check:
        height, width, _ = decode_image(payload, limits).shape
        return height, width
    with _opened(payload, limits) as image:
        width, height = image.size
        turned = False
        with contextlib.suppress(Exception):
            turned = _exif(image, payload).get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return (width, height) if turned else (height, width)


def _exif(image: Image.Image, payload: bytes) -> Image.Exif:
    """Tags of an image whose header is read. A png may have them behind its pixels, so one that has any is decoded."""
    if image.format == "PNG" and any(mark in payload for mark in _PNG_TAGS):
        image.load()
    return Image.Image.getexif(image)


@contextlib.contextmanager
def _opened(payload: bytes, limits: ImageLimits) -> Iterator[Image.Image]:
    """The image with its header read and its limits checked; whatever is raised inside comes out as BadSample."""
    if not payload:
        raise BadSample("image is empty (0 bytes)")
    if len(payload) > limits.max_bytes:
        raise BadSample(f"image has {len(payload)} bytes, the limit is {limits.max_bytes}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own, of sizes: what counts is the limit below
            with Image.open(io.BytesIO(payload), formats=FORMATS) as image:  # reads the header only
                _check_size(*image.size, limits)
                yield image
    except BadSample:
        raise
    except UnidentifiedImageError:
        raise BadSample(f"image is none of {', '.join(name.lower() for name in FORMATS)}") from None
    except Exception as error:  # on damaged bytes Pillow's parsers raise nearly anything
        raise BadSample(f"image cannot be decoded: {error}") from error


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Sides near the given ones: multiples of `factor`, shape kept as far as that allows, pixels in the given range.

    Raises BadSample if one side is over 200 times the other.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise BadSample(f"{width} x {height} pixels: one side must not be over {MAX_ASPECT} times the other")
    sides = round(height / factor) * factor, round(width / factor) * factor
    if sides[0] * sides[1] > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        return (
            max(factor, math.floor(height / scale / factor) * factor),
            max(factor, math.floor(width / scale / factor) * factor),
        )
    if sides[0] * sides[1] < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        return math.ceil(height * scale / factor) * factor, math.ceil(width * scale / factor) * factor
    return sides


def image_sides(
    heights_N: np.ndarray, widths_N: np.ndarray, limits: ImageLimits, patching: Patching
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of pixels that N images are resized to, int64 [N] each; 0 x 0 where `load_image` refuses."""
    return resized_sides(heights_N, widths_N, patching.factor, limits.min_pixels, limits.max_pixels)


def resized_sides(
    heights_N: np.ndarray, widths_N: np.ndarray, factor: int, min_pixels: int, max_pixels_N: np.ndarray | int
) -> tuple[np.ndarray, np.ndarray]:
    """`smart_resize` of N pairs of sides at least 1, int64 [N] each; 0 x 0 where it refuses. Exact below 2**53."""
    height_N, width_N = (np.asarray(side, np.int64) for side in (heights_N, widths_N))
    pixels_N = np.maximum(height_N * width_N, 1)
    rows_N, columns_N = (np.rint(side / factor) * factor for side in (height_N, width_N))
    down_N, up_N = np.sqrt(pixels_N / max_pixels_N), np.sqrt(min_pixels / pixels_N)
    many_N = rows_N * columns_N > max_pixels_N
    few_N = ~many_N & (rows_N * columns_N < min_pixels)
    refused_N = np.maximum(height_N, width_N) > MAX_ASPECT * np.minimum(height_N, width_N)
    sides = []
    for side_N, near_N in ((height_N, rows_N), (width_N, columns_N)):
        less_N = np.maximum(factor, np.floor(side_N / down_N / factor) * factor)
        more_N = np.ceil(side_N * up_N / factor) * factor
        side_N = np.where(many_N, less_N, np.where(few_N, more_N, near_N))
        sides.append(np.where(refused_N, 0, side_N).astype(np.int64))
    return sides[0], sides[1]


def resize(frame_HWC: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bicubic, antialiased: uint8 [H, W, 3] -> uint8 [*size, 3]."""
    if frame_HWC.shape[:2] == size:
        return frame_HWC
    height, width = size
    return np.asarray(Image.fromarray(frame_HWC).resize((width, height), Image.Resampling.BICUBIC))


def to_patches(frames_NHWC: np.ndarray, patching: Patching | None = None) -> tuple[Tensor, Grid]:
    """Frames uint8 [N, H, W, C] of whole blocks -> pixels float32 [P, X] in -1 to 1, and the grid.

    X runs over colours, frames, rows, columns. The last frame is repeated to fill a patch, so an image counts twice.
    """
    patching = patching or Patching()
    patch, temporal, merge = patching.patch_size, patching.temporal_patch_size, patching.merge_size
    frames, height, width, colours = frames_NHWC.shape
    if height % patching.factor or width % patching.factor:
        raise ValueError(f"sides of frames ({height} x {width}) must be multiples of {patching.factor}")
    missing = -frames % temporal
    if missing:
        frames_NHWC = np.concatenate([frames_NHWC, np.repeat(frames_NHWC[-1:], missing, axis=0)])
    grid = len(frames_NHWC) // temporal, height // patch, width // patch
    blocks = frames_NHWC.reshape(
        grid[0], temporal, grid[1] // merge, merge, patch, grid[2] // merge, merge, patch, colours
    )
    bytes_PX = blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(math.prod(grid), -1)
    return torch.from_numpy(bytes_PX).float().div_(127.5).sub_(1.0), grid  # as transformers rounds, for all 256 bytes


def _check_size(width: int, height: int, limits: ImageLimits) -> None:
    if not width or not height:
        raise BadSample(f"image claims {width} x {height} pixels")
    if width * height > limits.max_source_pixels:
        raise BadSample(f"image claims {width} x {height} pixels, the limit is {limits.max_source_pixels}")


def _rgb(image: Image.Image) -> np.ndarray:
    """Any mode to uint8 [H, W, 3]."""
    if image.mode == "F":
        raise BadSample("image has floating-point values, whose range is unknown")
    if image.mode.startswith("I"):  # Pillow would cut 16 bits off at 255
        grey_HW = np.asarray(image).astype(np.int64)
        if grey_HW.min() < 0 or grey_HW.max() > 65_535:
            raise BadSample(f"image has values from {grey_HW.min()} to {grey_HW.max()}, 0 to 65535 are allowed")
        clear = image.info.get("transparency")  # the one value of a png that stands for it
        grey_HW = np.where(grey_HW == clear, 65_535, grey_HW) if isinstance(clear, int) else grey_HW
        return np.repeat(((grey_HW + 128) // 257).astype(np.uint8)[:, :, None], 3, axis=2)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return np.asarray(image.convert("RGB"))
