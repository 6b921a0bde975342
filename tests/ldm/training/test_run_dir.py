"""The run's folder: continuing it, refusing another configuration, training longer."""

import shlex
from pathlib import Path

import pytest
import yaml
from lock_holder import holder

from ldm.config import loader
from ldm.config.schema import ClassifierConfig
from ldm.training import run_dir
from ldm.training.run_dir import prepare_out_dir, prepare_run_dir
from ldm.utils.errors import UserError
from ldm.utils.folder_lock import release_locks


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


def test_the_command_that_is_kept_is_one_for_a_shell(settings: loader.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["a folder/train_ldm.py", 'sample.prompts=["grey, short", "it\'s"]']
    monkeypatch.setattr("sys.argv", arguments)
    prepare_run_dir(settings)
    about = yaml.safe_load((settings.run.dir / "config.yaml").read_text())["about"]
    assert shlex.split(about["command"]) == arguments


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


def test_a_folder_in_which_another_process_trains_is_refused_and_left_as_it_is(
    root: Path, settings: loader.Config
) -> None:
    with release_locks():
        prepare_run_dir(settings)
    before = (settings.run.dir / "config.yaml").read_bytes()
    with holder(root, settings.run.dir), pytest.raises(UserError, match=r"^run\.dir: another process trains in"):
        prepare_run_dir(load_for(root, settings, "sample.steps=7"))
    assert (settings.run.dir / "config.yaml").read_bytes() == before
    with release_locks():
        prepare_run_dir(settings)


def load_for(root: Path, settings: loader.Config, *overrides: str) -> loader.Config:
    return loader.load(root / "configs/tiny.yaml", [f"run.dir={settings.run.dir}", *overrides])


@pytest.fixture
def finished(settings: loader.Config) -> Path:
    """The folder of a finished run, whose pipeline holds its number of steps."""
    prepare_run_dir(settings)
    folder, steps = settings.run.dir, settings.stage2.steps
    (folder / f"stage2/checkpoints/step-{steps:06d}").mkdir(parents=True)
    write_pipeline(folder, steps)
    return folder


def write_pipeline(folder: Path, steps: int) -> None:
    (folder / "pipeline").mkdir()
    (folder / "pipeline/steps").write_text(str(steps))


def steps_of(pipeline: Path) -> int:
    return int((pipeline / "steps").read_text())


def test_more_steps_continue_a_finished_run_and_keep_its_pipeline(
    root: Path, settings: loader.Config, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = settings.stage2.steps
    more = load_for(root, settings, f"stage2.steps={2 * steps}")
    assert prepare_run_dir(more) == more
    assert (finished / f"pipeline-{steps}").exists() and not (finished / "pipeline").exists()
    assert f"stage2.steps: {steps} → {2 * steps}; " in capsys.readouterr().err
    assert prepare_run_dir(more) == more  # a second start, before its end, prints nothing
    assert not capsys.readouterr().err


@pytest.mark.parametrize("trained", [0, 3])
def test_more_steps_can_be_taken_back_until_the_longer_run_is_finished(
    root: Path, settings: loader.Config, finished: Path, trained: int
) -> None:
    steps = settings.stage2.steps
    more = load_for(root, settings, f"stage2.steps={2 * steps}")
    prepare_run_dir(more)
    if trained:
        (finished / f"stage2/checkpoints/step-{steps + trained:06d}").mkdir()
    prepare_run_dir(settings)
    assert steps_of(finished / "pipeline") == steps and not (finished / f"pipeline-{steps}").exists()
    assert yaml.safe_load((finished / "config.yaml").read_text())["configuration"]["stage2"]["steps"] == steps
    if trained:
        with pytest.raises(UserError, match=rf"the run has gone to {steps + trained}; give {steps + trained} or more"):
            prepare_run_dir(load_for(root, settings, f"stage2.steps={steps + 1}"))
        assert (finished / "pipeline").exists()
    prepare_run_dir(more)
    assert steps_of(finished / f"pipeline-{steps}") == steps
    write_pipeline(finished, 2 * steps)
    with pytest.raises(UserError, match=rf"stage2\.steps: {2 * steps} → {steps}"):
        prepare_run_dir(settings)


def test_an_unfinished_run_may_end_earlier_but_not_before_its_checkpoint(root: Path, settings: loader.Config) -> None:
    prepare_run_dir(settings)
    (settings.run.dir / "stage2/checkpoints/step-000010").mkdir(parents=True)
    fewer = load_for(root, settings, "stage2.steps=10")
    assert prepare_run_dir(fewer) == fewer
    with pytest.raises(UserError, match=r"stage2\.steps: 10 → 9"):
        prepare_run_dir(load_for(root, settings, "stage2.steps=9"))


@pytest.mark.parametrize("written", [False, True])
def test_the_pipeline_has_the_configured_steps_wherever_a_change_was_killed(
    root: Path, settings: loader.Config, finished: Path, monkeypatch: pytest.MonkeyPatch, written: bool
) -> None:
    steps = settings.stage2.steps
    more = load_for(root, settings, f"stage2.steps={2 * steps}")

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    if written:
        prepare_run_dir(more)
    with monkeypatch.context() as patch:
        patch.setattr(run_dir, "_restore_results" if written else "atomic_file", kill)
        with pytest.raises(KeyboardInterrupt):
            prepare_run_dir(settings if written else more)
    assert not (finished / "pipeline").exists()
    prepare_run_dir(settings)
    assert steps_of(finished / "pipeline") == steps


def test_a_pipeline_that_was_set_aside_twice_is_found_by_its_steps(
    root: Path, settings: loader.Config, finished: Path
) -> None:
    steps = settings.stage2.steps
    for times in (2, 3):
        prepare_run_dir(load_for(root, settings, f"stage2.steps={times * steps}"))
        if times == 2:
            (finished / f"stage2/checkpoints/step-{2 * steps:06d}").mkdir()
            write_pipeline(finished, 2 * steps)
    prepare_run_dir(settings)
    assert steps_of(finished / "pipeline") == steps
    prepare_run_dir(load_for(root, settings, f"stage2.steps={2 * steps}"))
    assert steps_of(finished / "pipeline") == 2 * steps and steps_of(finished / f"pipeline-{steps}") == steps


@pytest.mark.parametrize(
    ("scheduler", "message"), [("constant", "stays constant"), ("linear", "ends at 80: 93% of stage2.lr at 10")]
)
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


def test_the_folder_of_a_classifier_is_refused(settings: loader.Config) -> None:
    settings.run.dir.mkdir()
    (settings.run.dir / "config.yaml").write_text("run: runs/faces\nclassifier: {steps: 3}\n")
    with pytest.raises(UserError, match=r"run\.dir: .* is not a run of train_ldm\.py; give another folder"):
        prepare_run_dir(settings)


def classifier_settings(**keys: object) -> dict[str, object]:
    return {
        "run": "runs/faces",
        "fingerprint": {"data": "a"},
        "classifier": ClassifierConfig(**keys).model_dump(mode="json"),
    }


def prepare_classifier_dir(folder: Path, settings: dict[str, object]) -> dict[str, object]:
    prepare_out_dir(folder, ClassifierConfig, "classifier", settings)
    return yaml.safe_load((folder / "config.yaml").read_text())


def test_the_folder_of_a_classifier_is_continued_with_what_may_change_and_keeps_its_origin(tmp_path: Path) -> None:
    written = prepare_classifier_dir(tmp_path, classifier_settings(steps=5))
    assert written["about"]["torch"] and written["classifier"]["steps"] == 5
    assert (
        prepare_classifier_dir(tmp_path, classifier_settings(steps=6))["classifier"]["steps"] == 6
    )  # nothing is trained
    (tmp_path / "classifier/checkpoints/step-000003").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({**classifier_settings(steps=6), "about": {"command": "first"}})
    )
    written = prepare_classifier_dir(tmp_path, {**classifier_settings(steps=6, checkpoint_every=7), "run": "moved"})
    assert (written["about"], written["run"]) == ({"command": "first"}, "moved")
    assert written["classifier"]["checkpoint_every"] == 7
    other = {**classifier_settings(steps=7), "fingerprint": {"data": "b"}}
    with pytest.raises(
        UserError, match=r"another training \(steps: 6 → 7; fingerprint\.data: a → b\); give another one"
    ):
        prepare_classifier_dir(tmp_path, other)
    with pytest.raises(UserError, match=r"--out: .* is a folder of another kind"):
        prepare_out_dir(tmp_path, ClassifierConfig, "distill", {"distill": {}})


def test_a_classifiers_folder_of_an_earlier_version_is_continued(tmp_path: Path) -> None:
    old = classifier_settings(steps=5)
    old["pictures"] = old.pop("fingerprint")
    del old["classifier"]["ema_widths"]
    (tmp_path / "model").mkdir()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    written = prepare_classifier_dir(tmp_path, classifier_settings(steps=5))
    assert written["fingerprint"] == {"data": "a"} and "pictures" not in written
