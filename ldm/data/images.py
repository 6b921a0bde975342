"""Picture files as tensors, and tensors as pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from ldm.data.order import Order
from ldm.data.sources import Record
from ldm.errors import UserError


def load(path: Path, size: int) -> torch.Tensor:
    """Reads a picture as `(3, size, size)` float32 in [-1, 1].

    Turned as its EXIF says, transparency on white, shorter side resized to `size` (antialiased), centre cropped.
    Raises UserError, naming the file, where it is not a readable picture.
    """
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened)
            if picture.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
                picture = Image.fromarray((np.asarray(picture) / 257).clip(0, 255).astype(np.uint8))
            if picture.mode != "RGB":
                rgba = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
            if picture.size != (size, size):
                picture = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable picture ({error}); mend or remove it") from None
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1  # (3, H, W)


def to_pil(pixels: torch.Tensor) -> list[Image.Image]:
    """Pictures of a `(N, 3, H, W)` tensor in [-1, 1]; what lies outside is clipped."""
    bytes_ = (pixels.float() / 2 + 0.5).clamp(0, 1).mul(255).round().byte()
    return [Image.fromarray(array) for array in bytes_.permute(0, 2, 3, 1).cpu().numpy()]


class Pictures(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The pictures of a run by position: item n is `{"position": n, "pixels": (3, size, size)}`."""

    def __init__(self, records: Sequence[Record], size: int, seed: int):
        self.records, self.size = records, size
        self.order = Order([record.weight for record in records], seed)

    def __getitem__(self, n: int) -> dict[str, torch.Tensor]:
        pixels = load(self.records[self.order[n]].path, self.size)
        return {"position": torch.tensor(n), "pixels": pixels}


def grid(
    pictures: Sequence[Image.Image], captions: Sequence[str], columns: int, marked: Iterable[int] = ()
) -> Image.Image:
    """A sheet of captioned pictures, those in `marked` in a frame; small pictures are enlarged to be seen."""
    side = max(128, pictures[0].width)
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
        sheet.paste(
            picture.resize((side, round(side * picture.height / picture.width)), Image.Resampling.LANCZOS), (x, y)
        )
        if i in marked:
            pen.rectangle((x - 3, y - 3, x + side + 2, y + side + 2), outline="#e8590c", width=2)
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
