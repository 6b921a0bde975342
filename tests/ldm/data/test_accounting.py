"""The balance of the check: whatever a source holds is good, bad and named, or left out and counted by reason."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ldm.config.schema import DataConfig, SourceConfig
from ldm.data import check, index
from ldm.data.records import BadSample, Record
from ldm.data.sources import Sources
from ldm.utils.errors import UserError


def png(number: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 16), (number * 9, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder: Path, **files: str | bytes) -> Path:
    """Files by name; two underscores stand for a slash. An empty string is an image."""
    for number, (name, content) in enumerate(files.items()):
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content or png(number))
    return folder


class Balance:
    """The good, bad and left out of a source, and the line that the check prints of them."""

    def __init__(self, path: Path, conditions: tuple[str, ...] = ("text",), **options: object):
        cache = Path(f"{path}-cache")
        data = DataConfig(source=[{"path": str(path), **options}], size=16)
        built = index.build(data, cache, conditions)
        self.good = [entry.key for entry in built]
        self.bad = [str(bad) for bad in built.bad_samples()]
        self.left_out = dict(built.sources.left_out().counts)
        *self.reasons, self.line = check.balance(built).splitlines()

    @property
    def counts(self) -> tuple[int, int, dict[str, int]]:
        return len(self.good), len(self.bad), self.left_out


def fixed_form(good: int, bad: int, left_out: int) -> str:
    return f"balance    {good} good, {bad} bad, {left_out} left out = {good + bad + left_out} seen"


IMAGE = b""


def test_caption_files_are_used_named_or_counted(tmp_path: Path) -> None:
    files = {"a.png": IMAGE, "a.txt": "a dog", "a.caption": "not read", "a.png.txt": "nor this", "lost.txt": "no image"}
    files |= {"b.png": IMAGE, "b.txt": " \n", "c.png": IMAGE, "c.txt": b"\xff\xfe", "d.png": IMAGE}
    balance = Balance(write(tmp_path / "data", **files))
    reasons = {"caption files that are not read": 2, "caption files without an image": 1}
    assert balance.counts == (1, 3, reasons)
    assert [bad.split(";")[0] for bad in balance.bad] == [
        "b.png: its caption is empty",
        "c.png: the caption is not UTF-8 (invalid start byte at byte 0)",
        "d.png: it has no caption",
    ]
    assert balance.line == fixed_form(1, 3, 3)
    write(tmp_path / "data", **{"metadata.jsonl": '{"file_name": "b.png", "text": "a cat"}'})
    reasons = {"images that no row names": 3, "caption files that are not read": 5, "caption files without an image": 1}
    assert Balance(tmp_path / "data").counts == (1, 0, reasons)


def test_files_of_other_splits_are_counted_with_their_captions(tmp_path: Path) -> None:
    files = {"train__a.png": IMAGE, "train__a.txt": "a dog", "test__b.png": IMAGE, "test__b.txt": "counted with b.png"}
    files |= {"test__lost.txt": "no image", "test__sub__notes.pdf": "%PDF", "test__.DS_Store": "x"}
    balance = Balance(write(tmp_path / "data", **files))
    assert balance.counts == (1, 0, {"images of other splits": 1, "other files of other splits": 3})


def write_tar(path: Path, *members: tuple[str, bytes | None]) -> Path:
    """A tar of members; None stands for a link."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, "elsewhere"
            info.size = len(content or b"")
            tar.addfile(info, io.BytesIO(content or b""))
    return path


TAR_MEMBERS: dict[str, tuple[list[tuple[str, bytes | None]], int, int, dict[str, int]]] = {
    "a second image": ([("a.png", png()), ("a.jpg", png()), ("a.txt", b"x")], 1, 0, {"other images of a sample": 1}),
    "a mask": ([("a.png", png()), ("a.mask.png", png()), ("a.txt", b"x")], 1, 0, {"other images of a sample": 1}),
    "a raw file": (
        [("a.png", png()), ("a.dng", b"II"), ("a.txt", b"x")],
        1,
        0,
        {"images that are read in another format": 1},
    ),
    "a json beside a txt": (
        [("a.png", png()), ("a.json", b"{}"), ("a.txt", b"x")],
        1,
        0,
        {"caption files that are not read": 1},
    ),
    "other keys of json": (
        [
            (f"{name}.{suffix}", data)
            for name in "ab"
            for suffix, data in (("png", png()), ("json", b'{"text": "x", "id": 1}'))
        ],
        2,
        0,
        {"keys of .json files that are not read": 1},
    ),
    "a key twice": ([("a.png", png()), ("a.json", b'{"text": "x", "text": "y"}')], 0, 1, {}),
    "a class": ([("a.png", png()), ("a.cls", b"1"), ("a.txt", b"x")], 1, 0, {"classes that are not read": 1}),
    "a caption named after the file": ([("a.png", png()), ("a.png.txt", b"x")], 1, 0, {}),
    "names with dots": ([("v1.0.png", png()), ("v1.1.png", png()), ("v1.0.txt", b"x")], 0, 2, {}),
    "two raw files": ([("a.dng", b"II"), ("a.psd", b"8B")], 0, 2, {}),
    "a linked caption": ([("a.png", png()), ("a.txt", None)], 0, 1, {"other files": 1}),
    "a linked image": ([("a.png", None), ("b.png", png()), ("b.txt", b"x")], 1, 1, {}),
    "a hidden folder": ([(".git/a.png", b"x"), ("./a.png", png()), ("./a.txt", b"x")], 1, 0, {"hidden files": 1}),
    "a line break": ([("a\n.png", png()), ("b.png", png()), ("b.txt", b"x")], 1, 1, {}),
    "halves": ([("a.png", png()), ("b.png", png()), ("a.txt", b"x"), ("b.txt", b"x")], 0, 4, {}),
    "the same name twice": ([("a.png", png()), ("a.png", png()), ("a.txt", b"x")], 1, 1, {}),
}


@pytest.mark.parametrize("kind", TAR_MEMBERS)
def test_each_member_of_a_tar_is_used_named_or_counted(kind: str, tmp_path: Path) -> None:
    members, good, bad, left_out = TAR_MEMBERS[kind]
    balance = Balance(write_tar(tmp_path / "0.tar", *members))
    assert balance.counts == (good, bad, left_out)
    assert balance.line == fixed_form(good, bad, sum(left_out.values()))


def test_what_lies_beside_tars_and_tables_is_counted(tmp_path: Path) -> None:
    write_tar(tmp_path / "data/0.tar", ("a.png", png()), ("a.txt", b"a dog"))
    write(tmp_path / "data", **{"README.md": "x", "._0.tar": "x", "sub__b.png": IMAGE, "sub__b.txt": "a cat"})
    reasons = {"hidden files": 1, "other files": 2, "images outside of the tars or tables": 1}
    assert Balance(tmp_path / "data").counts == (1, 0, reasons)
    streamed = Sources([SourceConfig(path=str(tmp_path / "data"))], 16, tmp_path / "cache")
    assert len(streamed.shards(0)) == 1
    assert streamed.left_out().counts == reasons


def as_csv(folder: Path) -> None:
    write(folder, **{"metadata.csv": "id,file_name,text,negative\n7,a.png,a dog,\n8,b.png,a, cat\n\n9,,a bird,ugly\n"})


def as_jsonl(folder: Path) -> None:
    rows = [{"file_name": "a.png", "text": "a dog", "id": 7}, {"text": "a bird", "negative": "ugly"}]
    lines = [*map(json.dumps, rows), "", '{"file_name": "b.png", "text": "a cat", "text": "a"}']
    write(folder, **{"metadata.jsonl": "\n".join(lines)})


def as_parquet(folder: Path) -> None:
    columns = {"id": [7, 8, 9], "file_name": ["a.png", "b.png", None], "text": ["a dog", None, "a bird"]}
    pq.write_table(pa.table({**columns, "negative": ["", "", "ugly"]}), folder / "metadata.parquet")


@pytest.mark.parametrize("write_metadata", [as_csv, as_jsonl, as_parquet])
def test_each_row_and_column_of_metadata_is_used_named_or_counted(
    write_metadata: Callable[[Path], None], tmp_path: Path
) -> None:
    write(tmp_path / "data", **{"a.png": IMAGE, "c.png": IMAGE})
    write_metadata(tmp_path / "data")
    balance = Balance(tmp_path / "data")
    assert balance.counts == (1, 2, {"columns that are not read": 2, "images that no row names": 1})
    (columns,) = [line for line in balance.reasons if "columns" in line]
    assert columns.endswith(f"{next((tmp_path / 'data').glob('metadata.*')).name}: negative") or "id" in columns


def test_a_column_that_comes_twice_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "data", **{"a.png": IMAGE, "metadata.csv": "file_name,text,text\na.png,a dog,a cat\n"})
    with pytest.raises(UserError, match=r"2 columns are named 'text'; rename all but one"):
        Balance(tmp_path / "data")


def test_an_open_quote_names_the_lines_that_it_swallows(tmp_path: Path) -> None:
    rows = 'file_name,text\na.png,a dog\nb.png,"a cat\nc.png,a bird\nd.png,a fish\n'
    balance = Balance(write(tmp_path / "data", **{"a.png": IMAGE, "b.png": IMAGE, "metadata.csv": rows}))
    assert balance.counts == (1, 1, {"images that no row names": 1})
    assert "line 3: it is no CSV (unexpected end of data), so lines 3 to 5 are lost; close its quotes" in balance.bad[0]


@pytest.mark.parametrize("name", ["{folder}/a.png", ".a.png", "./sub/../a.png"])
def test_an_image_that_a_row_names_is_counted_once(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    named = Path(name.format(folder=folder)).name
    row = json.dumps({"file_name": name.format(folder=folder), "text": "a dog"})
    write(folder, **{named: IMAGE, "sub__b.png": IMAGE, "metadata.jsonl": row})
    assert Balance(folder).counts == (1, 0, {"images that no row names": 1})


def test_rows_of_other_splits_count_with_their_images_or_by_themselves(tmp_path: Path) -> None:
    rows = [{"file_name": name, "text": name} for name in ("train/a.png", "test/b.png", "test/missing.png")]
    files = {"train__a.png": IMAGE, "test__b.png": IMAGE, "metadata.jsonl": "\n".join(map(json.dumps, rows))}
    balance = Balance(write(tmp_path / "data", **files))
    assert balance.counts == (1, 0, {"images of other splits": 1, "rows of other splits": 1})


def toml(folder: Path, general: str = "", dataset: str = "", subset: str = "") -> Path:
    write(folder, **{"dogs__a.png": IMAGE, "dogs__a.txt": "a dog"})
    text = f'[general]\n{general}\n[[datasets]]\n{dataset}\n[[datasets.subsets]]\nimage_dir = "dogs"\n{subset}\n'
    return write(folder, **{"set.toml": text}) / "set.toml"


@pytest.mark.parametrize(
    ("general", "dataset", "subset", "unused"),
    [
        ("", "resolution = 32", "num_repeats = 2", []),
        ("", "bucket_reso_steps = 8", "", ["data set 1: bucket_reso_steps"]),
        ("bucket_no_upscale = true", "enable_bucket = true", "", []),
        ("max_bucket_reso = 64", "enable_bucket = false", "", ["general: max_bucket_reso"]),
        ("", "", "keep_tokens = 1", ["data set 1, subset 1: keep_tokens"]),
        ("shuffle_caption = true", "", "keep_tokens = 1", []),
        ("num_repeats = 3", "num_repeats = 2", "num_repeats = 1", ["general: num_repeats", "data set 1: num_repeats"]),
    ],
)
def test_each_key_of_a_toml_has_an_effect_or_is_named(
    general: str, dataset: str, subset: str, unused: list[str], tmp_path: Path
) -> None:
    balance = Balance(toml(tmp_path / "set", general, dataset, subset))
    assert balance.counts == (1, 0, {"keys without effect": len(unused)} if unused else {})
    assert [line.split(": ", 1)[1] for line in balance.reasons] == (
        [", ".join(f"set.toml: {key}" for key in unused)] if unused else []
    )


def test_a_key_of_a_toml_that_is_unknown_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"set.toml: subsets: 'num_repeat' is unknown .*; the nearest is 'num_repeats'"):
        Balance(toml(tmp_path / "set", subset="num_repeat = 2"))


@pytest.mark.parametrize("streaming", [False, True])
def test_other_splits_and_columns_of_data_sets_are_counted(streaming: bool, tmp_path: Path) -> None:
    rows = {"image": [{"bytes": png(), "path": None}], "text": ["a dog"], "id": [7]}
    features = {"image": datasets.Image(), "text": datasets.Value("string"), "id": datasets.Value("int64")}
    table = datasets.Dataset.from_dict(rows, datasets.Features(features))
    datasets.DatasetDict(train=table, test=table, extra=table).save_to_disk(tmp_path / "saved")
    sources = Sources([SourceConfig(path=str(tmp_path / "saved"))], 16, tmp_path / "cache")
    samples = list(sources.samples(sources.shards(0)[0]) if streaming else sources.records(0))
    assert len(samples) == 1
    assert sources.left_out().counts == {"other splits": 2, "columns that are not read": 1}
    assert sources.left_out().lines()[0] == "left out   2 other splits: saved: test, saved: extra"


def test_columns_of_parquet_are_counted(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [png()], "text": ["a dog"], "id": [7]}), tmp_path / "a.parquet")
    assert Balance(tmp_path / "a.parquet").counts == (1, 0, {"columns that are not read": 1})
    assert Balance(tmp_path / "a.parquet", conditions=()).left_out == {"columns that are not read": 2}


@pytest.mark.parametrize(("name", "repeats"), [("10_dog", 10), ("999_dog", 999), ("2024_rome", 1), ("20240131_x", 1)])
def test_years_and_dates_are_no_repeats(name: str, repeats: int, tmp_path: Path) -> None:
    write(tmp_path / "data", **{f"{name}__a.png": IMAGE})
    (record,) = Sources([SourceConfig(path=str(tmp_path / "data"))], 16, tmp_path).records(0)
    assert isinstance(record, Record)
    assert record.repeats == repeats


def test_repeats_that_no_epoch_can_hold_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"repeated 2,000,000,000,000 times; give 1,000,000 at most"):
        Balance(toml(tmp_path / "set", subset="num_repeats = 2_000_000_000_000"))


def test_bad_samples_and_what_is_left_out_are_told_apart(tmp_path: Path) -> None:
    write(
        tmp_path / "data", **{"a.png": IMAGE, "a.txt": "a dog", "b.HEIC": "x", "c": png(), "d.png": "x", "d.txt": "d"}
    )
    records = list(Sources([SourceConfig(path=str(tmp_path / "data"))], 16, tmp_path / "cache").records(0))
    assert len([record for record in records if isinstance(record, BadSample)]) == 2  # d.png is bad when it is opened
    assert Balance(tmp_path / "data").counts == (1, 3, {})
