"""Image files to tensors, and tensors to images."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageColor, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from ldm.data.formats import formats_of, unread_format
from ldm.data.image_metadata import without_metadata
from ldm.data.records import BadSampleError

warnings.filterwarnings("ignore", module=r"PIL\.")  # of large images and odd EXIF, which are read anyway

T = TypeVar("T")
Size = tuple[int, int]  # width, height
MASK_REASON = "its mask can't be used: "  # before the reason why a mask can't be decoded
ROTATIONS = {  # EXIF's orientations
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(data: bytes, background: str = "white", min_side: int = 1) -> Image.Image:
    """An encoded image as RGB: its first frame, rotated by its EXIF, transparency over `background`.

    Raises BadSampleError where it is empty, truncated, no image, a decompression bomb, or smaller than `min_side`
    pixels.
    """
    image = _decode(data, lambda opened: _rgb(_rotated(opened), background))
    if min(image.size) < min_side:
        reason = f"it is {image.width} × {image.height} px, and data.min_side is {min_side}"
        raise BadSampleError(reason, "use a larger one")
    return image


def decode_alpha(data: bytes) -> Image.Image | None:
    """The alpha channel of an encoded image, 8 bits, rotated by its EXIF; None without one. Raises as `decode` does."""
    return _decode(data, lambda opened: _alpha(_rotated(opened)))


def rotation(data: bytes) -> Image.Transpose | None:
    """How an encoded image's EXIF turns or mirrors it, if it does."""
    return _decode(data, _rotation)


def may_be_read_now(reason: str) -> bool:
    """Whether an image that was bad for this reason may be good with the decoders of today, which are others."""
    reason = reason.partition(MASK_REASON)[2] or reason
    unknown = reason.startswith("it is none of ") and reason != unread_format(b"")[0]
    return unknown or reason.startswith(("it can't be decoded", "it is HEIF, ", "it is JXL, ", "it is AVIF, "))


def _decode(data: bytes, convert: Callable[[Image.Image], T]) -> T:
    """What `convert` makes of the loaded image; where its metadata can't be read, of its pixels alone."""
    if not data:
        raise BadSampleError("the file is empty", "fetch it anew, or remove it")
    try:
        return _load(data, convert)
    except BadSampleError:
        return _load_without_metadata(data, convert)


def _load(data: bytes, convert: Callable[[Image.Image], T]) -> T:
    try:
        with Image.open(io.BytesIO(data), formats=formats_of(data)) as opened:
            opened.load()
            return convert(opened)
    except Image.DecompressionBombError as error:
        raise BadSampleError(str(error).rstrip("."), "make it smaller") from None
    except UnidentifiedImageError:
        raise BadSampleError(*unread_format(data)) from None
    except Exception as error:  # damaged files make decoders raise anything
        reason = f"its pixels can't be decoded ({' '.join(str(error).split())})"
        raise BadSampleError(reason, "fetch it anew, or remove it") from None


def _load_without_metadata(data: bytes, convert: Callable[[Image.Image], T]) -> T:
    """`_load` of the pixels alone, for a file whose texts, profiles or EXIF can't be read.

    EXIF, which has the rotation, is dropped last.
    """
    for exif in (True, False):
        with contextlib.suppress(BadSampleError):
            return _load(without_metadata(data, exif), convert)
    return _load(data, convert)  # raises what is wrong with the file as it is


def _rotated(image: Image.Image) -> Image.Image:
    """The image as its EXIF says, where that can be read."""
    method = _rotation(image)
    return image if method is None else image.transpose(method)


def _rotation(image: Image.Image) -> Image.Transpose | None:
    try:
        return ROTATIONS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # EXIF of odd types makes its parsers raise anything
        return None


def _alpha(image: Image.Image) -> Image.Image | None:
    return image.convert("RGBA").getchannel("A") if image.has_transparency_data else None


def _rgb(image: Image.Image, background: str) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
        values = np.asarray(image)
        scale = 1 if image.mode == "I" and values.max() <= 255 else 257  # 32-bit files of 8-bit values are common
        image = Image.fromarray((values / scale).clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        values = np.nan_to_num(np.asarray(image))
        values = values * 255 if values.max() <= 1 else values  # [0, 1], or already [0, 255]
        image = Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, ImageColor.getrgb(background)), rgba).convert("RGB")


def to_tensor(image: Image.Image) -> torch.Tensor:
    """`(3, H, W)` float32 in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def to_pil(pixels: torch.Tensor) -> list[Image.Image]:
    """The images of a `(N, 3, H, W)` tensor in [-1, 1]; values outside are clipped."""
    bytes_ = (pixels.float() / 2 + 0.5).clamp(0, 1).mul(255).round().byte()
    return [Image.fromarray(array) for array in bytes_.permute(0, 2, 3, 1).cpu().numpy()]


FRAME = "#e8590c"  # the colour around marked images


def grid(
    images: Sequence[Image.Image], captions: Sequence[str], columns: int, marked: Iterable[int] = ()
) -> Image.Image:
    """A grid of captioned images, those whose numbers are in `marked` framed; small images are enlarged.

    It has as many `columns`, or fewer where there are fewer images.
    """
    columns = min(columns, len(images))
    side = max(128, *(max(image.size) for image in images))
    pad, line = 12, 15
    font = ImageFont.load_default(12)
    lines = [_wrap(caption, side, font) for caption in captions]
    height = side + pad + 6 + line * max(map(len, lines))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (side + pad) + pad, rows * height + pad), "white")
    draw = ImageDraw.Draw(sheet)
    marked = set(marked)
    for i, image in enumerate(images):
        x, y = pad + i % columns * (side + pad), pad + i // columns * height
        thumbnail = ImageOps.contain(image, (side, side), Image.Resampling.LANCZOS)
        left, top = x + (side - thumbnail.width) // 2, y + side - thumbnail.height
        sheet.paste(thumbnail, (left, top))
        if i in marked:
            right, bottom = left + thumbnail.width, top + thumbnail.height
            draw.rectangle((left - 3, top - 3, right + 2, bottom + 2), outline=FRAME, width=2)
        for j, text in enumerate(lines[i]):
            draw.text((x + side / 2, y + side + 6 + j * line), text, fill="#333", font=font, anchor="ma")
    return sheet


def has_frames(sheet: Image.Image) -> bool:
    """Whether a `grid` has a marked image: its frame's longer side has at least 128 pixels in a line."""
    framed = (np.asarray(sheet.convert("RGB")) == ImageColor.getrgb(FRAME)).all(2)
    return bool(max(framed.sum(0).max(), framed.sum(1).max()) >= 128)


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
