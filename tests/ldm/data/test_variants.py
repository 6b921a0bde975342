"""Variants of the faults that data sets in the wild have: nothing in them is read wrongly or passed over in silence."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cases import for_each
from PIL import ExifTags, Image
from tiny import TINY

from ldm.config.schema import SourceConfig
from ldm.data.formats import FORMATS
from ldm.data.images import decode
from ldm.data.records import BadSample, Record
from ldm.data.sources import Sources
from ldm.utils.errors import UserError
from scripts import check_data


def encoded(image_format: str = "PNG", number: int = 0, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 16), (number * 20, 90, 30)).save(buffer, image_format, **options)
    return buffer.getvalue()


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    """Files by name; an image where the content is empty."""
    for number, (name, content) in enumerate(files.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content.encode() if isinstance(content, str) else content
        path.write_bytes(data or encoded("JPEG" if name.lower().endswith("jpg") else "PNG", number))
    return folder


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


class Read:
    """Captions, repeats and classes of the good ones by name, reasons of the bad ones, counts of what is left out."""

    def __init__(self, path: Path | str, conditions: tuple[str, ...] = ("text",), **options: object):
        sources = Sources([SourceConfig(path=str(path), **options)], 16, Path(f"{path}-cache"), conditions)
        entries = list(sources.records(0))
        good = [entry for entry in entries if isinstance(entry, Record)]
        self.captions = {entry.key: entry.captions[0] for entry in good}
        self.repeats = {entry.key: entry.repeats for entry in good}
        self.labels = {entry.key: entry.label for entry in good}
        self.bad = {entry.key: str(entry) for entry in entries if isinstance(entry, BadSample)}
        self.left_out = dict(sources.left_out().counts)


def jsonl(**captions: str) -> str:
    return "\n".join(json.dumps({"file_name": name, "text": caption}) for name, caption in captions.items())


# ------------------------------------------------------------------------------------- captions above and beside images


def test_metadata_in_a_folder_of_its_own_is_read(tmp_path: Path) -> None:
    rows = "file_name,text\n../images/a.png,a dog\n../images/deep/b.png,a cat\n"
    files = {"images/a.png": "", "images/deep/b.png": "", "annotations/metadata.csv": rows}
    read = Read(write(tmp_path / "data", files))
    assert (read.captions, read.bad, read.left_out) == ({"images/a.png": "a dog", "images/deep/b.png": "a cat"}, {}, {})


def test_metadata_deep_inside_of_splits_is_read_by_split(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {f"{split}/set/{split}.png": "" for split in ("train", "valid")}
    files |= {f"{split}/set/metadata.jsonl": jsonl(**{f"{split}.png": split}) for split in ("train", "valid")}
    folder = write(tmp_path / "data", files)
    assert Read(folder).captions == {"train/set/train.png": "train"}
    assert Read(folder, split="validation").captions == {"valid/set/valid.png": "valid"}


@pytest.mark.parametrize("name", ["captions.yaml", "train_prompts.pkl", "images/annotations.xml", "captions.jsonl.gz"])
def test_a_file_with_the_title_of_captions_is_named_whatever_its_type(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "data", {"images/a.png": "", "images/b.png": "", name: "a.png: a dog"})
    with pytest.raises(UserError, match="may hold the captions") as caught:
        Read(folder)
    assert str(folder / name) in str(caught.value)
    assert sum(Read(folder, kind="classes").left_out.values()) == 1


def test_an_image_with_such_a_title_is_an_image(tmp_path: Path) -> None:
    assert Read(write(tmp_path / "data", {"red/caption.png": "", "red/tags.dng": "raw"})).captions == {
        "red/caption.png": "red"
    }


# ----------------------------------------------------------------------------------------------- names of caption files


@pytest.mark.parametrize(
    ("image_name", "caption_name"),
    [
        ("IMG_1.JPG", "img_1.jpg.TXT"),
        ("a.b.c.Png", "A.B.C.Caption"),
        ("é.png", "e\u0301.txt"),  # written apart, as macOS does
        ("E\u0301.PNG", "é.png.txt"),
    ],
)
@pytest.mark.parametrize("layout", ["folder", "toml"])
def test_a_caption_file_fits_however_its_name_is_written(
    layout: str, image_name: str, caption_name: str, tmp_path: Path
) -> None:
    write(tmp_path / "data", {image_name: "", caption_name: "a dog"})
    toml = '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "data"\nclass_tokens = "a class"\n'
    write(tmp_path, {"set.toml": toml})
    read = Read(tmp_path / ("data" if layout == "folder" else "set.toml"))
    assert (list(read.captions.values()), read.bad, read.left_out) == (["a dog"], {}, {})


def test_names_that_differ_in_their_accents_only_keep_their_own_captions(tmp_path: Path) -> None:
    files = {"é.png": "", "é.txt": "together", "e\u0301.png": "", "e\u0301.txt": "apart"}
    assert Read(write(tmp_path / "data", files)).captions == {"é.png": "together", "e\u0301.png": "apart"}


@pytest.mark.parametrize("extension", ["Txt", "TXT.bak", ".tags", "caption"])
def test_an_extension_of_a_toml_is_found_in_any_case_and_its_absence_is_seen(extension: str, tmp_path: Path) -> None:
    toml = (
        f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "dogs"\nclass_tokens = "c"\ncaption_extension = "{extension}"'
    )
    captions = {f"dogs/a.{extension.strip('.').lower()}": "a dog"}
    write(tmp_path, {"set.toml": toml, "dogs/a.png": "", "dogs/b.png": "", "dogs/b.cap": "not read", **captions})
    read = Read(tmp_path / "set.toml")
    assert read.captions == {"dogs/a.png": "a dog", "dogs/b.png": "c"}
    assert sum(read.left_out.values()) == 1


# ------------------------------------------------------------------------------------------------- formats and suffixes


@pytest.mark.skipif("HEIF" in FORMATS or "JXL" in FORMATS, reason="the plugins are installed")
@pytest.mark.parametrize(
    ("name", "data", "package"),
    [
        ("a.HEIF", b"\0\0\0\x18ftypmif1", "pillow-heif"),
        ("a.heics", b"\0\0\0\x18ftypheic", "pillow-heif"),
        ("a.jxl", b"\xff\x0a", "pillow-jxl-plugin"),
        ("a.jpg", b"\0\0\0\x18ftypheix", "pillow-heif"),  # as some phones name it
    ],
)
def test_an_image_of_a_phone_names_its_package_in_a_tar_a_row_and_a_folder(
    name: str, data: bytes, package: str, tmp_path: Path
) -> None:
    write_tar(tmp_path / "0.tar", {name: data, "a.txt": b"a dog"})
    pq.write_table(pa.table({"image": [data], "text": ["a dog"]}), tmp_path / "0.parquet")
    write(tmp_path / "data", {name: data, "a.txt": "a dog", "b.png": "", "b.txt": "a cat"})
    for source in ("0.tar", "0.parquet", "data"):
        run = tmp_path / f"run-{source}"
        assert check_data.main([*TINY, f"data.source={tmp_path / source}", f"run.dir={run}"]) == 1
        (bad,) = json.loads((run / "data-report.json").read_text())["list"]
        assert f"pip install {package}" in bad["fix"]


@pytest.mark.parametrize("name", ["a.pjpeg", "a.jpg_orig", "a.jpg.part", "a.png~", "a.jpg-1"])
def test_an_image_of_an_odd_suffix_is_named(name: str, tmp_path: Path) -> None:
    files = {name: encoded("JPEG"), "a.txt": "a dog", "b.jpeg": encoded("JPEG"), "b.txt": "a cat"}
    read = Read(write(tmp_path / "data", files))
    assert (list(read.captions), list(read.bad)) == (["b.jpeg"], [name])
    assert "it is JPEG, but isn't named so; rename it" in read.bad[name]
    assert read.left_out == {"caption files without an image": 1}


@pytest.mark.parametrize(
    ("suffix", "image_format"),
    [(".JFIF", "JPEG"), (".j2k", "JPEG2000"), (".PNM", "PPM"), (".icb", "TGA"), (".dib", "DIB")],
)
def test_a_rare_suffix_is_read_from_a_folder_and_a_tar(suffix: str, image_format: str, tmp_path: Path) -> None:
    data = encoded(image_format)
    write(tmp_path / "data", {f"a{suffix}": data, "a.txt": "a dog"})
    write_tar(tmp_path / "0.tar", {f"a{suffix}": data, "a.txt": b"a dog"})
    assert list(Read(tmp_path / "data").captions.values()) == ["a dog"]
    assert list(Read(tmp_path / "0.tar").captions.values()) == ["a dog"]
    assert decode(data).size == (24, 16)


def chunk(name: bytes, content: bytes, checksum: int | None = None) -> bytes:
    crc = zlib.crc32(name + content) if checksum is None else checksum
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)


def png_with(chunks: bytes) -> bytes:
    return encoded()[:33] + chunks + encoded()[33:]


def jpeg_with(segments: list[tuple[int, bytes]]) -> bytes:
    body = b"".join(b"\xff" + bytes([marker]) + struct.pack(">H", len(text) + 2) + text for marker, text in segments)
    return b"\xff\xd8" + body + encoded("JPEG")[2:]


def webp_with_odd_exif() -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    data = bytearray(encoded("WEBP", exif=exif.tobytes()))
    at = data.index(b"EXIF") + 8
    data[at : at + 6] = b"Broken"
    return bytes(data)


METADATA_FAULTS: dict[str, Callable[[], bytes]] = {
    "colour chunks of a PNG": lambda: png_with(
        chunk(b"gAMA", b"", 0) + chunk(b"cHRM", b"x" * 31) + chunk(b"pHYs", b"1")
    ),
    "a hundred texts of a PNG": lambda: png_with(chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * 10**6)) * 100),
    "a profile of a PNG": lambda: png_with(chunk(b"iCCP", b"x\0\0" + b"no stream")),
    "comments of a JPEG": lambda: jpeg_with([(0xFE, b"c" * 65000)] * 40),
    "parts of a profile of a JPEG": lambda: jpeg_with(
        [(0xE2, b"ICC_PROFILE\0\2\3part"), (0xE2, b"ICC_PROFILE\0\9\3part")]
    ),
    "XMP and EXIF of a JPEG": lambda: jpeg_with(
        [(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x"), (0xE1, b"Exif\0\0II*\0\xff")]
    ),
    "EXIF of a WebP": webp_with_odd_exif,
}


@for_each("fault", METADATA_FAULTS)
def test_metadata_never_costs_an_image_whose_pixels_decode(fault: str) -> None:
    assert decode(METADATA_FAULTS[fault]()).size == (24, 16)


# ----------------------------------------------------------------------------------------------------- names of folders


def test_repeats_are_read_below_a_split(tmp_path: Path) -> None:
    files = {"train/3_red cat/a.png": "", "train/2_cat/b.png": "", "test/3_red cat/c.png": ""}
    read = Read(write(tmp_path / "data", files))
    assert read.captions == {"train/3_red cat/a.png": "red cat", "train/2_cat/b.png": "cat"}
    assert read.repeats == {"train/3_red cat/a.png": 3, "train/2_cat/b.png": 2}
    assert read.left_out == {"images of other splits": 1}


@pytest.mark.parametrize(
    "names", [("10_", "20_"), ("2023_rome", "2024_oslo"), ("010_x", "020_y"), ("10_cat", "10cats")]
)
def test_folders_that_only_look_like_repeats_are_classes(names: tuple[str, str], tmp_path: Path) -> None:
    read = Read(write(tmp_path / "data", {f"{name}/a.png": "" for name in names}))
    assert list(read.captions.values()) == [" ".join(name.replace("_", " ").split()) for name in sorted(names)]
    assert set(read.repeats.values()) == {1}


# ----------------------------------------------------------------------------------------------------------------- tars


@pytest.mark.parametrize("between", ["Thumbs.db", ".DS_Store", "a/._b.jpg", "./__MACOSX/set/._a.txt", "set/.a.txt.swp"])
def test_a_member_between_an_image_and_its_caption_does_not_part_them(between: str, tmp_path: Path) -> None:
    tar = {"set/a.jpg": encoded("JPEG"), between: b"\0\5\x16\7", "set/a.txt": b"a dog"}
    read = Read(write_tar(tmp_path / "0.tar", tar))
    assert (read.captions, read.bad) == ({"0.tar:set/a.jpg": "a dog"}, {})
    assert sum(read.left_out.values()) == 1


@pytest.mark.parametrize("label", [b"dog\r\n", b"\xef\xbb\xbfdog", b" dog "])
def test_a_class_of_a_tar_is_its_word_whatever_is_around_it(label: bytes, tmp_path: Path) -> None:
    tar = {"a.CLS": label, "a.png": encoded(), "b.png": encoded(number=1), "b.json": b'{"label": 3}'}
    read = Read(write_tar(tmp_path / "0.tar", tar), ("class",))
    assert read.labels == {"0.tar:a.png": "dog", "0.tar:b.png": "3"}
    assert Read(tmp_path / "0.tar", ()).left_out["classes that are not read"] == 1


# --------------------------------------------------------------------------------------------------------------- splits


def test_the_splits_of_a_brace_pattern_are_chosen(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_tar(tmp_path / f"{split}-000.tar", {"a.png": encoded(), "a.txt": split.encode()})
    pattern = str(tmp_path / "{train,val}-000.tar")
    for split, caption in (("train", "train"), ("validation", "val"), ("val", "val")):
        read = Read(pattern, split=split)
        assert (list(read.captions.values()), read.left_out) == ([caption], {"files of other splits": 1})


def test_several_files_of_a_split_are_all_read_and_a_data_set_on_disk_names_its_others(tmp_path: Path) -> None:
    for name, rows in (("train-00000-of-00002", 2), ("train-00001-of-00002", 1), ("validation-00000-of-00001", 1)):
        (tmp_path / "hub/data").mkdir(parents=True, exist_ok=True)
        table = pa.table({"image": [encoded(number=i) for i in range(rows)], "text": [name] * rows})
        pq.write_table(table, tmp_path / f"hub/data/{name}.parquet")
    assert len(Read(tmp_path / "hub").captions) == 3
    assert len(Read(tmp_path / "hub", split="val").captions) == 1
    rows = datasets.Dataset.from_dict({"image": [encoded()], "text": ["a dog"]})
    datasets.DatasetDict(train=rows, holdout=rows).save_to_disk(tmp_path / "saved")
    assert Read(tmp_path / "saved").left_out == {"other splits": 1}
    assert len(Read(tmp_path / "saved", split="holdout").captions) == 1


# --------------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("file_name;text\na.png;a dog\n", "no column 'file_name' among file_name;text"),
        ("file_name\ttext\na.png\ta dog\n", "no column 'file_name' among file_name\ttext"),
        ("image,text\na.png,a dog\n", "no column 'file_name' among image, text"),
        ("", "no column 'file_name' among none"),
    ],
)
def test_a_csv_of_other_columns_or_separators_is_refused(content: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        Read(write(tmp_path / "data", {"a.png": "", "metadata.csv": content or "\n"}))
    assert says in str(caught.value)


@pytest.mark.parametrize("text_type", [pa.string(), pa.large_string()])  # pandas and polars write one each
@pytest.mark.parametrize("listed", [False, True])
def test_a_caption_that_is_not_utf8_costs_a_parquet_no_other_row(
    text_type: pa.DataType, listed: bool, tmp_path: Path
) -> None:
    binary = pa.large_binary() if text_type == pa.large_string() else pa.binary()
    raw = pa.array([b"a dog", b"\xff", b"a cat"], binary)
    captions = pa.Array.from_buffers(text_type, len(raw), raw.buffers())
    column = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), captions) if listed else captions
    pq.write_table(pa.table({"image": [encoded()] * 3, "text": column}), tmp_path / "a.parquet")
    read = Read(tmp_path / "a.parquet")
    assert list(read.captions.values()) == ["a dog", "a cat"]
    assert list(read.bad) == ["a.parquet:1"]


def test_tables_of_other_columns_are_refused_with_the_cause(tmp_path: Path) -> None:
    for column in ("text", "caption"):
        pq.write_table(pa.table({"image": [encoded()], column: ["a dog"]}), tmp_path / f"{column}.parquet")
    with pytest.raises(UserError, match=r"datasets can't open .* \(CastError: Couldn't cast .*caption"):
        list(Sources([SourceConfig(path=str(tmp_path))], 16, tmp_path / "cache").records(0))


@pytest.mark.parametrize("row", ["b.png,a fox, asleep,", 'b.png,"a fox" asleep', "b.png"])
def test_a_csv_row_that_is_not_of_its_header_is_bad(row: str, tmp_path: Path) -> None:
    rows = f'file_name,text\r\na.png,"a fox, awake"\r\n\r\n{row}\r\nc.png,a cat'
    read = Read(write(tmp_path / "data", {"a.png": "", "b.png": "", "c.png": "", "metadata.csv": rows}))
    assert read.captions == {"a.png": "a fox, awake", "c.png": "a cat"}
    assert len(read.bad) == 1


# ------------------------------------------------------------------------------------------------------ held-out images


@pytest.mark.parametrize("fraction", ["0.999999", "0.9999999"])
def test_a_share_that_holds_out_every_image_is_named(
    fraction: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "data", {"a.png": "", "a.txt": "a dog"})
    config = [*TINY, f"data.source={source}", f"run.dir={tmp_path / 'run'}"]
    assert check_data.main([*config, f"data.val_fraction={fraction}"]) == 1
    output = capsys.readouterr().out.splitlines()
    assert output[-2] == "balance    1 good, 0 bad, 0 left out = 1 seen"
    assert (
        output[-1]
        == f"training would stop: data.val_fraction: {fraction} holds out all 1 images; set it to 0, or add some"
    )
    assert check_data.main(config) == 0


# ---------------------------------------------------------------------------------------------------------------- links


@pytest.mark.parametrize("target", ["../blobs/1", "/etc/hostname", "nowhere", "a.png"])
def test_a_link_in_place_of_an_image_is_read_or_named(target: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "data", {"b.png": "", "b.txt": "a cat", "a.txt": "a dog"})
    (folder / "a.png").symlink_to(target)
    write(tmp_path / "blobs", {"1": ""})
    read = Read(folder)
    assert (list(read.captions), list(read.bad)) == (["b.png"], ["a.png"])


def test_a_linked_folder_inside_of_a_class_is_read_once_more_under_no_other_name(tmp_path: Path) -> None:
    write(tmp_path / "disk/more", {"x.png": "", "y.png": ""})
    folder = write(tmp_path / "data", {"red/a.png": ""})
    (folder / "red/more").symlink_to(tmp_path / "disk/more")
    (folder / "twice").symlink_to(tmp_path / "disk/more")
    read = Read(folder)
    assert len(read.captions) == 3
    assert read.left_out == {"links to folders that are read already": 1}
