"""Layouts of tars and parquet tables: every member and file is read, reported as bad, or counted as left out."""

import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ldm.config.schema import SourceConfig
from ldm.data.records import BadSample, Record
from ldm.data.sources import Sources
from ldm.utils.errors import UserError


def encoded(number: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 16), (number, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sources_of(path: Path | str, *conditions: str, **options: object) -> Sources:
    return Sources([SourceConfig(path=str(path), **options)], 16, Path("unused"), conditions or ("text",))


def members(prefix: str, hidden: str) -> dict[str, bytes]:
    result = dict[str, bytes]()
    for i, stem in enumerate("abc"):
        result |= {
            f"{hidden}{stem}.jpg": b"\0\5\x16\7",
            f"{prefix}{stem}.jpg": encoded(i),
            f"{hidden}{stem}.txt": b"\0\5\x16\7",
            f"{prefix}{stem}.txt": f"a {stem}".encode(),
        }
    return result


@pytest.mark.parametrize(("prefix", "hidden"), [("set/", "set/._"), ("", "._"), ("set/", "__MACOSX/set/._")])
def test_macos_metadata_in_a_tar_is_left_out(prefix: str, hidden: str, tmp_path: Path) -> None:
    sources = sources_of(write_tar(tmp_path / "0.tar", members(prefix, hidden)))
    records = list(sources.records(0))
    assert [record.captions[0] for record in records if isinstance(record, Record)] == ["a a", "a b", "a c"]
    assert len(records) == 3
    assert sources.left_out().counts == {"hidden files": 6}
    streamed = sources_of(tmp_path / "0.tar")
    (shard,) = streamed.shards(0)
    assert len([sample for sample in streamed.samples(shard) if not isinstance(sample, BadSample)]) == 3
    assert streamed.left_out().counts == {"hidden files": 6}


@pytest.mark.parametrize("suffix", ["cls", "CLS"])
def test_a_class_is_read_from_a_cls_member(suffix: str, tmp_path: Path) -> None:
    tar = {f"{i}.{name}": data for i in range(2) for name, data in ((suffix, b" %d\n" % (i + 7)), ("jpg", encoded(i)))}
    records = list(sources_of(write_tar(tmp_path / "0.tar", tar), "class").records(0))
    assert [record.label for record in records if isinstance(record, Record)] == ["7", "8"]


def test_a_json_label_precedes_cls_and_a_missing_class_is_reported_with_a_remedy(tmp_path: Path) -> None:
    tar = {"a.jpg": encoded(), "a.json": b'{"label": "dog"}', "a.cls": b"3", "b.jpg": encoded(1), "c.jpg": encoded(2)}
    tar |= {"c.json": b'{"text": "no label"}', "c.cls": b"cat"}
    dog, bad, cat = sources_of(write_tar(tmp_path / "0.tar", tar), "class").records(0)
    assert isinstance(dog, Record)
    assert isinstance(cat, Record)
    assert (dog.label, cat.label) == ("dog", "cat")
    assert str(bad) == "0.tar:b.jpg: it has no class; add a .cls of the same name, or the key 'label' to its .json"


def test_a_tar_may_hold_both_kinds_of_caption_files_and_its_other_members_are_counted(tmp_path: Path) -> None:
    tar = {"a.jpg": encoded(), "a.caption": b"a dog", "a.npy": b"\x93NUMPY", "b.dng": b"II*\0", "b.txt": b"a cat"}
    sources = sources_of(write_tar(tmp_path / "0.tar", tar))
    good, bad = sources.records(0)
    assert isinstance(good, Record)
    assert good.captions == ("a dog",)
    assert str(bad) == "0.tar:b.dng: images of type .dng aren't read here; develop it, as TIFF or JPEG"
    assert sources.left_out().counts == {"other files": 1}


def write_parquet(path: Path, rows: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": [encoded(i) for i in range(rows)], "text": [path.stem] * rows}), path)


@pytest.mark.parametrize(
    "names",
    [
        ("train-00000-of-00001", "test-00000-of-00001"),
        ("data/set_train", "data/set_test"),
        ("train/0", "test/0"),
        ("more", "eval.0"),  # a name without a split belongs to train
    ],
)
def test_parquet_is_read_by_split(names: tuple[str, str], tmp_path: Path) -> None:
    for name, rows in zip(names, (3, 2), strict=True):
        write_parquet(tmp_path / f"set/{name}.parquet", rows)
    for split, rows in (("train", 3), ("test", 2)):
        sources = Sources([SourceConfig(path=str(tmp_path / "set"), split=split)], 16, tmp_path / "cache")
        assert len(list(sources.records(0))) == rows
        assert sources.left_out().counts == {"files of other splits": 1}
    with pytest.raises(UserError, match=r"data\.source\.split: .* has no 'validation', but test"):
        list(Sources([SourceConfig(path=str(tmp_path / "set"), split="validation")], 16, tmp_path).records(0))


def test_a_single_split_is_read_whatever_its_name(tmp_path: Path) -> None:
    write_parquet(tmp_path / "set/test-0.parquet", 2)
    assert len(list(Sources([SourceConfig(path=str(tmp_path / "set"))], 16, tmp_path / "cache").records(0))) == 2


def test_tars_are_read_by_split(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_tar(tmp_path / f"{split}-0.tar", {"a.jpg": encoded(), "a.txt": split.encode()})
    for split in ("train", "test"):
        sources = sources_of(tmp_path / "*.tar", split=split)
        (record,) = sources.records(0)
        assert isinstance(record, Record)
        assert record.captions == (split,)
        assert sources.shards(0) == [(0, str(tmp_path / f"{split}-0.tar"))]
