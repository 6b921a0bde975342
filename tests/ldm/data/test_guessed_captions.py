"""A caption that all images share, guessed from a folder's name, has to be confirmed before training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from PIL import Image
from tiny import TINY

import train_ldm
from ldm.config.schema import SourceConfig
from ldm.data.sources import Sources
from ldm.utils.errors import UserError
from scripts import check_data


def write_images(folder: Path, *names: str) -> str:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (number, 0, 0)).save(folder / name)
    return str(folder)


def problem(source: str, conditions: tuple[str, ...] = ("text",), **options: object) -> str:
    return Sources([SourceConfig(path=source, **options)], 16, Path(source), conditions).unconfirmed_caption()


@pytest.mark.parametrize("name", ["images", "My Photos", "DCIM/100CANON"])
def test_one_folder_of_images_needs_a_confirmation(tmp_path: Path, name: str) -> None:
    source = write_images(tmp_path, f"{name}/a.png", f"{name}/b.png")
    label = name.split("/")[0]
    assert f"all images of {source} share the caption {label!r}, guessed from the folder's name" in problem(source)


@pytest.mark.parametrize(
    "options", [{"kind": "classes"}, {"template": "a photo of a {}"}, {"caption": "a dog"}, {"conditions": ("class",)}]
)
def test_a_configuration_confirms_it(tmp_path: Path, options: Mapping[str, object]) -> None:
    assert not problem(write_images(tmp_path, "dog/a.png", "dog/b.png"), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("names", [("hat/a.png", "shoe/b.png"), ("10_sks dog/a.png", "10_sks dog/b.png")])
def test_folders_of_several_classes_and_of_kohya_need_none(tmp_path: Path, names: tuple[str, ...]) -> None:
    assert not problem(write_images(tmp_path, *names))


def test_training_and_the_check_ask_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_images(tmp_path / "data", "images/a.png", "images/b.png")
    arguments = [*TINY, f"data.source={source}", f"run.dir={tmp_path / 'run'}"]
    remedy = "if that is meant, give --yes or data.source.kind=classes; else write a metadata.jsonl"
    assert check_data.main(arguments) == 1
    assert f"training would stop: data.source: all images of {source} share" in capsys.readouterr().out
    assert train_ldm.main(arguments) == 2
    assert remedy in capsys.readouterr().err
    assert not (tmp_path / "run/config.yaml").exists()

    def load_data(*_: object) -> None:
        raise UserError("the data would be read")

    monkeypatch.setattr(train_ldm, "load_data", load_data)
    for confirmation in ("data.source.kind=classes", "--yes"):
        assert train_ldm.main([*arguments, "--fresh", confirmation]) == 2
        assert "the data would be read" in capsys.readouterr().err
    assert check_data.main([*arguments, "data.source.kind=classes"]) == 0


def test_a_dry_run_reports_it_until_it_is_confirmed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_images(tmp_path / "data", "images/a.png", "images/b.png")
    arguments = [*TINY, f"data.source={source}", f"run.dir={tmp_path / 'run'}", "--dry-run"]

    def load_data(*_: object) -> None:
        raise UserError("the data would be read")

    monkeypatch.setattr(train_ldm, "load_data", load_data)
    outputs = []
    for confirmation in ((), ("--yes",)):
        assert train_ldm.main([*arguments, *confirmation]) == 2
        outputs.append(capsys.readouterr())
    assert ["training would stop: " in output.out for output in outputs] == [True, False]
    assert all("the data would be read" in output.err for output in outputs)
