"""The page *Export*: files that are read again, and what is refused."""

import io
import zipfile
from pathlib import Path

import pytest
from app_runs import write_adapter_run

from ldm.app import export, roots
from ldm.app.export import Job
from ldm.models.convert.safetensors_file import opened
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
    app.button[0].click().run()
    assert not app.exception and app.error[0].value.replace("\\", "").startswith("to single-file: ")

    app.segmented_control[0].set_value("Diffusers folder").run()
    out = folder.parent / "a-diffusers-fp16"
    assert app.text_input[0].value == str(out)
    app.button[0].click().run()
    assert not app.exception and not app.error and "read again, all equal" in app.code[0].value
    names = zipfile.ZipFile(io.BytesIO(export.zipped(out))).namelist()
    assert f"{out.name}/model_index.json" in names
    app.button[0].click().run()
    assert "exists already; give a new name" in app.error[0].value.replace("\\", "")

    app.segmented_control[0].set_value("LoRA").run()
    app.button[0].click().run()
    assert not app.exception and not app.error and "tensors  2 read again" in app.code[0].value
    with opened(adapter.parent / "a-kohya-fp16.safetensors") as file:
        assert all(key.startswith("lora_unet_") for key in file.keys())  # noqa: SIM118


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
