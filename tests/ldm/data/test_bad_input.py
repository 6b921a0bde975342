"""Damaged and hostile inputs among good ones: each is named, none leads anywhere, and all good ones are trained on."""

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
from ldm.data.records import BadSample, BadSampleError
from ldm.utils.errors import UserError

pytestmark = pytest.mark.timeout(30)  # nothing here may wait for a pipe, or go round in circles
SECRET = "the secret lighthouse"

# ------------------------------------------------------------------------------------------------- damaged pictures


def picture(name: str, kind: str = "PNG", size: tuple[int, int] = (20, 16)) -> bytes:
    """An encoded picture, another one for each name."""
    rng, buffer = np.random.default_rng([*name.encode()]), io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def part(kind: str, share: float) -> bytes:
    """The beginning of a picture."""
    data = picture("part", kind, (60, 40))
    return data[: int(len(data) * share)]


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, data: bytes = b"", depth: int = 8, *more: bytes) -> bytes:
    """A grey PNG of any claims: `data` is its compressed pixels."""
    header = struct.pack(">IIBBBBB", width & 0xFFFFFFFF, height & 0xFFFFFFFF, depth, 0, 0, 0, 0)
    chunks = (chunk(b"IHDR", header), *more, chunk(b"IDAT", data), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def changed(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def flipped(data: bytes, at: int) -> bytes:
    """One bit of a file is another."""
    return changed(data, at, bytes([data[at] ^ 16]))


def packed(row: bytes, rows: int) -> bytes:
    """`rows` times the same row, compressed as a PNG has it."""
    pack = zlib.compressobj(1)
    return b"".join([*(pack.compress((b"\0" + row) * 1000) for _ in range(rows // 1000)), pack.flush()])


def tiff(*entries: tuple[int, int, int, int]) -> bytes:
    return struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + b"".join(struct.pack("<HHII", *e) for e in entries)


JPEG, PNG = picture("whole", "JPEG"), picture("whole")
SMALL = zlib.compress(bytes(21 * 16))  # pixels of 20 × 16
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\n0 0 moveto 9 9 lineto stroke\n%%EOF\n"

DAMAGED: dict[str, Callable[[], bytes]] = {
    "jpeg-two-bytes.jpg": lambda: JPEG[:2],
    "jpeg-header.jpg": lambda: JPEG[: JPEG.index(b"\xff\xda")],
    "jpeg-quarter.jpg": lambda: part("JPEG", 0.25),
    "jpeg-half.jpg": lambda: part("JPEG", 0.5),
    "jpeg-most.jpg": lambda: part("JPEG", 0.97),
    "jpeg-65500-square.jpg": lambda: changed(JPEG, JPEG.index(b"\xff\xc0") + 5, struct.pack(">HH", 65500, 65500)),
    "jpeg-no-height.jpg": lambda: changed(JPEG, JPEG.index(b"\xff\xc0") + 5, struct.pack(">HH", 0, 20)),
    "png-signature.png": lambda: PNG[:8],
    "png-header.png": lambda: PNG[:33],
    "png-half.png": lambda: part("PNG", 0.5),
    "png-most.png": lambda: part("PNG", 0.97),
    "png-wrong-sum.png": lambda: flipped(PNG, 29),
    "png-wrong-bit.png": lambda: flipped(PNG, len(PNG) // 2),
    "png-wrong-depth.png": lambda: png(20, 16, SMALL, depth=99),
    "png-no-side.png": lambda: png(0, 0),
    "png-negative.png": lambda: png(-20, -16),
    "png-no-pixels.png": lambda: png(20, 16),
    "png-60000-square.png": lambda: png(60000, 60000, zlib.compress(bytes(1000))),
    "png-bomb.png": lambda: png(20000, 20000, packed(bytes(2500), 20000), 1),
    "webp-header.webp": lambda: picture("whole", "WEBP")[:20],
    "webp-half.webp": lambda: part("WEBP", 0.5),
    "webp-most.webp": lambda: part("WEBP", 0.97),
    "gif-header.gif": lambda: picture("whole", "GIF")[:13],
    "gif-half.gif": lambda: part("GIF", 0.5),
    "gif-most.gif": lambda: part("GIF", 0.97),
    "gif-65535-square.gif": lambda: changed(picture("whole", "GIF"), 6, b"\xff\xff\xff\xff"),
    "tiff-header.tif": lambda: picture("whole", "TIFF")[:8],
    "tiff-half.tif": lambda: part("TIFF", 0.5),
    "tiff-most.tif": lambda: part("TIFF", 0.97),
    "tiff-no-pixels.tif": lambda: tiff((256, 4, 1, 20), (257, 4, 1, 16), (258, 3, 1, 8), (262, 3, 1, 1)),
    "tiff-long-tag.tif": lambda: tiff((256, 4, 1, 20), (257, 4, 1, 16), (273, 4, 0x7FFFFFFF, 8)),
    "bmp-half.bmp": lambda: part("BMP", 0.5),
    "avif-half.avif": lambda: part("AVIF", 0.5),
    "nothing.jpg": lambda: b"",
    "zeros.jpg": lambda: bytes(4096),
    "random.png": lambda: np.random.default_rng(0).bytes(4096),
    "text.jpg": lambda: b"there was a picture here\n",
    "page.jpg": lambda: b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "json.png": lambda: b'{"error": "rate limit exceeded"}',
    "document.jpg": lambda: b"%PDF-1.7\n1 0 obj <</Type /Catalog>> endobj\ntrailer <</Root 1 0 R>>\n%%EOF\n",
    "drawing.png": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="/etc/passwd"/></svg>',
    "program.jpg": lambda: POSTSCRIPT,
    "archive.png": lambda: gzip.compress(PNG),
    "one-pixel.png": lambda: picture("one", size=(1, 1)),
    "line.png": lambda: picture("line", size=(1, 5000)),
    "nine-pixels.jpg": lambda: picture("nine", "JPEG", (3, 3)),
}

# -------------------------------------------------------------------------- what stands beside and behind a picture

CAPTIONS: dict[str, bytes | None] = {
    "caption-missing.png": None,
    "caption-empty.png": b"",
    "caption-blank.png": b" \n\t\r\n ",
    "caption-of-a-mark.png": b"\xef\xbb\xbf",
    "caption-latin-1.png": "ein grüner Schal".encode("latin-1"),
    "caption-utf-16.png": "ein grüner Schal".encode("utf-16"),
    "caption-utf-16-without-mark.png": b"a\0 \0h\0a\0t\0",
    "caption-random.png": np.random.default_rng(1).bytes(200),
}


def linked(target: str) -> Callable[[Path, Path], None]:
    """A link to a file outside, or to what has an absolute name."""
    return lambda path, outside: path.symlink_to(outside / target)


def with_caption(make: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
    """A good picture whose caption file is made in another way."""

    def trap(path: Path, outside: Path) -> None:
        path.write_bytes(picture(path.name))
        path.with_suffix(".txt").unlink()
        make(path.with_suffix(".txt"), outside)

    return trap


def unreadable(path: Path, outside: Path) -> None:
    path.write_bytes(picture(path.name))
    path.chmod(0)


def uncaptioned(path: Path, outside: Path) -> None:
    path.write_bytes(picture(path.name))
    path.with_suffix(".txt").unlink()


TRAPS: dict[str, Callable[[Path, Path], None]] = {
    "link-outside.png": linked("secret.png"),
    "link-to-passwd.jpg": linked("/etc/passwd"),
    "link-to-device.jpg": linked("/dev/zero"),
    "link-to-itself.png": lambda path, _: path.symlink_to(path),
    "link-to-nothing.png": lambda path, _: path.symlink_to("gone.png"),
    "link-to-folder.png": linked("."),
    "folder.jpg": lambda path, _: path.mkdir(),
    "pipe.jpg": lambda path, _: os.mkfifo(path),
    "caption-outside.png": with_caption(linked("secret.txt")),
    "caption-to-itself.png": with_caption(lambda path, _: path.symlink_to(path)),
    "caption-to-nothing.png": with_caption(lambda path, _: path.symlink_to("gone.txt")),
    "caption-pipe.png": with_caption(lambda path, _: os.mkfifo(path)),
    "caption-folder.png": with_caption(lambda path, _: path.mkdir()),
    "name-of-two\nlines.png": uncaptioned,
    "name-latin-1-\udce9.png": lambda path, _: path.write_bytes(picture("latin-1")) and None,  # the byte E9
}
if os.geteuid():  # root reads everything
    TRAPS |= {"unreadable.png": unreadable, "caption-unreadable.png": with_caption(unreadable)}

# --------------------------------------------------------------------------------------------- lines of metadata.jsonl


def row(name: object = "spare.png", text: object = "a hat") -> bytes:
    return json.dumps({"file_name": name, "text": text}).encode()


LINES: dict[str, bytes] = {
    "a missing file": row("gone.png"),
    "a way out": row("../outside/secret.png"),
    "a way out and in and out": row("../lines/../outside/secret.png"),
    "an absolute name": row("{outside}/secret.png"),
    "a file of the system": row("/etc/passwd"),
    "a device": row("/dev/zero"),
    "a link outside": row("link-outside.png"),
    "a link to itself": row("link-to-itself.png"),
    "a link to nothing": row("link-to-nothing.png"),
    "a file behind a linked folder": row("link-to-folder.png/secret.png"),
    "a folder": row("folder.jpg"),
    "the folder itself": row("."),
    "a pipe": row("pipe.jpg"),
    "a URL": row("http://127.0.0.1:9/a.png"),
    "a file's URL": row("file://{outside}/secret.png"),
    "the metadata itself": row("metadata.jsonl"),
    "a file of damaged content": row("damaged.jpg"),
    "a damaged file with a name of two lines": row("damaged\n.jpg"),
    "a name with a NUL": row("a\0.png"),
    "a name with half a letter": row("\ud800.png"),
    "a name of two lines": row("gone\n.png"),
    "a long name": row("x" * 5000 + ".png"),
    "a deep name": row("x/" * 2000 + "a.png"),
    "an empty name": row(""),
    "a number as name": row(5),
    "null as name": row(None),
    "a list as name": row(["spare.png"]),
    "no name": b'{"text": "a hat"}',
    "no caption": b'{"file_name": "spare.png"}',
    "null as caption": row(text=None),
    "a number as caption": row(text=5),
    "not a number as caption": row(text=math.nan),
    "a truth as caption": row(text=True),
    "an object as caption": row(text={"en": "a hat"}),
    "no caption in a list": row(text=[]),
    "a list in a list": row(text=[["a hat"]]),
    "a number in a list": row(text=["a hat", 5]),
    "null in a list": row(text=["a hat", None]),
    "a blank in a list": row(text=["a hat", " "]),
    "an empty caption": row(text=""),
    "a blank caption": row(text=" \n\u2003"),
    "half a letter as caption": row(text="\ud800"),
    "NULs in a caption": row(text="a\0 \0h\0a\0t\0"),
    "half a line": row()[:20],
    "a comma too many": b'{"file_name": "spare.png", "text": "a hat",}',
    "two objects": row() + row(),
    "no JSON": b"spare.png: a hat",
    "a long number": b'{"file_name": "spare.png", "text": ' + b"9" * 5000 + b"}",
    "an infinite number": b'{"file_name": "spare.png", "text": 1e999}',
    "a list": b'["spare.png", "a hat"]',
    "a string": b'"spare.png"',
    "null": b"null",
    "a deep list": b"[" * 100_000,
    "a deep object": b'{"text":' * 100_000,
    "a deep caption": row().replace(b'"a hat"', b"[" * 900 + b"]" * 900),
    "Latin-1": '{"file_name": "spare.png", "text": "ein grüner Schal"}'.encode("latin-1"),
    "UTF-16": '{"file_name": "spare.png", "text": "a hat"}'.encode("utf-16"),
    "random bytes": np.random.default_rng(2).bytes(300).replace(b"\n", b""),
}

NAMED_IN_LINES = (
    "link-outside.png",
    "link-to-itself.png",
    "link-to-nothing.png",
    "link-to-folder.png",
    "folder.jpg",
    "pipe.jpg",
)
FOUND_WHEN_OPENED = ("the metadata itself", "a file of damaged content", "a damaged file with a name of two lines")

# ----------------------------------------------------------------------------------------------- members of tars, tars

Member = tuple[str, bytes, dict[str, Any]]  # name, content, fields of its header


def member(name: str, data: bytes = b"", **facts: Any) -> Member:
    return name, data, facts


def sample(stem: str, **files: bytes) -> list[Member]:
    return [member(f"{stem}.{suffix}", data) for suffix, data in files.items()]


def special(stem: str, kind: bytes, target: str = "") -> list[Member]:
    return [member(f"{stem}.png", type=kind, linkname=target), member(f"{stem}.txt", b"a hat")]


MEMBERS: dict[str, list[Member]] = {
    "no-caption": sample("no-caption", png=PNG),
    "no-picture": sample("no-picture", txt=b"a hat"),
    "empty-picture": sample("empty-picture", png=b"", txt=b"a hat"),
    "half-a-picture": sample("half-a-picture", jpg=part("JPEG", 0.5), txt=b"a hat"),
    "a-page": sample("a-page", jpg=b"<html>404</html>", txt=b"a hat"),
    "one-pixel": sample("one-pixel", png=picture("one", size=(1, 1)), txt=b"a hat"),
    "empty-caption": sample("empty-caption", png=PNG, txt=b""),
    "blank-caption": sample("blank-caption", png=PNG, txt=b" \n"),
    "latin-1-caption": sample("latin-1-caption", png=PNG, txt="ein grüner Schal".encode("latin-1")),
    "half-a-json": sample("half-a-json", png=PNG, json=b'{"text": "a'),
    "random-json": sample("random-json", png=PNG, json=np.random.default_rng(3).bytes(5000)),
    "deep-json": sample("deep-json", png=PNG, json=b"[" * 100_000),
    "deep-caption": sample("deep-caption", png=PNG, json=b'{"text":' + b"[" * 900 + b"]" * 900 + b"}"),
    "list-as-json": sample("list-as-json", png=PNG, json=b'["a hat"]'),
    "number-in-json": sample("number-in-json", png=PNG, json=b'{"text": 5}'),
    "other-json": sample("other-json", png=PNG, json=b'{"caption": "a hat"}'),
    "link": special("link", tarfile.SYMTYPE, "../../outside/secret.png"),
    "hard-link": special("hard-link", tarfile.LNKTYPE, "/etc/passwd"),
    "pipe": special("pipe", tarfile.FIFOTYPE),
    "device": special("device", tarfile.CHRTYPE),
    "folder": special("folder", tarfile.DIRTYPE),
    "lone-link": special("lone-link", tarfile.SYMTYPE, "../../outside/secret.png")[:1],
    "link-as-caption": [
        *sample("link-as-caption", png=PNG),
        member("link-as-caption.txt", type=tarfile.SYMTYPE, linkname="../../outside/secret.txt"),
    ],
    "../way-out": sample("../way-out", png=PNG),
    "name-of-two\nlines": sample("name-of-two\nlines", png=PNG),
}


def archive(members: Iterable[Member], ends: bool = True) -> bytes:
    """A tar; one that does not end can be written on."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data, facts in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in facts.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(data))
        end = buffer.tell()
    return buffer.getvalue()[: None if ends else end]


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """The header of a member that claims any size."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


LAST = archive(sample("last", png=PNG, txt=b"a hat"))
CAPTION = archive(sample("last", txt=b"a hat"), ends=False)  # of the picture that comes next
TARS: dict[str, bytes] = {  # what follows two good samples
    "cut-in-a-header.tar": LAST[:100],
    "cut-in-a-picture.tar": LAST[: 512 + len(PNG) // 2],
    "cut-before-a-caption.tar": LAST[: LAST.index(b"last.txt")],
    "cut-in-a-caption.tar": LAST[: LAST.index(b"a hat") + 3],
    "cut-between-samples.tar": b"",
    "wrong-sum.tar": flipped(LAST, 150),
    "page-within.tar": b"<html>503 Service Unavailable</html>".ljust(512) + LAST,
    "minus-one.tar": CAPTION + header("last.png", -1) + LAST,
    "minus-two.tar": CAPTION + header("last.png", -2) + LAST,
    "backwards.tar": CAPTION + header("last.png", -512) + LAST,
    "back-to-a-caption.tar": CAPTION + header("last.png", -512 - len(CAPTION)) + LAST,
    "huge-picture.tar": CAPTION + header("last.png", 2**60) + LAST,
    "huger-picture.tar": CAPTION + header("last.png", 2**80) + LAST,
    "huge-caption.tar": header("last.txt", 2**60) + LAST,
    "huge-name.tar": header("last.png", 2**60, tarfile.GNUTYPE_LONGNAME) + LAST,
    "huge-facts.tar": header("last.png", 2**60, tarfile.XHDTYPE) + LAST,
    "deep-names.tar": (header("a", 2, tarfile.GNUTYPE_LONGNAME) + b"a".ljust(512, b"\0")) * 2000 + LAST,
    "wrong-facts.tar": header("last.png", 9, tarfile.XHDTYPE) + b"0 size=x\n".ljust(512, b"\0") + LAST,
    "picture-twice.tar": archive(sample("picture-twice-2", png=PNG)),
    "caption-twice.tar": archive([member("caption-twice-2.txt", b"a hat")]),
}
NO_TARS: dict[str, bytes] = {
    "nothing.tar": b"",
    "text.tar": b"there was a tar here\n" * 100,
    "random.tar": np.random.default_rng(4).bytes(5000),
    "packed.tar": gzip.compress(LAST),
}

# ----------------------------------------------------------------------------------------------------- rows of parquet

ROWS: dict[str, tuple[dict[str, Any] | None, bytes | None]] = {
    "no picture": (None, b"a hat"),
    "a picture of nulls": ({"bytes": None, "path": None}, b"a hat"),
    "a picture of no bytes": ({"bytes": b"", "path": "a.png"}, b"a hat"),
    "random bytes": ({"bytes": np.random.default_rng(5).bytes(500), "path": None}, b"a hat"),
    "half a picture": ({"bytes": part("PNG", 0.5), "path": None}, b"a hat"),
    "a bomb": ({"bytes": png(60000, 60000), "path": None}, b"a hat"),
    "one pixel": ({"bytes": picture("one", size=(1, 1)), "path": None}, b"a hat"),
    "only the path of a file": ({"bytes": None, "path": "{outside}/secret.png"}, b"a hat"),
    "only the path of a file of the system": ({"bytes": None, "path": "/etc/passwd"}, b"a hat"),
    "only a URL": ({"bytes": None, "path": "http://127.0.0.1:9/a.png"}, b"a hat"),
    "no caption": ({"bytes": PNG, "path": None}, None),
    "an empty caption": ({"bytes": PNG, "path": None}, b""),
    "a blank caption": ({"bytes": PNG, "path": None}, b" \n "),
    "a caption in Latin-1": ({"bytes": PNG, "path": None}, "ein grüner Schal".encode("latin-1")),
    "nothing at all": (None, None),
}

UNCAPTIONED = {  # bad for no other reason than that there is no caption
    "caption-missing.png",
    "caption-empty.png",
    "caption-blank.png",
    "caption-of-a-mark.png",
    "name-of-two\nlines.png",
    "no caption",
    "null as caption",
    "no caption in a list",
    "a blank in a list",
    "an empty caption",
    "a blank caption",
    "no-caption",
    "empty-caption",
    "blank-caption",
    "list-as-json",
    "other-json",
    "link-as-caption",
    "../way-out",
    "name-of-two\nlines",
    "caption-folder.png",
}

# ---------------------------------------------------------------------------------------------------------------- sets


@dataclass
class Set:
    """A source of good and hostile inputs: what names the hostile ones, and the good ones' captions by SHA-256."""

    path: Path
    named: dict[str, str] = field(default_factory=dict)  # hostile input → a pattern that fits its key
    good: dict[bytes, tuple[str, ...]] = field(default_factory=dict)

    def picture(self, name: str) -> tuple[bytes, str]:
        """One more good picture and its caption."""
        caption = f"the picture {name!a} of {self.path.name}"
        data = picture(caption)
        self.good[hashlib.sha256(data).digest()] = (caption,)
        return data, caption

    def sample(self, stem: str) -> list[Member]:
        """The same for a tar."""
        data, caption = self.picture(stem)
        return sample(stem, png=data, txt=caption.encode())


def printable(name: str) -> str:
    """A pattern for a name, of which the part that can't be printed is written in some other way."""
    return re.sub(r"[\n\udce9]", ".+", name.replace(".", r"\."))


def files(folder: Path, outside: Path, names: Sequence[str]) -> Set:
    """Pictures with caption files beside them."""
    made = Set(folder)
    for number, name in enumerate(("", *names)):
        if number % 8 == 0:
            good = folder / f"{'amz'[number // 8 % 3]}-{number}.png"
            data, caption = made.picture(good.name)
            good.write_bytes(data)
            good.with_suffix(".txt").write_text(caption)
        if not name:
            continue
        path = folder / name
        text = path.with_suffix(".txt")
        made.named[name] = printable(name)
        if name in CAPTIONS:
            path.write_bytes(picture(name))
            if (content := CAPTIONS[name]) is not None:
                text.write_bytes(content)
        else:
            text.write_text("a hat")
            if name in DAMAGED:
                path.write_bytes(DAMAGED[name]())
            else:
                TRAPS[name](path, outside)
    return made


def lines(folder: Path, outside: Path, names: Sequence[str]) -> Set:
    """Pictures that a metadata.jsonl names."""
    made, rows = Set(folder), []
    for name in NAMED_IN_LINES:
        TRAPS[name](folder / name, outside)
    (folder / "spare.png").write_bytes(picture("spare"))
    for name in ("damaged.jpg", "damaged\n.jpg"):
        (folder / name).write_bytes(b"damaged")
    for number, name in enumerate(("", *names)):
        if number % 8 == 0:
            data, caption = made.picture(f"{number}.png")
            (folder / f"{number}.png").write_bytes(data)
            rows.append(row(f"{number}.png", caption))
        if name:
            rows.append(LINES[name].replace(b"{outside}", os.fsencode(outside)))
            made.named[name] = rf".*/metadata\.jsonl line {len(rows)}(, .+)?"
            if name in FOUND_WHEN_OPENED:
                made.named[name] = printable(json.loads(LINES[name])["file_name"])
    (folder / "metadata.jsonl").write_bytes(b"\n".join(rows))
    return made


def tars(folder: Path, outside: Path, names: Sequence[str]) -> Set:
    """Tars, one of which holds all bad members."""
    made = Set(folder)
    members = made.sample("first")
    for number, name in enumerate(names):
        if name in MEMBERS:
            members += MEMBERS[name] if number % 8 else [*made.sample(str(number)), *MEMBERS[name]]
            made.named[name] = rf"members\.tar:{printable(name)}(\.\w+)?"
        elif name in TARS:
            stem = name.removesuffix(".tar")
            made.named[name] = rf"(.*/)?{stem}\.tar(:(last|{stem}-2).*)?"
            (folder / name).write_bytes(
                archive([*made.sample(f"{stem}-1"), *made.sample(f"{stem}-2")], ends=False) + TARS[name]
            )
        else:
            made.named[name] = rf"(.*/)?{name}"
            (folder / name).write_bytes(NO_TARS[name])
    (folder / "members.tar").write_bytes(archive([*members, *made.sample("last")]))
    return made


def rows(folder: Path, outside: Path, names: Sequence[str]) -> Set:
    """Rows of a parquet file."""
    made, table = Set(folder), []
    for number, name in enumerate(("", *names)):
        if number % 8 == 0:
            data, caption = made.picture(str(number))
            table.append(({"bytes": data, "path": "/etc/passwd"}, caption.encode()))
        if name:
            image, text = ROWS[name]
            if image and image["path"]:
                image = {**image, "path": image["path"].replace("{outside}", str(outside))}
            made.named[name] = f"rows:{len(table)}"
            table.append((image, text))
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images, texts = zip(*table, strict=True)
    # A view, not a cast, which would refuse what is no UTF-8.
    columns = {"image": pa.array(images, kind), "text": pa.array(texts, pa.binary()).view(pa.string())}
    pq.write_table(pa.table(columns), folder / "train.parquet")
    return made


KINDS: dict[str, tuple[Callable[[Path, Path, Sequence[str]], Set], tuple[str, ...]]] = {
    "files": (files, (*DAMAGED, *CAPTIONS, *TRAPS)),
    "lines": (lines, tuple(LINES)),
    "tars": (tars, (*MEMBERS, *TARS, *NO_TARS)),
    "rows": (rows, tuple(ROWS)),
}
HOSTILE = [(kind, name) for kind, (_, names) in KINDS.items() for name in names]


def make(tmp_path: Path, kind: str, *names: str) -> Set:
    """A set of some hostile inputs, or all, and of good ones; secrets lie beside it."""
    outside, folder = tmp_path / "outside", tmp_path / kind
    folder.mkdir()
    if not outside.exists():
        outside.mkdir()
        (outside / "secret.png").write_bytes(picture("secret"))
        (outside / "secret.txt").write_text(SECRET)
    write, every = KINDS[kind]
    return write(folder, outside, names or every)


def arguments(tmp_path: Path, sets: Sequence[Set], *overrides: str) -> list[str]:
    sources = ", ".join(str(each.path) for each in sets)
    return [f"run.dir={tmp_path / 'run'}", "run.tracker=none", f"data.source=[{sources}]", "data.size=16", *overrides]


def settings(root: Path, tmp_path: Path, sets: Sequence[Set], *overrides: str) -> loader.Config:
    return loader.load(root / "configs/tiny.yaml", arguments(tmp_path, sets, *overrides))


def assert_named(bad: Sequence[BadSample], sets: Sequence[Set]) -> None:
    """Every hostile input is named, in one line, and nothing else is."""
    patterns = [
        (name, (f"{number}:" if len(sets) > 1 else "") + pattern)
        for number, each in enumerate(sets)
        for name, pattern in each.named.items()
    ]
    for name, pattern in patterns:
        assert any(re.fullmatch(pattern, one.key, re.DOTALL) for one in bad), f"{name} is not named"
    for one in bad:
        assert any(re.fullmatch(pattern, one.key, re.DOTALL) for _, pattern in patterns), f"{one} is accused"
        for text in (one.key, one.reason, one.fix):
            assert text.strip()
            assert len(text.splitlines()) == 1, text
        assert len(one.reason) < 6000, one  # a path may be as long, but no reason quotes a whole file


def assert_good(found: Index, sets: Sequence[Set]) -> None:
    """The good ones are all there with their captions, and nothing else is."""
    assert {entry.sha256: entry.captions for entry in found} == {k: v for each in sets for k, v in each.good.items()}


# --------------------------------------------------------------------------------------------- what a process touches


class Watch:
    """What this process opens, starts and connects to while it is watched."""

    FILES = ("open", "os.listdir", "os.scandir")
    OTHERS = ("subprocess.Popen", "os.system", "os.posix_spawn", "os.exec", "socket.connect")

    def __init__(self) -> None:
        self.watching, self.opened, self.others = False, set[str](), list[str]()
        sys.addaudithook(self.note)  # for good: Python takes none back

    def note(self, event: str, details: tuple[Any, ...]) -> None:
        if not self.watching:
            return
        if event in self.FILES and isinstance(details[0], str | bytes):
            self.opened.add(os.path.realpath(os.fsdecode(details[0])))
        elif event in self.OTHERS:
            self.others.append(f"{event} {details}")

    @contextmanager
    def within(self, tmp_path: Path) -> Iterator[None]:
        """Nothing outside of the sets may be touched."""
        self.watching, self.opened, self.others = True, set(), []
        try:
            yield
        finally:
            self.watching = False
        assert not self.others
        forbidden = (str((tmp_path / "outside").resolve()), "/etc/passwd", "/dev/zero")
        assert not [name for name in self.opened if name.startswith(forbidden)]


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.fixture(autouse=True)
def waited_for(tmp_path: Path) -> Iterator[None]:
    """Frees whoever waits for a pipe to be written, which no timeout could, and tells of it."""
    done, found = threading.Event(), []

    def free() -> None:
        while not done.wait(5):
            for path in tmp_path.rglob("*"):
                if stat.S_ISFIFO(path.lstat().st_mode):
                    with suppress(OSError):  # nobody reads it
                        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
                        found.append(path)

    thread = threading.Thread(target=free, daemon=True)
    thread.start()
    yield
    done.set()
    thread.join()
    assert not found


def tree(folder: Path) -> dict[str, tuple[object, ...]]:
    """Everything in a folder: kind, rights, time and content of each file."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(folder.rglob("*")):
        facts = path.lstat()
        content: object = path.readlink() if path.is_symlink() else None
        if stat.S_ISREG(facts.st_mode) and os.access(path, os.R_OK):
            content = hashlib.sha256(path.read_bytes()).digest()
        found[str(path)] = (facts.st_mode, facts.st_size, facts.st_mtime_ns, content)
    return found


# --------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize(("kind", "name"), HOSTILE, ids=[f"{kind}: {name!a}" for kind, name in HOSTILE])
def test_a_hostile_input_is_named_and_the_good_ones_are_kept(
    kind: str, name: str, root: Path, tmp_path: Path, watch: Watch
) -> None:
    sets = [make(tmp_path, kind, name)]
    with watch.within(tmp_path):
        found = indexed(settings(root, tmp_path, sets))
    assert_named(list(found.bad_samples()), sets)
    assert_good(found, sets)


def test_all_hostile_inputs_together_are_named_and_nothing_outside_is_read(
    root: Path, tmp_path: Path, watch: Watch
) -> None:
    assert len(HOSTILE) >= 40
    sets = [make(tmp_path, kind) for kind in KINDS]
    assert sum(len(each.named) for each in sets) == len(HOSTILE)
    before = {kind: tree(tmp_path / kind) for kind in (*KINDS, "outside")}
    with watch.within(tmp_path):
        found = indexed(settings(root, tmp_path, sets))
        again = indexed(settings(root, tmp_path, sets))  # with what is known from the first time
        found.write_report(tmp_path / "data-report.json")
    assert os.path.realpath(tmp_path / "files/a-0.png") in watch.opened  # it does see what is opened
    for one in (found, again):
        assert_named(list(one.bad_samples()), sets)
        assert_good(one, sets)
    assert {kind: tree(tmp_path / kind) for kind in before} == before

    report = json.loads((tmp_path / "data-report.json").read_text("utf-8"))
    assert_named([BadSample(**each) for each in report["list"]], sets)
    assert (report["images"], report["bad"]) == (len(found), len(report["list"]))

    secret = hashlib.sha256(picture("secret")).digest()
    for file in (tmp_path / "run").rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert SECRET.encode() not in content
            assert secret not in content


def test_without_captions_all_other_hostile_inputs_are_named_and_nothing_outside_is_read(
    root: Path, tmp_path: Path, watch: Watch
) -> None:
    sets = [make(tmp_path, kind) for kind in KINDS]
    for each in sets:
        assert each.named.keys() & UNCAPTIONED
        each.named = {name: pattern for name, pattern in each.named.items() if name not in UNCAPTIONED}
    with watch.within(tmp_path):
        found = indexed(settings(root, tmp_path, sets, "stage2.conditions=[]", "stage2.pooled_text=false"))
    assert_named(list(found.bad_samples()), sets)
    expected = {key: captions for each in sets for key, captions in each.good.items()}
    captioned = {entry.sha256: entry.captions for entry in found if entry.captions not in (("",), ("a hat",))}
    assert captioned == expected
    assert SECRET not in {caption for entry in found for caption in entry.captions}


def test_the_share_of_bad_ones_decides_in_one_line(root: Path, tmp_path: Path) -> None:
    sets = [make(tmp_path, "files", "jpeg-half.jpg", "caption-blank.png", "pipe.jpg")]
    assert len(sets[0].good) == 1
    for overrides, rule in (
        (["data.max_bad=1"], ""),
        (["data.max_bad=0.75"], ""),
        (["data.max_bad=0.7"], "data.max_bad is 0.7"),
        (["data.max_bad=1", "data.on_error=stop"], "data.on_error is stop"),
    ):
        found = indexed(settings(root, tmp_path, sets, *overrides))
        said = found.stop_reason(tmp_path / "data-report.json")
        if rule:
            first = next(found.bad_samples())
            for part_ in ("3 of 4 images", rule, str(tmp_path / "data-report.json"), first.key, first.reason):
                assert part_ in said
            assert len(said.splitlines()) == 1
        else:
            assert said == ""


def test_nothing_good_is_a_verdict_of_its_own(root: Path, tmp_path: Path) -> None:
    made = make(tmp_path, "files", "jpeg-half.jpg")
    for good in (tmp_path / "files").glob("a-*"):
        good.unlink()
    said = indexed(settings(root, tmp_path, [made], "data.max_bad=1")).stop_reason(tmp_path / "data-report.json")
    assert "no usable image" in said
    assert "jpeg-half.jpg" in said
    assert len(said.splitlines()) == 1


def test_a_caption_nested_to_any_depth_is_named(root: Path, tmp_path: Path) -> None:
    deep = [b'{"file_name": "a.png", "text": ' + b"[" * n + b"]" * n + b"}" for n in range(1, 1100)]
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/a.png").write_bytes(PNG)
    (tmp_path / "deep/metadata.jsonl").write_bytes(b"\n".join([*deep, row("a.png")]))
    members = [sample(f"{n}", png=PNG, json=line) for n, line in enumerate(deep)]
    (tmp_path / "deep.tar").write_bytes(archive([*itertools.chain(*members), *sample("a", png=PNG, txt=b"a hat")]))
    for source in ("deep", "deep.tar"):
        found = indexed(settings(root, tmp_path, [Set(tmp_path / source)]))
        assert (found.bad_count(), len(found)) == (len(deep), 1)


def test_names_in_a_tar_are_only_names(root: Path, tmp_path: Path, watch: Watch) -> None:
    made = make(tmp_path, "tars", "half-a-picture")
    names = ("../outside/secret", "/etc/hosts", "CON", "two\nlines", "Latin-1 \udce9", "x" * 300)
    members = itertools.chain(*(made.sample(name) for name in names))
    (tmp_path / "tars/names.tar").write_bytes(archive(members))
    with watch.within(tmp_path):
        found = indexed(settings(root, tmp_path, [made]))
    assert_named(list(found.bad_samples()), [made])
    assert_good(found, [made])
    assert all(entry.key.isprintable() for entry in found)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_of_metadata_names_its_bad_rows(suffix: str, root: Path, tmp_path: Path, watch: Watch) -> None:
    made = Set(tmp_path / "table")
    made.path.mkdir()
    (made.path / "spare.png").write_bytes(picture("spare"))
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
        data, caption = made.picture(f"good-{len(rows)}.png")
        (made.path / f"good-{len(rows)}.png").write_bytes(data)
        rows += [(f"good-{len(rows)}.png".encode(), caption.encode()), (name, text)]
        line = len(rows) + (suffix == "csv")  # a CSV begins with its columns
        made.named[f"{name!r}, {text!r}"] = rf".*/metadata\.{suffix} \w+ {line}(, .+)?"
    if suffix == "csv":
        lines = [b"file_name,text", *(name + (b"" if text is None else b"," + text) for name, text in rows)]
        (made.path / "metadata.csv").write_bytes(b"\n".join(lines))
    else:
        columns = zip(("file_name", "text"), zip(*rows, strict=True), strict=True)
        table = pa.table({name: pa.array(values, pa.binary()).view(pa.string()) for name, values in columns})
        pq.write_table(table, made.path / "metadata.parquet")
    with watch.within(tmp_path):
        found = indexed(settings(root, tmp_path, [made]))
    assert_named(list(found.bad_samples()), [made])
    assert_good(found, [made])


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_a_metadata_file_that_leads_out_of_the_folder_is_not_read(
    name: str, root: Path, tmp_path: Path, watch: Watch
) -> None:
    made, outside = make(tmp_path, "files", "pipe.jpg"), tmp_path / "outside" / name
    rows_ = {"file_name": ["a-0.png"], "text": [SECRET]}
    if name.endswith("parquet"):
        pq.write_table(pa.table(rows_), outside)
    else:
        outside.write_text(
            json.dumps({k: v[0] for k, v in rows_.items()})
            if name.endswith("l")
            else f"file_name,text\na-0.png,{SECRET}\n"
        )
    (tmp_path / "files" / name).symlink_to(outside)
    with watch.within(tmp_path), pytest.raises(UserError, match=f"{name}.* leads out of the folder"):
        indexed(settings(root, tmp_path, [made]))


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_a_pipe_in_place_of_the_metadata_is_not_waited_for(name: str, root: Path, tmp_path: Path) -> None:
    made = make(tmp_path, "files", "one-pixel.png")
    os.mkfifo(tmp_path / "files" / name)
    with pytest.raises(UserError, match=name):
        indexed(settings(root, tmp_path, [made]))


@pytest.mark.parametrize("kind", ["tars", "rows"])
def test_a_stream_names_the_same_and_yields_all_good_ones(kind: str, root: Path, tmp_path: Path, watch: Watch) -> None:
    made = make(tmp_path, kind, *(name for name in KINDS[kind][1] if name != "packed.tar"))  # which a stream reads
    given = settings(root, tmp_path, [made], "data.streaming=true", "data.cache=none")
    with watch.within(tmp_path):
        bad, good = [], {}
        stream = streamed(given)
        for item in (item for shard in stream.shards for item in stream.sources.samples(shard)):
            if isinstance(item, BadSample):
                bad.append(item)
                continue
            try:
                decode(item[1], min_side=given.data.min_side)
            except BadSampleError as error:
                bad.append(BadSample(item[0].key, *error.args))
            else:
                good[hashlib.sha256(item[1]).digest()] = item[0].captions
    made.named = {name: pattern.replace("rows:", "rows:0-") for name, pattern in made.named.items()}
    assert_named(bad, [made])
    assert good == made.good


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_training_on_the_hostile_set_sees_every_good_one_and_stops_when_told(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = [make(tmp_path, kind) for kind in KINDS]
    before = {kind: tree(tmp_path / kind) for kind in (*KINDS, "outside")}
    good = {key for each in sets for key in each.good}
    steps = -(-len(good) // 8)
    given = arguments(
        tmp_path,
        sets,
        "data.max_bad=1",
        "sample.prompts=[]",
        f"stage1.steps={steps}",
        f"stage2.steps={steps}",
        "stage1.batch=8",
        "stage2.batch=8",
    )
    command = ["--config", str(root / "configs/tiny.yaml"), *given]
    assert train_ldm.main(command) == 0
    assert (tmp_path / "run/pipeline/model_index.json").exists()
    report = json.loads((tmp_path / "run/data-report.json").read_text("utf-8"))
    assert_named([BadSample(**each) for each in report["list"]], sets)
    assert report["images"] == len(good)

    AcceleratorState._reset_state(reset_partial_state=True)
    trained = loader.load(root / "configs/tiny.yaml", given)
    draws = SamplePlan(indexed(trained).select("train"), spec_of(trained, 8))
    assert {draws[n].entry.sha256 for n in range(8 * steps)} == good
    assert {kind: tree(tmp_path / kind) for kind in before} == before

    capsys.readouterr()
    assert train_ldm.main([*command, f"run.dir={tmp_path / 'other'}", "data.on_error=stop"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(r"(^|\r)error: \d+ of \d+ images are bad, and data\.on_error is stop", said)
    assert (tmp_path / "other/data-report.json").exists()
    assert not list((tmp_path / "other").glob("stage*/checkpoints"))
