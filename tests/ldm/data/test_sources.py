"""Folders of captioned pictures."""

import json
from pathlib import Path

import pytest
from PIL import Image

from ldm.data.sources import read
from ldm.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (20, 16), "red").save(tmp_path / name)
    return tmp_path


def test_metadata_and_caption_files_read_alike(folder: Path) -> None:
    rows = [{"file_name": "a.png", "text": "one"}, {"file_name": "b.png", "text": ["two", "deux"]}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [(r.key, r.captions) for r in read(str(folder), 16, folder)] == [
        ("a.png", ("one",)),
        ("b.png", ("two", "deux")),
    ]
    (folder / "metadata.jsonl").unlink()
    (folder / "a.txt").write_text("one\n")
    (folder / "b.txt").write_text("two")
    assert [(r.key, r.captions) for r in read(str(folder), 16, folder)] == [("a.png", ("one",)), ("b.png", ("two",))]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"file_name": "../x.png", "text": "x"}', "not a file inside"),
        ('{"file_name": "a.png", "text": 5}', "text 5"),
        ('{"file_name": "a.png", "text": null}', "text None"),
        ('{"file_name": "a.png", "text": []}', "give a caption"),
        ('{"file_name": "a.png", "text": [" "]}', "give a caption"),
        ('{"text": "x"}', "file_name"),
        ("{", "line 1"),
    ],
)
def test_bad_metadata_is_named_by_line(folder: Path, line: str, says: str) -> None:
    (folder / "metadata.jsonl").write_text(line)
    with pytest.raises(UserError, match="line 1") as caught:
        read(str(folder), 16, folder)
    assert says in str(caught.value)


@pytest.mark.parametrize(("caption", "says"), [(b"caf\xe9", "not UTF-8"), (b" \n", "an empty caption")])
def test_a_bad_caption_file_is_named(folder: Path, caption: bytes, says: str) -> None:
    (folder / "a.txt").write_bytes(caption)
    with pytest.raises(UserError, match=rf"a\.txt: {says}"):
        read(str(folder), 16, folder)


def test_a_folder_without_captions_says_what_to_put_there(folder: Path) -> None:
    with pytest.raises(UserError, match=r"metadata\.jsonl"):
        read(str(folder), 16, folder)


def test_an_unknown_source_suggests_the_known_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'openmoji-demo'"):
        read("openmoji-dem", 16, tmp_path)
