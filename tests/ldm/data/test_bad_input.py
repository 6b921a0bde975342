"""Damaged and hostile inputs among good ones: every bad one is reported, none is followed, all good ones are used."""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import json
import math
import os
import re
import stat
import struct
import sys
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from accelerate.state import AcceleratorState
from of_config import indexed, spec_of, streamed
from PIL import Image

import train_ldm
from ldm.config import loader
from ldm.data.dataset import SamplePlan
from ldm.data.images import decode
from ldm.data.index import Index
from ldm.data.index_report import stop_reason, write_report
from ldm.data.records import BadSample, BadSampleError
from ldm.utils.errors import UserError

pytestmark = pytest.mark.timeout(30)  # no input may make a test wait for a pipe or loop for ever
SECRET = "the secret lighthouse"

# ------------------------------------------------------------------------------------------------------- damaged images


def encoded_image(name: str, kind: str = "PNG", size: tuple[int, int] = (20, 16)) -> bytes:
    """An encoded image of noise, seeded by `name`."""
    rng, buffer = np.random.default_rng([*name.encode()]), io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def truncated_image(kind: str, fraction: float) -> bytes:
    """The first `fraction` of an encoded image."""
    data = encoded_image("part", kind, (60, 40))
    return data[: int(len(data) * fraction)]


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, data: bytes = b"", depth: int = 8) -> bytes:
    """A greyscale PNG whose header states any size and depth; `data` is its compressed pixels."""
    header = struct.pack(">IIBBBBB", width & 0xFFFFFFFF, height & 0xFFFFFFFF, depth, 0, 0, 0, 0)
    chunks = (chunk(b"IHDR", header), chunk(b"IDAT", data), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def overwritten(data: bytes, offset: int, replacement: bytes) -> bytes:
    return data[:offset] + replacement + data[offset + len(replacement) :]


def with_flipped_bit(data: bytes, offset: int) -> bytes:
    """The data with one bit changed."""
    return overwritten(data, offset, bytes([data[offset] ^ 16]))


def deflated(row: bytes, count: int) -> bytes:
    """`count` equal rows of pixels, compressed as in a PNG."""
    compressor = zlib.compressobj(1)
    return b"".join([*(compressor.compress((b"\0" + row) * 1000) for _ in range(count // 1000)), compressor.flush()])


def tiff_directory(*entries: tuple[int, int, int, int]) -> bytes:
    return struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + b"".join(struct.pack("<HHII", *e) for e in entries)


JPEG, PNG = encoded_image("valid", "JPEG"), encoded_image("valid")
SMALL = zlib.compress(bytes(21 * 16))  # pixels of 20 × 16
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\n0 0 moveto 9 9 lineto stroke\n%%EOF\n"

DAMAGED: dict[str, Callable[[], bytes]] = {
    "jpeg-two-bytes.jpg": lambda: JPEG[:2],
    "jpeg-header.jpg": lambda: JPEG[: JPEG.index(b"\xff\xda")],
    "jpeg-quarter.jpg": lambda: truncated_image("JPEG", 0.25),
    "jpeg-half.jpg": lambda: truncated_image("JPEG", 0.5),
    "jpeg-most.jpg": lambda: truncated_image("JPEG", 0.97),
    "jpeg-65500-square.jpg": lambda: overwritten(JPEG, JPEG.index(b"\xff\xc0") + 5, struct.pack(">HH", 65500, 65500)),
    "jpeg-no-height.jpg": lambda: overwritten(JPEG, JPEG.index(b"\xff\xc0") + 5, struct.pack(">HH", 0, 20)),
    "png-signature.png": lambda: PNG[:8],
    "png-header.png": lambda: PNG[:33],
    "png-half.png": lambda: truncated_image("PNG", 0.5),
    "png-most.png": lambda: truncated_image("PNG", 0.97),
    "png-wrong-checksum.png": lambda: with_flipped_bit(PNG, 29),
    "png-wrong-bit.png": lambda: with_flipped_bit(PNG, len(PNG) // 2),
    "png-wrong-depth.png": lambda: png(20, 16, SMALL, depth=99),
    "png-no-side.png": lambda: png(0, 0),
    "png-negative.png": lambda: png(-20, -16),
    "png-no-pixels.png": lambda: png(20, 16),
    "png-60000-square.png": lambda: png(60000, 60000, zlib.compress(bytes(1000))),
    "png-bomb.png": lambda: png(20000, 20000, deflated(bytes(2500), 20000), 1),
    "webp-header.webp": lambda: encoded_image("valid", "WEBP")[:20],
    "webp-half.webp": lambda: truncated_image("WEBP", 0.5),
    "webp-most.webp": lambda: truncated_image("WEBP", 0.97),
    "gif-header.gif": lambda: encoded_image("valid", "GIF")[:13],
    "gif-half.gif": lambda: truncated_image("GIF", 0.5),
    "gif-most.gif": lambda: truncated_image("GIF", 0.97),
    "gif-65535-square.gif": lambda: overwritten(encoded_image("valid", "GIF"), 6, b"\xff\xff\xff\xff"),
    "tiff-header.tif": lambda: encoded_image("valid", "TIFF")[:8],
    "tiff-half.tif": lambda: truncated_image("TIFF", 0.5),
    "tiff-most.tif": lambda: truncated_image("TIFF", 0.97),
    "tiff-no-pixels.tif": lambda: tiff_directory((256, 4, 1, 20), (257, 4, 1, 16), (258, 3, 1, 8), (262, 3, 1, 1)),
    "tiff-long-tag.tif": lambda: tiff_directory((256, 4, 1, 20), (257, 4, 1, 16), (273, 4, 0x7FFFFFFF, 8)),
    "bmp-half.bmp": lambda: truncated_image("BMP", 0.5),
    "avif-half.avif": lambda: truncated_image("AVIF", 0.5),
    "nothing.jpg": lambda: b"",
    "zeros.jpg": lambda: bytes(4096),
    "random.png": lambda: np.random.default_rng(0).bytes(4096),
    "text.jpg": lambda: b"there was an image here\n",
    "page.jpg": lambda: b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "json.png": lambda: b'{"error": "rate limit exceeded"}',
    "document.jpg": lambda: b"%PDF-1.7\n1 0 obj <</Type /Catalog>> endobj\ntrailer <</Root 1 0 R>>\n%%EOF\n",
    "drawing.png": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="/etc/passwd"/></svg>',
    "program.jpg": lambda: POSTSCRIPT,
    "archive.png": lambda: gzip.compress(PNG),
    "one-pixel.png": lambda: encoded_image("one", size=(1, 1)),
    "line.png": lambda: encoded_image("line", size=(1, 5000)),
    "nine-pixels.jpg": lambda: encoded_image("nine", "JPEG", (3, 3)),
}

# ------------------------------------------------------------------------------------ captions, links and special files

CAPTIONS: dict[str, bytes | None] = {
    "caption-missing.png": None,
    "caption-empty.png": b"",
    "caption-blank.png": b" \n\t\r\n ",
    "caption-byte-order-mark.png": b"\xef\xbb\xbf",
    "caption-latin-1.png": "ein grüner Schal".encode("latin-1"),
    "caption-utf-16.png": "ein grüner Schal".encode("utf-16"),
    "caption-utf-16-without-bom.png": b"a\0 \0h\0a\0t\0",
    "caption-random.png": np.random.default_rng(1).bytes(200),
}


def link_to(target: str) -> Callable[[Path, Path], None]:
    """Writes a link to a file outside the folder; `target` is relative to `outside`, or absolute."""
    return lambda path, outside: path.symlink_to(outside / target)


def caption_trap(write_caption: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
    """A good image whose caption file is written by `write_caption`."""

    def trap(path: Path, outside: Path) -> None:
        path.write_bytes(encoded_image(path.name))
        path.with_suffix(".txt").unlink()
        write_caption(path.with_suffix(".txt"), outside)

    return trap


def unreadable(path: Path, outside: Path) -> None:
    path.write_bytes(encoded_image(path.name))
    path.chmod(0)


def uncaptioned(path: Path, outside: Path) -> None:
    path.write_bytes(encoded_image(path.name))
    path.with_suffix(".txt").unlink()


TRAPS: dict[str, Callable[[Path, Path], None]] = {
    "link-outside.png": link_to("secret.png"),
    "link-to-passwd.jpg": link_to("/etc/passwd"),
    "link-to-device.jpg": link_to("/dev/zero"),
    "link-to-itself.png": lambda path, _: path.symlink_to(path),
    "link-to-nothing.png": lambda path, _: path.symlink_to("gone.png"),
    "link-to-folder.png": link_to("."),
    "folder.jpg": lambda path, _: path.mkdir(),
    "pipe.jpg": lambda path, _: os.mkfifo(path),
    "caption-outside.png": caption_trap(link_to("secret.txt")),
    "caption-to-itself.png": caption_trap(lambda path, _: path.symlink_to(path)),
    "caption-to-nothing.png": caption_trap(lambda path, _: path.symlink_to("gone.txt")),
    "caption-pipe.png": caption_trap(lambda path, _: os.mkfifo(path)),
    "caption-folder.png": caption_trap(lambda path, _: path.mkdir()),
    "name-with\nnewline.png": uncaptioned,
    "name-latin-1-\udce9.png": lambda path, _: path.write_bytes(encoded_image("latin-1")) and None,  # the byte E9
}
if os.geteuid():  # root reads everything
    TRAPS |= {"unreadable.png": unreadable, "caption-unreadable.png": caption_trap(unreadable)}

# ---------------------------------------------------------------------------------------------- lines of metadata.jsonl


def json_row(name: object = "spare.png", text: object = "a hat") -> bytes:
    return json.dumps({"file_name": name, "text": text}).encode()


JSONL_LINES: dict[str, bytes] = {
    "a missing file": json_row("gone.png"),
    "a path that leaves the folder": json_row("../outside/secret.png"),
    "a path that leaves, returns and leaves": json_row("../lines/../outside/secret.png"),
    "an absolute path": json_row("{outside}/secret.png"),
    "a system file": json_row("/etc/passwd"),
    "a device": json_row("/dev/zero"),
    "a link outside": json_row("link-outside.png"),
    "a link to itself": json_row("link-to-itself.png"),
    "a link to nothing": json_row("link-to-nothing.png"),
    "a file behind a linked folder": json_row("link-to-folder.png/secret.png"),
    "a folder": json_row("folder.jpg"),
    "the folder itself": json_row("."),
    "a pipe": json_row("pipe.jpg"),
    "a URL": json_row("http://127.0.0.1:9/a.png"),
    "a file's URL": json_row("file://{outside}/secret.png"),
    "the metadata itself": json_row("metadata.jsonl"),
    "a damaged file": json_row("damaged.jpg"),
    "a damaged file with a newline in its name": json_row("damaged\n.jpg"),
    "a name with a NUL": json_row("a\0.png"),
    "a name with a lone surrogate": json_row("\ud800.png"),
    "a name with a newline": json_row("gone\n.png"),
    "a long name": json_row("x" * 5000 + ".png"),
    "a deep name": json_row("x/" * 2000 + "a.png"),
    "an empty name": json_row(""),
    "a number for a name": json_row(5),
    "null for a name": json_row(None),
    "a list for a name": json_row(["spare.png"]),
    "no name": b'{"text": "a hat"}',
    "no caption": b'{"file_name": "spare.png"}',
    "null for a caption": json_row(text=None),
    "a number for a caption": json_row(text=5),
    "NaN for a caption": json_row(text=math.nan),
    "a boolean for a caption": json_row(text=True),
    "an object for a caption": json_row(text={"en": "a hat"}),
    "an empty list of captions": json_row(text=[]),
    "a list in a list": json_row(text=[["a hat"]]),
    "a number in a list": json_row(text=["a hat", 5]),
    "null in a list": json_row(text=["a hat", None]),
    "a blank caption in a list": json_row(text=["a hat", " "]),
    "an empty caption": json_row(text=""),
    "a blank caption": json_row(text=" \n\u2003"),
    "a lone surrogate in a caption": json_row(text="\ud800"),
    "NULs in a caption": json_row(text="a\0 \0h\0a\0t\0"),
    "half a row": json_row()[:20],
    "a trailing comma": b'{"file_name": "spare.png", "text": "a hat",}',
    "two objects": json_row() + json_row(),
    "not JSON": b"spare.png: a hat",
    "a long number": b'{"file_name": "spare.png", "text": ' + b"9" * 5000 + b"}",
    "an infinite number": b'{"file_name": "spare.png", "text": 1e999}',
    "a list": b'["spare.png", "a hat"]',
    "a string": b'"spare.png"',
    "null": b"null",
    "a deep list": b"[" * 100_000,
    "a deep object": b'{"text":' * 100_000,
    "a deep caption": json_row().replace(b'"a hat"', b"[" * 900 + b"]" * 900),
    "Latin-1": '{"file_name": "spare.png", "text": "ein grüner Schal"}'.encode("latin-1"),
    "UTF-16": '{"file_name": "spare.png", "text": "a hat"}'.encode("utf-16"),
    "random bytes": np.random.default_rng(2).bytes(300).replace(b"\n", b""),
}

TRAPS_IN_JSONL = (
    "link-outside.png",
    "link-to-itself.png",
    "link-to-nothing.png",
    "link-to-folder.png",
    "folder.jpg",
    "pipe.jpg",
)
BAD_ONLY_WHEN_DECODED = ("the metadata itself", "a damaged file", "a damaged file with a newline in its name")

# ------------------------------------------------------------------------------------------------ members of tars, tars

Member = tuple[str, bytes, dict[str, Any]]  # name, content, fields of its header


def member(name: str, data: bytes = b"", **fields: Any) -> Member:
    return name, data, fields


def sample(stem: str, **files: bytes) -> list[Member]:
    return [member(f"{stem}.{suffix}", data) for suffix, data in files.items()]


def special_member(stem: str, kind: bytes, target: str = "") -> list[Member]:
    return [member(f"{stem}.png", type=kind, linkname=target), member(f"{stem}.txt", b"a hat")]


TAR_MEMBERS: dict[str, list[Member]] = {
    "no-caption": sample("no-caption", png=PNG),
    "no-image": sample("no-image", txt=b"a hat"),
    "empty-image": sample("empty-image", png=b"", txt=b"a hat"),
    "half-an-image": sample("half-an-image", jpg=truncated_image("JPEG", 0.5), txt=b"a hat"),
    "a-page": sample("a-page", jpg=b"<html>404</html>", txt=b"a hat"),
    "one-pixel": sample("one-pixel", png=encoded_image("one", size=(1, 1)), txt=b"a hat"),
    "empty-caption": sample("empty-caption", png=PNG, txt=b""),
    "blank-caption": sample("blank-caption", png=PNG, txt=b" \n"),
    "latin-1-caption": sample("latin-1-caption", png=PNG, txt="ein grüner Schal".encode("latin-1")),
    "half-json": sample("half-json", png=PNG, json=b'{"text": "a'),
    "random-json": sample("random-json", png=PNG, json=np.random.default_rng(3).bytes(5000)),
    "deep-json": sample("deep-json", png=PNG, json=b"[" * 100_000),
    "deep-caption": sample("deep-caption", png=PNG, json=b'{"text":' + b"[" * 900 + b"]" * 900 + b"}"),
    "list-as-json": sample("list-as-json", png=PNG, json=b'["a hat"]'),
    "number-in-json": sample("number-in-json", png=PNG, json=b'{"text": 5}'),
    "other-json": sample("other-json", png=PNG, json=b'{"caption": "a hat"}'),
    "link": special_member("link", tarfile.SYMTYPE, "../../outside/secret.png"),
    "hard-link": special_member("hard-link", tarfile.LNKTYPE, "/etc/passwd"),
    "pipe": special_member("pipe", tarfile.FIFOTYPE),
    "device": special_member("device", tarfile.CHRTYPE),
    "folder": special_member("folder", tarfile.DIRTYPE),
    "lone-link": special_member("lone-link", tarfile.SYMTYPE, "../../outside/secret.png")[:1],
    "link-as-caption": [
        *sample("link-as-caption", png=PNG),
        member("link-as-caption.txt", type=tarfile.SYMTYPE, linkname="../../outside/secret.txt"),
    ],
    "../outside": sample("../outside", png=PNG),
    "name-with\nnewline": sample("name-with\nnewline", png=PNG),
}


def tar_bytes(members: Iterable[Member], end_marker: bool = True) -> bytes:
    """A tar; without its end marker, more members can be appended."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data, fields in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in fields.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(data))
        end = buffer.tell()
    return buffer.getvalue()[: None if end_marker else end]


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """The header of a tar member, with any stated size."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


LAST = tar_bytes(sample("last", png=PNG, txt=b"a hat"))
CAPTION = tar_bytes(sample("last", txt=b"a hat"), end_marker=False)  # of the image that comes next
TARS: dict[str, bytes] = {  # what follows two good samples
    "cut-in-a-header.tar": LAST[:100],
    "cut-in-an-image.tar": LAST[: 512 + len(PNG) // 2],
    "cut-before-a-caption.tar": LAST[: LAST.index(b"last.txt")],
    "cut-in-a-caption.tar": LAST[: LAST.index(b"a hat") + 3],
    "cut-between-samples.tar": b"",
    "wrong-checksum.tar": with_flipped_bit(LAST, 150),
    "page-within.tar": b"<html>503 Service Unavailable</html>".ljust(512) + LAST,
    "minus-one.tar": CAPTION + header("last.png", -1) + LAST,
    "minus-two.tar": CAPTION + header("last.png", -2) + LAST,
    "backwards.tar": CAPTION + header("last.png", -512) + LAST,
    "back-to-a-caption.tar": CAPTION + header("last.png", -512 - len(CAPTION)) + LAST,
    "huge-image.tar": CAPTION + header("last.png", 2**60) + LAST,
    "huger-image.tar": CAPTION + header("last.png", 2**80) + LAST,
    "huge-caption.tar": header("last.txt", 2**60) + LAST,
    "huge-name.tar": header("last.png", 2**60, tarfile.GNUTYPE_LONGNAME) + LAST,
    "huge-pax-header.tar": header("last.png", 2**60, tarfile.XHDTYPE) + LAST,
    "deep-names.tar": (header("a", 2, tarfile.GNUTYPE_LONGNAME) + b"a".ljust(512, b"\0")) * 2000 + LAST,
    "wrong-pax-header.tar": header("last.png", 9, tarfile.XHDTYPE) + b"0 size=x\n".ljust(512, b"\0") + LAST,
    "image-twice.tar": tar_bytes(sample("image-twice-2", png=PNG)),
    "caption-twice.tar": tar_bytes([member("caption-twice-2.txt", b"a hat")]),
}
NOT_TARS: dict[str, bytes] = {
    "nothing.tar": b"",
    "text.tar": b"there was a tar here\n" * 100,
    "random.tar": np.random.default_rng(4).bytes(5000),
    "packed.tar": gzip.compress(LAST),
}

# ------------------------------------------------------------------------------------------------------ rows of parquet

PARQUET_ROWS: dict[str, tuple[dict[str, Any] | None, bytes | None]] = {
    "no image": (None, b"a hat"),
    "an image of nulls": ({"bytes": None, "path": None}, b"a hat"),
    "an image of no bytes": ({"bytes": b"", "path": "a.png"}, b"a hat"),
    "random bytes": ({"bytes": np.random.default_rng(5).bytes(500), "path": None}, b"a hat"),
    "half an image": ({"bytes": truncated_image("PNG", 0.5), "path": None}, b"a hat"),
    "a bomb": ({"bytes": png(60000, 60000), "path": None}, b"a hat"),
    "one pixel": ({"bytes": encoded_image("one", size=(1, 1)), "path": None}, b"a hat"),
    "only the path of a file": ({"bytes": None, "path": "{outside}/secret.png"}, b"a hat"),
    "only the path of a system file": ({"bytes": None, "path": "/etc/passwd"}, b"a hat"),
    "only a URL": ({"bytes": None, "path": "http://127.0.0.1:9/a.png"}, b"a hat"),
    "no caption": ({"bytes": PNG, "path": None}, None),
    "an empty caption": ({"bytes": PNG, "path": None}, b""),
    "a blank caption": ({"bytes": PNG, "path": None}, b" \n "),
    "a caption in Latin-1": ({"bytes": PNG, "path": None}, "ein grüner Schal".encode("latin-1")),
    "nothing at all": (None, None),
}

UNCAPTIONED = {  # bad only because they have no caption
    "caption-missing.png",
    "caption-empty.png",
    "caption-blank.png",
    "caption-byte-order-mark.png",
    "name-with\nnewline.png",
    "no caption",
    "null for a caption",
    "an empty list of captions",
    "a blank caption in a list",
    "an empty caption",
    "a blank caption",
    "no-caption",
    "empty-caption",
    "blank-caption",
    "list-as-json",
    "other-json",
    "link-as-caption",
    "../outside",
    "name-with\nnewline",
    "caption-folder.png",
}

# -------------------------------------------------------------------------------------------------------------- sources


@dataclass
class MixedSource:
    """A source of good and hostile inputs: the keys of the hostile ones, and the good ones' captions by SHA-256."""

    path: Path
    bad_keys: dict[str, str] = field(default_factory=dict)  # hostile input → a pattern for the key it is reported by
    good: dict[bytes, tuple[str, ...]] = field(default_factory=dict)

    def add_image(self, name: str) -> tuple[bytes, str]:
        """Adds a good image; returns its encoded bytes and its caption."""
        caption = f"the image {name!a} of {self.path.name}"
        data = encoded_image(caption)
        self.good[hashlib.sha256(data).digest()] = (caption,)
        return data, caption

    def add_sample(self, stem: str) -> list[Member]:
        """Adds a good sample; returns its members of a tar."""
        data, caption = self.add_image(stem)
        return sample(stem, png=data, txt=caption.encode())


def printable(name: str) -> str:
    """A pattern for a name, whose unprintable characters may be escaped in any way."""
    return re.sub(r"[\n\udce9]", ".+", name.replace(".", r"\."))


def write_files(folder: Path, outside: Path, names: Sequence[str]) -> MixedSource:
    """Images, each with a caption file."""
    source = MixedSource(folder)
    for number, name in enumerate(("", *names)):
        if number % 8 == 0:
            good = folder / f"{'amz'[number // 8 % 3]}-{number}.png"
            data, caption = source.add_image(good.name)
            good.write_bytes(data)
            good.with_suffix(".txt").write_text(caption)
        if not name:
            continue
        path = folder / name
        text = path.with_suffix(".txt")
        source.bad_keys[name] = printable(name)
        if name in CAPTIONS:
            path.write_bytes(encoded_image(name))
            if (content := CAPTIONS[name]) is not None:
                text.write_bytes(content)
        else:
            text.write_text("a hat")
            if name in DAMAGED:
                path.write_bytes(DAMAGED[name]())
            else:
                TRAPS[name](path, outside)
    return source


def write_jsonl(folder: Path, outside: Path, names: Sequence[str]) -> MixedSource:
    """Images that a metadata.jsonl lists."""
    source, rows = MixedSource(folder), []
    for name in TRAPS_IN_JSONL:
        TRAPS[name](folder / name, outside)
    (folder / "spare.png").write_bytes(encoded_image("spare"))
    for name in ("damaged.jpg", "damaged\n.jpg"):
        (folder / name).write_bytes(b"damaged")
    for number, name in enumerate(("", *names)):
        if number % 8 == 0:
            data, caption = source.add_image(f"{number}.png")
            (folder / f"{number}.png").write_bytes(data)
            rows.append(json_row(f"{number}.png", caption))
        if name:
            rows.append(JSONL_LINES[name].replace(b"{outside}", os.fsencode(outside)))
            source.bad_keys[name] = rf".*/metadata\.jsonl line {len(rows)}(, .+)?"
            if name in BAD_ONLY_WHEN_DECODED:
                source.bad_keys[name] = printable(json.loads(JSONL_LINES[name])["file_name"])
    (folder / "metadata.jsonl").write_bytes(b"\n".join(rows))
    return source


def write_tars(folder: Path, outside: Path, names: Sequence[str]) -> MixedSource:
    """Tars, of which one holds all bad members."""
    source = MixedSource(folder)
    members = source.add_sample("first")
    for number, name in enumerate(names):
        if name in TAR_MEMBERS:
            members += TAR_MEMBERS[name] if number % 8 else [*source.add_sample(str(number)), *TAR_MEMBERS[name]]
            source.bad_keys[name] = rf"members\.tar:{printable(name)}(\.\w+)?"
        elif name in TARS:
            stem = name.removesuffix(".tar")
            source.bad_keys[name] = rf"(.*/)?{stem}\.tar(:(last|{stem}-2).*)?"
            (folder / name).write_bytes(
                tar_bytes([*source.add_sample(f"{stem}-1"), *source.add_sample(f"{stem}-2")], end_marker=False)
                + TARS[name]
            )
        else:
            source.bad_keys[name] = rf"(.*/)?{name}"
            (folder / name).write_bytes(NOT_TARS[name])
    (folder / "members.tar").write_bytes(tar_bytes([*members, *source.add_sample("last")]))
    return source


def write_parquet(folder: Path, outside: Path, names: Sequence[str]) -> MixedSource:
    """Rows of a parquet file."""
    source, table = MixedSource(folder), []
    for number, name in enumerate(("", *names)):
        if number % 8 == 0:
            data, caption = source.add_image(str(number))
            table.append(({"bytes": data, "path": "/etc/passwd"}, caption.encode()))
        if name:
            image, text = PARQUET_ROWS[name]
            if image and image["path"]:
                image = {**image, "path": image["path"].replace("{outside}", str(outside))}
            source.bad_keys[name] = f"rows:{len(table)}"
            table.append((image, text))
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images, texts = zip(*table, strict=True)
    # A view: a cast would refuse bytes that aren't UTF-8.
    columns = {"image": pa.array(images, kind), "text": pa.array(texts, pa.binary()).view(pa.string())}
    pq.write_table(pa.table(columns), folder / "train.parquet")
    return source


KINDS: dict[str, tuple[Callable[[Path, Path, Sequence[str]], MixedSource], tuple[str, ...]]] = {
    "files": (write_files, (*DAMAGED, *CAPTIONS, *TRAPS)),
    "lines": (write_jsonl, tuple(JSONL_LINES)),
    "tars": (write_tars, (*TAR_MEMBERS, *TARS, *NOT_TARS)),
    "rows": (write_parquet, tuple(PARQUET_ROWS)),
}
HOSTILE = [(kind, name) for kind, (_, names) in KINDS.items() for name in names]


def write_source(tmp_path: Path, kind: str, *names: str) -> MixedSource:
    """A source of good inputs and of hostile ones: `names`, or all of its kind. Secrets lie outside of it."""
    outside, folder = tmp_path / "outside", tmp_path / kind
    folder.mkdir()
    if not outside.exists():
        outside.mkdir()
        (outside / "secret.png").write_bytes(encoded_image("secret"))
        (outside / "secret.txt").write_text(SECRET)
    write, all_names = KINDS[kind]
    return write(folder, outside, names or all_names)


def arguments(tmp_path: Path, sources: Sequence[MixedSource], *overrides: str) -> list[str]:
    paths = ", ".join(str(source.path) for source in sources)
    return [f"run.dir={tmp_path / 'run'}", "run.tracker=none", f"data.source=[{paths}]", "data.size=16", *overrides]


def settings(root: Path, tmp_path: Path, sources: Sequence[MixedSource], *overrides: str) -> loader.Config:
    return loader.load(root / "configs/tiny.yaml", arguments(tmp_path, sources, *overrides))


def assert_bad_samples(bad: Sequence[BadSample], sources: Sequence[MixedSource]) -> None:
    """Every hostile input is reported, in one line each, and nothing else is."""
    patterns = [
        (name, (f"{number}:" if len(sources) > 1 else "") + pattern)
        for number, source in enumerate(sources)
        for name, pattern in source.bad_keys.items()
    ]
    for name, pattern in patterns:
        assert any(re.fullmatch(pattern, sample.key, re.DOTALL) for sample in bad), f"{name} is not reported"
    for sample in bad:
        assert any(re.fullmatch(pattern, sample.key, re.DOTALL) for _, pattern in patterns), (
            f"{sample} is reported, but isn't hostile"
        )
        for text in (sample.key, sample.reason, sample.fix):
            assert text.strip()
            assert len(text.splitlines()) == 1, text
        assert len(sample.reason) < 6000, sample  # a reason may quote a long path, but never a file's content


def assert_good_samples(index: Index, sources: Sequence[MixedSource]) -> None:
    """The index holds every good image with its captions, and nothing else."""
    assert {entry.sha256: entry.captions for entry in index} == {
        k: v for source in sources for k, v in source.good.items()
    }


# ------------------------------------------------------------------------------------------------- what a process opens


class AccessLog:
    """Records the files that this process opens, and fails on processes and connections that it starts."""

    FILE_EVENTS = ("open", "os.listdir", "os.scandir")
    FORBIDDEN_EVENTS = ("subprocess.Popen", "os.system", "os.posix_spawn", "os.exec", "socket.connect")

    def __init__(self) -> None:
        self.recording, self.opened, self.forbidden_events = False, set[str](), list[str]()
        sys.addaudithook(self.record)  # Python can't remove an audit hook

    def record(self, event: str, details: tuple[Any, ...]) -> None:
        if not self.recording:
            return
        if event in self.FILE_EVENTS and isinstance(details[0], str | bytes):
            self.opened.add(os.path.realpath(os.fsdecode(details[0])))
        elif event in self.FORBIDDEN_EVENTS:
            self.forbidden_events.append(f"{event} {details}")

    @contextmanager
    def nothing_outside(self, tmp_path: Path) -> Iterator[None]:
        """Fails where the block opens secrets or system files, or starts a process or a connection."""
        self.recording, self.opened, self.forbidden_events = True, set(), []
        try:
            yield
        finally:
            self.recording = False
        assert not self.forbidden_events
        forbidden = (str((tmp_path / "outside").resolve()), "/etc/passwd", "/dev/zero")
        assert not [name for name in self.opened if name.startswith(forbidden)]


@pytest.fixture(scope="module")
def access_log() -> AccessLog:
    return AccessLog()


@pytest.fixture(autouse=True)
def no_reader_of_pipes(tmp_path: Path) -> Iterator[None]:
    """Unblocks readers of pipes, which no timeout could, and fails where there was one."""
    done, opened = threading.Event(), []

    def unblock() -> None:
        while not done.wait(5):
            for path in tmp_path.rglob("*"):
                if stat.S_ISFIFO(path.lstat().st_mode):
                    with suppress(OSError):  # no process reads it
                        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
                        opened.append(path)

    thread = threading.Thread(target=unblock, daemon=True)
    thread.start()
    yield
    done.set()
    thread.join()
    assert not opened


def snapshot(folder: Path) -> dict[str, tuple[object, ...]]:
    """Mode, size, modification time and content of every path in a folder."""
    entries: dict[str, tuple[object, ...]] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content: object = path.readlink() if path.is_symlink() else None
        if stat.S_ISREG(status.st_mode) and os.access(path, os.R_OK):
            content = hashlib.sha256(path.read_bytes()).digest()
        entries[str(path)] = (status.st_mode, status.st_size, status.st_mtime_ns, content)
    return entries


# ---------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize(("kind", "name"), HOSTILE, ids=[f"{kind}: {name!a}" for kind, name in HOSTILE])
def test_a_hostile_input_is_reported_and_the_good_ones_are_kept(
    kind: str, name: str, root: Path, tmp_path: Path, access_log: AccessLog
) -> None:
    sources = [write_source(tmp_path, kind, name)]
    with access_log.nothing_outside(tmp_path):
        index = indexed(settings(root, tmp_path, sources))
    assert_bad_samples(list(index.bad_samples()), sources)
    assert_good_samples(index, sources)


def test_all_hostile_inputs_together_are_reported_and_nothing_outside_is_read(
    root: Path, tmp_path: Path, access_log: AccessLog
) -> None:
    assert len(HOSTILE) >= 40
    sources = [write_source(tmp_path, kind) for kind in KINDS]
    assert sum(len(source.bad_keys) for source in sources) == len(HOSTILE)
    before = {kind: snapshot(tmp_path / kind) for kind in (*KINDS, "outside")}
    with access_log.nothing_outside(tmp_path):
        index = indexed(settings(root, tmp_path, sources))
        second_index = indexed(settings(root, tmp_path, sources))  # reuses what the first one read
        write_report(index, tmp_path / "data-report.json")
    assert os.path.realpath(tmp_path / "files/a-0.png") in access_log.opened  # the log records what is opened
    for built in (index, second_index):
        assert_bad_samples(list(built.bad_samples()), sources)
        assert_good_samples(built, sources)
    assert {kind: snapshot(tmp_path / kind) for kind in before} == before

    report = json.loads((tmp_path / "data-report.json").read_text("utf-8"))
    assert_bad_samples([BadSample(**bad) for bad in report["list"]], sources)
    assert (report["images"], report["bad"]) == (len(index), len(report["list"]))

    secret = hashlib.sha256(encoded_image("secret")).digest()
    for file in (tmp_path / "run").rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert SECRET.encode() not in content
            assert secret not in content


def test_without_captions_all_other_hostile_inputs_are_reported_and_nothing_outside_is_read(
    root: Path, tmp_path: Path, access_log: AccessLog
) -> None:
    sources = [write_source(tmp_path, kind) for kind in KINDS]
    for source in sources:
        assert source.bad_keys.keys() & UNCAPTIONED
        source.bad_keys = {name: pattern for name, pattern in source.bad_keys.items() if name not in UNCAPTIONED}
    with access_log.nothing_outside(tmp_path):
        index = indexed(settings(root, tmp_path, sources, "stage2.conditions=[]", "stage2.pooled_text=false"))
    assert_bad_samples(list(index.bad_samples()), sources)
    expected = {key: captions for source in sources for key, captions in source.good.items()}
    captioned = {entry.sha256: entry.captions for entry in index if entry.captions not in (("",), ("a hat",))}
    assert captioned == expected
    assert SECRET not in {caption for entry in index for caption in entry.captions}


def test_the_share_of_bad_images_decides_whether_to_stop_in_one_line(root: Path, tmp_path: Path) -> None:
    sources = [write_source(tmp_path, "files", "jpeg-half.jpg", "caption-blank.png", "pipe.jpg")]
    assert len(sources[0].good) == 1
    for overrides, rule in (
        (["data.max_bad=1"], ""),
        (["data.max_bad=0.75"], ""),
        (["data.max_bad=0.7"], "data.max_bad is 0.7"),
        (["data.max_bad=1", "data.on_error=stop"], "data.on_error is stop"),
    ):
        index = indexed(settings(root, tmp_path, sources, *overrides))
        message = stop_reason(index, tmp_path / "data-report.json")
        if rule:
            first = next(index.bad_samples())
            for fragment in ("3 of 4 images", rule, str(tmp_path / "data-report.json"), first.key, first.reason):
                assert fragment in message
            assert len(message.splitlines()) == 1
        else:
            assert message == ""


def test_a_source_without_good_images_stops_whatever_max_bad_is(root: Path, tmp_path: Path) -> None:
    source = write_source(tmp_path, "files", "jpeg-half.jpg")
    for good in (tmp_path / "files").glob("a-*"):
        good.unlink()
    message = stop_reason(indexed(settings(root, tmp_path, [source], "data.max_bad=1")), tmp_path / "data-report.json")
    assert "no usable image" in message
    assert "jpeg-half.jpg" in message
    assert len(message.splitlines()) == 1


def test_a_caption_nested_to_any_depth_is_reported(root: Path, tmp_path: Path) -> None:
    deep = [b'{"file_name": "a.png", "text": ' + b"[" * n + b"]" * n + b"}" for n in range(1, 1100)]
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/a.png").write_bytes(PNG)
    (tmp_path / "deep/metadata.jsonl").write_bytes(b"\n".join([*deep, json_row("a.png")]))
    members = [sample(f"{n}", png=PNG, json=line) for n, line in enumerate(deep)]
    (tmp_path / "deep.tar").write_bytes(tar_bytes([*itertools.chain(*members), *sample("a", png=PNG, txt=b"a hat")]))
    for source in ("deep", "deep.tar"):
        index = indexed(settings(root, tmp_path, [MixedSource(tmp_path / source)]))
        assert (index.bad_count(), len(index)) == (len(deep), 1)


def test_names_in_a_tar_are_never_followed_as_paths(root: Path, tmp_path: Path, access_log: AccessLog) -> None:
    source = write_source(tmp_path, "tars", "half-an-image")
    names = ("../outside/secret", "/etc/hosts", "CON", "new\nline", "Latin-1 \udce9", "x" * 300)
    members = itertools.chain(*(source.add_sample(name) for name in names))
    (tmp_path / "tars/names.tar").write_bytes(tar_bytes(members))
    with access_log.nothing_outside(tmp_path):
        index = indexed(settings(root, tmp_path, [source]))
    assert_bad_samples(list(index.bad_samples()), [source])
    assert_good_samples(index, [source])
    assert all(entry.key.isprintable() for entry in index)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_bad_rows_of_a_metadata_table_are_reported(
    suffix: str, root: Path, tmp_path: Path, access_log: AccessLog
) -> None:
    source = MixedSource(tmp_path / "table")
    source.path.mkdir()
    (source.path / "spare.png").write_bytes(encoded_image("spare"))
    rows: list[tuple[bytes, bytes | None]] = []
    for name, text in (
        (b"gone.png", b"a hat"),
        (b"../outside/secret.png", b"a hat"),
        (b"/etc/passwd", b"a hat"),
        (b"", b"a hat"),
        (b"name-\xe9.png", b"a hat"),
        (b"spare.png", None),
        (b"spare.png", b" "),
        (b"spare.png", b"a gr\xfcn hat"),
        (b"spare.png", b"a\0 \0h\0a\0t\0"),
    ):
        data, caption = source.add_image(f"good-{len(rows)}.png")
        (source.path / f"good-{len(rows)}.png").write_bytes(data)
        rows += [(f"good-{len(rows)}.png".encode(), caption.encode()), (name, text)]
        line = len(rows) + (suffix == "csv")  # a CSV begins with a header
        source.bad_keys[f"{name!r}, {text!r}"] = rf".*/metadata\.{suffix} \w+ {line}(, .+)?"
    if suffix == "csv":
        lines = [b"file_name,text", *(name + (b"" if text is None else b"," + text) for name, text in rows)]
        (source.path / "metadata.csv").write_bytes(b"\n".join(lines))
    else:
        columns = zip(("file_name", "text"), zip(*rows, strict=True), strict=True)
        table = pa.table({name: pa.array(values, pa.binary()).view(pa.string()) for name, values in columns})
        pq.write_table(table, source.path / "metadata.parquet")
    with access_log.nothing_outside(tmp_path):
        index = indexed(settings(root, tmp_path, [source]))
    assert_bad_samples(list(index.bad_samples()), [source])
    assert_good_samples(index, [source])


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_a_metadata_file_that_leads_out_of_the_folder_is_not_read(
    name: str, root: Path, tmp_path: Path, access_log: AccessLog
) -> None:
    source, outside = write_source(tmp_path, "files", "pipe.jpg"), tmp_path / "outside" / name
    table = {"file_name": ["a-0.png"], "text": [SECRET]}
    if name.endswith("parquet"):
        pq.write_table(pa.table(table), outside)
    else:
        outside.write_text(
            json.dumps({k: v[0] for k, v in table.items()})
            if name.endswith("l")
            else f"file_name,text\na-0.png,{SECRET}\n"
        )
    (tmp_path / "files" / name).symlink_to(outside)
    with access_log.nothing_outside(tmp_path), pytest.raises(UserError, match=f"{name}.* leads out of the folder"):
        indexed(settings(root, tmp_path, [source]))


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_a_pipe_in_place_of_the_metadata_is_refused_at_once(name: str, root: Path, tmp_path: Path) -> None:
    source = write_source(tmp_path, "files", "one-pixel.png")
    os.mkfifo(tmp_path / "files" / name)
    with pytest.raises(UserError, match=name):
        indexed(settings(root, tmp_path, [source]))


@pytest.mark.parametrize("kind", ["tars", "rows"])
def test_a_stream_reports_the_same_and_yields_all_good_samples(
    kind: str, root: Path, tmp_path: Path, access_log: AccessLog
) -> None:
    names = [name for name in KINDS[kind][1] if name != "packed.tar"]  # a stream reads compressed tars
    source = write_source(tmp_path, kind, *names)
    config = settings(root, tmp_path, [source], "data.streaming=true", "data.cache=none")
    with access_log.nothing_outside(tmp_path):
        bad, good = [], {}
        stream = streamed(config)
        for item in (item for shard in stream.shards for item in stream.sources.samples(shard)):
            if isinstance(item, BadSample):
                bad.append(item)
                continue
            try:
                decode(item[1], min_side=config.data.min_side)
            except BadSampleError as error:
                bad.append(BadSample(item[0].key, *error.args))
            else:
                good[hashlib.sha256(item[1]).digest()] = item[0].captions
    source.bad_keys = {name: pattern.replace("rows:", "rows:0-") for name, pattern in source.bad_keys.items()}
    assert_bad_samples(bad, [source])
    assert good == source.good


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_training_uses_every_good_image_and_stops_where_on_error_is_stop(
    root: Path, tmp_path: Path, words: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = [write_source(tmp_path, kind) for kind in KINDS]
    before = {kind: snapshot(tmp_path / kind) for kind in (*KINDS, "outside")}
    good = {key for source in sources for key in source.good}
    steps = -(-len(good) // 8)
    overrides = arguments(
        tmp_path,
        sources,
        "data.max_bad=1",
        f"text.model={words}",
        "sample.prompts=[]",
        f"stage1.steps={steps}",
        f"stage2.steps={steps}",
        "stage1.batch=8",
        "stage2.batch=8",
    )
    command = ["--config", str(root / "configs/tiny.yaml"), *overrides]
    assert train_ldm.main(command) == 0
    assert (tmp_path / "run/pipeline/model_index.json").exists()
    report = json.loads((tmp_path / "run/data-report.json").read_text("utf-8"))
    assert_bad_samples([BadSample(**bad) for bad in report["list"]], sources)
    assert report["images"] == len(good)

    AcceleratorState._reset_state(reset_partial_state=True)
    config = loader.load(root / "configs/tiny.yaml", overrides)
    plan = SamplePlan(indexed(config).select("train"), spec_of(config, 8))
    assert {plan[n].entry.sha256 for n in range(8 * steps)} == good
    assert {kind: snapshot(tmp_path / kind) for kind in before} == before

    capsys.readouterr()
    assert train_ldm.main([*command, f"run.dir={tmp_path / 'other'}", "data.on_error=stop"]) == 2
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1
    assert re.search(r"(^|\r)error: \d+ of \d+ images are bad, and data\.on_error is stop", stderr)
    assert (tmp_path / "other/data-report.json").exists()
    assert not list((tmp_path / "other").glob("stage*/checkpoints"))
