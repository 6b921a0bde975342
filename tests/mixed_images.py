"""Writes images of mixed origin in every layout that a source may have, and says what became of each.

    PYTHONPATH=. python -P tests/mixed_images.py 2000 [FOLDER]

Drawings and generated images, re-encoded into every format and mode that Pillow writes, with every orientation of EXIF,
under odd names, in folders, tars, tables and TOMLs.
"""

from __future__ import annotations

import io
import itertools
import json
import sys
import tarfile
import tempfile
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import ExifTags, Image, ImageOps

from ldm.config.schema import DataConfig, SourceConfig
from ldm.data import check, index, openmoji, records
from ldm.data.images import ROTATIONS
from ldm.data.index import Index

MODES = ("1", "L", "LA", "P", "P transparent", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I;16", "I", "F")
WITH_EXIF = ("JPEG", "PNG", "WEBP", "TIFF", "AVIF", "MPO")
UNDONE = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}  # the other orientations undo themselves
# Suffixes of the formats that Pillow writes, where its register has none, or has several.
SUFFIX_OF = {
    "PPM": ".ppm",
    "MPO": ".mpo",
    "SPIDER": ".spider",
    "TIFF": ".tif",
    "JPEG": ".jpg",
    "SGI": ".sgi",
    "DIB": ".dib",
}
NAMES = ("IMG_{}", "{}", "{} of many", "{}_photo", "bild-{}-ä", "日本{}", "({})", "photo {} (copy)", "x{}.v2")
NAMES += ("{}.jpg", "-{}", "UPPER{}", "é{}", "'{}'", "%{}", "#{}", "{},", "a&b{}")


class MixedImage(NamedTuple):
    """An image as it is stored, and what it looks like: a grey thumbnail `(6, 6)`, transparency over white.

    Some of Pillow's writers lose transparency or depth, so the thumbnail is of what was written; None: can't be read.
    """

    name: str
    data: bytes
    caption: str
    format: str
    mode: str
    thumbnail: np.ndarray | None


def thumbnail(image: Image.Image) -> np.ndarray:
    """`(6, 6)` in [0, 255]."""
    return np.asarray(image.convert("L").resize((6, 6), Image.Resampling.BOX), np.float32)


def generated(number: int) -> Image.Image:
    """A coloured gradient with a bright corner, so that every rotation of it differs."""
    x, y = np.meshgrid(np.linspace(0, 1, 36), np.linspace(0, 1, 28))
    red, green, blue = np.random.default_rng(number).uniform(60, 200, 3)
    pixels = np.stack([red * x, green * y, blue * (1 - x)], axis=-1)
    pixels[:8, :10] = 255
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    """An RGB image in a mode of Pillow; those with transparency have a transparent stripe."""
    grey = np.asarray(image.convert("L"))
    alpha = np.full(grey.shape, 255, np.uint8)
    alpha[-6:] = 0
    if mode == "I;16":
        return Image.fromarray(grey.astype(np.uint16) * 257)
    if mode in ("I", "F"):
        return Image.fromarray(grey.astype(np.int32 if mode == "I" else np.float32))
    if mode == "P transparent":
        palette = image.convert("P", palette=Image.Palette.ADAPTIVE, colors=64)
        palette.info["transparency"] = 0
        return palette
    if mode in ("LA", "PA", "RGBA"):
        base = image.convert("RGBA")
        base.putalpha(Image.fromarray(alpha))
        return base if mode == "RGBA" else base.convert("LA") if mode == "LA" else base.convert("P").convert("PA")
    return image.convert(mode)


def encode(image: Image.Image, image_format: str, orientation: int) -> bytes | None:
    """The encoded image; None where Pillow doesn't write this mode in this format."""
    options: dict[str, Any] = {}
    if orientation > 1:
        method = UNDONE.get(orientation, ROTATIONS[orientation])
        transparency = image.info.get("transparency")
        image = image.transpose(method)
        image.info = {} if transparency is None else {"transparency": transparency}
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        options["exif"] = exif
    if image_format in ("WEBP", "AVIF", "JPEG", "MPO"):
        options["quality"] = 90
    if "transparency" in image.info:
        options["transparency"] = image.info["transparency"]
    buffer = io.BytesIO()
    try:
        image.save(buffer, image_format, **options)
    except Exception:  # each of Pillow's writers has its own way to refuse
        return None
    return buffer.getvalue() or None


def suffix_of(image_format: str) -> str:
    registered = (suffix for suffix, name in Image.registered_extensions().items() if name == image_format)
    return SUFFIX_OF.get(image_format) or next(registered, f".{image_format.lower()}")


def written_formats() -> list[tuple[str, str]]:
    """The pairs of format and mode that Pillow writes here."""
    Image.init()
    image = generated(0)
    pairs = itertools.product(sorted(Image.SAVE), MODES)
    return [(name, mode) for name, mode in pairs if encode(in_mode(image, mode), name, 1)]


def mixed_images(count: int, drawings: Sequence[Path]) -> list[MixedImage]:
    """`count` images: format and mode change with each, then orientation, origin and name."""
    pairs, result = written_formats(), list[MixedImage]()
    for number in range(count):
        image_format, mode = pairs[number % len(pairs)]
        drawn = drawings and number % 2
        original = Image.open(drawings[number % len(drawings)]).convert("RGB") if drawn else generated(number)
        image = in_mode(original, mode)
        orientation = 1 + (number // 3) % 8 if image_format in WITH_EXIF else 1
        data = encode(image, image_format, orientation)
        assert data, (image_format, mode, orientation)
        suffix = suffix_of(image_format)
        name = NAMES[number % len(NAMES)].format(number) + (suffix.upper() if number % 5 == 0 else suffix)
        result.append(MixedImage(name, data, f"image {number}", image_format, mode, appearance(data)))
    return result


def appearance(data: bytes) -> np.ndarray | None:
    try:
        with Image.open(io.BytesIO(data)) as stored:
            stored.load()
            return thumbnail(flattened(ImageOps.exif_transpose(stored)))
    except Exception:  # each of Pillow's readers has its own way to refuse
        return None


def flattened(image: Image.Image) -> Image.Image:
    """RGB, transparency over white, by other means than the package's."""
    if image.mode in ("I;16", "I", "F"):
        values = np.asarray(image).astype(np.float32)
        return Image.fromarray((values / (257 if values.max() > 255 else 1)).clip(0, 255).astype(np.uint8))
    if image.mode in ("LAB", "HSV", "YCbCr", "CMYK"):
        return image.convert("RGB")
    rgba = np.asarray(image.convert("RGBA"), np.float32)
    alpha = rgba[..., 3:] / 255
    return Image.fromarray((rgba[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8))


# -------------------------------------------------------------------------------------------------------------- layouts

Layout = Callable[[Path, Sequence[MixedImage]], tuple[str, list[str]]]


def _write(path: Path, data: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)


def _sidecars(folder: Path, images: Sequence[MixedImage], places: Sequence[str]) -> list[str]:
    names = [f"{places[number % len(places)]}{image.name}" for number, image in enumerate(images)]
    for number, (name, image) in enumerate(zip(names, images, strict=True)):
        _write(folder / name, image.data)
        text = (folder / name).with_suffix((".txt", ".TXT", ".caption")[number % 3])
        _write(Path(f"{folder / name}.txt") if number % 4 == 3 else text, image.caption)
    return names


def loose(folder: Path, images: Sequence[MixedImage]) -> tuple[str, list[str]]:
    return str(folder), _sidecars(folder, images, [""])


def sub_folders(folder: Path, images: Sequence[MixedImage]) -> tuple[str, list[str]]:
    return str(folder), _sidecars(folder, images, ["", "a/", "a/b c/", "ä/1/2/3/"])


def repeated(folder: Path, images: Sequence[MixedImage]) -> tuple[str, list[str]]:
    names = [f"{('10_sks dog', '1_dog')[number % 2]}/{image.name}" for number, image in enumerate(images)]
    for name, image in zip(names, images, strict=True):
        _write(folder / name, image.data)
    return str(folder), names


def class_folders(folder: Path, images: Sequence[MixedImage]) -> tuple[str, list[str]]:
    names = [f"{('cats', 'Dogs', '3 birds')[number % 3]}/{image.name}" for number, image in enumerate(images)]
    for name, image in zip(names, images, strict=True):
        _write(folder / name, image.data)
    return str(folder), names


def metadata_above(folder: Path, images: Sequence[MixedImage]) -> tuple[str, list[str]]:
    names = [f"{('', 'images/', 'more/images/')[number % 3]}{image.name}" for number, image in enumerate(images)]
    rows = []
    for name, image in zip(names, images, strict=True):
        _write(folder / name, image.data)
        rows.append(json.dumps({"file_name": name, "text": image.caption}))
    _write(folder / "metadata.jsonl", "\n".join(rows))
    return str(folder), names


def csv_file(folder: Path, images: Sequence[MixedImage]) -> tuple[str, list[str]]:
    rows = ["file_name,text"]
    for image in images:
        _write(folder / image.name, image.data)
        quoted = image.name.replace('"', '""')
        rows.append(f'"{quoted}","{image.caption}"')
    _write(folder / "metadata.csv", "\ufeff" + "\r\n".join(rows))
    return str(folder), [image.name for image in images]


def tar(folder: Path, images: Sequence[MixedImage]) -> tuple[str, list[str]]:
    folder.mkdir(parents=True)
    with tarfile.open(folder / "0.tar", "w") as file:
        for image in images:
            text = (Path(image.name).with_suffix(".txt").name, image.caption.encode())
            for name, data in ((image.name, image.data), text):
                info = tarfile.TarInfo(f"set/{name}")
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    return str(folder), [f"0.tar:set/{image.name}" for image in images]


def parquet(folder: Path, images: Sequence[MixedImage]) -> tuple[str, list[str]]:
    folder.mkdir(parents=True)
    columns = {"image": [image.data for image in images], "text": [image.caption for image in images]}
    pq.write_table(pa.table(columns), folder / "0.parquet")
    return str(folder), [f"{folder.name}:{number}" for number in range(len(images))]


def saved(folder: Path, images: Sequence[MixedImage]) -> tuple[str, list[str]]:
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": [{"bytes": image.data, "path": None} for image in images], "text": [i.caption for i in images]}
    datasets.Dataset.from_dict(rows, features).save_to_disk(folder)
    return str(folder), [f"{folder.name}:{number}" for number in range(len(images))]


def toml(folder: Path, images: Sequence[MixedImage]) -> tuple[str, list[str]]:
    names = _sidecars(folder / "set/images", images, ["", "deep/"])
    text = '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "images"\nnum_repeats = 2\nclass_tokens = "an image"\n'
    _write(folder / "set/set.toml", text)
    assert tomllib.loads(text)
    return str(folder / "set/set.toml"), [f"images/{name}" for name in names]


LAYOUTS: tuple[Layout, ...] = (
    loose, sub_folders, repeated, class_folders, metadata_above, csv_file, tar, parquet, saved, toml,
)  # fmt: skip


class Outcome(NamedTuple):
    """The used images with their numbers in the index, those that are named with the reason, and those lost."""

    index: Index
    used: list[tuple[MixedImage, int]]
    named: list[tuple[MixedImage, str]]
    lost: list[MixedImage]


def read_all(folder: Path, images: Sequence[MixedImage]) -> Outcome:
    """Deals the images to all layouts, reads these as the sources of one index, and looks up each image by its name."""
    outcome_of = dict[str, MixedImage]()
    sources = []
    for number, layout in enumerate(LAYOUTS):
        dealt = [image for i, image in enumerate(images) if (i + i // len(LAYOUTS)) % len(LAYOUTS) == number]
        path, keys = layout(folder / layout.__name__, dealt)

        sources.append(SourceConfig(path=path))
        outcome_of |= {f"{number}:{key}": image for key, image in zip(keys, dealt, strict=True)}
    assert len(outcome_of) == len(images)
    data = DataConfig(source=sources, size=32, min_side=1)
    built = index.build(data, folder / "cache")
    numbers = {entry.key: i for i, entry in enumerate(built)}
    reasons = dict(_named(built))
    used, named, lost = list[tuple[MixedImage, int]](), list[tuple[MixedImage, str]](), list[MixedImage]()
    for key, image in outcome_of.items():
        stored = next((name for name in _spellings(key) if name in numbers or name in reasons), None)
        if stored in numbers:
            used.append((image, numbers[stored]))
        elif stored:
            named.append((image, reasons[stored]))
        else:
            lost.append(image)
    return Outcome(built, used, named, lost)


def _spellings(key: str) -> Iterator[str]:
    """The names by which an image may be reported: a tar's suffixes are in lower case, and without its name's dots."""
    yield key
    head, dot, suffix = key.rpartition(".")
    yield f"{head}{dot}{suffix.lower()}"
    folder, _, name = key.rpartition("/")
    stem, dot, suffixes = name.partition(".")
    yield f"{folder}/{stem}{dot}{suffixes.lower()}"


def _named(built: Index) -> Iterator[tuple[str, str]]:
    """Names and reasons of all that is bad or left out, as the keys of an index with several sources."""
    for number, counts in enumerate(built.sources._left_out):
        for reason, names in counts.examples.items():
            yield from ((f"{number}:{name}", reason) for name in names)
    for bad in built.bad_samples():
        yield bad.key, f"{bad.reason}; {bad.fix}"
        if ", '" in bad.key or ', "' in bad.key:  # a row of a metadata file, which ends with the image's name
            yield f"{bad.key.split(':')[0]}:{bad.key.split(', ', 1)[1][1:-1]}", bad.reason


def main(count: int, folder: Path) -> None:
    records.MAX_EXAMPLES = 10**9  # the name of each that is left out is looked up
    drawings = [path for _, path in openmoji.draw("openmoji-demo", 40, folder / "drawings")]
    images = mixed_images(count, drawings)
    outcome = read_all(folder, images)
    for reason, number in Counter(reason for _, reason in outcome.named).most_common():
        print(f"named  {number:>5,} {reason}")
    print(check.balance(outcome.index))
    print(f"{len(outcome.used):,} used + {len(outcome.named):,} named = {count - len(outcome.lost):,} of {count:,}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(int(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else temporary))
