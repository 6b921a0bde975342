"""Masks of the loss: which part of an image is learned. White is learned, black is not, grey partly."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops

from ldm.config.schema import SourceConfig
from ldm.data.folder_tree import FolderTree
from ldm.data.formats import is_image_file
from ldm.data.images import MASK_REASON, Size, decode, decode_alpha, rotation
from ldm.data.records import NO_MASK, BadSample, BadSampleError, ImageLocation, LeftOut, Record, Records, one_line
from ldm.utils.errors import UserError

FOLDERS = ("metadata", "sidecars", "classes", "images")  # kinds of sources: those that are a folder of images
ALPHA = "alpha"  # what `data.source.mask` calls the images' own alpha channel


def mask_folder(source: SourceConfig, kind: str) -> Path | None:
    """The folder that `data.source.mask` names for a source of this kind; None for the alpha channel or no masks.

    None too for a column: a source with columns has its masks in one, whatever folders there are. A folder of masks of
    images with a metadata file is therefore a path with a slash: `./masks`.
    """
    if source.mask in ("", ALPHA) or kind not in FOLDERS or (kind == "metadata" and "/" not in source.mask):
        return None
    folder = Path(source.mask)
    return folder if folder.is_dir() else None


def check_apart(key: str, masks: Path, images: Path) -> None:
    """UserError where the folder of masks holds the images too; `key` is the one that names it."""
    if images.resolve().is_relative_to(masks.resolve()):
        raise UserError(f"{key}: {masks} holds the images too; put the masks into a folder of their own")


class MaskFolder:
    """The mask files of a folder, by the images' relative names: the mask of `a/b.jpg` is `a/b.jpg` or `a/b.png`.

    Any suffix of an image will do. A name that fits exactly comes before one that fits in another case, or with its
    accents written otherwise.
    """

    def __init__(self, path: Path):
        self.tree = FolderTree(path)
        self.left_out: list[LeftOut] = []
        self.by_stem: dict[str, list[str]] = {}
        self.unused = dict[str, None]()
        for directory in self.tree.walk():
            self.left_out += [LeftOut(f"{path.name}/{file.key}", file.reason) for file in directory.left_out]
            for name in directory.names:
                key = self.tree.key(directory.path / name)
                if is_image_file(name):
                    self.by_stem.setdefault(_folded(key), []).append(key)
                    self.unused[key] = None
                else:
                    self.left_out.append(LeftOut(f"{path.name}/{key}", "other files in the folder of masks"))

    def masked(self, records: Records) -> Records:
        """The records with their masks; at the end, what of the folder is no mask of an image."""
        for record in records:
            try:
                location = self.location(record.key)
            except BadSampleError as error:
                yield BadSample(record.key, *error.args) if isinstance(record, Record) else record
                continue
            yield replace(record, mask=location) if isinstance(record, Record) else record
        yield from self.left_out
        yield from (LeftOut(f"{self.tree.path.name}/{key}", "masks without an image") for key in self.unused)

    def location(self, image: str) -> ImageLocation:
        """Where the mask of an image is, NO_MASK where it has none; BadSampleError where several fit."""
        candidates = self.by_stem.get(_folded(image), [])
        for fits in (lambda key: one_line(key) == image, lambda key: _stem(one_line(key)) == _stem(image)):
            candidates = [key for key in candidates if fits(key)] or candidates
        for key in candidates:
            self.unused.pop(key, None)
        if not candidates:
            return NO_MASK
        if len(candidates) > 1:
            raise BadSampleError(f"it has several masks: {', '.join(candidates)}", "keep one of them")
        path = self.tree.file(candidates[0])
        if isinstance(path, str):
            raise BadSampleError(f"its mask {candidates[0]}: {path}", f"copy it into {self.tree.path}")
        return ImageLocation(str(path))


def _stem(key: str) -> str:
    return key.removesuffix(Path(key).suffix)


def _folded(key: str) -> str:
    return unicodedata.normalize("NFC", one_line(_stem(key))).lower()


def load_mask(record: Record, size: Size, read: Callable[[ImageLocation], bytes]) -> tuple[Image.Image, bytes] | None:
    """An image's mask, 8-bit grey of the image's `size`, and the SHA-256 of what it was read from; None without one.

    `size` is that of the image after rotation by its EXIF, which rotates its alpha channel too. A mask file is made of
    the image as it is shown; one that only fits the image as it is stored is rotated along. Of a mask file the
    brightest channel counts, and what is transparent is black. Raises BadSampleError where it can't be decoded, is of
    another size, black, or has only values of 0 and 1.
    """
    location = record.mask
    if location is None or location == NO_MASK:
        return None
    content = read(location)
    if location == record.location:
        name, mask, digest = "alpha channel", decode_alpha(content), hashlib.sha256(b"alpha" + content).digest()
        if mask is None:
            return None
    else:
        name, digest = "mask", hashlib.sha256(content).digest()
        try:
            red, green, blue = decode(content, "black").split()
        except BadSampleError as error:
            reason, fix = error.args
            raise BadSampleError(MASK_REASON + reason, fix) from None
        mask = ImageChops.lighter(ImageChops.lighter(red, green), blue)
        if mask.size != size and (method := rotation(read(record.location))) is not None:
            rotated = mask.transpose(method)
            mask = rotated if rotated.size == size else mask
        if mask.size != size:
            sizes = f"{mask.width} × {mask.height} px and the image {size[0]} × {size[1]} px"
            raise BadSampleError(f"its mask is {sizes}", "bring both to the same size")
    brightest = np.asarray(mask).max()
    if brightest == 0:
        raise BadSampleError(f"its {name} is black, so nothing of it is learned", "paint what to learn, or remove it")
    if brightest == 1:
        raise BadSampleError(f"the values of its {name} are 0 and 1 of 255, all black", "multiply them by 255")
    return mask, digest


def latent_mask(mask: Image.Image, factor: int) -> torch.Tensor:
    """A cropped mask at the size of the latents, `(1, H / factor, W / factor)` in [0, 1]: the mean over each area."""
    return F.avg_pool2d(torch.from_numpy(np.array(mask)).float()[None] / 255, factor)
