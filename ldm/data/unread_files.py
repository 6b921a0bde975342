"""Files of a source that are neither images nor captions: what they are taken for."""

from __future__ import annotations

from pathlib import Path

from ldm.data.records import BadSample, LeftOut

SIDECARS = (".txt", ".caption")
TABLES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".xls", ".xlsx", ".ods")
# Suffixes of texts that other tools write beside an image.
TEXTS = (".text", ".cap", ".captions", ".tag", ".tags", ".prompt", ".desc", ".description", ".md", ".yaml", ".yml")
_TITLES = ("caption", "prompt", "metadata", "annotation", "tags", "description")


def unread_file(path: Path, key: str) -> BadSample | LeftOut:
    """Why a file that is not read is left out, or bad."""
    suffix = path.suffix.lower()
    if suffix in SIDECARS:
        return LeftOut(key, "caption files without an image")
    if suffix in TABLES:
        return LeftOut(key, "tables that are not read")
    return LeftOut(key, "other files")


def may_hold_captions(name: str, images: set[str]) -> bool:
    """Whether a file looks as if it held captions in a form that is not read; `images` are the stems beside it."""
    path = Path(name)
    suffix = path.suffix.lower()
    if suffix in SIDECARS:
        return any(title in path.stem.lower() for title in _TITLES)
    return suffix in TABLES or (suffix in TEXTS and path.stem in images)
