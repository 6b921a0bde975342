"""Files of a source that are neither images nor captions: what they are taken for."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from ldm.data.formats import REMEDIES, SIGNATURE_BYTES, format_of, is_image_file
from ldm.data.records import BadSample, LeftOut

SIDECARS = (".txt", ".caption")  # suffixes of caption files
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
TABLES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".xls", ".xlsx", ".ods")
# Suffixes of texts that other tools write beside an image.
TEXTS = (".text", ".cap", ".captions", ".tag", ".tags", ".prompt", ".desc", ".description", ".md", ".yaml", ".yml")
UNREAD_CAPTIONS = "caption files that are not read"  # beside an image with other captions
_TITLES = ("caption", "prompt", "metadata", "annotation", "tags", "description")


def unread_file(path: Path, key: str, stems: Collection[str] = ()) -> BadSample | LeftOut:
    """Why a file that is not read is left out, or bad; `stems` are names and stems of the images beside it."""
    suffix = path.suffix.lower()
    if suffix in SIDECARS:
        return LeftOut(key, UNREAD_CAPTIONS if path.stem in stems else "caption files without an image")
    if suffix in TABLES:
        return LeftOut(key, "tables that are not read")
    if suffix in REMEDIES and path.stem in stems:
        return LeftOut(key, "images that are read in another format")  # a raw file beside its JPEG
    if suffix in REMEDIES:
        return BadSample(key, f"images of type {suffix} aren't read here", REMEDIES[suffix])
    if name := _format_of_file(path):
        return BadSample(key, f"it is {name}, but isn't named so", "rename it, to end as such files do")
    return LeftOut(key, "other files")


def _format_of_file(path: Path) -> str:
    try:
        if path.is_symlink() or not path.is_file():  # it may lead out of the source; a pipe would be waited for
            return ""
        with path.open("rb") as file:
            return format_of(file.read(SIGNATURE_BYTES))
    except OSError:  # a file of no known suffix, which is not needed
        return ""


def may_hold_captions(name: str, images: set[str]) -> bool:
    """Whether a file looks as if it held captions in a form that is not read; `images` are the stems beside it."""
    path = Path(name)
    suffix = path.suffix.lower()
    if is_image_file(name) or suffix in REMEDIES:
        return False
    titled = any(title in path.stem.lower() for title in _TITLES)
    return titled or suffix in TABLES or (suffix in TEXTS and path.stem in images)
