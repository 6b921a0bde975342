"""The pages *Generate* and *Judge*, and the folders that they may read."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageChops
from run_folder import write_run

from ldm.app import drawing, roots
from ldm.app.drawing import Loaded, Settings, Upload
from ldm.sampling import png_metadata
from ldm.sampling.options import Sampling
from ldm.sampling.pipeline import LatentDiffusion
from ldm.utils.errors import UserError

pytest.importorskip("streamlit")
from streamlit.testing.v1 import AppTest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, random_model: Callable[..., LatentDiffusion]) -> Path:
    folder = tmp_path_factory.mktemp("roots") / "runs/a/pipeline"
    random_model("text").save(folder)
    return folder


@pytest.fixture(autouse=True)
def rooted(folder: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(roots.ROOTS, str(folder.parents[1]))
        yield


def script() -> None:
    from ldm.app.generate import page

    page()


def judge() -> None:
    from ldm.app.judge import page

    page()


def press(app: AppTest, label: str) -> AppTest:
    return next(button for button in app.button if button.label == label).click().run()


def test_a_picture_of_the_page_equals_the_library_s(folder: Path, tmp_path: Path) -> None:
    app = AppTest.from_function(script, default_timeout=120).run()
    app.text_area[0].set_value("cat")
    next(box for box in app.selectbox if box.label == "Solver").set_value("ddim")
    next(box for box in app.number_input if box.label == "Seed").set_value(7)
    press(app, "Generate")
    assert not app.exception and not app.error
    kept = app.session_state["kept"][0]
    model = LatentDiffusion.load(folder).optimize_for_inference()
    (expected,) = model("cat", 7, solver="ddim", num_inference_steps=3, guidance_scale=2.0)
    assert ImageChops.difference(kept.image, expected).getbbox() is None

    (tmp_path / "a.png").write_bytes(kept.png)
    recipe = png_metadata.read(tmp_path / "a.png")
    assert (recipe["prompt"], recipe["seed"], recipe["solver"], recipe["script"]) == ("cat", 7, "ddim", "txt2img.py")
    press(app, "Remake")
    again = app.session_state["kept"]
    assert len(again) == 2 and again[0].png == again[1].png

    app.text_area[0].set_value("cat " * 200)
    press(app, "Generate")
    assert "tokens that the model reads; ignored would be" in app.error[0].value
    assert len(app.session_state["kept"]) == 2


def test_images_change_and_masks_keep_the_rest(folder: Path) -> None:
    image = Image.radial_gradient("L").resize((16, 16)).convert("RGB")
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 8, 16))
    uploads = []
    for picture in (image, mask):
        picture.save(buffer := io.BytesIO(), "PNG")
        uploads.append(Upload("a.png", buffer.getvalue()))
    loaded, steps = Loaded.read(str(folder), ()), []
    settings = Settings(str(folder), "cat", options=Sampling(strength=1.0), image=uploads[0], mask=uploads[1])
    made = drawing.draw(loaded, settings, lambda number, total, picture: steps.append((number, total, picture.size)))
    assert steps == [(i, 3, (16, 16)) for i in (1, 2, 3)]
    difference = ImageChops.difference(made, image)
    assert difference.crop((8, 0, 16, 16)).getbbox() is None and difference.getbbox()
    with pytest.raises(UserError, match="mask: it is none of"):
        drawing.draw(loaded, Settings(str(folder), "cat", image=uploads[0], mask=Upload("m.png", b"no image")))


def test_folders_outside_of_the_roots_are_refused(folder: Path, tmp_path: Path) -> None:
    root = folder.parents[1]
    (root / "link").symlink_to(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    for name in (tmp_path, root / "link", root / "a/../..", "/"):
        with pytest.raises(UserError, match=f"^folder: .* is outside of {root}"):
            roots.allowed(str(name))
    assert roots.allowed(str(folder)) == folder
    assert roots.pipelines() == [folder]
    app = AppTest.from_function(script, default_timeout=60).run()
    next(box for box in app.text_input if box.label == "Or another folder").set_value("/etc").run()
    assert len(app.error) == 1 and "is outside of" in app.error[0].value and not app.exception


def test_without_a_run_the_pages_say_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(roots.ROOTS, str(tmp_path / "none"))
    for page in (script, judge):
        app = AppTest.from_function(page, default_timeout=60).run()
        assert "make demo" in app.info[0].value and not app.exception


def test_judge_shows_the_report_of_a_run(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(root, tmp_path / "runs/b")
    monkeypatch.setenv(roots.ROOTS, str(run.parent))
    app = AppTest.from_function(judge, default_timeout=60).run()
    assert not app.exception and not app.error
    (frame,) = app.get("iframe")
    assert "Content-Security-Policy" in frame.proto.srcdoc and "</html>" in frame.proto.srcdoc
