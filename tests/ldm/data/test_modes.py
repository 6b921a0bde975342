"""Images of any mode decode to the RGB that a viewer shows."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from cases import for_each
from PIL import Image, ImageOps

from ldm.data.images import decode

WIDTH, HEIGHT = 24, 16
BACKGROUND = "#2060a0"
BACKGROUND_RGB = np.array([0x20, 0x60, 0xA0], float)


def ramp(low: float, high: float) -> np.ndarray:
    """Values that rise from the top left to the bottom right, `(HEIGHT, WIDTH)`."""
    return np.linspace(low, high, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)


RED, GREEN, BLUE = ramp(0, 255), ramp(255, 0), ramp(60, 90)
COLOURS = np.stack([RED, GREEN, BLUE], axis=-1).round().astype(np.uint8)  # (HEIGHT, WIDTH, 3)
GREY = ramp(0, 255).round().astype(np.uint8)
ALPHA = ramp(255, 0).T.reshape(HEIGHT, WIDTH).round().astype(np.uint8)
PALETTE = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200], [240, 240, 240]], np.uint8)
PALETTE_INDICES = (np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 4).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def palette_image() -> Image.Image:
    image = Image.fromarray(PALETTE_INDICES, "P")
    image.putpalette(PALETTE.tobytes())
    return image


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=-1)


def composite(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    opacity = alpha[..., None] / 255
    return colours * opacity + BACKGROUND_RGB * (1 - opacity)


def png_16_bit(kind: int, values: np.ndarray) -> bytes:
    """A PNG of colour type `kind` with 16 bits a channel, which Pillow can't write; `values` is uint8, `(H, W, C)`."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, kind, 0, 0, 0)
    rows = b"".join(b"\0" + (row.astype(int) * 257).astype(">u2").tobytes() for row in values)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def cmyk() -> tuple[Image.Image, np.ndarray]:
    inks = np.stack([RED, GREEN, BLUE, ramp(0, 120)], axis=-1).round().astype(np.uint8)
    return Image.fromarray(inks, "CMYK"), (255.0 - inks[..., :3]) * (255.0 - inks[..., 3:]) / 255


def frames(*colours: str) -> list[Image.Image]:
    return [Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in colours]


def solid(*colour: int) -> np.ndarray:
    return np.broadcast_to(np.array(colour, float), (HEIGHT, WIDTH, 3))


# The encoded file, the pixels that a viewer shows over BACKGROUND, and the tolerance of a pixel.
CASES: dict[str, Callable[[], tuple[bytes, np.ndarray, float]]] = {
    "RGB in PNG": lambda: (encoded(Image.fromarray(COLOURS), "PNG"), COLOURS, 0),
    "RGB in JPEG": lambda: (encoded(Image.fromarray(COLOURS), "JPEG", quality=98, subsampling=0), COLOURS, 6),
    "RGB in WEBP": lambda: (encoded(Image.fromarray(COLOURS), "WEBP", lossless=True), COLOURS, 0),
    "RGB in BMP": lambda: (encoded(Image.fromarray(COLOURS), "BMP"), COLOURS, 0),
    "RGB in TIFF": lambda: (encoded(Image.fromarray(COLOURS), "TIFF"), COLOURS, 0),
    "RGB in AVIF": lambda: (encoded(Image.fromarray(COLOURS), "AVIF", quality=100, subsampling="4:4:4"), COLOURS, 6),
    "RGB with a transparent colour": lambda: (
        encoded(Image.fromarray(PALETTE[PALETTE_INDICES]), "PNG", transparency=tuple(PALETTE[2].tolist())),
        np.where((PALETTE_INDICES == 2)[..., None], BACKGROUND_RGB, PALETTE[PALETTE_INDICES]),
        0,
    ),
    "RGB with 16 bits": lambda: (png_16_bit(2, COLOURS), COLOURS, 1),
    "RGBA in PNG": lambda: (
        encoded(Image.fromarray(np.dstack([COLOURS, ALPHA])), "PNG"),
        composite(COLOURS, ALPHA),
        1.5,
    ),
    "RGBA in WEBP": lambda: (
        encoded(Image.fromarray(np.dstack([COLOURS, ALPHA])), "WEBP", lossless=True, exact=True),
        composite(COLOURS, ALPHA),
        1.5,
    ),
    "RGBA in TIFF": lambda: (
        encoded(Image.fromarray(np.dstack([COLOURS, ALPHA])), "TIFF"),
        composite(COLOURS, ALPHA),
        1.5,
    ),
    "RGBA with 16 bits": lambda: (png_16_bit(6, np.dstack([COLOURS, ALPHA])), composite(COLOURS, ALPHA), 1.5),
    "grey": lambda: (encoded(Image.fromarray(GREY), "PNG"), grey(GREY), 0),
    "grey in JPEG": lambda: (encoded(Image.fromarray(GREY), "JPEG", quality=98), grey(GREY), 6),
    "grey with a transparent shade": lambda: (
        encoded(Image.fromarray(PALETTE_INDICES * 80), "PNG", transparency=160),
        np.where((PALETTE_INDICES == 2)[..., None], BACKGROUND_RGB, grey(PALETTE_INDICES * 80)),
        0,
    ),
    "grey and alpha": lambda: (
        encoded(Image.fromarray(np.dstack([GREY, ALPHA]), "LA"), "PNG"),
        composite(grey(GREY), ALPHA),
        1.5,
    ),
    "grey and alpha with 16 bits": lambda: (png_16_bit(4, np.dstack([GREY, ALPHA])), composite(grey(GREY), ALPHA), 1.5),
    "grey with 16 bits in PNG": lambda: (
        encoded(Image.fromarray(ramp(0, 65535).astype(np.uint16)), "PNG"),
        grey(ramp(0, 255)),
        1,
    ),
    "grey with 16 bits in TIFF": lambda: (
        encoded(Image.fromarray(ramp(0, 65535).astype(np.uint16)), "TIFF"),
        grey(ramp(0, 255)),
        1,
    ),
    "grey with 16 bits, big-endian": lambda: (
        encoded(Image.fromarray(ramp(0, 65535).astype(">u2")), "TIFF"),
        grey(ramp(0, 255)),
        1,
    ),
    "32-bit integers": lambda: (
        encoded(Image.fromarray(ramp(0, 65535).astype(np.int32)), "TIFF"),
        grey(ramp(0, 255)),
        1,
    ),
    "floating point to 255": lambda: (
        encoded(Image.fromarray(ramp(0, 255).astype(np.float32)), "TIFF"),
        grey(ramp(0, 255)),
        1,
    ),
    "floating point to 1": lambda: (
        encoded(Image.fromarray(ramp(0, 1).astype(np.float32)), "TIFF"),
        grey(ramp(0, 255)),
        1,
    ),
    "black and white in PNG": lambda: (
        encoded(Image.fromarray(PALETTE_INDICES < 2), "PNG"),
        grey(np.where(PALETTE_INDICES < 2, 255, 0)),
        0,
    ),
    "black and white in TIFF": lambda: (
        encoded(Image.fromarray(PALETTE_INDICES < 2), "TIFF", compression="group4"),
        grey(np.where(PALETTE_INDICES < 2, 255, 0)),
        0,
    ),
    "palette in PNG": lambda: (encoded(palette_image(), "PNG"), PALETTE[PALETTE_INDICES], 0),
    "palette in GIF": lambda: (encoded(palette_image(), "GIF"), PALETTE[PALETTE_INDICES], 0),
    "palette in BMP": lambda: (encoded(palette_image(), "BMP"), PALETTE[PALETTE_INDICES], 0),
    "palette with a transparent colour in PNG": lambda: (
        encoded(palette_image(), "PNG", transparency=1),
        np.where((PALETTE_INDICES == 1)[..., None], BACKGROUND_RGB, PALETTE[PALETTE_INDICES]),
        0,
    ),
    "palette with a transparent colour in GIF": lambda: (
        encoded(palette_image(), "GIF", transparency=1),
        np.where((PALETTE_INDICES == 1)[..., None], BACKGROUND_RGB, PALETTE[PALETTE_INDICES]),
        0,
    ),
    "palette with half-transparent colours": lambda: (
        encoded(palette_image(), "PNG", transparency=bytes([255, 128, 0, 40])),
        composite(PALETTE[PALETTE_INDICES], np.array([255, 128, 0, 40])[PALETTE_INDICES]),
        1.5,
    ),
    "CMYK in TIFF": lambda: (encoded(cmyk()[0], "TIFF"), cmyk()[1], 2),
    "CMYK in JPEG": lambda: (encoded(cmyk()[0], "JPEG", quality=98, subsampling=0), cmyk()[1], 8),
    "YCbCr": lambda: (encoded(Image.fromarray(COLOURS).convert("YCbCr"), "TIFF"), COLOURS, 3),
    "LAB": lambda: (encoded(Image.fromarray(np.dstack([GREY, GREY * 0, GREY * 0]), "LAB"), "TIFF"), lightness(), 3),
    "the first frame in GIF": lambda: (
        encoded(frames("red", "lime", "blue")[0], "GIF", save_all=True, append_images=frames("lime", "blue")),
        solid(255, 0, 0),
        0,
    ),
    "the first frame in WEBP": lambda: (
        encoded(frames("red")[0], "WEBP", save_all=True, append_images=frames("lime", "blue"), lossless=True),
        solid(255, 0, 0),
        0,
    ),
    "the first frame in PNG": lambda: (
        encoded(frames("red")[0], "PNG", save_all=True, append_images=frames("lime", "blue")),
        solid(255, 0, 0),
        0,
    ),
    "the first frame in AVIF": lambda: (
        encoded(frames("red")[0], "AVIF", save_all=True, append_images=frames("lime", "blue"), quality=100),
        solid(255, 0, 0),
        6,
    ),
    "the first image in MPO": lambda: (
        encoded(frames("red")[0], "MPO", save_all=True, append_images=frames("lime", "blue")),
        solid(255, 0, 0),
        6,
    ),
    "the first page in TIFF": lambda: (
        encoded(frames("red")[0], "TIFF", save_all=True, append_images=frames("lime", "blue")),
        solid(255, 0, 0),
        0,
    ),
}


def lightness() -> np.ndarray:
    """The sRGB grey of CIE lightness 0 … 100, which LAB images store as 0 … 255."""
    level = GREY / 255 * 100
    linear = np.where(level > 8, ((level + 16) / 116) ** 3, level / 903.3)
    return grey(255 * np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear))


@for_each("case", CASES)
def test_an_image_of_any_mode_decodes_to_what_a_viewer_shows(case: str) -> None:
    data, expected, tolerance = CASES[case]()
    image = decode(data, BACKGROUND)
    assert (image.mode, image.size) == ("RGB", (WIDTH, HEIGHT))
    np.testing.assert_allclose(np.asarray(image, float), expected, atol=tolerance, rtol=0)


# EXIF orientation → the transposes from the upright image to the stored one: the inverse of what a viewer does.
TRANSPOSES: dict[int, tuple[Image.Transpose, ...]] = {
    1: (),
    2: (Image.Transpose.FLIP_LEFT_RIGHT,),
    3: (Image.Transpose.ROTATE_180,),
    4: (Image.Transpose.FLIP_TOP_BOTTOM,),
    5: (Image.Transpose.TRANSPOSE,),
    6: (Image.Transpose.ROTATE_90,),
    7: (Image.Transpose.TRANSVERSE,),
    8: (Image.Transpose.ROTATE_270,),
}


@for_each("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@for_each("orientation", TRANSPOSES)
def test_the_exif_orientation_is_applied(orientation: int, kind: str) -> None:
    stored = Image.fromarray(COLOURS)
    for transpose in TRANSPOSES[orientation]:
        stored = stored.transpose(transpose)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 98, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    image = decode(encoded(stored, kind, exif=exif, **options))
    assert (image.mode, image.size) == ("RGB", (WIDTH, HEIGHT))
    np.testing.assert_allclose(np.asarray(image, float), COLOURS.astype(float), atol=6 if kind == "JPEG" else 0, rtol=0)


@for_each("orientation", [0, 9, 65535])
def test_an_unknown_exif_orientation_is_ignored(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode(encoded(Image.fromarray(COLOURS), "PNG", exif=exif))
    np.testing.assert_array_equal(np.asarray(image), COLOURS)


def test_orientation_and_transparency_are_both_applied() -> None:
    stored = ImageOps.flip(Image.fromarray(np.dstack([COLOURS, ALPHA])))
    exif = Image.Exif()
    exif[0x0112] = 4
    image = decode(encoded(stored, "PNG", exif=exif), BACKGROUND)
    np.testing.assert_allclose(np.asarray(image, float), composite(COLOURS, ALPHA), atol=1.5, rtol=0)
