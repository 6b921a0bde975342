"""Folders of images with a caption file beside each image, or with captions in the names of their folders.

What is read of a folder, and which links are followed, is in ldm/data/folder_tree.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from ldm.data.folder_tree import FolderTree, is_image_file
from ldm.data.layout import FolderLayout
from ldm.data.records import (
    BadSample,
    BadSampleError,
    ImageLocation,
    ReadOptions,
    Record,
    Records,
    captions_of,
)
from ldm.data.unread_files import SIDECARS, unread_file


class CaptionFiles:
    """The caption file of each image of a directory."""

    def __init__(self, names: Sequence[str], extensions: Sequence[str] = SIDECARS):
        present = set(names)
        self.by_image: dict[str, str] = {}
        for image in filter(is_image_file, names):
            candidates = (Path(image).stem + extension for extension in extensions)
            if file := next((name for name in candidates if name in present), None):
                self.by_image[image] = file
        self.used = set(self.by_image.values())


def sidecars(
    tree: FolderTree,
    options: ReadOptions,
    extensions: tuple[str, ...] = SIDECARS,
    default: str = "",
    layout: FolderLayout = FolderLayout(),  # noqa: B008 (immutable)
) -> Records:
    """A folder and its subfolders of images, each with a caption file: `a.jpg` and `a.txt` or `a.caption`.

    `default` is the caption of an image that has none. Where classes are read, a subfolder is one.
    """
    for directory in tree.walk():
        yield from directory.left_out
        caption_files = CaptionFiles(directory.names, extensions)
        for name in directory.names:
            key = tree.key(directory.path / name)
            if not is_image_file(name):
                if name not in caption_files.used:
                    yield unread_file(directory.path / name, key)
                continue
            path = tree.file(key)
            sidecar = caption_files.by_image.get(name)
            if isinstance(path, str):
                yield BadSample(key, path, f"copy it into {tree.path}")
                continue
            try:
                if sidecar:
                    file = tree.file(tree.key(directory.path / sidecar))
                    if isinstance(file, str):
                        raise BadSampleError(f"its caption file {sidecar}: {file}", f"copy it into {tree.path}")
                    captions = captions_of(file.read_bytes(), options)
                elif default or not options.captions:
                    captions = captions_of(default, options._replace(lines=False))
                else:
                    raise BadSampleError(
                        "it has no caption", f"write one into {Path(name).stem}{extensions[0]} beside it"
                    )
            except BadSampleError as error:
                yield BadSample(key, *error.args)
                continue
            except OSError as error:
                yield BadSample(key, f"can't read {sidecar}: {error.strerror}", "let it be read")
                continue
            label = layout.label(key) if options.label is not None else ""
            yield Record(key, ImageLocation(str(path)), captions, label)


def classes(tree: FolderTree, template: str, options: ReadOptions, layout: FolderLayout) -> Records:
    """A folder of class folders; the caption is the folder's name in `template`, whose `{}` it replaces."""
    for directory in tree.walk():
        yield from directory.left_out
        for name in directory.names:
            key = tree.key(directory.path / name)
            if not is_image_file(name):
                yield unread_file(directory.path / name, key)
                continue
            path = tree.file(key)
            label = layout.label(key)
            if isinstance(path, str):
                yield BadSample(key, path, f"copy it into {tree.path}")
            elif not label:
                yield BadSample(key, "it is in no class folder", "move it into the folder of its class")
            else:
                try:
                    captions = captions_of(class_caption(label, template), options)
                    yield Record(key, ImageLocation(str(path)), captions, label)
                except BadSampleError as error:
                    yield BadSample(key, *error.args)


def class_caption(label: str, template: str) -> str:
    return template.replace("{}", label.replace("_", " "))


def first_labels(tree: FolderTree, layout: FolderLayout, count: int) -> list[str]:
    """The first classes of class folders, at most `count`."""
    return list(itertools.islice(_distinct_labels(tree, layout), count))


def _distinct_labels(tree: FolderTree, layout: FolderLayout) -> Iterator[str]:
    seen: set[str] = set()
    for directory in tree.walk():
        if any(map(is_image_file, directory.names)):
            label = layout.label(tree.key(directory.path / "any"))
            if label and label not in seen:
                seen.add(label)
                yield label
