"""kohya's regularization images: an epoch shows them as often as all the others together."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from ldm.config.schema import SourceConfig
from ldm.data.records import Record
from ldm.data.sources import Sources
from ldm.utils.errors import UserError

SUBSET = "[[datasets.subsets]]\nimage_dir = '{}'\n{}\n"


def write_images(folder: Path, count: int) -> None:
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(folder / f"{i}.png")


def sources_of(folder: Path, *subsets: tuple[str, str]) -> Sources:
    content = "[[datasets]]\nresolution = 16\n" + "".join(SUBSET.format(name, keys) for name, keys in subsets)
    (folder / "set.toml").write_text(content)
    return Sources([SourceConfig(path=str(folder / "set.toml"))], 16, folder / "cache")


DOG, REG = ("dog", "class_tokens = 'sks dog'\nnum_repeats = 3"), ("reg", "class_tokens = 'dog'\nis_reg = true")


@pytest.mark.parametrize(
    ("count", "repeats"),
    [
        (3, [4, 4, 4]),
        (5, [3, 3, 2, 2, 2]),
        (12, [1] * 12),
        (14, [1] * 12),
    ],
)
@pytest.mark.parametrize("order", [(DOG, REG), (REG, DOG)])
def test_an_epoch_shows_regularization_images_as_often_as_the_others(
    tmp_path: Path, count: int, repeats: list[int], order: tuple[tuple[str, str], ...]
) -> None:
    write_images(tmp_path / "dog", 4)
    write_images(tmp_path / "reg", count)
    sources = sources_of(tmp_path, *order)
    records = [record for record in sources.records(0) if isinstance(record, Record)]
    regularization = [record for record in records if record.key.startswith("reg/")]
    assert [record.repeats for record in records if record.key.startswith("dog/")] == [3] * 4
    assert [record.repeats for record in regularization] == repeats
    assert {record.captions for record in regularization} == {("dog",)}
    beyond = sources.left_out().counts["regularization images beyond the number of the others"]
    assert len(regularization) + beyond == count


def test_repeats_of_regularization_images_come_before_turns(tmp_path: Path) -> None:
    write_images(tmp_path / "dog", 4)
    write_images(tmp_path / "reg", 4)
    sources = sources_of(tmp_path, DOG, ("reg", f"{REG[1]}\nnum_repeats = 5"))
    records = [record for record in sources.records(0) if isinstance(record, Record) and record.key.startswith("reg/")]
    assert [record.repeats for record in records] == [5, 5, 2]
    assert sources.left_out().counts.total() == 1


def test_only_regularization_images_are_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "reg", 1)
    with pytest.raises(UserError, match=r"set\.toml: only regularization images; give a subset of other images"):
        list(sources_of(tmp_path, REG).records(0))


def test_is_reg_belongs_to_a_subset(tmp_path: Path) -> None:
    (tmp_path / "set.toml").write_text("[general]\nis_reg = true\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'")
    with pytest.raises(UserError, match=r"general: is_reg has no meaning here; write it into a \[\[datasets\.subsets"):
        list(Sources([SourceConfig(path=str(tmp_path / "set.toml"))], 16, tmp_path / "cache").records(0))
