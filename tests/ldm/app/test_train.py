"""The page *Train*: its form, the folders that a training may use; trainings started, stopped and killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from run_folder import write_run
from tiny import TINY

from ldm.app import processes, roots, train_settings
from ldm.app.processes import Record
from ldm.app.train_settings import LORA, SCRATCH, resolve
from ldm.config import loader
from ldm.utils.errors import UserError

pytest.importorskip("streamlit")
from streamlit.testing.v1 import AppTest

PATIENCE = 240  # seconds, on a busy machine


@pytest.fixture
def runs(tmp_path: Path, words: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty root; the small text encoder is in another. What was started in it ends with the test."""
    folder = tmp_path / "runs"
    folder.mkdir()
    monkeypatch.setenv(roots.ROOTS, os.pathsep.join(map(str, (folder, words))))
    monkeypatch.chdir(root)
    yield folder
    for run in folder.iterdir():
        if (record := Record.read(run)) and (process := record.process):
            process.kill()


def script() -> None:
    from ldm.app.train import page

    page()


def page() -> AppTest:
    return AppTest.from_function(script, default_timeout=PATIENCE).run()


def press(app: AppTest, label: str) -> AppTest:
    return next(button for button in app.button if button.label == label).click().run()


def errors(app: AppTest) -> list[str]:
    assert not app.exception
    return [error.value.replace("\\", "") for error in app.error]


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_the_form_has_the_schema_s_help_and_its_rules_messages(runs: Path) -> None:
    app = page()
    assert not errors(app)
    (steps,) = (box for box in app.number_input if box.key == "stage2.steps")
    assert steps.value == 40 and "Optimizer steps." in steps.help
    steps.set_value(-3).run()
    assert errors(app) == ["stage2.steps: -3: should be greater than 0"]
    assert next(button for button in app.button if button.label == "Start training").disabled
    app.number_input(key="stage2.steps").set_value(7).run()
    assert not errors(app) and "configs/tiny.yaml stage2.steps=7 run.dir=" in app.code[0].value
    app.toggle(key="stage2.zero_snr").set_value(True).run()
    assert errors(app) == ["stage2.zero_snr: True is for discrete timesteps, which flow has none of; leave it out"]
    app.text_area(key="train-typed").set_value("data.source=/etc")
    press(app, "Undo all changes")
    folders = os.environ[roots.ROOTS].split(":")
    flags = " ".join(f"--root {folder}" for folder in (*folders, "/etc"))
    assert errors(app) == [f"data.source.path: /etc is outside of {', '.join(folders)}; start the app with {flags}"]
    assert not any(runs.iterdir())


def test_every_setting_is_shown_as_an_override_that_changes_nothing(root: Path) -> None:
    for name in ("tiny", "openmoji", "lora-openmoji", "sdxl-1024"):
        config = loader.load(root / f"configs/{name}.yaml")
        every = [setting for keys in train_settings.settings().values() for setting in keys.values()]
        overrides = [setting.override(setting.shown(config)) for setting in every]
        assert loader.load(root / "configs/tiny.yaml", [*overrides, f"run.dir={config.run.dir}"]) == config


@pytest.mark.parametrize("key", ["run.dir", "data.cache_dir", "text.model", "stage2.init_from", "data.source"])
def test_paths_outside_of_the_roots_are_refused(runs: Path, root: Path, key: str) -> None:
    (runs / "link").symlink_to(root)
    base = train_settings.bases(SCRATCH)[0]
    for path in (root, runs / "link", runs / "..", "configs", f"{runs}/../new/er"):
        with pytest.raises(UserError, match=rf"^{key}(\.path)?: .* is outside of {runs}"):
            resolve(base, [f"run.dir={runs / 'a'}", f"{key}={path}"])


def test_a_lora_starts_from_a_model_of_the_roots(runs: Path, root: Path) -> None:
    run = write_run(root, runs / "a")
    (run / "pipeline").mkdir()
    (run / "pipeline/model_index.json").write_text("{}")
    base = train_settings.bases(LORA)[0]
    config = resolve(base, [f"run.dir={runs / 'b'}"])
    assert config.finetune.kind == "lora" and config.stage2.channels == (32, 64)
    assert {config.stage1.pretrained, config.text.model, config.stage2.init_from} == {str(run / "pipeline")}


def test_one_training_at_a_time_and_each_end_is_a_sentence(runs: Path) -> None:
    def start(name: str, code: str) -> Path:
        processes.start(runs / name, [sys.executable, "-c", code], runs.iterdir())
        return runs / name

    run = start("a", "import time; print('began', flush=True); time.sleep(600)")
    with pytest.raises(UserError, match=r"^run\.dir: .*/a is being trained already"):
        start("a", "")
    with pytest.raises(UserError, match=r"^run\.dir: .*/a is being trained, and a second training would share"):
        start("b", "")
    record = Record.read(run)
    assert record and processes.is_running(run) and os.getsid(record.pid) == record.pid != os.getsid(0)
    wait_until(lambda: processes.lines(run) == ["began"])
    Record(record.pid, record.began - 60, 0).write(run)  # an earlier process of the same id
    assert not processes.is_running(run)
    record.write(run)
    os.kill(record.pid, signal.SIGKILL)
    assert processes.wait(run, 60) and "the training was killed" in processes.why_ended(run)

    start("a", "import sys; sys.exit('error: can\\'t write x: No space left on device; make room')")
    assert processes.wait(run, 60) and processes.why_ended(run).endswith("No space left on device; make room")
    start("a", "import time; time.sleep(600)")
    processes.stop(run)
    assert processes.wait(run, 60) and processes.why_ended(run) == ""
    start("a", "int('x')")
    assert processes.wait(run, 60) and processes.why_ended(run).startswith("ValueError: invalid literal")
    (runs / "file").write_text("")
    with pytest.raises(UserError, match=r"^run\.dir: can't write .*/file/c: Not a directory"):
        start("file/c", "")


def test_a_run_of_the_terminal_is_shown_with_its_curves_and_samples(runs: Path, root: Path) -> None:
    run = write_run(root, runs / "a")
    app = page()
    app.session_state["train-view"] = "Runs"
    app.run()
    assert not errors(app) and app.info[0].value == "Not finished."
    assert [label.value for label in app.markdown if "loss" in label.value or "Samples" in label.value] == [
        "**Samples** at step 100",
        "**U-Net**, loss",
        "**Autoencoder**, loss",
    ]
    assert any(button.label == "Continue" for button in app.button)
    (run / "pipeline").mkdir()  # with which it is finished
    assert "Finished" in app.run().success[0].value


@pytest.mark.slow
def test_a_training_is_started_watched_and_stopped(runs: Path) -> None:
    app = page()
    app.text_area(key="train-typed").set_value("\n".join((*TINY[2:], "stage1.steps=100000", "run.log_every=1"))).run()
    press(app, "Start training")
    run = runs / "tiny"
    assert not errors(app) and processes.is_running(run)
    other = page()  # of another tab
    assert app.session_state["train-view"] == other.session_state["train-view"] == "Runs"
    other.session_state["train-view"] = "New training"
    press(other.run(), "Start training")
    assert len(errors(other)) == 1 and f"{run} is being trained" in errors(other)[0]

    wait_until(lambda: (run / "stage1/metrics.jsonl").exists() or not processes.is_running(run))
    assert app.run().metric[0].label == "Images a second" and not errors(app)
    press(app, "Stop")
    assert processes.wait(run, PATIENCE)
    assert any("stage1: stopped and saved at step" in line for line in processes.lines(run)), processes.lines(run)
    assert app.run().info[0].value == "Stopped." and not errors(app)
    assert loader.load(run / "config.yaml").stage1.steps == 100000  # with which it continues


APP = """
from streamlit.testing.v1 import AppTest
from ldm.app.train import page
app = AppTest.from_string("from ldm.app.train import page; page()", default_timeout=240).run()
next(button for button in app.button if button.label.startswith("Train the tiny model")).click().run()
assert not app.exception and not app.error
print("started", flush=True)
input()
"""


@pytest.mark.drill
def test_a_training_outlives_the_app_and_is_found_again(runs: Path, root: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(root)}
    with subprocess.Popen(
        [sys.executable, "-c", APP], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as first:
        assert first.stdout and first.stdout.readline() == "started\n"
        first.kill()
    run = runs / "tiny"
    record = Record.read(run)
    assert record and record.process and record.process.ppid() != os.getpid()
    app = page()  # of another app
    assert any(button.label == "Stop" for button in app.button) and not errors(app)
    psutil.wait_procs([record.process], timeout=540)
    assert "Finished" in app.run().success[0].value and not errors(app)
    assert roots.pipelines() == [run / "pipeline"]
