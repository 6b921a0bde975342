"""Picture files as tensors, and tensors as pictures.

A picture is decoded (turned as its EXIF says, any mode made RGB), then the part that is kept is resized to the size of
its bucket in one antialiased step.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from ldm.data.records import BadSampleError

warnings.filterwarnings("ignore", module=r"PIL\.")  # of large pictures and odd EXIF, which are read all the same

Size = tuple[int, int]  # width, height
# What is decoded, whatever a file is called: for others, PostScript for one, Pillow starts programs.
Image.init()
FORMATS = tuple(
    name
    for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
    if name in Image.OPEN  # some builds of Pillow lack some
)


def decode(data: bytes, background: str = "white", min_side: int = 1) -> Image.Image:
    """An encoded picture as RGB: its first frame, turned as its EXIF says, transparency over `background`.

    Raises BadSampleError where it is empty, cut off, no picture, incredibly large, or smaller than `min_side` pixels.
    """
    if not data:
        raise BadSampleError("the file is empty", "fetch it anew, or remove it")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            opened.load()
            picture = _rgb(ImageOps.exif_transpose(opened), background)
    except Image.DecompressionBombError as error:
        raise BadSampleError(str(error).rstrip("."), "make it smaller") from None
    except UnidentifiedImageError:
        raise BadSampleError(f"it is none of {', '.join(FORMATS)}", "convert or remove it") from None
    except Exception as error:  # decoders of damaged files raise whatever they stumble over
        raise BadSampleError(
            f"it can't be decoded ({' '.join(str(error).split())})", "fetch it anew, or remove it"
        ) from None
    if min(picture.size) < min_side:
        raise BadSampleError(
            f"it is {picture.width} × {picture.height} px, and data.min_side is {min_side}", "use a larger one"
        )
    return picture


def _rgb(picture: Image.Image, background: str) -> Image.Image:
    if picture.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
        values = np.asarray(picture)
        scale = 1 if picture.mode == "I" and values.max() <= 255 else 257  # 32-bit files of 8-bit values are common
        picture = Image.fromarray((values / scale).clip(0, 255).astype(np.uint8))
    elif picture.mode == "F":
        values = np.nan_to_num(np.asarray(picture))
        values = values * 255 if values.max() <= 1 else values  # white is 1, where nothing is more
        picture = Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        return picture.convert("RGB")
    rgba = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, ImageColor.getrgb(background)), rgba).convert("RGB")


# ---------------------------------------------------------------------------------------------------- buckets


def to_tensor(picture: Image.Image) -> torch.Tensor:
    """`(3, H, W)` float32 in [-1, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1


def to_pil(pixels: torch.Tensor) -> list[Image.Image]:
    """Pictures of a `(N, 3, H, W)` tensor in [-1, 1]; what lies outside is clipped."""
    bytes_ = (pixels.float() / 2 + 0.5).clamp(0, 1).mul(255).round().byte()
    return [Image.fromarray(array) for array in bytes_.permute(0, 2, 3, 1).cpu().numpy()]


def grid(
    pictures: Sequence[Image.Image], captions: Sequence[str], columns: int, marked: Iterable[int] = ()
) -> Image.Image:
    """A sheet of captioned pictures, those in `marked` in a frame; small pictures are enlarged to be seen."""
    side = max(128, *(max(picture.size) for picture in pictures))
    pad, line = 12, 15
    font = ImageFont.load_default(12)
    lines = [_wrap(caption, side, font) for caption in captions]
    height = side + pad + 6 + line * max(map(len, lines))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (side + pad) + pad, rows * height + pad), "white")
    pen = ImageDraw.Draw(sheet)
    marked = set(marked)
    for i, picture in enumerate(pictures):
        x, y = pad + i % columns * (side + pad), pad + i // columns * height
        shown = ImageOps.contain(picture, (side, side), Image.Resampling.LANCZOS)
        left, top = x + (side - shown.width) // 2, y + side - shown.height
        sheet.paste(shown, (left, top))
        if i in marked:
            right, bottom = left + shown.width, top + shown.height
            pen.rectangle((left - 3, top - 3, right + 2, bottom + 2), outline="#e8590c", width=2)
        for j, text in enumerate(lines[i]):
            pen.text((x + side / 2, y + side + 6 + j * line), text, fill="#333", font=font, anchor="ma")
    return sheet


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
