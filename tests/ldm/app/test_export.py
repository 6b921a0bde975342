"""The page *Export*: files that are read again, and what is refused."""

import io
import zipfile
from pathlib import Path

import pytest
import torch
from app_runs import write_adapter_run
from diffusers import UNet2DConditionModel
from stable_diffusion import PIPELINES

from ldm.app import export, roots
from ldm.app.export import Fit, Job
from ldm.cli.export import single_file_layout
from ldm.models.convert.safetensors_file import opened
from ldm.sampling.pipeline import LatentDiffusion
from ldm.utils.errors import UserError

pytest.importorskip("streamlit")
from streamlit.testing.v1 import AppTest


@pytest.fixture(autouse=True)
def rooted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(roots.ROOTS, str(folder.parents[1]))


def script() -> None:
    from ldm.app.export import page

    page()


def test_the_page_writes_what_it_compared(folder: Path, adapter: Path) -> None:
    app = AppTest.from_function(script, default_timeout=120).run()
    assert app.segmented_control[0].value == "Diffusers folder", "the model has no single file"
    out = folder.parent / "a-diffusers-fp16"
    assert app.text_input[0].value == str(out)
    app.button[0].click().run()
    assert not app.exception and not app.error and "read again, all equal" in app.code[0].value
    names = zipfile.ZipFile(io.BytesIO(export.zipped(out))).namelist()
    assert f"{out.name}/model_index.json" in names
    app.button[0].click().run()
    assert "exists already; give a new name" in app.error[0].value.replace("\\", "")

    app.segmented_control[0].set_value("LoRA").run()
    assert "can't open this model" in app.caption[0].value
    app.button[0].click().run()
    assert not app.exception and not app.error and "tensors  2 read again" in app.code[0].value
    with opened(adapter.parent / "a-kohya-fp16.safetensors") as file:
        assert all(key.startswith("lora_unet_") for key in file.keys())  # noqa: SIM118


def test_a_layout_that_lacks_parts_of_the_model_is_refused_before_the_click(folder: Path) -> None:
    app = AppTest.from_function(script, default_timeout=60).run()
    app.segmented_control[0].set_value("Single file").run()
    assert not app.exception and app.button[0].disabled
    assert app.info[0].value == "This model has parts that the single-file layout lacks; take *Diffusers folder*."
    with pytest.raises(ValueError) as refused:
        single_file_layout(LatentDiffusion.load(folder, "cpu"))
    assert Fit.of(folder) == Fit(str(refused.value), in_programs=False)


@pytest.mark.parametrize("layout", ["sd1", "sdxl"])
def test_where_a_model_can_go_is_known_from_its_configurations(layout: str, tmp_path: Path) -> None:
    PIPELINES[layout](tmp_path).save_pretrained(tmp_path / "model")
    for file in (tmp_path / "model").rglob("*.safetensors"):
        file.unlink()
    assert Fit.of(tmp_path / "model") == Fit("", in_programs=False), "its widths are smaller than the published ones"
    with torch.device("meta"):
        UNet2DConditionModel().save_config(tmp_path / "model/unet")
    published = layout == "sd1"  # whose configuration is the default one
    assert Fit.of(tmp_path / "model").in_programs == published


def test_the_page_opens_with_the_adapter_of_a_run(folder: Path, adapter: Path) -> None:
    run = write_adapter_run(folder, adapter, "b")
    app = AppTest.from_function(script, default_timeout=60)
    app.query_params["run"] = str(run)
    app.run()
    assert not app.exception and not app.error and app.segmented_control[0].value == "LoRA"
    chosen = {box.label: box.value for box in app.selectbox}
    assert (chosen["Adapter"], chosen["Trained on"]) == (str(run / "lora" / adapter.name), str(folder))


def test_nothing_is_written_outside_of_the_roots(folder: Path, tmp_path: Path) -> None:
    for out in (tmp_path / "a.safetensors", folder.parents[1] / "../a.safetensors"):
        with pytest.raises(UserError, match="is outside of"):
            export.run(Job("diffusers", str(folder), "no", str(out)))
    with pytest.raises(UserError, match="there is no"):
        export.run(Job("diffusers", str(folder), "no", str(folder.parent / "none/a")))
