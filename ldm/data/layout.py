"""What the names of files and folders say: the split an image belongs to, and kohya's repeats."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ldm.data.folder_tree import FolderTree, unreadable_folder
from ldm.data.formats import is_image_file
from ldm.utils.errors import UserError

# Names of splits, as the library datasets knows them.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_CANONICAL = {name: split for split, names in SPLITS.items() for name in names}
_WORD = re.compile(rf"(?:^|[^a-z])({'|'.join(sorted(_CANONICAL, key=len, reverse=True))})(?=[^a-z]|$)")
_REPEATED = re.compile(r"([1-9][0-9]{0,2})_(.*\S.*)", re.DOTALL)  # more digits are years, dates or numbers


class FolderLayout(NamedTuple):
    """How the sub-folders of a source are read."""

    other_splits: frozenset[str] = frozenset()
    """First-level folders that are left out: those of other splits than the chosen one."""
    depth: int = 0
    """1 where the first level of folders only names splits."""
    repeated: bool = False
    """Every sub-folder with images is named as kohya does: `10_sks dog` is repeated ten times, captioned "sks dog"."""

    def label(self, key: str) -> str:
        """The class of an image: its first folder, splits and repeats aside; empty where it is in none."""
        folders = Path(key).parts[self.depth : -1]
        return self.repeated_caption(key) or (folders[0] if folders else "")

    def repeated_caption(self, key: str) -> str:
        """What one of kohya's folders says of its images, without the repeats; empty elsewhere."""
        match = self.repeated_folder(key)
        return " ".join(match[2].replace("_", " ").split()) if match else ""

    def repeats(self, key: str) -> int:
        match = self.repeated_folder(key)
        return int(match[1]) if match else 1

    def repeated_folder(self, key: str) -> re.Match[str] | None:
        """The folder `10_sks dog` of an image, as groups of number and words."""
        return _repeated_folder(Path(key).parts[self.depth : -1]) if self.repeated else None


def folder_layout(folder: Path, split: str, captions: bool = True, masks: Path | None = None) -> FolderLayout:
    """The layout of a folder; UserError where its folders name splits and none is `split`.

    A single split is taken for one only where captions are needed: a class named `train` does no harm. The folder
    `masks` is none of its own.
    """
    mask_folder = masks and masks.resolve()
    try:
        with os.scandir(folder) as entries:
            is_folder = {entry.name: _is_dir(entry) for entry in entries if not entry.name.startswith(".")}
    except OSError as error:
        raise unreadable_folder(error) from None
    loose = any(map(is_image_file, is_folder))
    names = sorted(name for name in is_folder if is_folder[name] and name != "__MACOSX")
    names = [name for name in names if not mask_folder or (folder / name).resolve() != mask_folder]
    named = [name for name in names if name.lower() in _CANONICAL]
    others = [name for name in names if name not in named]
    if loose or not named or any(_has_images(folder / name) for name in others):
        return FolderLayout(repeated=_is_repeated(folder, 0, masks))
    several = len({_CANONICAL[name.lower()] for name in named}) > 1
    if not several and not captions and split == "train":
        return FolderLayout(repeated=_is_repeated(folder, 0, masks))
    chosen = choose_split(named, split, str(folder))
    return FolderLayout(frozenset(named) - frozenset(chosen), 1, _is_repeated(folder, 1, masks))


def choose_split(names: Sequence[str], split: str, source: str) -> list[str]:
    """The names of files or folders that belong to `split`; beside others, those that name no split are of `train`.

    All of them where they belong to one split and `split` is the default; UserError where none belongs to it.
    """
    splits = [split_of(name) for name in names]
    available = {name or "train" for name in splits} if any(splits) else set()
    requested = _CANONICAL.get(split, split)
    if len(available) <= 1 and requested == "train":
        return list(names)
    chosen = [
        name for name, value in zip(names, splits, strict=True) if any(splits) and (value or "train") == requested
    ]
    if not chosen:
        hint = f"but {', '.join(sorted(available))}; name one of them"
        if not available:
            hint = "and nothing there is named after a split; leave it out"
        raise UserError(f"data.source.split: {source} has no {split!r}, {hint}")
    return chosen


def split_of(name: str) -> str:
    """The split that a file, or else its folder, is named after: `train`, `validation`, `test`, or empty."""
    *_, folder, file = ("", *name.lower().rstrip("/").split("/"))
    match = _WORD.search(file)
    return _CANONICAL[match[1]] if match else _CANONICAL.get(folder, "")


def _repeated_folder(folders: Sequence[str]) -> re.Match[str] | None:
    return next((match for name in folders if (match := _REPEATED.fullmatch(name))), None)


def _is_repeated(folder: Path, depth: int, masks: Path | None) -> bool:
    """Whether every sub-folder with images is one of kohya's."""
    matched = False
    for directory in FolderTree(folder, masks=masks).walk():
        folders = directory.path.relative_to(folder).parts[depth:]
        if folders and any(map(is_image_file, directory.names)):
            if not _repeated_folder(folders):
                return False
            matched = True
    return matched


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links
        return False


def _has_images(folder: Path) -> bool:
    return any(is_image_file(name) for directory in FolderTree(folder).walk() for name in directory.names)
