"""The run's folder."""

from pathlib import Path

import pytest
import yaml

from ldm.config import loader
from ldm.training.run_dir import prepare_run_dir
from ldm.utils.errors import UserError


@pytest.fixture
def settings(root: Path, tmp_path: Path) -> loader.Config:
    return loader.load(root / "configs/tiny.yaml", [f"run.dir={tmp_path / 'run'}"])


def test_a_folder_is_taken_up_again_by_the_same_configuration_only(root: Path, settings: loader.Config) -> None:
    prepare_run_dir(settings)
    written = yaml.safe_load((settings.run.dir / "config.yaml").read_text())
    assert loader.parse(written["configuration"], "") == settings
    assert written["about"]["torch"]
    assert prepare_run_dir(settings) == settings
    again = loader.load(root / "configs/tiny.yaml", [f"run.dir={settings.run.dir}", "sample.steps=7"])
    assert prepare_run_dir(again) == again
    other = loader.load(root / "configs/tiny.yaml", [f"run.dir={settings.run.dir}", "stage1.lr=1e-3"])
    with pytest.raises(UserError, match=r"stage1\.lr: 0\.002 → 0\.001"):
        prepare_run_dir(other)


def test_a_folder_from_before_a_key_existed_is_taken_up_again(settings: loader.Config) -> None:
    prepare_run_dir(settings)
    file = settings.run.dir / "config.yaml"
    written = yaml.safe_load(file.read_text())
    del written["configuration"]["stage1"]["ema_widths"]
    file.write_text(yaml.safe_dump(written))
    assert prepare_run_dir(settings) == settings


def test_stage_two_may_be_changed_until_it_has_begun(root: Path, settings: loader.Config) -> None:
    prepare_run_dir(settings)
    changed = loader.load(root / "configs/tiny.yaml", [f"run.dir={settings.run.dir}", "stage2.lr=1e-3"])
    assert prepare_run_dir(changed) == changed
    written = yaml.safe_load((settings.run.dir / "config.yaml").read_text())
    assert written["configuration"]["stage2"]["lr"] == 1e-3
    (settings.run.dir / "stage2/checkpoints/step-000010").mkdir(parents=True)
    with pytest.raises(UserError, match=r"stage2\.lr: 0\.001 → 0\.002"):
        prepare_run_dir(settings)


def test_fresh_starts_beside_and_deletes_nothing(settings: loader.Config) -> None:
    prepare_run_dir(settings)
    names = [prepare_run_dir(settings, fresh=True).run.dir.name for _ in range(2)]
    assert names == ["run-2", "run-3"]
    assert (settings.run.dir / "config.yaml").exists()


def test_a_folder_that_can_not_be_written_is_named(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run\.dir: can't write"):
        prepare_run_dir(loader.load(root / "configs/tiny.yaml", [f"run.dir={tmp_path / 'file/run'}"]))
