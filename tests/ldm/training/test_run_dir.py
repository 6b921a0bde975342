"""The run's folder: continuing it, refusing another configuration, training longer."""

from pathlib import Path

import pytest
import yaml

from ldm.config import loader
from ldm.training.run_dir import prepare_run_dir
from ldm.utils.errors import UserError


@pytest.fixture
def settings(root: Path, tmp_path: Path) -> loader.Config:
    return loader.load(root / "configs/tiny.yaml", [f"run.dir={tmp_path / 'run'}"])


def test_a_folder_is_continued_only_by_the_same_configuration(root: Path, settings: loader.Config) -> None:
    prepare_run_dir(settings)
    written = yaml.safe_load((settings.run.dir / "config.yaml").read_text())
    assert loader.parse(written["configuration"], "") == settings
    assert written["about"]["torch"]
    assert prepare_run_dir(settings) == settings
    resampled = loader.load(root / "configs/tiny.yaml", [f"run.dir={settings.run.dir}", "sample.steps=7"])
    assert prepare_run_dir(resampled) == resampled
    other = loader.load(root / "configs/tiny.yaml", [f"run.dir={settings.run.dir}", "stage1.lr=1e-3"])
    with pytest.raises(UserError, match=r"stage1\.lr: 0\.002 → 0\.001"):
        prepare_run_dir(other)


def test_a_folder_from_before_a_key_existed_is_continued(settings: loader.Config) -> None:
    prepare_run_dir(settings)
    file = settings.run.dir / "config.yaml"
    written = yaml.safe_load(file.read_text())
    del written["configuration"]["stage1"]["ema_widths"]
    file.write_text(yaml.safe_dump(written))
    assert prepare_run_dir(settings) == settings


def test_stage_2_may_be_changed_until_it_has_started(root: Path, settings: loader.Config) -> None:
    prepare_run_dir(settings)
    changed = loader.load(root / "configs/tiny.yaml", [f"run.dir={settings.run.dir}", "stage2.lr=1e-3"])
    assert prepare_run_dir(changed) == changed
    written = yaml.safe_load((settings.run.dir / "config.yaml").read_text())
    assert written["configuration"]["stage2"]["lr"] == 1e-3
    (settings.run.dir / "stage2/checkpoints/step-000010").mkdir(parents=True)
    with pytest.raises(UserError, match=r"stage2\.lr: 0\.001 → 0\.002"):
        prepare_run_dir(settings)


def test_fresh_starts_in_a_new_folder_and_deletes_nothing(settings: loader.Config) -> None:
    prepare_run_dir(settings)
    names = [prepare_run_dir(settings, fresh=True).run.dir.name for _ in range(2)]
    assert names == ["run-2", "run-3"]
    assert (settings.run.dir / "config.yaml").exists()


def test_a_folder_that_cannot_be_written_is_refused_by_key(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run\.dir: can't write"):
        prepare_run_dir(loader.load(root / "configs/tiny.yaml", [f"run.dir={tmp_path / 'file/run'}"]))


def load_for(root: Path, settings: loader.Config, *overrides: str) -> loader.Config:
    return loader.load(root / "configs/tiny.yaml", [f"run.dir={settings.run.dir}", *overrides])


def test_more_steps_continue_a_finished_run_and_keep_its_pipeline(
    root: Path, settings: loader.Config, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_run_dir(settings)
    steps = settings.stage2.steps
    (settings.run.dir / f"stage2/checkpoints/step-{steps:06d}").mkdir(parents=True)
    (settings.run.dir / "pipeline").mkdir()
    more = load_for(root, settings, f"stage2.steps={2 * steps}")
    assert prepare_run_dir(more) == more
    assert (settings.run.dir / f"pipeline-{steps}").exists() and not (settings.run.dir / "pipeline").exists()
    assert f"stage2.steps: {steps} → {2 * steps}; " in capsys.readouterr().err
    assert prepare_run_dir(more) == more  # a second start, before its end, prints nothing
    assert not capsys.readouterr().err
    with pytest.raises(UserError, match=rf"stage2\.steps: {2 * steps} → {steps}"):
        prepare_run_dir(settings)


@pytest.mark.parametrize(("scheduler", "message"), [("constant", "stays constant"), ("linear", "ends at 80: 5")])
def test_more_steps_report_the_new_learning_rate_schedule(
    root: Path, settings: loader.Config, capsys: pytest.CaptureFixture[str], scheduler: str, message: str
) -> None:
    lr = f"stage2.lr_scheduler={scheduler}"
    prepare_run_dir(load_for(root, settings, lr))
    (settings.run.dir / "stage2/checkpoints/step-000010").mkdir(parents=True)
    prepare_run_dir(load_for(root, settings, lr, "stage2.steps=80"))
    assert message in capsys.readouterr().err


def test_more_steps_without_a_checkpoint_are_refused_and_nothing_moves(root: Path, settings: loader.Config) -> None:
    prepare_run_dir(settings)
    (settings.run.dir / "pipeline").mkdir()
    with pytest.raises(UserError, match="has no checkpoint to continue from"):
        prepare_run_dir(load_for(root, settings, "stage2.steps=80"))
    assert (settings.run.dir / "pipeline").exists()
