"""Random sources: whatever a folder, tar, table or TOML holds, each thing in it is used, named as bad, or counted.

`FUZZ_EXAMPLES=999 pytest tests/ldm/data/test_fuzz.py` tries as many random examples of each; the suite, a few.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import os
import re
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm.config import loader
from ldm.config.schema import DataConfig, SourceConfig
from ldm.data import check, index, records
from ldm.data.formats import IMAGE_SUFFIXES
from ldm.data.index import Index
from ldm.data.records import BadSample, one_line
from ldm.data.sources import Sources
from ldm.utils.errors import UserError

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 0))


def fuzz(examples: int) -> Callable[[Any], Any]:
    """Settings of a test: `examples` fixed ones, or FUZZ_EXAMPLES random ones; each in bounded time."""
    return settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        database=None,
        deadline=10_000,  # ms; the machine may be busy
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(autouse=True, scope="module")
def every_name_is_kept() -> Iterator[None]:
    """LeftOutCounts keeps the names of all that is left out, so that they can be compared with the source's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "MAX_EXAMPLES", 10**9)
        yield


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fuzz") as name:
        yield Path(name)


class Account:
    """What became of a source, by name."""

    def __init__(self, index: Index):
        self.index = index
        self.good = {entry.key: entry for entry in index}
        self.bad = {bad.key: str(bad) for bad in index.bad_samples()}
        left_out = index.sources.left_out()
        self.left_out = {name: reason for reason, names in left_out.examples.items() for name in names}
        bad_rows = list(index.bad_samples())
        self.keys = [bad.key for bad in bad_rows]
        self.total = len(index) + len(bad_rows) + left_out.counts.total()
        lines = [*check.balance(index).splitlines(), *map(str, bad_rows), *index.sources.describe()]
        if len(index):
            lines += check.describe(check.facts(index, None)).splitlines()
        numbers = [
            int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", check.balance(index).splitlines()[-1])
        ]
        assert numbers == [len(index), len(bad_rows), left_out.counts.total(), self.total]
        assert sum(left_out.counts.values()) == sum(map(len, left_out.examples.values()))
        for line in lines:
            assert line.isprintable(), f"{line!r} can't be printed in one line"

    def places(self, name: str) -> list[str]:
        """The accounts in which a name is."""
        accounts = {"good": self.good, "bad": self.bad, "left out": self.left_out}
        return [account for account, names in accounts.items() if one_line(name) in names]


def account(source: dict[str, Any], cache: Path, conditions: tuple[str, ...] = ("text",)) -> Account | None:
    """The account of a source; anything but a UserError is raised, which commands print in one line."""
    try:
        return Account(index.build(DataConfig(source=[source], size=16), cache, conditions))
    except UserError as error:
        assert str(error)
        return None


# ------------------------------------------------------------------------------------------------------------- contents


def encoded(image_format: str, number: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((12 + number, 10), 50).save(buffer, image_format)
    return buffer.getvalue()


IMAGES = {name: encoded(name, number) for number, name in enumerate(("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"))}
GOOD_IMAGES = st.sampled_from(list(IMAGES.values()))
BAD_IMAGES = st.sampled_from(
    [b"", b"\0" * 100, b"text", b"\x89PNG", *(data[: len(data) // 2] for name, data in IMAGES.items() if name != "GIF")]
)
GOOD_TEXTS = st.sampled_from(
    ["a dog", "  a\tdog \n", "a, b", "ein grüner Hund", "\ufeffmark", "line\nline", '"quoted"', "{}"]
)
BAD_TEXTS = st.sampled_from([b"", b" \n\t", "mähne".encode("latin-1"), "a dog".encode("utf-16"), b"a\0b"])
TEXTS = GOOD_TEXTS.map(str.encode) | BAD_TEXTS
CONDITIONS = st.sampled_from([("text",), ("text",), (), ("class",), ("text", "class")])


def caption_of(content: bytes) -> str | None:
    """The caption that a file of this content holds; None for a bad one."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else " ".join(text.split()) or None


# -------------------------------------------------------------------------------------------------------------- folders

STEMS = [
    "a",
    "b",
    "A",
    "a.b",
    "a.png",
    "10_dog",
    "é",
    "e\u0301",
    "日本",
    "a b",
    " a",
    "-x",
    "._a",
    ".hidden",
    "metadata",
]
STEMS += [
    "captions",
    "a\nb",
    "a\x1b[31m",
    "\udcff",
    "x" * 200,
    "a'\"b",
    "%d{}",
    "[a]*",
    "~",
    "$HOME",
    "train",
    "\u202e",
]
SUFFIXES = [".png", ".png", ".jpg", ".txt", ".txt", ".PNG", ".webp", ".tif", ".Txt", ".caption", ".jpg.txt", ".heic"]
SUFFIXES += [".dng", ".json", ".csv", ".jsonl", "", ".jpg_large", ".tar", ".pdf", ".npy", ".psd", ".tags", "."]
FOLDERS = [
    "",
    "",
    "",
    "a",
    "a",
    "b",
    "a/b",
    "10_dog",
    "5_cat",
    "train",
    "test",
    "train/a",
    "test/b",
    ".git",
    "__MACOSX",
]
FOLDERS += ["x.png", "a/.cache", "\udcff", "2_\n", "2_\udcfe", "0_x", "blobs", "snapshots", "999999_x"]

stems = st.sampled_from(STEMS[:2]) | st.sampled_from(STEMS)
suffixes = st.sampled_from(SUFFIXES[:5]) | st.sampled_from(SUFFIXES)
names = st.builds(str.__add__, stems, suffixes)
links = st.sampled_from(["", "a", "b.png", "a.png", "nowhere", "/etc/passwd", "..", ".", "a/b"]).map(
    lambda to: ("link", to)
)
special = links | st.just(("pipe", ""))


def is_image_name(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


@st.composite
def trees(draw: st.DrawFn) -> dict[str, bytes | tuple[str, str]]:
    """Files by path: their content, or a link, or a pipe."""
    tree: dict[str, bytes | tuple[str, str]] = {}
    for _ in range(draw(st.integers(0, 10))):
        directory, name = draw(st.sampled_from(FOLDERS)), draw(names)
        path = str(PurePosixPath(directory) / name)
        if any(path == other or f"{path}/" in f"{other}/" or f"{other}/" in f"{path}/" for other in tree):
            continue
        if draw(st.integers(0, 9)) == 0:
            tree[path] = draw(special)
        elif is_image_name(name):
            tree[path] = draw(GOOD_IMAGES | GOOD_IMAGES | BAD_IMAGES)
            sidecar = str(PurePosixPath(path).with_suffix(draw(st.sampled_from([".txt", ".txt", ".TXT", ".caption"]))))
            if draw(st.booleans()) and sidecar not in tree:
                tree[sidecar] = draw(TEXTS)
        else:
            tree[path] = draw(TEXTS | GOOD_IMAGES)
    if draw(st.integers(0, 3)) == 0:
        directory = draw(st.sampled_from(["", "", "a", "train", "test"]))
        rows = draw(st.lists(st.builds(metadata_row, st.sampled_from(list(tree) or ["a.png"]), GOOD_TEXTS), max_size=4))
        relative = [{**row, "file_name": os.path.relpath(row["file_name"], directory or ".")} for row in rows]
        lines = "\n".join(map(json.dumps, relative))
        tree.setdefault(str(PurePosixPath(directory) / "metadata.jsonl"), lines.encode())
    return tree


def metadata_row(name: str, text: str) -> dict[str, str]:
    return {"file_name": name, "text": text}


def write_tree(root: Path, tree: dict[str, bytes | tuple[str, str]]) -> None:
    for name, content in tree.items():
        path = root / name
        with contextlib.suppress(OSError):  # a file where another one needs a folder
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            elif content[0] == "pipe":
                os.mkfifo(path)
            else:
                path.symlink_to(content[1] or root)


def files_of(root: Path) -> list[str]:
    """All files, links and pipes, relative to the folder; hidden folders and links are not entered."""
    names = list[str]()
    for directory, directories, file_names in os.walk(root):
        relative = Path(directory).relative_to(root)
        for name in list(directories):
            if name.startswith((".", "__MACOSX")) or (Path(directory) / name).is_symlink():
                directories.remove(name)
                names.append(str(relative / name))
        names += [str(relative / name) for name in file_names]
    return names


def companions(name: str, present: set[str]) -> bool:
    """Whether a file may count with another: a caption file with its image, a metadata file with its rows."""
    path = PurePosixPath(name)
    if path.name in ("metadata.jsonl", "metadata.csv", "metadata.parquet"):
        return True
    if path.suffix.lower() not in (".txt", ".caption"):
        return False
    base = path.stem.lower()
    others = (PurePosixPath(other) for other in present)
    return any(
        base in (other.stem.lower(), other.name.lower())
        for other in others
        if other.parent == path.parent and is_image_name(other.name)
    )


@fuzz(45)
@given(trees(), CONDITIONS, st.sampled_from(["", "a photo"]), st.sampled_from(["train", "train", "test", "validation"]))
def test_every_file_of_a_folder_is_used_named_or_counted(
    tree: dict[str, Any], conditions: tuple[str, ...], caption: str, split: str
) -> None:
    with folder() as root:
        write_tree(root / "data", tree)
        (root / "data").mkdir(exist_ok=True)
        source = {"path": str(root / "data"), "caption": caption, "split": split}
        if (result := account(source, root / "cache", conditions)) is None:
            return
        (kind,) = result.index.sources.kinds
        if kind == "tar":
            result.left_out = {os.path.relpath(name, root / "data"): reason for name, reason in result.left_out.items()}
            return
        present = files_of(root / "data")
        aside = [one_line(name.rstrip("/")) for name in result.left_out]
        rows = Counter(entry.key for entry in result.index)
        consumed = Counter[str]()
        for name in present:
            accounts = result.places(name) + (["left out"] if one_line(f"{name}/") in result.left_out else [])
            row_of = kind == "metadata" and any(
                one_line(repr(PurePosixPath(name).name))[1:-1] in row for row in (*result.bad, *result.left_out)
            )
            if (root / "data" / name).is_dir() and not is_image_name(name):
                continue  # a link that is followed, or named by where it leads
            if any(one_line(f"{parent}/") in result.left_out for parent in PurePosixPath(name).parents):
                continue
            if not accounts and companions(name, set(present)):
                consumed[str(PurePosixPath(name).parent)] += 1
            elif not row_of:
                assert len(accounts) == 1, f"{name!r} of {kind} is in {accounts}: {aside}"
        for key, entry in result.good.items():
            content = Path(entry.location.file).read_bytes()
            assert content not in (b"", b"text"), key
            if kind == "sidecars" and rows[key] == 1:
                exact = root / "data" / PurePosixPath(key).with_suffix(".txt")
                if exact.is_file() and "text" in conditions:
                    assert entry.captions == (caption_of(exact.read_bytes()),)
        if kind == "sidecars" and split == "train":
            expected_good(tree, root / "data", result, conditions)


def expected_good(tree: dict[str, Any], root: Path, result: Account, conditions: tuple[str, ...]) -> None:
    """A sound image with a sound caption of its exact name, in no folder of another meaning, is good."""
    for name, content in tree.items():
        path = PurePosixPath(name)
        sidecar = tree.get(str(path.with_suffix(".txt")))
        plain = path.parent in (PurePosixPath("."), PurePosixPath("b")) and not path.name.startswith(".")
        if plain and is_image_name(name) and content in IMAGES.values() and isinstance(sidecar, bytes):
            usable = caption_of(sidecar) and "\udcff" not in name and conditions == ("text",)
            if usable and (root / name).is_file():
                assert result.places(name) == ["good"], (name, result.bad.get(name))


# ----------------------------------------------------------------------------------------------------------------- tars

TAR_STEMS = [
    "a",
    "b",
    "sub/a",
    "./a",
    "a.b",
    "._a",
    "__MACOSX/._a",
    ".git/a",
    "é",
    "日本/a b",
    "a\nb",
    "A",
    "x" * 120,
    "",
]
TAR_SUFFIXES = [
    ".png",
    ".jpg",
    ".txt",
    ".json",
    ".cls",
    ".caption",
    ".PNG",
    ".dng",
    ".npy",
    ".png.txt",
    ".mask.png",
    "",
]
TAR_CONTENTS = {
    ".json": ['{"text": "a dog", "label": "x"}', "{}", "[", '{"text": 1}', "null"],
    ".cls": ["1", " cat\n", ""],
}
TarMember = tuple[str, str, bytes]  # name, type, content


@st.composite
def tar_members(draw: st.DrawFn) -> list[TarMember]:
    members: list[TarMember] = []
    for _ in range(draw(st.integers(0, 6))):
        stem = draw(st.sampled_from(TAR_STEMS[:2]) | st.sampled_from(TAR_STEMS))
        for suffix in draw(st.lists(st.sampled_from(TAR_SUFFIXES[:3]) | st.sampled_from(TAR_SUFFIXES), max_size=3)):
            kind = draw(st.sampled_from(["file"] * 12 + ["link", "folder", "hard link", "pipe"]))
            if suffix in TAR_CONTENTS:
                content = draw(st.sampled_from(TAR_CONTENTS[suffix])).encode()
            else:
                content = draw(GOOD_IMAGES | BAD_IMAGES if is_image_name(f"a{suffix}") else TEXTS)
            if stem + suffix:
                members.append((stem + suffix, kind, content))
    return draw(st.permutations(members)) if draw(st.booleans()) else members


TYPES = {"file": tarfile.REGTYPE, "link": tarfile.SYMTYPE, "folder": tarfile.DIRTYPE, "hard link": tarfile.LNKTYPE}


def write_tar(path: Path, members: list[TarMember]) -> int:
    """Where the members end."""
    with tarfile.open(path, "w") as tar:
        for name, kind, content in members:
            info = tarfile.TarInfo(name)
            info.type, info.size = TYPES.get(kind, tarfile.FIFOTYPE), len(content) if kind == "file" else 0
            info.linkname = "a.png" if "link" in kind else ""
            tar.addfile(info, io.BytesIO(content) if kind == "file" else None)
        return tar.offset


def is_hidden(name: str) -> bool:
    return any(part == "__MACOSX" or (part.startswith(".") and part != ".") for part in name.split("/"))


@fuzz(45)
@given(tar_members(), CONDITIONS)
def test_every_member_of_a_tar_is_used_named_or_counted(members: list[TarMember], conditions: tuple[str, ...]) -> None:
    with folder() as root:
        write_tar(root / "0.tar", members)
        result = account({"path": str(root / "0.tar")}, root / "cache", conditions)
        assert result is not None
        check_stream(root / "0.tar", conditions, result)
        reported = [str(key).removeprefix("0.tar:").lower() for key in (*result.good, *result.bad, *result.left_out)]
        duplicates = " ".join(result.bad.values()).lower()
        texts_used = 0
        for number, (name, kind, _) in enumerate(members):
            if kind == "folder" and (is_hidden(name) or not is_image_name(name)):
                continue
            lowered = one_line(name).lower()
            if lowered in reported or f"{lowered}: duplicate" in duplicates or lowered in duplicates:
                continue
            stem = re.fullmatch(r"((?:.*/|)[^.]*)[.].*", lowered)
            assert stem, f"{name!r} is nowhere: {reported}"
            used = [key for key in reported if key == stem[1] or key.startswith(f"{stem[1]}.")]
            assert used, f"{name!r} of member {number} is nowhere: {reported}"
            assert not is_image_name(name) or stem[1] in reported, f"the image {name!r} is nowhere: {reported}"
            texts_used += 1
        pairs = [
            (name, content)
            for (name, kind, content), (text, text_kind, caption) in itertools.pairwise(members)
            if name.endswith(".png") and kind == text_kind == "file" and text == f"{name[:-4]}.txt"
            if caption_of(caption) and content in IMAGES.values() and members.count((name, kind, content)) == 1
        ]
        for name, _ in pairs:
            alone = [other for other, _, _ in members if other.split(".")[0] == name.split(".")[0]]
            if len(alone) == 2 and re.fullmatch(r"[\w/ ]+\.png", name) and conditions == ("text",):
                assert f"0.tar:{name}" in result.good, result.bad


def check_stream(tar: Path, conditions: tuple[str, ...], result: Account) -> None:
    """A stream has the same samples as the index, and leaves out the same."""
    sources = Sources([SourceConfig(path=str(tar))], 16, tar.parent / "cache", conditions)
    (shard,) = sources.shards(0)
    samples = list(sources.samples(shard))
    keys = Counter(sample[0].key for sample in samples if isinstance(sample, tuple))
    bad = Counter(sample.key for sample in samples if isinstance(sample, BadSample))
    assert keys + bad == Counter([*result.keys, *(entry.key for entry in result.index)])
    assert sources.left_out().counts == result.index.sources.left_out().counts


@fuzz(30)
@given(tar_members(), st.data())
def test_a_damaged_tar_is_read_as_far_as_it_goes(members: list[TarMember], data: st.DataObject) -> None:
    with folder() as root:
        file = root / "0.tar"
        end = write_tar(file, members)
        content = bytearray(file.read_bytes())
        complete = account({"path": str(file)}, root / "cache")
        length, changes = data.draw(st.integers(0, end)), data.draw(st.integers(0, 3))
        for _ in range(changes):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        file.write_bytes(content[:length] if data.draw(st.booleans()) or not changes else content)
        result = account({"path": str(file)}, root / "cache")
        assert complete is not None
        assert result is not None
        if not changes:
            assert result.bad
            assert set(result.good) <= set(complete.good)


# --------------------------------------------------------------------------------------------------------------- tables

CELLS = ["a dog", "", " ", "a, b", 'say "x"', "two\nlines", "ä", "'", "a;b", "\ttab", "\0", "=1+1", "NULL"]
ROW_NAMES = [
    "a.png",
    "b.png",
    "c.png",
    "missing.png",
    "",
    "sub/d.png",
    "./a.png",
    "../out.png",
    "a.png\n",
    "/etc/passwd",
]
ROW_NAMES += ["x" * 300, "sub/../b.png", "sub", ".e.png", "a.txt", "*"]
SOUND = {"a.png", "b.png", "sub/d.png", "./a.png", "sub/../b.png", ".e.png"}
TABLE_FILES = {"a.png": "PNG", "b.png": "PNG", "sub/d.png": "JPEG", ".e.png": "PNG", "unnamed.png": "GIF"}

row_names = st.sampled_from(ROW_NAMES[:2]) | st.sampled_from(ROW_NAMES)
rows_of_cells = st.lists(
    st.tuples(row_names, st.sampled_from(CELLS), st.lists(st.sampled_from(CELLS), max_size=2), st.integers(0, 8)),
    max_size=8,
)


def write_images(root: Path) -> None:
    for number, (name, image_format) in enumerate(TABLE_FILES.items()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(image_format, number))
    (root / "c.png").write_bytes(b"\x89PNG")


def is_sound(name: str, caption: object) -> bool:
    return name in SOUND and isinstance(caption, str) and bool(caption.split()) and "\0" not in caption


@fuzz(35)
@given(
    rows_of_cells,
    st.permutations(["file_name", "text"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-8", "latin-1", "utf-16"]),
    st.sampled_from(["\n", "\r\n", "\r"]),
)
def test_every_row_of_a_csv_is_used_named_or_counted(
    rows: list[Any], header: list[str], quoting: int, encoding: str, end: str
) -> None:
    with folder() as root:
        write_images(root / "data")
        with (root / "data/metadata.csv").open("w", encoding=encoding, newline="") as file:
            if end == "\r":
                quoting = csv.QUOTE_ALL  # the writer quotes only the line ends of its own kind
            writer = csv.writer(file, quoting=quoting, lineterminator=end)  # type: ignore[arg-type]
            writer.writerow(header)
            sound, named = Counter[str](), set[str]()
            lines = 0
            for name, caption, surplus, missing in rows:
                if missing == 0:
                    file.write(end)  # an empty line
                    continue
                cells = [name if column == "file_name" else caption for column in header]
                cells = cells[:1] if missing == 1 else cells
                writer.writerow(cells + surplus if missing > 6 else cells)
                lines += 1
                row = dict(zip(header, cells, strict=False))
                surplus = surplus if missing > 6 else []
                if row.get("file_name") and not surplus:
                    named.add(os.path.normpath(name))
                complete = not surplus and (encoding != "latin-1" or (name + caption).isascii())
                if complete and is_sound(row.get("file_name", ""), row.get("text")):
                    sound[os.path.normpath(name)] += 1
        result = account({"path": str(root / "data")}, root / "cache")
        if encoding == "utf-16":
            assert result is None
            return
        assert result is not None
        assert Counter(os.path.normpath(entry.key) for entry in result.index) == sound
        assert len(result.index) + result.index.bad_count() == lines
        for name in (*TABLE_FILES, "c.png"):
            assert (name in result.left_out) == (name not in named), name


@fuzz(35)
@given(
    st.text(alphabet="file_name,tx\n\"\r';\t \0ä.pgab\ufeff", max_size=80),
    st.booleans(),
    st.sampled_from(["csv", "jsonl"]),
)
def test_any_text_as_a_table_is_read_or_refused_in_a_line(content: str, header: bool, suffix: str) -> None:
    with folder() as root:
        write_images(root / "data")
        text = ("file_name,text\n" if header and suffix == "csv" else "") + content
        (root / f"data/metadata.{suffix}").write_bytes(text.encode())
        result = account({"path": str(root / "data")}, root / "cache")
        assert result is not None or suffix == "csv"
        if result is not None and not len(result.index):
            assert set(TABLE_FILES) | {"c.png"} <= set(result.left_out) | {
                key.split(", '")[-1][:-1] for key in result.bad
            }


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from([*CELLS, *ROW_NAMES, "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "x"]), inner, max_size=2),
    max_leaves=4,
)


@fuzz(35)
@given(
    st.lists(
        st.dictionaries(st.sampled_from(["file_name", "text", "label", "x"]), VALUES | row_names) | VALUES, max_size=6
    ),
    CONDITIONS,
)
def test_every_row_of_a_jsonl_is_used_named_or_counted(rows: list[Any], conditions: tuple[str, ...]) -> None:
    with folder() as root:
        write_images(root / "data")
        (root / "data/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        result = account({"path": str(root / "data")}, root / "cache", conditions)
        assert result is not None
        assert len(result.index) + result.index.bad_count() == len(rows)
        for row in rows:
            name, text = (row.get("file_name"), row.get("text")) if isinstance(row, dict) else (None, None)
            if conditions == ("text",) and isinstance(name, str) and is_sound(name, text) and text != "\ud800":
                assert os.path.normpath(name) in result.good
        columns = {name for row in rows if isinstance(row, dict) for name in row}
        read = {"file_name", *(["text"] if "text" in conditions else []), *(["label"] if "class" in conditions else [])}
        reasons = result.left_out.items()
        unread = {name.split(": ")[-1] for name, reason in reasons if reason == "columns that are not read"}
        assert unread == columns - read


@fuzz(25)
@given(
    st.lists(st.tuples(row_names | st.none(), st.sampled_from(CELLS) | st.none()), max_size=5),
    st.sampled_from(
        [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int8(), pa.string()), pa.string_view()]
    ),
    st.booleans(),
)
def test_every_row_of_a_parquet_is_used_named_or_counted(
    rows: list[Any], column_type: pa.DataType, in_rows: bool
) -> None:
    with folder() as root:
        write_images(root / "data")
        captions = [
            caption if column_type != pa.binary() or caption is None else caption.encode() for _, caption in rows
        ]
        columns = {"text": pa.array(captions, column_type), "x": pa.array(range(len(rows)))}
        if in_rows:
            images = [IMAGES["PNG"] if name == "a.png" else (name or "").encode() or None for name, _ in rows]
            pq.write_table(pa.table({"image": pa.array(images, pa.binary()), **columns}), root / "t.parquet")
            result = account({"path": str(root / "t.parquet")}, root / "cache")
        else:
            table = pa.table({"file_name": pa.array([name for name, _ in rows], pa.string()), **columns})
            pq.write_table(table, root / "data/metadata.parquet")
            result = account({"path": str(root / "data")}, root / "cache")
        if not rows:  # datasets refuses an empty table
            return
        assert result is not None
        assert len(result.index) + result.index.bad_count() == len(rows)
        assert "columns that are not read" in result.left_out.values()
        sound = sum(is_sound(name or "", caption) and (not in_rows or name == "a.png") for name, caption in rows)
        assert len(result.index) == sound


# ---------------------------------------------------------------------------------------------------------------- TOMLs

ODD_VALUES = st.sampled_from(
    [0, 1, 2, -1, 10**12, 0.5, 1.0, float("nan"), True, False, "", "x", "10", [], [16, 16], [0], {}]
)
TOML_VALUES: dict[str, st.SearchStrategy[Any]] = {
    "caption_extension": st.sampled_from([".txt", "txt", ".caption", "cap", "", ".", "..", ".TXT", ".png", "/", "\0"]),
    "shuffle_caption": st.booleans(),
    "keep_tokens": st.integers(0, 3),
    "caption_dropout_rate": st.sampled_from([0, 0.1, 0.99]),
    "flip_aug": st.booleans(),
    "num_repeats": st.integers(1, 4),
    "class_tokens": st.sampled_from(["a dog", "", " ", "sks"]),
    "resolution": st.sampled_from([16, 32, [16, 16], [16, 32]]),
    "enable_bucket": st.booleans(),
    "bucket_reso_steps": st.sampled_from([8, 16, 64]),
    "min_bucket_reso": st.sampled_from([8, 16]),
    "max_bucket_reso": st.sampled_from([64, 128]),
    "bucket_no_upscale": st.booleans(),
}
SUBSET_KEYS = ["caption_extension", "shuffle_caption", "keep_tokens", "caption_dropout_rate", "flip_aug", "num_repeats"]
SUBSET_KEYS += ["class_tokens"]
UNKNOWN_KEYS = [
    "num_repeat",
    "is_regularisation",
    "é",
    "a b",
    "batch_size",
    "color_aug",
    "metadata_file",
    "subset",
    "x" * 100,
]
IMAGE_DIRS = ["dogs", "dogs", "cats", "./dogs", "dogs/", "cats/../dogs"]
ODD_DIRS = ["missing", "", "dogs/a.png", "x" * 300, "~nobody/x", "$NOWHERE/x", "\0", "a\nb", 3, None]
RESULT_OF_DIR = {"dogs": 2, "cats": 1}  # images


@st.composite
def sections(draw: st.DrawFn, keys: list[str]) -> dict[str, Any]:
    chosen = draw(st.lists(st.sampled_from(keys), max_size=3, unique=True))
    section = {key: draw(TOML_VALUES[key]) for key in chosen}
    if draw(st.integers(0, 14)) == 0:
        section[draw(st.sampled_from([*keys, *UNKNOWN_KEYS]))] = draw(ODD_VALUES)
    return section


@st.composite
def tomls(draw: st.DrawFn) -> dict[str, Any]:
    tree = {"general": draw(sections(list(TOML_VALUES))), "datasets": []}
    for _ in range(draw(st.integers(1, 2))):
        dataset = draw(sections(list(TOML_VALUES)))
        dataset["subsets"] = []
        for _ in range(draw(st.integers(1, 2))):
            odd = draw(st.integers(0, 9)) == 0
            reg = {"is_reg": draw(st.booleans())} if draw(st.integers(0, 3)) == 0 else {}
            subset = {
                **reg,
                "image_dir": draw(st.sampled_from(ODD_DIRS if odd else IMAGE_DIRS)),
                **draw(sections(SUBSET_KEYS)),
            }
            dataset["subsets"].append({key: value for key, value in subset.items() if value is not None})
        tree["datasets"].append(dataset)
    return tree


def toml_value(value: object) -> str:
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, dict):
        return "{}"
    return str(value).lower() if isinstance(value, (bool, float)) else str(value)


def toml_text(tree: dict[str, Any]) -> str:
    def lines(section: dict[str, Any]) -> list[str]:
        return [
            f"{json.dumps(key, ensure_ascii=False)} = {toml_value(value)}"
            for key, value in section.items()
            if key != "subsets"
        ]

    text = ["[general]", *lines(tree["general"])]
    for dataset in tree["datasets"]:
        text += ["[[datasets]]", *lines(dataset)]
        for subset in dataset["subsets"]:
            text += ["[[datasets.subsets]]", *lines(subset)]
    return "\n".join(text) + "\n"


def expected_repeats(tree: dict[str, Any]) -> Counter[tuple[str, int]] | None:
    """How often each image comes by a plain reading of the TOML; None where a folder has images without a caption."""
    expected = Counter[tuple[str, int]]()
    for dataset in tree["datasets"]:
        for subset in dataset["subsets"]:
            options = {**tree["general"], **dataset, **subset}
            extension = str(options.get("caption_extension") or "txt").lstrip(".").lower()
            if subset.get("is_reg"):
                return None
            captioned = extension == "txt" or str(options.get("class_tokens", "")).strip()
            if not captioned or not subset["image_dir"]:
                return None
            name = Path(os.path.normpath(subset["image_dir"])).name
            expected[name, options.get("num_repeats", 1)] += RESULT_OF_DIR[name]
    return expected


@pytest.fixture(scope="module")
def tiny(root: Path) -> Path:
    return root / "configs/tiny.yaml"


@fuzz(35)
@given(tree=tomls(), mark=st.sampled_from(["", "\ufeff"]))
def test_every_key_of_a_toml_has_an_effect_or_is_named(tiny: Path, tree: dict[str, Any], mark: str) -> None:
    with folder() as root:
        for name in ("dogs/a.png", "dogs/b.png", "cats/c.png"):
            path = root / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(encoded("PNG", len(name)))
            path.with_suffix(".txt").write_text(f"{name}, red, big, old")
        (root / "set.toml").write_text(mark + toml_text(tree), "utf-8")
        overrides = [
            f"data.source={root / 'set.toml'}",
            "data.size=null",
            "data.buckets=null",
            f"run.dir={root / 'run'}",
        ]
        try:
            config = loader.load(tiny, overrides)
            result = Account(index.build(config.data, root / "cache"))
        except UserError as error:
            assert str(error)
            return
        keys = [key for section in (tree["general"], *tree["datasets"]) for key in section]
        keys += [key for dataset in tree["datasets"] for subset in dataset["subsets"] for key in subset]
        assert not set(keys) & set(UNKNOWN_KEYS), "an unknown key was passed over"
        repeats = Counter((entry.location.file.split("/")[-2], entry.repeats) for entry in result.index)
        if (expected := expected_repeats(tree)) is not None:
            assert repeats == expected, result.bad
        for key, needed in (("keep_tokens", "shuffle_caption"), ("max_bucket_reso", "enable_bucket")):
            if key in keys and needed not in keys:
                assert any(name.endswith(f": {key}") for name in result.left_out)
