"""Captions of a folder's images in `.txt` files beside them, read and written: no widgets here."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ldm.config.schema import SourceConfig
from ldm.data import openmoji
from ldm.data.folder_tree import FolderTree
from ldm.data.folders import CaptionFiles
from ldm.data.formats import is_image_file
from ldm.data.source_kinds import detect
from ldm.utils.atomic_files import atomic_file
from ldm.utils.errors import UserError

COPY = ".bak"  # appended to the name of a caption file before it is changed for the first time
ELSEWHERE = {
    "metadata": "The captions are in the folder's metadata file; edit that. A `.txt` would not be read.",
    "classes": "The captions are the folders' names; rename these, or put a `.txt` beside each image.",
}
"""Why captions of a kind of source aren't edited here."""
NO_FOLDER = "Captions are edited here where images lie in a folder, with a `.txt` beside each or without captions."


@dataclass(frozen=True)
class Row:
    """An image, and the file with its caption, which may not exist yet."""

    key: str
    image: Path
    file: Path
    shared: bool
    """Whether another image has the same caption file."""

    def caption(self) -> str:
        """The caption as it is stored; UserError where it can't be read."""
        try:
            return self.file.read_text("utf-8-sig").strip() if self.file.exists() else ""
        except (OSError, ValueError) as error:
            raise UserError(f"{self.file.name}: it can't be read ({error}); save it as UTF-8") from None


def why_not(source: str) -> str:
    """Why the captions of a source can't be edited; empty where they can. UserError where it is no source."""
    if not Path(source).is_dir():
        return NO_FOLDER
    kind = detect(SourceConfig(path=source), conditions=())
    return "" if kind in ("sidecars", "images") else ELSEWHERE.get(kind, NO_FOLDER)


def rows(folder: Path) -> list[Row]:
    """The images of a folder and its sub-folders, in order, without those that a link takes from elsewhere."""
    tree, found = FolderTree(folder), list[Row]()
    for directory in tree.walk():
        by_image = CaptionFiles(directory.names).by_image
        images = [name for name in directory.names if is_image_file(name)]
        stems, files = Counter(Path(name).stem for name in images), Counter(by_image.values())
        for name in images:
            stem = Path(name).stem
            file = by_image.get(name) or (f"{stem}.txt" if stems[stem] == 1 else f"{name}.txt")
            keys = [tree.key(directory.path / each) for each in (name, file)]
            image, text = (tree.file(key) for key in keys)
            if isinstance(image, Path) and (isinstance(text, Path) or name not in by_image):
                path = text if isinstance(text, Path) else directory.path / file
                found.append(Row(keys[0], image, path, shared=files[file] > 1))
    return found


def uncaptioned(source: str) -> tuple[list[int], int]:
    """The numbers of those images of `rows` that have no caption, and of how many; none where none are edited here."""
    if source in openmoji.SUBSETS or why_not(source):
        return [], 0
    images = rows(Path(source))
    return [number for number, row in enumerate(images) if not row.file.exists() or _is_blank(row.file)], len(images)


def _is_blank(file: Path) -> bool:
    try:
        return not file.read_bytes().strip()
    except OSError:  # the check names it
        return False


def normalized(text: str) -> str:
    """The text without needless white space; lines stay, as `data.source.lines` makes each a caption."""
    return "\n".join(" ".join(line.split()) for line in text.splitlines() if line.strip())


def save(row: Row, seen: str, caption: str) -> bool:
    """Writes a caption; whether an earlier one was copied. UserError where it is not what the visitor has `seen`.

    The copy is made once, so it holds what was there before the app changed anything.
    """
    if row.caption() != seen:
        raise UserError(f"{row.key}: its caption was changed elsewhere meanwhile; reload the page")
    if not (caption := normalized(caption)):
        raise UserError(f"{row.key}: its caption is empty; write what the image shows")
    copy = row.file.with_name(row.file.name + COPY)
    copied = row.file.exists() and not copy.exists()
    if copied:
        with atomic_file(copy) as tmp_path:
            tmp_path.write_bytes(row.file.read_bytes())
    with atomic_file(row.file) as tmp_path:
        tmp_path.write_text(caption + "\n", "utf-8")
    return copied
