"""What people bring to a page: images, checked before they are decoded; and their mistakes, shown as sentences."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import streamlit as st
import torch
from PIL import Image

from ldm.app.launch import MAX_UPLOAD_MB
from ldm.data import images, openmoji
from ldm.data.formats import formats_of
from ldm.data.records import BadSampleError
from ldm.utils.errors import UserError

MAX_PIXELS = 40_000_000
IMAGE_TYPES = ["png", "jpg", "jpeg", "webp", "gif", "bmp"]
SAMPLE_SIDE = 512


def plain(text: str) -> str:
    """Text whose characters Markdown does not interpret."""
    return re.sub(r"([\\`*_{}\[\]()#+\-.!|$:~<>])", r"\\\1", text)


def images_text(count: int) -> str:
    """A number of images, in words."""
    return "1 image" if count == 1 else f"{count:,} images"


def initial(key: str, value: Any) -> str:
    """The key of a widget that begins with a value, and has the visitor's again when its page is drawn anew."""
    st.session_state.setdefault(key, value)
    return key


@contextmanager
def sentences(stop: bool = True) -> Iterator[None]:
    """Shows a mistake in the block as a sentence, and ends the page there, or with `stop=False` the block alone."""
    try:
        yield
        return
    except UserError as error:
        st.error(plain(str(error)))
    except torch.OutOfMemoryError:
        st.error("The GPU's memory is full; take a smaller model, or close other programs.")
    if stop:
        st.stop()


def decoded(data: bytes, name: str = "image", background: str = "white") -> Image.Image:
    """An uploaded image as RGB; UserError where it is too large, damaged or no image."""
    if len(data) > MAX_UPLOAD_MB * 2**20:
        raise UserError(f"{name}: {len(data) / 2**20:.0f} MB; give {MAX_UPLOAD_MB} at most")
    try:
        with Image.open(io.BytesIO(data), formats=formats_of(data)) as header:
            width, height = header.size
    except Exception:  # what is wrong, `decode` says better
        width = height = 0
    if width * height > MAX_PIXELS:
        raise UserError(f"{name}: {width} × {height} pixels; give {MAX_PIXELS // 10**6} million at most")
    try:
        return images.decode(data, background)
    except BadSampleError as error:
        raise UserError(f"{name}: {'; '.join(error.args)}") from None


@cache
def sample() -> tuple[Image.Image, str]:
    """A picture for those who bring none, and where it is from: a drawing of OpenMoji, or generated."""
    try:
        with TemporaryDirectory() as folder:
            _, path = openmoji.draw("openmoji-thumbs", SAMPLE_SIDE, Path(folder))[0]
            return images.decode(path.read_bytes()), openmoji.ATTRIBUTION
    except (ImportError, OSError, UserError):
        gradient = Image.radial_gradient("L").resize((SAMPLE_SIDE, SAMPLE_SIDE))
        return Image.merge("RGB", (gradient, gradient.rotate(90), Image.new("L", gradient.size, 160))), "Generated."
