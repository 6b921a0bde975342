"""The recipe that reproduces an image, saved in a text chunk of its PNG."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin, UnidentifiedImageError

from ldm.utils.atomic_files import atomic_file
from ldm.utils.errors import UserError

KEY, VERSION = "ldm", 1
REQUIRED = {"script", "model", "weights", "prompt", "label", "seed", "toward", "row", "threads", "device", "torch"}


def save(image: Image.Image, path: Path, recipe: dict[str, Any]) -> None:
    """Writes a PNG with the recipe in it, complete or not at all."""
    chunk = PngImagePlugin.PngInfo()
    chunk.add_itxt(KEY, json.dumps({"version": VERSION, **recipe}, ensure_ascii=False))
    with atomic_file(path) as tmp_path:
        image.save(tmp_path, "PNG", pnginfo=chunk)


def read(path: Path) -> dict[str, Any]:
    """The recipe of an image; UserError if it has none, or one of a later version."""
    try:
        with Image.open(path) as opened:
            text = opened.info.get(KEY)
    except FileNotFoundError:
        raise UserError(f"recipe: no file {path}") from None
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"recipe: can't read {path}: {error}") from None
    if not text:
        raise UserError(f"recipe: {path} does not say how it was made; give a PNG as these scripts write it")
    try:
        recipe = dict(json.loads(text))
        if recipe.get("version") == VERSION and (missing := REQUIRED - recipe.keys()):
            raise ValueError(missing)
    except (ValueError, TypeError):
        raise UserError(f"recipe: what {path} says of how it was made is damaged; give another PNG") from None
    if recipe.pop("version", None) != VERSION:
        raise UserError(f"recipe: {path} was written by a later version; update ldm")
    return recipe


def fingerprint(path: Path) -> str:
    """SHA-256 of a file that an image was made from."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
