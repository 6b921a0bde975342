"""The directories of a folder, and which of its files may be read.

Links to folders are followed once, wherever they lead. A link to a file has to stay inside, except in a snapshot of the
Hub's cache, whose files are links into `blobs`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ldm.data.formats import is_image_file
from ldm.data.records import LeftOut
from ldm.data.unread_files import METADATA, SIDECARS
from ldm.utils.errors import UserError


class Directory(NamedTuple):
    """A directory, the names of its files, sorted, and what is left out of it."""

    path: Path
    names: list[str]
    left_out: list[LeftOut]


class FolderTree:
    """A folder with its sub-folders, without those first-level ones that are `other_splits`, and without `masks`."""

    def __init__(self, path: Path, other_splits: frozenset[str] = frozenset(), masks: Path | None = None):
        self.path, self.other_splits = path, other_splits
        self.masks = masks and masks.resolve()
        self._roots = [path.resolve()]  # and the targets of the links that were followed
        snapshots = next((parent for parent in self._roots[0].parents if parent.name == "snapshots"), None)
        self._blobs = [snapshots.parent / "blobs"] if snapshots else []

    def walk(self) -> Iterator[Directory]:
        """Each directory, in order, without hidden files and folders."""
        for directory, directories, names in os.walk(self.path, onerror=_raise_unreadable, followlinks=True):
            path, left_out, entered = Path(directory), list[LeftOut](), list[str]()
            names += [name for name in directories if is_image_file(name)]  # named as bad: no files
            hub_cache = {"blobs", "snapshots"} <= set(directories)
            for name in sorted(directories):
                if name.startswith((".", "__MACOSX")):
                    left_out.append(LeftOut(f"{self.key(path / name)}/", "hidden folders"))
                elif self.masks and (path / name).resolve() == self.masks:
                    left_out.append(LeftOut(f"{self.key(path / name)}/", "folders of masks"))
                elif hub_cache and name in ("blobs", "refs"):
                    left_out.append(LeftOut(f"{self.key(path / name)}/", "folders of the Hub's cache"))
                elif (path / name).is_symlink() and (is_image_file(name) or not self._follows(path / name)):
                    if not is_image_file(name):
                        left_out.append(LeftOut(self.key(path / name), "links to folders that are read already"))
                else:
                    entered.append(name)
            directories[:] = entered
            names.sort()
            if self.in_other_split(path.relative_to(self.path)):
                yield Directory(path, [], [*left_out, *self._of_other_split(path, names)])
                continue
            left_out += [LeftOut(self.key(path / name), "hidden files") for name in names if name.startswith(".")]
            yield Directory(path, [name for name in names if not name.startswith(".")], left_out)

    def _of_other_split(self, directory: Path, names: list[str]) -> Iterator[LeftOut]:
        """The images of a directory, with which their captions count, and its other files."""
        images = set(filter(is_image_file, names))
        stems = images | {Path(name).stem for name in images}
        for name in names:
            if name in images:
                yield LeftOut(self.key(directory / name), OTHER_SPLITS)
            elif name not in METADATA and not (name.lower().endswith(SIDECARS) and Path(name).stem in stems):
                yield LeftOut(self.key(directory / name), "other files of other splits")

    def in_other_split(self, relative: Path) -> bool:
        return not self.other_splits.isdisjoint(relative.parts[:1])

    def key(self, path: Path) -> str:
        """The name of a file, relative to the folder."""
        return str(path.relative_to(self.path))

    def file(self, name: str) -> Path | str:
        """The path of the file `name`, relative to the folder, or the reason why it can't be used."""
        try:
            name.encode()  # an index holds text: names of other bytes can't be written to it
            path = (self.path / name).resolve()
            if not any(map(path.is_relative_to, (*self._roots, *self._blobs))):
                return "it leads out of the folder"
            return path if path.is_file() else "it is no file" if path.exists() else "there is no such file"
        except (OSError, ValueError, RuntimeError) as error:  # a loop of links, a NUL, a name that is too long
            return f"it can't be followed ({error})"

    def _follows(self, link: Path) -> bool:
        """Whether the link leads to a folder that is neither read already nor holds one that is: that is a loop."""
        target = link.resolve()
        if any(target.is_relative_to(root) or root.is_relative_to(target) for root in self._roots):
            return False
        self._roots.append(target)
        return True


OTHER_SPLITS = "images of other splits"


def unreadable_folder(error: OSError) -> UserError:
    return UserError(f"data.source: can't list {error.filename} ({error.strerror}); let it be read, or move it away")


def _raise_unreadable(error: OSError) -> None:
    raise unreadable_folder(error)
