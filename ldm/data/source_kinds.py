"""The kinds of sources: which one a path is, and which keys have an effect on it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

from ldm.config.kohya import subsets
from ldm.config.schema import SourceConfig
from ldm.data import archives, folders, openmoji
from ldm.data.folder_tree import FolderTree
from ldm.data.formats import REMEDIES, is_image_file
from ldm.data.layout import choose_split, folder_layout
from ldm.data.masks import ALPHA, FOLDERS, check_apart, mask_folder
from ldm.data.metadata_files import metadata_files
from ldm.data.unread_files import METADATA, may_hold_captions
from ldm.utils.errors import UserError

# Each kind of source, as it is described to the user.
KINDS = {
    "openmoji": "the built-in OpenMoji drawings",
    "metadata": "a folder with a metadata file",
    "sidecars": "a folder with a caption file beside each image",
    "classes": "class folders: an image's folder is its caption",
    "images": "a folder of images",
    "tar": "WebDataset tars",
    "parquet": "parquet with an image column",
    "datasets": "a data set of the library datasets",
    "kohya": "kohya's TOML",
}
_TABULAR = ("metadata", "tar", "parquet", "datasets")
# The kinds of sources that a key has an effect on, where that is not all of them.
KINDS_OF_KEY = {
    "caption_column": _TABULAR,
    "label": _TABULAR,
    "image": ("parquet", "datasets"),
    "lines": ("sidecars", *_TABULAR),
    "template": ("classes",),
    "caption": ("sidecars",),
    "mask": ("openmoji", "metadata", "sidecars", "classes", "images", "tar", "parquet", "datasets"),
    "split": ("sidecars", "classes", "images", *_TABULAR),
}
STREAMED = ("tar", "parquet", "datasets")
HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
CAPTIONED = ("text",)  # conditions of a model that reads captions


def detect(source: SourceConfig, conditions: Sequence[str] = CAPTIONED) -> str:
    """The kind of a source, a key of KINDS; UserError, with a suggestion, where the path is none of them."""
    path = source.path
    if source.kind == "images" and "text" in conditions:
        raise UserError(
            f"data.source.kind: images, so {path} has no captions, and stage2.conditions has text; "
            "leave out the kind, or text"
        )
    if source.kind != "auto":
        return source.kind
    if path in openmoji.SUBSETS:
        return "openmoji"
    if path.endswith(archives.TARS):
        return "tar"
    if path.endswith(".parquet"):
        return "parquet"
    if path.endswith(".toml"):
        return "kohya"
    folder = Path(path)
    if not _is_folder(path):
        close = difflib.get_close_matches(path, openmoji.SUBSETS, n=1)
        if close or not HUB_ID.match(path) or folder.exists():
            hint = f"did you mean {close[0]!r}?" if close else f"give a folder or one of {', '.join(openmoji.SUBSETS)}"
            raise UserError(f"data.source: {path!r} is neither a folder nor a built-in set; {hint}")
        return "datasets"
    if any((folder / name).exists() for name in METADATA):
        return "metadata"
    if any((folder / name).exists() for name in ("dataset_dict.json", "state.json", "dataset_info.json")):
        return "datasets"
    return _kind_of_folder(folder, source, "text" in conditions)


def _is_folder(path: str) -> bool:
    try:
        return Path(path).is_dir()
    except OSError as error:  # a name that is too long, or a folder that may not be entered
        raise UserError(f"data.source: can't look at {path} ({error.strerror}); give another path") from None


def _kind_of_folder(folder: Path, source: SourceConfig, captions: bool) -> str:
    in_classes = loose = metadata = False
    undecoded: Path | None = None
    unread: Path | None = None
    masks = mask_folder(source, "sidecars")  # or another kind without columns
    layout = folder_layout(folder, source.split, captions, masks)
    for directory in FolderTree(folder, layout.other_splits, masks).walk():
        images = [name for name in directory.names if is_image_file(name)]
        if folders.CaptionFiles(directory.names).by_image:
            return "sidecars"
        for suffixes, kind in ((archives.TARS, "tar"), ((".parquet",), "parquet")):
            tables = [name for name in directory.names if name.endswith(suffixes) and name not in METADATA]
            if not images and tables:
                return kind
        others = (name for name in directory.names if Path(name).suffix.lower() in REMEDIES)
        undecoded = undecoded or next((directory.path / name for name in others), None)
        metadata |= not set(METADATA).isdisjoint(directory.names)
        if images:
            in_class = len(directory.path.relative_to(folder).parts) > layout.depth
            in_classes, loose = in_classes or in_class, loose or not in_class
        stems = {Path(name).stem for name in images}
        texts = (name for name in directory.names if may_hold_captions(name, stems))
        unread = unread or next((directory.path / name for name in texts), None)
    if metadata:
        return "metadata"
    if source.caption and (loose or in_classes):
        return "sidecars"
    if loose and not captions:
        return "images"
    if captions and (in_classes or loose) and (unread := unread or _metadata_above(folder)):
        raise UserError(
            f"data.source: {unread} may hold the captions of {folder}, but isn't read: that takes a "
            f"{' or '.join(METADATA)} in this folder, or a .txt beside each image; write one of these, or set "
            "data.source.kind=classes to caption images by their folders' names"
        )
    if in_classes:
        return "classes"
    if undecoded and not loose:
        remedy = REMEDIES[undecoded.suffix.lower()]
        raise UserError(f"data.source: {folder} has only images that aren't read here, such as {undecoded}; {remedy}")
    raise UserError(
        f"data.source: no captioned image in {folder}; put a metadata.jsonl there, or a .txt beside each image, "
        "or set data.source.caption, in which {} is the file's name"
        if loose
        else f"data.source: no image in {folder}; expected .jpg, .png and the like, tars or parquet"
    )


def _metadata_above(folder: Path) -> Path | None:
    """A metadata file in the folder above that names files of this one."""
    for file in (folder.resolve().parent / name for name in METADATA):
        if file.is_file() and (file.suffix == ".parquet" or f"{folder.resolve().name}/".encode() in file.read_bytes()):
            return file
    return None


def check_keys(source: SourceConfig, kind: str) -> None:
    """UserError where a key of the source is set that has no effect on its kind."""
    if source.mask and kind == "kohya":
        raise UserError(
            f"data.source.mask: has no effect on {source.path}, {KINDS[kind]}; write alpha_mask = true, or a "
            "conditioning_data_dir, into its subsets"
        )
    for key, kinds in KINDS_OF_KEY.items():
        value = getattr(source, key)
        if kind not in kinds and value != SourceConfig.model_fields[key].default:
            raise UserError(
                f"data.source.{key}: {value!r} has no effect on {source.path}, {KINDS[kind]}; leave it out, or set "
                f"data.source.kind to one of {', '.join(kinds)}"
            )
    _check_mask_folder(source, kind)
    if kind in FOLDERS and source.split != "train" and _is_folder(source.path):
        layout = folder_layout(Path(source.path), source.split, masks=mask_folder(source, kind))
        if not layout.depth:  # no folder there names a split
            choose_split((), source.split, source.path)


def _check_mask_folder(source: SourceConfig, kind: str) -> None:
    """UserError where masks of a folder's images are neither `alpha` nor in a folder of their own."""
    masks = mask_folder(source, kind)
    is_column = kind == "metadata" and "/" not in source.mask
    if masks is None and source.mask not in ("", ALPHA) and kind in FOLDERS and not is_column:
        inside = Path(source.path, source.mask)
        raise UserError(
            f"data.source.mask: no folder {source.mask}; give "
            + (str(inside) if inside.is_dir() else "alpha, or the folder that has a mask of each image")
        )
    if masks:
        check_apart("data.source.mask", masks, Path(source.path))


def check(sources: Sequence[SourceConfig], streaming: bool = False, conditions: Sequence[str] = CAPTIONED) -> None:
    """UserError where a source is not of the kind that is configured, or can't be streamed; no file is opened."""
    for source in sources:
        kind = detect(source, conditions)
        check_keys(source, kind)
        if streaming and kind not in STREAMED:
            raise UserError(
                f"data.streaming: {source.path} is {KINDS[kind]}; set it to false: tars, parquet and datasets stream"
            )
        if kind in FOLDERS and not _is_folder(source.path):
            raise UserError(f"data.source: no folder {source.path}")
        if kind == "metadata" and not metadata_files(Path(source.path)):
            raise UserError(f"data.source: none of {', '.join(METADATA)} in {source.path}; write one")
        if kind == "kohya":
            subsets(Path(source.path))
