"""Tars that have not changed are not listed again; whatever may have changed is noticed."""

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL
import pytest
from of_config import indexed
from PIL import Image

from ldm.config import loader
from ldm.data import index_file
from ldm.data.index import Index
from ldm.data.sources import Sources


def write_tar(path: Path, colors: range) -> None:
    with tarfile.open(path, "w") as tar:
        for n in colors:
            image = io.BytesIO()
            Image.new("RGB", (16, 16), (n, 0, 0)).save(image, "PNG")
            members = (f"{n}.png", image.getvalue()), (f"{n}.txt", b"an image"), (f".{n}", b"hidden")
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


Build = Callable[..., Index]


@pytest.fixture
def build(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    """Indexes two tars of three images; `listed` says whether their records are expected to be listed."""
    counts, records = list[int](), Sources.records
    monkeypatch.setattr(Sources, "records", lambda self, number: counts.append(number) or records(self, number))
    (tmp_path / "tars").mkdir()
    for shard in range(2):
        write_tar(tmp_path / f"tars/{shard}.tar", range(3 * shard, 3 * shard + 3))

    def build(listed: bool, *overrides: str) -> Index:
        counts.clear()
        source = [f"data.source={{path: {tmp_path / 'tars'}, kind: tar}}", f"data.cache_dir={tmp_path / 'cache'}"]
        config = loader.load(root / "configs/tiny.yaml", [*source, "data.size=16", "data.workers=0", *overrides])
        built = indexed(config)
        assert bool(counts) == listed
        return built

    return build


def test_unchanged_tars_give_the_same_index_without_a_listing(build: Build) -> None:
    first, second = build(True), build(False)
    assert list(second) == list(first)
    assert second.fingerprint() == first.fingerprint()
    assert second.table.columns.folder == first.table.columns.folder
    assert second.sources.left_out().lines() == first.sources.left_out().lines() != []


def change_content(folder: Path) -> None:
    before = (folder / "0.tar").stat()
    content = (folder / "0.tar").read_bytes()
    (folder / "0.tar").write_bytes(content.replace(b"an image", b"a number"))
    os.utime(folder / "0.tar", ns=(before.st_atime_ns, before.st_mtime_ns))  # the same size and modification time


@pytest.mark.parametrize(
    "change",
    [
        change_content,
        lambda folder: (folder / "1.tar").unlink(),
        lambda folder: write_tar(folder / "2.tar", range(6, 8)),
        lambda folder: (folder / "1.tar").rename(folder / "3.tar"),
        lambda folder: next(folder.glob("../cache/index-*")).write_bytes(b""),
    ],
)
def test_any_changed_file_is_noticed(build: Build, tmp_path: Path, change: Callable[[Path], Any]) -> None:
    build(True)
    change(tmp_path / "tars")
    assert list(build(True)) == list(build(False))


def test_settings_and_readers_that_may_change_a_listing_cause_one(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {entry.repeats for entry in build(True)} == {1}
    assert {entry.repeats for entry in build(True, "data.source.repeats=2")} == {2}
    monkeypatch.setattr(PIL, "__version__", "another")
    build(True, "data.source.repeats=2")
    build(False, "data.source.repeats=2")


def test_what_could_not_be_read_is_tried_again(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(*_: Any) -> bytes:
        raise OSError("the network is down")

    with monkeypatch.context() as patches:
        patches.setattr(Sources, "read", unreadable)
        patches.setattr(index_file, "PREFETCH", 1)
        assert build(True).bad_count() == 6
    assert build(True).bad_count() == 0
    build(False)
