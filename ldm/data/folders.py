"""Folders of images with a caption file beside each image, or with captions in the names of their folders.

What is read of a folder, and which links are followed, is in ldm/data/folder_tree.py.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from ldm.data.folder_tree import FolderTree
from ldm.data.formats import is_image_file
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
    """The caption file of each image of a directory: `a.txt` or `a.jpg.txt` of `a.jpg`, in any case.

    A file whose name fits exactly comes first; one that fits in another case, or with its accents written otherwise
    (macOS takes them apart), only belongs to no other image.
    """

    def __init__(self, names: Sequence[str], extensions: Sequence[str] = SIDECARS):
        images = [name for name in names if is_image_file(name)]
        present = set(names).difference(images)
        stems = {image: Path(image).stem for image in images}
        bases = {*stems, *stems.values()}
        by_base: dict[tuple[str, str], str] = {}  # the name without its extension, the extension in lower case → name
        in_any_case: dict[tuple[str, str], str] = {}
        for name in names:
            for extension in {extension.lower() for extension in extensions}:
                if name in present and name.lower().endswith(extension):
                    base = name[: -len(extension)]
                    by_base[base, extension] = name
                    if base not in bases:
                        in_any_case[_folded(base), extension] = name
        self.by_image: dict[str, str] = {}
        for image, stem in stems.items():
            exact = (stem + extension for extension in extensions if stem + extension in present)
            near = (
                table.get((base, extension.lower()))
                for table, pairs in ((by_base, (stem, image)), (in_any_case, (_folded(stem), _folded(image))))
                for base in pairs
                for extension in extensions
            )
            if file := next((name for name in itertools.chain(exact, near) if name), None):
                self.by_image[image] = file
        self.stems = bases
        self.used = set(self.by_image.values())


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).lower()


def sidecars(
    tree: FolderTree,
    options: ReadOptions,
    extensions: tuple[str, ...] = SIDECARS,
    default: str = "",
    layout: FolderLayout = FolderLayout(),  # noqa: B008 (immutable)
) -> Records:
    """A folder and its subfolders of images, each with a caption file: `a.jpg` and `a.txt` or `a.caption`.

    `default` is the caption of an image that has none, in which `{}` is the file's name, or else the words of kohya's
    folder. Where classes are read, a subfolder is one.
    """
    for directory in tree.walk():
        yield from directory.left_out
        caption_files = CaptionFiles(directory.names, extensions)
        for name in directory.names:
            key = tree.key(directory.path / name)
            if not is_image_file(name):
                if name not in caption_files.used:
                    yield unread_file(directory.path / name, key, caption_files.stems)
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
                elif (caption := file_caption(name, default) or layout.repeated_caption(key)) or not options.captions:
                    captions = captions_of(caption, options._replace(lines=False))
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
            yield Record(key, ImageLocation(str(path)), captions, label, repeats=layout.repeats(key))


def classes(tree: FolderTree, template: str, options: ReadOptions, layout: FolderLayout) -> Records:
    """A folder of class folders; the caption is the folder's name in `template`, whose `{}` it replaces."""
    for directory in tree.walk():
        yield from directory.left_out
        stems = CaptionFiles(directory.names).stems
        for name in directory.names:
            key = tree.key(directory.path / name)
            if not is_image_file(name):
                yield unread_file(directory.path / name, key, stems)
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
                    yield Record(key, ImageLocation(str(path)), captions, label, repeats=layout.repeats(key))
                except BadSampleError as error:
                    yield BadSample(key, *error.args)


def file_caption(name: str, template: str) -> str:
    """`template`, in which `{}` stands for the words of a file's name."""
    return template.replace("{}", Path(name).stem.replace("_", " "))


def class_caption(label: str, template: str) -> str:
    return template.replace("{}", label.replace("_", " "))


def first_class_folders(tree: FolderTree, layout: FolderLayout, count: int) -> dict[str, str]:
    """An image's name of each of the first classes of class folders, at most `count`, by class."""
    first: dict[str, str] = {}
    for directory in tree.walk():
        if image := next(filter(is_image_file, directory.names), None):
            key = tree.key(directory.path / image)
            if label := layout.label(key):
                first.setdefault(label, key)
                if len(first) == count:
                    break
    return first
