"""The page *Train*: its form, the folders that a training may use; trainings started, stopped and killed."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlencode

import fork_server
import psutil
import pytest
from app_runs import write_configuration
from lock_holder import holder
from run_folder import write_run
from tiny import TINY

from ldm.app import processes, roots, train_estimate, train_form, train_settings
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


@pytest.fixture
def forking_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`sys.executable` runs its arguments in a fork, which has imported everything already."""
    fork_server.start()
    python, runner = tmp_path / "python", Path(fork_server.__file__).with_name("forked_python.py")
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{runner}" "{tmp_path}/$$.txt" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))


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
        same = loader.load(root / "configs/tiny.yaml", [*overrides, f"run.dir={config.run.dir}"])
        assert same.model_copy(update={"budget": config.budget}) == config  # a budget is the command's


def test_of_two_overrides_of_a_key_the_command_has_the_last(root: Path) -> None:
    base = train_settings.Base("tiny", root / "configs/tiny.yaml", ("stage2.batch=16", "data.source={path: a, url: b}"))
    typed = "stage2.batch=8\nstage2.steps=7\ndata.source=c"
    form = train_form.Form(base, "x", {"stage2.batch": 12}, typed=typed)
    *overrides, folder = form.command()[6:]  # behind the interpreter, the module and the file
    assert overrides == ["data.source={path: a, url: b}", "stage2.batch=8", "stage2.steps=7", "data.source=c"]
    assert folder == f"run.dir={form.folder}"


@pytest.mark.parametrize("key", ["run.dir", "data.cache_dir", "text.model", "stage2.init_from", "data.source"])
def test_paths_outside_of_the_roots_are_refused(runs: Path, root: Path, key: str) -> None:
    (runs / "link").symlink_to(root)
    base = train_settings.bases(SCRATCH)[0]
    for path in (root, runs / "link", runs / "..", "configs", f"{runs}/../new/er"):
        with pytest.raises(UserError, match=rf"^{key}(\.path)?: .* is outside of {runs}"):
            resolve(base, [f"run.dir={runs / 'a'}", f"{key}={path}"])


def test_a_lora_starts_from_a_model_of_the_roots(runs: Path, root: Path) -> None:
    run = finished_run(root, runs / "a")
    base = train_settings.bases(LORA)[0]
    config = resolve(base, [f"run.dir={runs / 'b'}"])
    assert config.finetune.kind == "lora" and config.stage2.channels == (32, 64)
    assert {config.stage1.pretrained, config.text.model, config.stage2.init_from} == {str(run / "pipeline")}


def finished_run(root: Path, run: Path) -> Path:
    write_run(root, run)
    (run / "pipeline").mkdir()
    (run / "pipeline/model_index.json").write_text("{}")
    return run


def test_images_and_what_was_typed_stay_with_another_kind_and_base(
    runs: Path, root: Path, three_shapes: Callable[[list[str]], Path]
) -> None:
    finished_run(root, runs / "a")
    images = runs / "images"
    three_shapes(["a kite", "a hat"]).rename(images)
    app = page()

    def choose(kind: str) -> None:
        app.segmented_control(key="train-kind").set_value(kind).run()
        assert not errors(app) and app.selectbox(key="data.source").value == str(images)
        assert app.number_input(key="stage2.batch").value == 2 and "a kite" in app.text_area(key="sample.prompts").value

    app.selectbox(key="data.source").set_value(str(images)).run()
    app.number_input(key="stage2.steps").set_value(7).run()
    app.text_area(key="train-typed").set_value("run.log_every=3").run()
    choose("LoRA")
    assert app.number_input(key="stage2.steps").value == 300, "steps are chosen for a base"
    assert app.text_input(key="train-name").value == "a-lora" and "run.log_every=3" in app.code[0].value
    app.text_input(key="train-name").set_value("kites").run()
    choose("Full fine-tune")
    choose("From scratch")
    app.selectbox(key="train-base-From scratch").select_index(1).run()
    assert not errors(app) and app.selectbox(key="data.source").value == str(images)
    assert app.text_input(key="train-name").value == "kites"


def test_a_folder_s_name_is_offered_as_caption_where_no_image_has_one(
    runs: Path, three_shapes: Callable[[list[str]], Path]
) -> None:
    (runs / "class").mkdir()
    images = three_shapes(["a kite", "a hat"]).rename(runs / "class/kites")
    app = page()
    app.selectbox(key="data.source").set_value(str(images)).run()
    assert not errors(app) and not app.checkbox
    for file in images.glob("*.txt"):
        file.unlink()
    box = app.selectbox(key="data.source")
    box.options.append(str(runs / "class"))  # a browser sends what was typed as another option
    box.set_value(str(runs / "class")).run()
    assert not errors(app) and "take the folder's name" in app.checkbox[0].label


def test_images_of_the_page_data_suggest_a_lora_on_the_newest_model(
    runs: Path, root: Path, three_shapes: Callable[[list[str]], Path]
) -> None:
    for changed, name in enumerate(("old", "new")):
        os.utime(finished_run(root, runs / name) / "pipeline/model_index.json", (changed, changed))
    three_shapes(["a kite"]).rename(runs / "images")
    app = page()
    assert app.segmented_control(key="train-kind").value == "From scratch"
    app.session_state["train-source"] = str(runs / "images")
    app.run()
    assert not errors(app) and app.segmented_control(key="train-kind").value == "LoRA"
    assert app.selectbox(key="train-base-LoRA").value.name == "runs/new, your model"
    assert app.selectbox(key="data.source").value == str(runs / "images")
    assert any("can't draw photographs" in caption.value for caption in app.caption)
    app.segmented_control(key="train-kind").set_value("Full fine-tune").run()
    app.session_state["train-source"] = str(runs / "images")
    assert app.run().segmented_control(key="train-kind").value == "Full fine-tune", "it was chosen"


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
    links = [(link.proto.label, link.proto.page, link.proto.query_string) for link in app.get("page_link")]
    query = urlencode({"run": run})
    assert links == [("Draw with it", "generate", query), ("Export", "export", query)]


def menu(app: AppTest) -> list[str]:
    return next(box.options for box in app.selectbox if box.label == "Run")


def choose_run(app: AppTest, run: Path) -> None:
    next(box for box in app.selectbox if box.label == "Run").set_value(str(run)).run()


def test_a_training_of_a_terminal_is_shown_as_one_and_no_second_one_starts(runs: Path, root: Path) -> None:
    write_configuration(runs / "b", "lora", runs / "a/pipeline", "dog", stage1={"pretrained": str(runs / "a/pipeline")})
    run = write_configuration(runs / "a", "lora", runs / "b", "dog", stage1={"pretrained": str(runs / "b")})
    with holder(root, run):
        app = page()
        app.session_state["train-run"] = str(runs / "a")
        app.run()
        assert not errors(app) and menu(app) == ["runs/a, in training", "runs/b"]
        assert any("started elsewhere" in text.value for text in app.markdown)
        assert [bar.proto.text for bar in app.get("progress")] == ["U-Net: step 0 of 1"], "no autoencoder is trained"
        assert not app.button
        choose_run(app, runs / "b")
        assert not errors(app) and app.info[0].value == "Not finished."
        choose_run(app, run)
        for name in ("a", "c"):
            with pytest.raises(UserError, match=rf"^run\.dir: {run} is being trained"):
                processes.start(runs / name, [sys.executable, "-c", ""], runs.iterdir())
    app.run()
    assert not errors(app) and sorted(menu(app)) == ["runs/a", "runs/b"] and app.info[0].value == "Not finished."
    assert next(box.value for box in app.selectbox if box.label == "Run") == str(run)


def test_chosen_images_decide_the_batch_and_the_prompts_but_nothing_that_was_changed(
    runs: Path, three_shapes: Callable[[list[str]], Path]
) -> None:
    images = runs / "images"
    three_shapes([f"kite {i}" for i in range(7)]).rename(images)
    app = page()

    def choose(source: str) -> tuple[int, str]:
        next(box for box in app.selectbox if box.label == "Images").set_value(source).run()
        assert not errors(app)
        return app.number_input(key="stage2.batch").value, app.text_area(key="sample.prompts").value

    before = (16, "red heart\nwoman astronaut, light skin tone\ngreen square")
    assert choose(str(images)) == (7, "kite 0\nkite 2\nkite 4\nkite 6")
    assert all(f"{key}=7" in app.code[0].value for key in ("stage1.batch", "stage2.batch"))
    assert choose("openmoji-demo") == before
    app.number_input(key="stage2.batch").set_value(12).run()
    app.text_area(key="sample.prompts").set_value("a dog").run()
    assert choose(str(images)) == (12, "a dog") and "stage1.batch=7" in app.code[0].value
    press(app, "Undo all changes")
    assert (app.number_input(key="stage2.batch").value, app.text_area(key="sample.prompts").value) == before
    assert "stage1.batch" not in app.code[0].value


def test_an_estimate_that_is_broken_off_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def leave(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train_estimate.st, "empty", lambda: SimpleNamespace(caption=leave))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = "import os, tempfile, time; tempfile.mkdtemp(); print(os.getpid(), flush=True); time.sleep(600)"
    with pytest.raises(KeyboardInterrupt):
        train_estimate._dry_run([sys.executable, "-c", code])
    assert not any(tmp_path.iterdir()) and not psutil.Process().children()


@pytest.mark.slow
@pytest.mark.usefixtures("forking_python")
def test_a_training_is_estimated_started_watched_and_stopped(
    runs: Path, three_shapes: Callable[[list[str]], Path]
) -> None:
    three_shapes(list("abcdefgh")).rename(runs / "images")
    app = page()
    settings = (*TINY[2:], f"data.source={runs / 'images'}", "stage1.steps=100000", "run.log_every=1")
    app.text_area(key="train-typed").set_value("\n".join(settings)).run()
    press(app, "Estimate time and memory")
    (line,) = (part.value.replace("\\", "") for part in app.markdown if part.value.startswith("About "))
    assert not errors(app) and re.fullmatch(r"About .+, [\d,.]+ [MG]B of memory, [\d,.]+ [MG]B of disk\.", line)
    app.toggle(key="stage2.channels_last").set_value(True).run()
    assert not any(part.value.startswith("About ") for part in app.markdown), "of other settings"
    press(app, "Start training")
    run = runs / "tiny"
    assert not errors(app) and processes.is_running(run)
    other = page()  # of another tab
    assert app.session_state["train-view"] == other.session_state["train-view"] == "Runs"
    other.session_state["train-view"] = "New training"
    other.run().text_input(key="train-name").set_value("second").run()
    press(other, "Start training")
    assert len(errors(other)) == 1 and f"{run} is being trained, and a second" in errors(other)[0]

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
