"""Every kind of pixel that a picture file may hold becomes the RGB that a viewer shows."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from ldm.data.images import decode

WIDE, HIGH = 24, 16
BACKGROUND = "#2060a0"
BEHIND = np.array([0x20, 0x60, 0xA0], float)


def ramp(low: float, high: float) -> np.ndarray:
    """Values that rise from the top left to the bottom right, `(HIGH, WIDE)`."""
    return np.linspace(low, high, HIGH * WIDE).reshape(HIGH, WIDE)


RED, GREEN, BLUE = ramp(0, 255), ramp(255, 0), ramp(60, 90)
COLOURS = np.stack([RED, GREEN, BLUE], axis=-1).round().astype(np.uint8)  # (HIGH, WIDE, 3)
GREY = ramp(0, 255).round().astype(np.uint8)
ALPHA = ramp(255, 0).T.reshape(HIGH, WIDE).round().astype(np.uint8)
FOUR = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200], [240, 240, 240]], np.uint8)
NUMBERS = (np.arange(HIGH * WIDE).reshape(HIGH, WIDE) % 4).astype(np.uint8)


def saved(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def of_palette() -> Image.Image:
    picture = Image.fromarray(NUMBERS, "P")
    picture.putpalette(FOUR.tobytes())
    return picture


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=-1)


def over(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return colours * share + BEHIND * (1 - share)


def png_16_bit(kind: int, values: np.ndarray) -> bytes:
    """A PNG of colour type `kind` with 16 bits a channel, which Pillow doesn't write, of `(HIGH, WIDE, C)` bytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", WIDE, HIGH, 16, kind, 0, 0, 0)
    rows = b"".join(b"\0" + (row.astype(int) * 257).astype(">u2").tobytes() for row in values)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def cmyk() -> tuple[Image.Image, np.ndarray]:
    inks = np.stack([RED, GREEN, BLUE, ramp(0, 120)], axis=-1).round().astype(np.uint8)
    return Image.fromarray(inks, "CMYK"), (255.0 - inks[..., :3]) * (255.0 - inks[..., 3:]) / 255


def films(*colours: str) -> list[Image.Image]:
    return [Image.new("RGB", (WIDE, HIGH), colour) for colour in colours]


def plain(*colour: int) -> np.ndarray:
    return np.broadcast_to(np.array(colour, float), (HIGH, WIDE, 3))


# What is in the file, the pixels that a viewer shows over BACKGROUND, and how far off each may be.
CASES: dict[str, Callable[[], tuple[bytes, np.ndarray, float]]] = {
    "RGB in PNG": lambda: (saved(Image.fromarray(COLOURS), "PNG"), COLOURS, 0),
    "RGB in JPEG": lambda: (saved(Image.fromarray(COLOURS), "JPEG", quality=98, subsampling=0), COLOURS, 6),
    "RGB in WEBP": lambda: (saved(Image.fromarray(COLOURS), "WEBP", lossless=True), COLOURS, 0),
    "RGB in BMP": lambda: (saved(Image.fromarray(COLOURS), "BMP"), COLOURS, 0),
    "RGB in TIFF": lambda: (saved(Image.fromarray(COLOURS), "TIFF"), COLOURS, 0),
    "RGB in AVIF": lambda: (saved(Image.fromarray(COLOURS), "AVIF", quality=100, subsampling="4:4:4"), COLOURS, 6),
    "RGB of a transparent colour": lambda: (
        saved(Image.fromarray(FOUR[NUMBERS]), "PNG", transparency=tuple(FOUR[2].tolist())),
        np.where((NUMBERS == 2)[..., None], BEHIND, FOUR[NUMBERS]),
        0,
    ),
    "RGB of 16 bits": lambda: (png_16_bit(2, COLOURS), COLOURS, 1),
    "RGBA in PNG": lambda: (saved(Image.fromarray(np.dstack([COLOURS, ALPHA])), "PNG"), over(COLOURS, ALPHA), 1.5),
    "RGBA in WEBP": lambda: (
        saved(Image.fromarray(np.dstack([COLOURS, ALPHA])), "WEBP", lossless=True, exact=True),
        over(COLOURS, ALPHA),
        1.5,
    ),
    "RGBA in TIFF": lambda: (saved(Image.fromarray(np.dstack([COLOURS, ALPHA])), "TIFF"), over(COLOURS, ALPHA), 1.5),
    "RGBA of 16 bits": lambda: (png_16_bit(6, np.dstack([COLOURS, ALPHA])), over(COLOURS, ALPHA), 1.5),
    "grey": lambda: (saved(Image.fromarray(GREY), "PNG"), grey(GREY), 0),
    "grey in JPEG": lambda: (saved(Image.fromarray(GREY), "JPEG", quality=98), grey(GREY), 6),
    "grey of a transparent shade": lambda: (
        saved(Image.fromarray(NUMBERS * 80), "PNG", transparency=160),
        np.where((NUMBERS == 2)[..., None], BEHIND, grey(NUMBERS * 80)),
        0,
    ),
    "grey and alpha": lambda: (
        saved(Image.fromarray(np.dstack([GREY, ALPHA]), "LA"), "PNG"),
        over(grey(GREY), ALPHA),
        1.5,
    ),
    "grey and alpha of 16 bits": lambda: (png_16_bit(4, np.dstack([GREY, ALPHA])), over(grey(GREY), ALPHA), 1.5),
    "grey of 16 bits in PNG": lambda: (
        saved(Image.fromarray(ramp(0, 65535).astype(np.uint16)), "PNG"),
        grey(ramp(0, 255)),
        1,
    ),
    "grey of 16 bits in TIFF": lambda: (
        saved(Image.fromarray(ramp(0, 65535).astype(np.uint16)), "TIFF"),
        grey(ramp(0, 255)),
        1,
    ),
    "grey of 16 bits, the high byte first": lambda: (
        saved(Image.fromarray(ramp(0, 65535).astype(">u2")), "TIFF"),
        grey(ramp(0, 255)),
        1,
    ),
    "32-bit numbers": lambda: (saved(Image.fromarray(ramp(0, 65535).astype(np.int32)), "TIFF"), grey(ramp(0, 255)), 1),
    "floating point to 255": lambda: (
        saved(Image.fromarray(ramp(0, 255).astype(np.float32)), "TIFF"),
        grey(ramp(0, 255)),
        1,
    ),
    "floating point to 1": lambda: (
        saved(Image.fromarray(ramp(0, 1).astype(np.float32)), "TIFF"),
        grey(ramp(0, 255)),
        1,
    ),
    "black and white in PNG": lambda: (
        saved(Image.fromarray(NUMBERS < 2), "PNG"),
        grey(np.where(NUMBERS < 2, 255, 0)),
        0,
    ),
    "black and white in TIFF": lambda: (
        saved(Image.fromarray(NUMBERS < 2), "TIFF", compression="group4"),
        grey(np.where(NUMBERS < 2, 255, 0)),
        0,
    ),
    "palette in PNG": lambda: (saved(of_palette(), "PNG"), FOUR[NUMBERS], 0),
    "palette in GIF": lambda: (saved(of_palette(), "GIF"), FOUR[NUMBERS], 0),
    "palette in BMP": lambda: (saved(of_palette(), "BMP"), FOUR[NUMBERS], 0),
    "palette of a transparent colour in PNG": lambda: (
        saved(of_palette(), "PNG", transparency=1),
        np.where((NUMBERS == 1)[..., None], BEHIND, FOUR[NUMBERS]),
        0,
    ),
    "palette of a transparent colour in GIF": lambda: (
        saved(of_palette(), "GIF", transparency=1),
        np.where((NUMBERS == 1)[..., None], BEHIND, FOUR[NUMBERS]),
        0,
    ),
    "palette of half transparent colours": lambda: (
        saved(of_palette(), "PNG", transparency=bytes([255, 128, 0, 40])),
        over(FOUR[NUMBERS], np.array([255, 128, 0, 40])[NUMBERS]),
        1.5,
    ),
    "inks in TIFF": lambda: (saved(cmyk()[0], "TIFF"), cmyk()[1], 2),
    "inks in JPEG": lambda: (saved(cmyk()[0], "JPEG", quality=98, subsampling=0), cmyk()[1], 8),
    "YCbCr": lambda: (saved(Image.fromarray(COLOURS).convert("YCbCr"), "TIFF"), COLOURS, 3),
    "LAB": lambda: (saved(Image.fromarray(np.dstack([GREY, GREY * 0, GREY * 0]), "LAB"), "TIFF"), lightness(), 3),
    "the first frame in GIF": lambda: (
        saved(films("red", "lime", "blue")[0], "GIF", save_all=True, append_images=films("lime", "blue")),
        plain(255, 0, 0),
        0,
    ),
    "the first frame in WEBP": lambda: (
        saved(films("red")[0], "WEBP", save_all=True, append_images=films("lime", "blue"), lossless=True),
        plain(255, 0, 0),
        0,
    ),
    "the first frame in PNG": lambda: (
        saved(films("red")[0], "PNG", save_all=True, append_images=films("lime", "blue")),
        plain(255, 0, 0),
        0,
    ),
    "the first frame in AVIF": lambda: (
        saved(films("red")[0], "AVIF", save_all=True, append_images=films("lime", "blue"), quality=100),
        plain(255, 0, 0),
        6,
    ),
    "the first picture of a phone's several": lambda: (
        saved(films("red")[0], "MPO", save_all=True, append_images=films("lime", "blue")),
        plain(255, 0, 0),
        6,
    ),
    "the first page in TIFF": lambda: (
        saved(films("red")[0], "TIFF", save_all=True, append_images=films("lime", "blue")),
        plain(255, 0, 0),
        0,
    ),
}


def lightness() -> np.ndarray:
    """The sRGB grey of CIE lightness 0 … 100, which LAB pictures keep as 0 … 255."""
    level = GREY / 255 * 100
    linear = np.where(level > 8, ((level + 16) / 116) ** 3, level / 903.3)
    return grey(255 * np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear))


@pytest.mark.parametrize("case", CASES)
def test_a_picture_of_any_mode_is_what_a_viewer_shows(case: str) -> None:
    data, expected, off = CASES[case]()
    picture = decode(data, BACKGROUND)
    assert (picture.mode, picture.size) == ("RGB", (WIDE, HIGH))
    np.testing.assert_allclose(np.asarray(picture, float), expected, atol=off, rtol=0)


# Orientation in EXIF → what turns an upright picture into the stored one: the inverse of what a viewer does.
TURNS: dict[int, tuple[Image.Transpose, ...]] = {
    1: (),
    2: (Image.Transpose.FLIP_LEFT_RIGHT,),
    3: (Image.Transpose.ROTATE_180,),
    4: (Image.Transpose.FLIP_TOP_BOTTOM,),
    5: (Image.Transpose.TRANSPOSE,),
    6: (Image.Transpose.ROTATE_90,),
    7: (Image.Transpose.TRANSVERSE,),
    8: (Image.Transpose.ROTATE_270,),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", TURNS)
def test_a_turned_picture_stands_upright(orientation: int, kind: str) -> None:
    stored = Image.fromarray(COLOURS)
    for turn in TURNS[orientation]:
        stored = stored.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 98, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    picture = decode(saved(stored, kind, exif=exif, **options))
    assert (picture.mode, picture.size) == ("RGB", (WIDE, HIGH))
    np.testing.assert_allclose(
        np.asarray(picture, float), COLOURS.astype(float), atol=6 if kind == "JPEG" else 0, rtol=0
    )


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_a_turn_that_there_is_not_is_none(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = decode(saved(Image.fromarray(COLOURS), "PNG", exif=exif))
    np.testing.assert_array_equal(np.asarray(picture), COLOURS)


def test_turned_and_transparent_is_both() -> None:
    stored = ImageOps.flip(Image.fromarray(np.dstack([COLOURS, ALPHA])))
    exif = Image.Exif()
    exif[0x0112] = 4
    picture = decode(saved(stored, "PNG", exif=exif), BACKGROUND)
    np.testing.assert_allclose(np.asarray(picture, float), over(COLOURS, ALPHA), atol=1.5, rtol=0)
