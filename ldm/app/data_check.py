"""What `ldm-check-data` says of a source, as plain data, and uploads as folders: no widgets here."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from ldm.app.roots import allowed, inside
from ldm.config.schema import DataConfig
from ldm.config.schema.data import BucketConfig
from ldm.data import check, index, openmoji
from ldm.data.archives import TARS
from ldm.data.folder_tree import FolderTree
from ldm.data.formats import is_image_file
from ldm.data.records import BadSample
from ldm.data.sampler import SampleSpec
from ldm.data.source_kinds import KINDS
from ldm.data.unread_files import SIDECARS
from ldm.utils.errors import UserError

SAMPLES = 16  # on the contact sheet
MAX_LISTED = 200  # bad images
MAX_UPLOADS, MAX_UPLOADS_MB = 500, 200
BUILT_IN = "openmoji-demo"

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
        stop=built.stop_reason(Path("the list below")) or built.sources.unconfirmed_caption("data.source.kind=classes"),
    )


def save_uploads(files: Sequence[tuple[str, bytes]], folder: Path) -> Path:
    """Writes uploads into a folder; returns it, or the tar in it. UserError for too many or too much, or other files.

    They are images and caption files, or one tar; what is in them, the check finds.
    """
    total = sum(len(data) for _, data in files)
    if len(files) > MAX_UPLOADS or total > MAX_UPLOADS_MB * 2**20:
        raise UserError(
            f"upload: {len(files)} files of {total / 2**20:.0f} MB; give {MAX_UPLOADS} of {MAX_UPLOADS_MB} MB at most, "
            "or copy them into a folder of the app"
        )
    written = set[str]()
    for name, data in files:
        name = Path(name.replace("\\", "/")).name
        if name.startswith(".") or not (is_image_file(name) or name.lower().endswith((*SIDECARS, *TARS))):
            raise UserError(f"upload: {name} is no image, caption file or tar; leave it out")
        if name in written:
            raise UserError(f"upload: two files are named {name}; rename one")
        written.add(name)
        (folder / name).write_bytes(data)
    tars = [name for name in written if name.lower().endswith(TARS)]
    if tars and len(written) > 1:
        raise UserError(f"upload: {tars[0]} comes with other files; give one tar, or images with caption files")
    return folder / tars[0] if tars else folder
