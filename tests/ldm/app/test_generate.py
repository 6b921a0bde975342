"""The pages *Generate* and *Judge*, and the folders that they may read."""

import base64
import io
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from app_runs import write_adapter_run, write_configuration
from PIL import Image, ImageChops
from run_folder import write_run
from safetensors.torch import save_file

from ldm.app import drawing, generate, roots
from ldm.app.drawing import Loaded, Settings, Upload, read_base
from ldm.app.mask_canvas import PREFIX, mask_png
from ldm.cli import txt2img, upscale
from ldm.models.adapters.embedding_files import DIFFUSERS_FILE
from ldm.sampling import png_metadata
from ldm.sampling.options import Sampling
from ldm.sampling.pipeline import LatentDiffusion
from ldm.utils.errors import UserError

pytest.importorskip("streamlit")
from streamlit.testing.v1 import AppTest

pytestmark = pytest.mark.usefixtures("rooted")


def script() -> None:
    from ldm.app.generate import page

    page()


def judge() -> None:
    from ldm.app.judge import page

    page()


def export() -> None:
    from ldm.app.export import page

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


def png_of(picture: Image.Image) -> bytes:
    picture.save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def upscaler(folder: Path, random_model: Callable[..., LatentDiffusion]) -> Path:
    path = folder.parents[1] / "up/pipeline"
    random_model("text", "upscale").save(path)
    return path


def test_the_commands_make_a_picture_of_the_gallery_anew(folder: Path, upscaler: Path, tmp_path: Path) -> None:
    assert roots.upscalers() == [upscaler]
    small = Upload("small.png", png_of(Image.radial_gradient("L").resize((8, 8)).convert("RGB")))
    (tmp_path / "small.png").write_bytes(small.data)
    enlarger = Loaded.of(read_base(str(upscaler)))
    cases = [
        (txt2img.main, Loaded.of(read_base(str(folder))), Settings(str(folder), "cat", upscaler=str(upscaler)), []),
        (upscale.main, enlarger, Settings(str(upscaler), "cat", image=small, enlarges=True), ["--image", "small.png"]),
    ]
    for main, loaded, settings, images in cases:
        options = Sampling(num_inference_steps=2, guidance_scale=1.5)
        settings, second = replace(settings, options=options), enlarger if settings.upscaler else None
        preview = Mock()
        made = drawing.draw(loaded, settings, preview, second)
        assert [call.args[:2] for call in preview.call_args_list] == [(1, 2), (2, 2)] + [
            (i, 3) for i in (1, 2, 3)
        ] * bool(second)
        (tmp_path / "a.png").write_bytes(drawing.png(loaded, settings, made, second))
        paths = [str(tmp_path / name) if name.endswith(".png") else name for name in images]
        (tmp_path / "b.png").unlink(missing_ok=True)
        assert not main(["--again", str(tmp_path / "a.png"), "--out", str(tmp_path / "b.png"), *paths])
        assert ImageChops.difference(Image.open(tmp_path / "b.png"), made).getbbox() is None
    big = Upload("big.png", png_of(Image.new("RGB", (33, 8))))
    with pytest.raises(UserError, match="image: 33 × 8 pixels; give 32 × 32 at most"):
        drawing.draw(enlarger, replace(settings, image=big))


def test_adapters_change_a_copy_of_the_model(folder: Path, adapter: Path) -> None:
    """The base is read once; a scale gives the weights that the commands have."""
    base = read_base(str(folder))
    assert roots.loras() == [adapter]
    same = adapter.with_name("kohya.safetensors")
    same.touch()  # the same adapter in another layout
    assert roots.loras() == [adapter] and roots.adapter_name(adapter) == roots.short(adapter.parents[1])
    same.unlink()
    before = Loaded.of(base).weights
    for scale in (0.5, -1.0):
        expected = drawing.weights_fingerprint(LatentDiffusion.load(folder).add_loras((adapter, scale)))
        assert generate.load(str(folder), ((str(adapter), scale),)).weights == expected != before
    assert Loaded.of(base).weights == before


def opened_with(run: Path) -> AppTest:
    app = AppTest.from_function(script, default_timeout=120)
    app.query_params["run"] = str(run)
    return app.run()


def test_the_page_opens_with_the_adapter_of_a_run_and_compares_its_scales(folder: Path, adapter: Path) -> None:
    run = write_adapter_run(folder, adapter, "b")
    app = opened_with(run)
    assert not app.exception and not app.error and "run" not in app.query_params
    assert app.selectbox[0].value == str(folder) and app.text_area[0].value == "dog"
    press(app, "Generate")
    next(slider for slider in app.slider if slider.label.startswith("Scale of")).set_value(0.5)
    press(app, "Generate")
    assert not app.exception and not app.error
    file = str(run / "lora" / adapter.name)
    assert [kept.settings.loras for kept in app.session_state["kept"]] == [((file, 0.5),), ((file, 1.0),)]
    cards = [text.value.replace("\\", "").split("  \n") for text in app.caption if "seed" in text.value]
    assert [card[1] for card in cards] == ["runs/a/pipeline + runs/b × 0.5", "runs/a/pipeline + runs/b × 1"]
    assert cards[0][0] == cards[1][0] == "dog" and cards[0][2] == cards[1][2]


def test_the_page_opens_with_the_word_of_a_run(folder: Path, tmp_path: Path) -> None:
    run = write_configuration(folder.parents[1] / "c", "inversion", folder, "a <toy>")
    text = LatentDiffusion.load(folder, "cpu").text
    assert text
    (run / "embeddings").mkdir()
    word = run / "embeddings" / DIFFUSERS_FILE
    save_file({"<toy>": torch.full((1, text.width), 0.1)}, word)
    app = opened_with(run)
    assert not app.exception and not app.error and app.text_area[0].value == "a <toy>"
    press(app, "Generate")
    kept = app.session_state["kept"][0]
    assert kept.settings.embeddings == (str(word),) and not app.exception and not app.error
    model = LatentDiffusion.load(folder).add_embeddings(word).optimize_for_inference()
    (expected,) = model("a <toy>", 0)
    assert ImageChops.difference(kept.image, expected).getbbox() is None
    (tmp_path / "a.png").write_bytes(kept.png)
    assert png_metadata.read(tmp_path / "a.png")["embedding"] == [str(word)]


def test_a_run_that_can_t_be_opened_is_refused_in_a_sentence(folder: Path, tmp_path: Path) -> None:
    unfinished = write_configuration(folder.parents[1] / "d", "lora", folder, "dog")
    other = write_configuration(folder.parents[1] / "e", "lora", tmp_path / "elsewhere", "dog")
    (other / "lora").mkdir()
    for run, message in {
        unfinished: "it has not finished",
        other: f"its model, {tmp_path}/elsewhere, is in none of the app's folders",
        tmp_path: "is outside of",
    }.items():
        app = opened_with(run)
        assert not app.exception and message in app.error[0].value.replace("\\", "")
        assert app.text_area[0].value == "red heart"


def missing(app: AppTest) -> str:
    """What is in the row of the disabled button."""
    rows = [block for block in app.get("flex_container") if any(b.label == "Generate" for b in block.button)]
    row = rows[-1]  # the innermost one
    assert [button.disabled for button in row.button] == [True]
    return str(row.markdown[0].value)


def visits() -> None:
    import streamlit as st

    from ldm.app import generate, learn
    from ldm.app.menu import keep_choices

    keep_choices()
    {"generate": generate, "learn": learn}[st.session_state.get("visited", "generate")].page()


def test_what_was_chosen_stays_while_another_page_is_open(folder: Path, adapter: Path) -> None:
    app = AppTest.from_function(visits, default_timeout=120).run()
    app.segmented_control(key="generate-task").set_value("Image to image")
    app.text_area(key="generate-prompt").set_value("cat")
    app.multiselect(key="generate-loras").set_value([str(adapter)]).run()
    app.slider(key=f"generate-scale-{adapter}").set_value(0.5)
    app.number_input(key=f"generate-steps-{folder}").set_value(2).run()
    for page in ("learn", "learn", "generate"):
        app.session_state["visited"] = page
        app.run()
        assert not app.exception and not app.error
    assert app.segmented_control(key="generate-task").value == "Image to image"
    assert app.text_area(key="generate-prompt").value == "cat"
    assert app.multiselect(key="generate-loras").value == [str(adapter)]
    assert app.slider(key=f"generate-scale-{adapter}").value == 0.5
    assert app.number_input(key=f"generate-steps-{folder}").value == 2


def test_the_settings_of_a_picture_fill_the_form(folder: Path, adapter: Path) -> None:
    app = AppTest.from_function(script, default_timeout=120).run()
    app.text_area(key="generate-prompt").set_value("cat")
    app.selectbox(key="generate-solver").set_value("ddim")
    app.number_input(key="generate-seed").set_value(7)
    app.multiselect(key="generate-loras").set_value([str(adapter)]).run()
    app.slider(key=f"generate-scale-{adapter}").set_value(0.5)
    press(app, "Generate")
    (settings,) = (kept.settings for kept in app.session_state["kept"])
    app.text_area(key="generate-prompt").set_value("dog")
    app.selectbox(key="generate-solver").set_value("as saved")
    app.number_input(key="generate-seed").set_value(0)
    app.multiselect(key="generate-loras").set_value([]).run()
    press(app, "Use these settings")
    press(app, "Generate")
    assert not app.exception and not app.error
    assert app.session_state["kept"][0].settings == settings


def test_a_painted_mask_has_the_image_s_size(folder: Path) -> None:
    sheet = Image.new("RGBA", (8, 4))
    sheet.paste("white", (0, 0, 4, 4))
    url = PREFIX + base64.b64encode(png_of(sheet)).decode()
    mask = Image.open(io.BytesIO(mask_png(url, (32, 16))))
    assert mask.size == (32, 16) and mask.getbbox() == (0, 0, 16, 16)
    for bad in (PREFIX + "!", PREFIX + base64.b64encode(b"no image").decode()):
        with pytest.raises(UserError, match=r"^mask: "):
            mask_png(bad, (32, 16))

    app = AppTest.from_function(script, default_timeout=60).run()
    app.segmented_control[0].set_value("Inpainting").run()
    assert missing(app) == "Choose an image first."
    app.file_uploader[0].upload("a.png", png_of(sheet), "image/png").run()
    assert missing(app) == "Paint a mask first."
    assert not app.exception and not app.error and app.get("bidi_component")


def test_images_change_and_masks_keep_the_rest(folder: Path) -> None:
    image = Image.radial_gradient("L").resize((16, 16)).convert("RGB")
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 8, 16))
    uploads = [Upload("a.png", png_of(picture)) for picture in (image, mask)]
    loaded, steps = Loaded.of(read_base(str(folder))), []
    settings = Settings(str(folder), "cat", options=Sampling(strength=1.0), image=uploads[0], mask=uploads[1])
    made = drawing.draw(loaded, settings, lambda *step: steps.append(step))
    assert [step[:2] for step in steps] == [(i, 3) for i in (1, 2, 3)] and steps[0][2].size == (16, 16)
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
    assert folder in roots.pipelines() and root / "link" not in roots.pipelines()
    app = AppTest.from_function(script, default_timeout=60).run()
    next(box for box in app.text_input if box.label == "Or another folder").set_value("/etc").run()
    assert len(app.error) == 1 and "is outside of" in app.error[0].value and not app.exception


def test_without_a_run_the_pages_say_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(roots.ROOTS, str(tmp_path / "none"))
    for page in (script, judge, export):
        app = AppTest.from_function(page, default_timeout=60).run()
        text = app.info[0].value
        assert 0 < text.index("*Train*") < text.index("make demo") and not app.exception
        assert [link.proto.page for link in app.get("page_link")] == ["train"]


def test_judge_shows_reports_side_by_side_and_comparisons_of_families(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [write_run(root, tmp_path / "runs" / name) for name in ("a", "b")]
    (tmp_path / "runs/c").mkdir()
    (tmp_path / "runs/c/families.md").write_text("- recall: the GAN wins.")
    monkeypatch.setenv(roots.ROOTS, str(tmp_path / "runs"))
    app = AppTest.from_function(judge, default_timeout=60).run()
    pages = [app.get("iframe")[0].proto.srcdoc]
    app.multiselect[0].set_value([str(run) for run in runs]).run()
    pages.append(app.get("iframe")[0].proto.srcdoc)
    assert all("Content-Security-Policy" in page and "</html>" in page for page in pages)
    assert "2 runs side by side" in pages[1] and "2 runs side by side" not in pages[0]
    app.segmented_control[0].set_value("GAN, VAE, diffusion").run()
    assert "- recall: the GAN wins." in [text.value for text in app.markdown] and not app.exception


def test_judge_opens_with_the_run_that_was_trained_last(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [write_run(root, tmp_path / "runs" / name) for name in ("a", "b", "c")]
    for run, time in zip(runs, (1, 3, 2), strict=True):
        for stage in ("stage1", "stage2"):
            os.utime(run / stage / "metrics.jsonl", (time, time))
    monkeypatch.setenv(roots.ROOTS, str(tmp_path / "runs"))
    app = AppTest.from_function(judge, default_timeout=60).run()
    assert not app.exception and app.multiselect[0].value == [str(runs[1])]
    assert [Path(option).name for option in app.multiselect[0].options] == ["b", "c", "a"]
