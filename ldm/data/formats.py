"""Image formats: which ones are decoded, what their files are called, and what to do with those that aren't.

HEIC and JPEG XL are decoded where their Pillow plugins are installed (the extra `formats`).
"""

from __future__ import annotations

import contextlib
import importlib
import re
from pathlib import Path

from PIL import Image

Image.init()
with contextlib.suppress(ImportError):
    importlib.import_module("pillow_heif").register_heif_opener()
with contextlib.suppress(ImportError):
    importlib.import_module("pillow_jxl")  # registers itself

# What is decoded, whatever a file is called. For others, such as PostScript, Pillow would start external programs.
FORMATS = tuple(
    name
    for name in (
        "JPEG",
        "PNG",
        "WEBP",
        "GIF",
        "BMP",
        "TIFF",
        "AVIF",
        "JPEG2000",
        "PPM",
        "QOI",
        "SGI",
        "PCX",
        "DDS",
        "ICO",
        "HEIF",
        "JXL",
    )
    if name in Image.OPEN  # builds of Pillow differ
)
_TGA_END = b"TRUEVISION-XFILE.\0"  # TGA has no mark at its beginning, and its older version none at all
# DIB is BMP without its file header. It begins with the size of the next one, which alone is no mark either.
_DIB_HEADERS = tuple(size.to_bytes(4, "little") for size in (12, 40, 52, 56, 64, 108, 124))
_REGISTERED = Image.registered_extensions()
# Suffixes whose files are opened. MPO is what some cameras and phones write as JPEG.
IMAGE_SUFFIXES = frozenset(
    {suffix for suffix, name in _REGISTERED.items() if name in (*FORMATS, "TGA", "MPO", "DIB")}
    | {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}
)

_CONVERT = "convert it to PNG"
_HEIF = "pip install pillow-heif, or convert it to JPEG"
_JXL = "pip install pillow-jxl-plugin, or convert it to PNG"
_DEVELOP = "develop it, as TIFF or JPEG"
_RAW = (
    ".3fr",
    ".arw",
    ".cr2",
    ".cr3",
    ".crw",
    ".dcr",
    ".dng",
    ".erf",
    ".iiq",
    ".kdc",
    ".mef",
    ".mos",
    ".mrw",
    ".nef",
    ".nrw",
    ".orf",
    ".pef",
    ".raf",
    ".raw",
    ".rw2",
    ".rwl",
    ".sr2",
    ".srf",
    ".srw",
    ".x3f",
)
# Suffixes of images that aren't opened → what to do.
REMEDIES = {
    **{suffix: _CONVERT for suffix, name in _REGISTERED.items() if name not in ("PDF", "MPEG", "HDF5", "GRIB", "BUFR")},
    **dict.fromkeys((".heic", ".heics", ".heif", ".heifs", ".hif"), _HEIF),
    ".jxl": _JXL,
    **dict.fromkeys(_RAW, _DEVELOP),
    **dict.fromkeys((".svg", ".svgz", ".xcf", ".kra", ".exr", ".hdr"), _CONVERT),
}
REMEDIES = {suffix: remedy for suffix, remedy in REMEDIES.items() if suffix not in IMAGE_SUFFIXES}

# How files of common formats begin, and which these are.
_SIGNATURES = (
    (re.compile(rb"\xff\xd8\xff"), "JPEG"),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "PNG"),
    (re.compile(rb"GIF8[79]a"), "GIF"),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), "WEBP"),
    (re.compile(rb"(II\*\0|MM\0\*)"), "TIFF"),
    (re.compile(rb"BM....\0\0\0\0", re.DOTALL), "BMP"),
    (re.compile(rb"....ftyp(hei[cxms]|hev[cx]|mif1|msf1)", re.DOTALL), "HEIF"),
    (re.compile(rb"....ftypavi[fs]", re.DOTALL), "AVIF"),
    (re.compile(rb"(\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n)"), "JXL"),
    (re.compile(rb"\0\0\0\x0cjP  \r\n\x87\n"), "JPEG2000"),
)
SIGNATURE_BYTES = 16
_PLUGINS = {"HEIF": _HEIF, "JXL": _JXL, "AVIF": "pip install --upgrade pillow, or convert it to PNG"}


def is_image_file(name: str) -> bool:
    """Whether a file of this name is opened."""
    return Path(name).suffix.lower() in IMAGE_SUFFIXES


def formats_of(data: bytes) -> tuple[str, ...]:
    """The formats that an encoded image may have."""
    if data.startswith(_DIB_HEADERS):
        return (*FORMATS, "DIB")
    return (*FORMATS, "TGA") if data.endswith(_TGA_END) and "TGA" in Image.OPEN else FORMATS


def format_of(start: bytes) -> str:
    """The format of the file that begins so, where it is a common one; else empty."""
    return next((name for signature, name in _SIGNATURES if signature.match(start)), "")


def unread_format(data: bytes) -> tuple[str, str]:
    """Reason and remedy for data that no decoder knows."""
    name = format_of(data[:SIGNATURE_BYTES])
    if name in _PLUGINS and name not in FORMATS:
        return f"it is {name}, which this Pillow does not read", _PLUGINS[name]
    if name in FORMATS:
        return f"its pixels can't be decoded (it begins as {name} does)", "fetch it anew, or remove it"
    return f"it is none of {', '.join(FORMATS)}", "convert or remove it"
