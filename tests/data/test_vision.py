"""Images to patches: equal to transformers' processor, any mode of file, and bombs refused by their headers."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from data.errors import BadSample
from data.vision import ImageLimits, Patching, decode_image, load_image, smart_resize, to_patches


def noise(height: int, width: int, colours: int = 3, seed: int = 0) -> np.ndarray:
    """Smooth enough that resizing is tested at more than one frequency."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height))).astype(int) + generator.integers(-20, 20, (height, width, 3))
    return np.clip(smooth, 0, 255).astype(np.uint8)[:, :, :colours].squeeze()


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def processor(patching: Patching, min_pixels: int, max_pixels: int):
    pytest.importorskip("transformers")
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(
        size={"shortest_edge": min_pixels, "longest_edge": max_pixels},
        patch_size=patching.patch_size,
        temporal_patch_size=patching.temporal_patch_size,
        merge_size=patching.merge_size,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def assert_equal_to_transformers(payload: bytes, limits: ImageLimits, patching: Patching) -> None:
    pixels_PX, grid = load_image(payload, limits, patching)
    image = Image.open(io.BytesIO(payload))
    want = processor(patching, limits.min_pixels, limits.max_pixels)(images=image, return_tensors="pt")
    assert grid == tuple(want["image_grid_thw"][0].tolist())
    assert pixels_PX.dtype == torch.float32 and pixels_PX.is_contiguous()
    assert torch.equal(pixels_PX, want["pixel_values"])


@pytest.mark.parametrize("seed", range(20))
def test_equals_transformers(seed):
    choose = random.Random(seed)
    patching = Patching(choose.choice((16, 16, 14, 8)), choose.choice((2, 2, 1, 3)), choose.choice((2, 2, 1, 3)))
    image = Image.fromarray(noise(choose.randint(5, 300), choose.randint(5, 300), seed=seed))
    limits = ImageLimits(min_pixels=choose.choice((3_136, 50_000)), max_pixels=choose.choice((60_000, 12_845_056)))
    assert_equal_to_transformers(encoded(image, choose.choice(("PNG", "JPEG", "WEBP", "BMP"))), limits, patching)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "transparent colour", "transparent palette"])
def test_modes_equal_transformers(mode):
    image, options, kind = Image.fromarray(noise(70, 90)), {}, "PNG"
    if mode == "RGBA":
        image.putalpha(Image.fromarray(noise(70, 90, 1, seed=1)))
    elif mode == "LA":
        image = image.convert("L")
        image.putalpha(Image.fromarray(noise(70, 90, 1, seed=1)))
    elif mode == "transparent colour":
        options = {"transparency": tuple(np.asarray(image)[3, 4].tolist())}
    elif mode == "transparent palette":
        image, options = image.convert("P"), {"transparency": bytes(range(256))}
    else:
        image, kind = image.convert(mode), "JPEG" if mode == "CMYK" else "PNG"
    assert_equal_to_transformers(encoded(image, kind, **options), ImageLimits(), Patching())


def test_transparency_lies_on_white():
    clear = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    assert (decode_image(encoded(clear)) == 255).all()


def test_16_bits_keep_their_range():
    """Pillow's own conversion cuts at 255, and transformers follows it."""
    grey_HW = np.linspace(0, 65_535, 64 * 64).reshape(64, 64).astype(np.uint16)
    frame_HWC = decode_image(encoded(Image.fromarray(grey_HW)))
    assert frame_HWC.dtype == np.uint8 and frame_HWC.min() == 0 and frame_HWC.max() == 255
    assert np.abs(frame_HWC - grey_HW[:, :, None] / 257).max() <= 0.5


QUARTERS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 0]]], np.uint8).repeat(32, 0).repeat(32, 1)


def quarters(payload: bytes, tolerance: int = 0) -> bool:
    """Whether it decodes to red, green, blue and yellow, a quarter each, in that order."""
    frame_HWC = decode_image(payload)
    assert frame_HWC.dtype == np.uint8 and frame_HWC.shape == (64, 64, 3)
    middles = [(16, 16), (16, 48), (48, 16), (48, 48)]
    return all(np.abs(frame_HWC[at].astype(int) - QUARTERS[at]).max() <= tolerance for at in middles)


def without_segment(jpeg: bytes, marker: int) -> bytes:
    at = jpeg.index(bytes([0xFF, marker]))
    return jpeg[:at] + jpeg[at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big") :]


def test_colours_of_every_kind_of_file():
    image = Image.fromarray(QUARTERS)
    palette = image.convert("P", palette=Image.Palette.ADAPTIVE, colors=4)
    for payload in (encoded(image), encoded(palette), encoded(image, "GIF"), encoded(image, "BMP")):
        assert quarters(payload)
    for payload in (encoded(image, "WEBP", lossless=True), encoded(palette, "BMP"), encoded(image.convert("RGBA"))):
        assert quarters(payload)
    assert quarters(encoded(image, "JPEG", quality=95), 8)
    grey = decode_image(encoded(image.convert("L"), "JPEG", quality=100))
    assert [int(grey[at].max()) for at in ((16, 16), (16, 48), (48, 16), (48, 48))] == pytest.approx(
        [76, 150, 29, 226], abs=2
    )
    bits = decode_image(encoded(Image.fromarray(QUARTERS[:, :, 0] > 0)))
    assert (bits[:32, :32] == 255).all() and (bits[:32, 32:] == 0).all()


def test_cmyk_of_jpeg_with_and_without_adobes_marker():
    """Adobe stores inks inverted and says so by a marker; Pillow, as browsers do, takes all to be stored so."""
    cmyk = Image.fromarray(QUARTERS).convert("CMYK")
    adobe = encoded(cmyk, "JPEG", quality=95)
    assert b"Adobe" in adobe and quarters(adobe, 8)
    plain = without_segment(adobe, 0xEE)
    assert b"Adobe" not in plain and quarters(plain, 8)
    black = encoded(Image.new("CMYK", (64, 64), (0, 0, 0, 128)), "JPEG", quality=95)
    assert np.abs(decode_image(black).astype(int) - 127).max() <= 2


def test_transparent_entries_of_a_palette_lie_on_white():
    palette = Image.fromarray(QUARTERS).convert("P", palette=Image.Palette.ADAPTIVE, colors=4)
    red, green = palette.getpixel((16, 16)), palette.getpixel((48, 16))
    for kind in ("PNG", "GIF"):
        frame_HWC = decode_image(encoded(palette, kind, transparency=red))
        assert (frame_HWC[16, 16] == 255).all() and (frame_HWC[48, 48] == (255, 255, 0)).all()
    alphas = bytearray(b"\xff" * 4)
    alphas[green] = 128
    half = decode_image(encoded(palette, transparency=bytes(alphas)))[16, 48]
    assert half.tolist() == [127, 255, 127]


def test_half_transparency_lies_on_white():
    rgba = Image.new("RGBA", (40, 40), (200, 0, 100, 51))  # a fifth
    grey = Image.new("LA", (40, 40), (100, 51))
    for kind in ("PNG", "WEBP"):
        assert np.abs(decode_image(encoded(rgba, kind, lossless=True))[5, 5].astype(int) - (244, 204, 224)).max() <= 1
    assert np.abs(decode_image(encoded(grey))[5, 5].astype(int) - 224).max() <= 1


def png(width: int, height: int, bits: int, colours: int, rows: bytes, **chunks: bytes) -> bytes:
    parts = {"IHDR": struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)} | chunks
    parts |= {"IDAT": zlib.compress(rows), "IEND": b""}
    names = ((name.encode(), data) for name, data in parts.items())
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in names
    )


def test_16_bits_of_colour_and_of_transparency():
    pixel = struct.pack(">HHH", 65_535, 32_896, 0)
    assert decode_image(png(1, 1, 16, 2, b"\0" + pixel)).tolist() == [[[255, 128, 0]]]
    with_alpha = png(1, 1, 16, 6, b"\0" + pixel + struct.pack(">H", 0))
    assert decode_image(with_alpha).tolist() == [[[255, 255, 255]]]
    grey = png(2, 1, 16, 0, b"\0" + struct.pack(">HH", 32_896, 1_000), tRNS=struct.pack(">H", 1_000))
    assert decode_image(grey).tolist() == [[[128] * 3, [255] * 3]]


def test_the_first_picture_of_two_cameras():
    pictures = [Image.fromarray(QUARTERS), Image.new("RGB", (64, 64), "white")]
    payload = encoded(pictures[0], "MPO", save_all=True, append_images=pictures[1:], quality=95)
    assert Image.open(io.BytesIO(payload)).format == "MPO" and quarters(payload, 8)


def test_first_frames_whose_animation_starts_with_a_part():
    frames = [Image.fromarray(QUARTERS), Image.new("RGB", (64, 64), "white")]
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})):
        payload = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert getattr(Image.open(io.BytesIO(payload)), "n_frames", 1) == 2 and quarters(payload)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    stored = Image.fromarray(noise(40, 60))
    exif = Image.Exif()
    exif[0x0112] = orientation
    frame_HWC = decode_image(encoded(stored, "PNG", exif=exif))
    a = np.asarray(stored)
    turned = {1: a, 2: a[:, ::-1], 3: a[::-1, ::-1], 4: a[::-1], 5: a.swapaxes(0, 1), 6: np.rot90(a, -1)}
    turned |= {7: np.rot90(a.swapaxes(0, 1), 2), 8: np.rot90(a)}
    assert np.array_equal(frame_HWC, turned[orientation])


def test_damaged_exif_is_ignored():
    stored = Image.fromarray(noise(40, 60))
    payload = encoded(stored, "PNG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01")
    assert np.array_equal(decode_image(payload), np.asarray(stored))


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP"):
        payload = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        assert (decode_image(payload) == (255, 0, 0)).all()


def test_smart_resize_equals_transformers():
    pytest.importorskip("transformers")
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as theirs

    choose, refused = random.Random(0), 0
    for _ in range(3_000):
        height, width = (int(2 ** choose.uniform(0, 13)) for _ in range(2))
        factor, low = choose.choice((28, 32)), choose.choice((3_136, 100_000))
        high = low * choose.choice((2, 50, 4_096))
        try:
            want = theirs(height, width, factor, low, high)
        except ValueError:
            refused += 1
            with pytest.raises(BadSample, match="over 200 times"):
                smart_resize(height, width, factor, low, high)
        else:
            assert smart_resize(height, width, factor, low, high) == want
    assert refused > 10


def test_frames_of_a_video_fill_whole_patches():
    frames_NHWC = np.stack([noise(32, 64, seed=i) for i in range(3)])
    pixels_PX, grid = to_patches(frames_NHWC)
    assert grid == (2, 2, 4)
    values = pixels_PX.view(2, 8, 3, 2, 16, 16)
    for i in range(4):  # the third frame fills the fourth place too
        alone_PX, _ = to_patches(frames_NHWC[min(i, 2)][None])
        assert torch.equal(values[i // 2, :, :, i % 2], alone_PX.view(8, 3, 2, 16, 16)[:, :, 0])
    with pytest.raises(ValueError, match="multiples of 32"):
        to_patches(frames_NHWC[:, :, :48])


def png_claiming(width: int, height: int) -> bytes:
    """A header and nothing that could be decoded."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"not to be read") + chunk(b"IEND", b"")


@pytest.mark.parametrize("side,message", [(10_000, "claims 10000 x 10000 pixels"), (60_000, "bomb")])
def test_a_bomb_is_refused_by_its_header(side, message, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(BadSample, match=message):
        decode_image(png_claiming(side, side))


def test_bad_images():
    good = encoded(Image.fromarray(noise(64, 64)))
    thin = encoded(Image.new("RGB", (1, 201)))
    floats = encoded(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF")
    for payload, message in [
        (b"", "empty"),
        (b"GIF89a", "is none of|cannot be decoded"),
        (b"no image at all", "is none of jpeg, png"),
        (good[: len(good) // 2], "cannot be decoded"),
        (encoded(Image.fromarray(noise(64, 64)), "JPEG")[:900], "cannot be decoded"),
        (floats, "is none of jpeg, png"),  # a format that is not opened
        (thin, "over 200 times"),
        (png_claiming(8, 8), "cannot be decoded"),
    ]:
        with pytest.raises(BadSample, match=message):
            load_image(payload)
    with pytest.raises(BadSample, match=r"bytes, the limit is 10"):
        load_image(good, ImageLimits(max_bytes=10))


def test_random_damage_never_gets_out():
    generator = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        good = encoded(Image.fromarray(noise(48, 48)), kind)
        for _ in range(60):
            bad = bytearray(good)
            for place in generator.integers(0, len(bad), generator.integers(1, 30)):
                bad[place] = generator.integers(256)
            try:
                assert decode_image(bytes(bad)).dtype == np.uint8
            except BadSample as error:
                assert "\n" not in str(error)
