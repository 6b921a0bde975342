"""Every way people keep captioned pictures, as one list of records.

A folder holds pictures and, beside them, either one `metadata.jsonl` (`{"file_name": "a.png", "text": "a red heart"}` a
line; `text` may be a list of captions) or a caption file for each picture (`a.png` + `a.txt`).
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ldm.data import openmoji
from ldm.errors import UserError

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}


@dataclass(frozen=True)
class Record:
    """One captioned picture.

    `split` is `train`, `reconstruction` (stage one never sees it) or `combination` (neither stage sees it: its
    caption joins parts that training only shows apart). `weight` is how often it is drawn beside a plain picture's 1.
    `attributes` is what a source knows of the picture besides its caption: OpenMoji's people have `role` and `tone`.
    """

    key: str
    path: Path
    captions: tuple[str, ...]
    split: str = "train"
    weight: float = 1.0
    attributes: Mapping[str, str] = field(default_factory=dict)


def check(source: str) -> None:
    """UserError where a source is neither a folder nor one of the built-in sets."""
    if source not in openmoji.SUBSETS and not Path(source).is_dir():
        close = difflib.get_close_matches(source, openmoji.SUBSETS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"give a folder or one of {', '.join(openmoji.SUBSETS)}"
        raise UserError(f"data.source: {source!r} is neither a folder nor a built-in set; {hint}")


def read(source: str, size: int, cache: Path) -> list[Record]:
    """Reads a source, `openmoji-demo`, `openmoji-all` or a folder, into records ordered by key.

    `size` (pixels) and `cache` (a folder that this may fill) are for sources that are drawn rather than read.
    Raises UserError, naming source and remedy, where nothing can be read.
    """
    if source in openmoji.SUBSETS:
        drawings = openmoji.draw(source, size, cache / f"{source}-{size}px")
        return [
            Record(d.code, path, d.captions, d.split, d.weight, {"role": d.role, "tone": d.tone} if d.role else {})
            for d, path in drawings
        ]
    check(source)
    folder = Path(source)
    records = _from_metadata(folder) if (folder / "metadata.jsonl").exists() else _from_sidecars(folder)
    if not records:
        raise UserError(
            f"data.source: no captioned picture in {folder}; put a metadata.jsonl there, or a .txt beside each picture"
        )
    return sorted(records, key=lambda record: record.key)


def fingerprint(records: Sequence[Record]) -> str:
    """SHA-256 of which pictures with which captions there are, by name: a run is only continued on the same ones."""
    lines = [[record.key, record.captions, record.weight] for record in records]
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def _from_metadata(folder: Path) -> list[Record]:
    records = []
    where = folder / "metadata.jsonl"
    for number, line in enumerate(_text(where).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, text = row["file_name"], row["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f'{where} line {number}: {error!r}; expected {{"file_name": "a.png", "text": "…"}}'
            ) from None
        captions = [text] if isinstance(text, str) else text
        if (
            not isinstance(captions, list)
            or not all(isinstance(c, str) and c.strip() for c in captions)
            or not captions
        ):
            raise UserError(f"{where} line {number}: text {text!r}; give a caption, or a list of captions")
        path = (folder / name).resolve()
        if not path.is_relative_to(folder.resolve()) or not path.is_file():
            raise UserError(f"{where} line {number}: file_name {name!r} is not a file inside {folder}")
        records.append(Record(name, path, tuple(captions)))
    return records


def _from_sidecars(folder: Path) -> list[Record]:
    pictures = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in PICTURES)
    captioned = [path for path in pictures if path.with_suffix(".txt").exists()]
    return [Record(str(path.relative_to(folder)), path, (_caption(path.with_suffix(".txt")),)) for path in captioned]


def _caption(path: Path) -> str:
    caption = _text(path).strip()
    if not caption:
        raise UserError(f"{path}: an empty caption; write what the picture shows")
    return caption


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
