"""What `ldm-check-data` says of a source, as plain data, and uploads as folders: no widgets here."""

from __future__ import annotations

import io
import shutil
import stat
import threading
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from ldm.app.launch import MAX_UPLOADS_MB
from ldm.app.roots import allowed, inside, roots
from ldm.config.schema import DataConfig
from ldm.config.schema.data import BucketConfig
from ldm.data import check, index, openmoji
from ldm.data.archives import TARS
from ldm.data.folder_tree import FolderTree
from ldm.data.formats import REMEDIES, is_image_file
from ldm.data.index_report import stop_reason
from ldm.data.records import BadSample
from ldm.data.sampler import SampleSpec
from ldm.data.source_kinds import KINDS
from ldm.data.unread_files import METADATA, SIDECARS
from ldm.utils.errors import UserError

SAMPLES = 16  # on the contact sheet
MAX_LISTED = 200  # bad images
MAX_UPLOADS = 500  # files
BUILT_IN = "openmoji-demo"
ZIP = ".zip"

_lock = threading.Lock()  # two checks would write the same index


@dataclass(frozen=True)
class Check:
    """What was found in a source."""

    kind: str
    good: int
    bad: int
    left_out: dict[str, tuple[int, list[str]]]
    """How many files were left out for a reason, and the first ones."""
    facts: dict[str, Any]
    """Of `ldm.data.check.facts`; empty without a good image."""
    bad_samples: list[BadSample]
    samples: list[tuple[Image.Image, str]] = field(repr=False)
    """Images with their captions, as training sees them."""
    stop: str
    """Why training would stop; empty where it can begin."""


@cache
def _work() -> TemporaryDirectory[str]:
    """The folder of indices, as long as the app runs."""
    return TemporaryDirectory(prefix="ldm-app-")


def source_of(text: str) -> str:
    """A path inside the roots, or the built-in drawings; UserError where a link in it leads out."""
    if text in openmoji.SUBSETS:
        return text
    path = allowed(text)
    if path.suffix == ".toml":
        raise UserError("data: kohya's TOML names folders of its own; give one of these")
    check_links(path)
    return str(path)


def check_links(path: Path) -> None:
    """UserError where a folder or file below `path` is a link that leads out of the roots: the library follows some."""
    if not path.is_dir():
        return
    for directory in FolderTree(path).walk():
        links = (file for name in directory.names if (file := directory.path / name).is_symlink())
        for file in (directory.path, *links):
            if not inside(file.resolve()):
                raise UserError(f"data: {file} leads out of the app's folders; copy what it links to, or remove it")


def run_check(source: str, size: int, buckets: bool, captions: bool) -> Check:
    """Checks every image of a source; UserError where it can't be read at all."""
    step = max(8, min(BucketConfig().step, size // 32 * 8))  # a small size has buckets too
    settings = {"source": source, "size": size, "buckets": BucketConfig(step=step) if buckets else None}
    data = DataConfig.model_validate(settings)
    with _lock:
        built = index.build(data, Path(_work().name), ("text",) if captions else ())
        facts = check.facts(built, None) if len(built) else {}
    left_out = built.sources.left_out()
    training = built.select("train")
    spec = SampleSpec.of(data, batch=1, seed=0)
    return Check(
        kind=KINDS[built.sources.kinds[0]],
        good=len(built),
        bad=built.bad_count(),
        left_out={reason: (count, left_out.examples[reason]) for reason, count in left_out.counts.items()},
        facts=facts,
        bad_samples=[bad for _, bad in zip(range(MAX_LISTED), built.bad_samples(), strict=False)],
        samples=check.samples(training, spec, min(SAMPLES, len(training))) if len(training) else [],
        stop=stop_reason(built, Path("the list below"))
        or built.sources.unconfirmed_caption("data.source.kind=classes"),
    )


def save_uploads(files: Sequence[tuple[str, bytes]], folder: Path) -> tuple[Path, list[str]]:
    """Writes uploads into a folder: the path of the source, and what a zip has besides images and captions.

    They are images and caption files, one zip of these, or one tar; what is in them, the check shows. UserError for too
    many or too much, or other files.
    """
    _check_amount("upload", len(files), sum(len(data) for _, data in files))
    written = set[str]()
    for name, data in files:
        name = Path(name.replace("\\", "/")).name
        archive = name.lower().endswith((*TARS, ZIP))
        if name.startswith(".") or not (archive or is_image_file(name) or name.lower().endswith(SIDECARS)):
            raise UserError(f"upload: {name} is no image, caption file, zip or tar; leave it out")
        if archive and len(files) > 1:
            raise UserError(f"upload: {name} comes with other files; give one zip or tar, or images with caption files")
        if name.lower().endswith(ZIP):
            return _unzip(name, data, folder)
        if name in written:
            raise UserError(f"upload: two files are named {name}; rename one")
        written.add(name)
        (folder / name).write_bytes(data)
        if archive:
            return folder / name, []
    return folder, []


def _check_amount(what: str, count: int, size: int) -> None:
    files = "1 file" if count == 1 else f"{count:,} files"
    if count > MAX_UPLOADS or size > MAX_UPLOADS_MB * 2**20:
        raise UserError(
            f"{what}: {files} of {size / 2**20:,.0f} MB; give {MAX_UPLOADS} of {MAX_UPLOADS_MB} MB at most, "
            "or copy them into a folder of the app"
        )


def _unzip(name: str, data: bytes, folder: Path) -> tuple[Path, list[str]]:
    """Writes the images and captions of a zip; the folder that holds all of them, and the names of the other files."""
    left_out = list[str]()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for info, path in _members(name, archive):
                if not _is_unpacked(path.name):
                    left_out.append(str(path))
                    continue
                target = folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("xb") as file:
                    file.write(archive.read(info))
    except UserError:
        raise
    except FileExistsError:
        raise UserError(f"upload: {name} has {path} twice; rename one") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError, ValueError) as error:
        raise UserError(f"upload: {name} can't be unpacked ({error}); zip the images anew") from None
    if not any(folder.iterdir()):
        raise UserError(f"upload: {name} has neither images nor captions; give a zip with images in it")
    entries = [*folder.iterdir()]
    while len(entries) == 1 and entries[0].is_dir():  # what was zipped was a folder, which is no class
        folder = entries[0]
        entries = [*folder.iterdir()]
    return folder, left_out


def _is_unpacked(name: str) -> bool:
    """Whether it is an image, perhaps one for which the check names a remedy, or a file of captions."""
    table = name in METADATA and not name.endswith(".parquet")
    return table or is_image_file(name) or name.lower().endswith((*SIDECARS, *REMEDIES))


def _members(name: str, archive: zipfile.ZipFile) -> Iterator[tuple[zipfile.ZipInfo, PurePosixPath]]:
    """The files of a zip, without hidden ones and what macOS adds; UserError before the first where one is unsafe."""
    infos = [info for info in archive.infolist() if not info.is_dir()]
    paths = [PurePosixPath(info.filename.replace("\\", "/")) for info in infos]
    for info, path in zip(infos, paths, strict=True):
        if path.is_absolute() or ".." in path.parts:
            raise UserError(f"upload: {name} has {path}, which leads out of it; zip the images anew")
        if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
            raise UserError(f"upload: {name} has {path}, which is a link or no file; zip what it links to")
        if info.flag_bits & 1:
            raise UserError(f"upload: {name} is encrypted; zip the images without a password")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others unpack without bounds
            raise UserError(f"upload: {name} is not compressed by Deflate; zip the images with the usual settings")
    hidden = [any(part.startswith((".", "__MACOSX")) for part in path.parts) for path in paths]
    members = [(info, path) for info, path, skip in zip(infos, paths, hidden, strict=True) if not skip]
    _check_amount(f"upload: {name}", len(members), sum(info.file_size for info, _ in members))
    yield from members


def is_upload(source: str) -> bool:
    """Whether it lies in a folder of the session."""
    return source != BUILT_IN and not inside(Path(source))


def kept_path(source: Path, name: str) -> Path:
    """Where a training may read a source: itself, or of an upload a new folder in the first root, by its name."""
    if inside(source):
        return source
    folders = (roots()[0] / (name if number == 1 else f"{name}-{number}") for number in range(1, 10**6))
    return next(folder for folder in folders if not folder.exists())


def keep(source: Path, name: str) -> Path:
    """The source at its `kept_path`: an upload is copied."""
    target = kept_path(source, name)
    if target == source:
        return source
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            return Path(shutil.copytree(source, target))
        target.mkdir()
        return Path(shutil.copy(source, target))
    except OSError as error:
        raise UserError(
            f"upload: can't copy it to {target} ({error}); make room, or let the folder be written"
        ) from None
