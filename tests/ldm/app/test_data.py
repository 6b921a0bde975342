"""The page *Data*: the check of a source, captions edited in place, uploads."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from ldm.app import data_captions, data_check, roots
from ldm.utils.errors import UserError

pytest.importorskip("streamlit")
from streamlit.testing.v1 import AppTest


@pytest.fixture
def folder(three_shapes: Callable[[list[str]], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = three_shapes(["a cat", "a dog", "a heart"])
    monkeypatch.setenv(roots.ROOTS, str(folder.parent))
    return folder


def script() -> None:
    from ldm.app.data import page

    page()


def press(app: AppTest, label: str) -> AppTest:
    return next(button for button in app.button if button.label == label).click().run()


def test_the_page_checks_a_folder_and_saves_captions(folder: Path) -> None:
    (folder / "bad.png").write_bytes(b"no image")
    (folder / "notes.md").write_text("notes")
    app = AppTest.from_function(script, default_timeout=120).run()
    assert "Name a folder" in app.info[0].value
    app.text_input[0].set_value("/etc").run()
    assert "is outside of" in app.error[0].value
    app.text_input[0].set_value(str(folder)).run()
    app.number_input[0].set_value(16)
    app.toggle[0].set_value(True)
    press(app, "Check")
    assert not app.exception and "1 of 4 images are bad" in app.error[0].value
    assert [metric.value for metric in app.metric] == ["3", "1", "1", "0"]
    check = app.session_state["check"][1]
    assert sorted(caption for _, caption in check.samples) == ["a cat", "a dog", "a heart"]
    assert len(check.facts["buckets"]) > 1 and check.bad_samples[0].key == "bad.png"

    app.text_area[1].set_value("a brown  dog")
    press(app, "Save")
    assert not app.exception and app.success[-1].value.startswith("Saved 1 caption. The earlier captions of 1 are kept")
    assert (folder / "01.txt").read_text() == "a brown dog\n" and (folder / "01.txt.bak").read_text() == "a dog"
    app.text_area[1].set_value("a black dog")
    press(app, "Save")
    assert (folder / "01.txt").read_text() == "a black dog\n" and (folder / "01.txt.bak").read_text() == "a dog"
    assert (folder / "00.txt").read_text() == "a cat" and not (folder / "00.txt.bak").exists()
    (folder / "02.txt").write_text("changed elsewhere")
    app.text_area[2].set_value("mine")
    press(app, "Save")
    assert "changed elsewhere meanwhile" in app.error[-1].value
    assert (folder / "02.txt").read_text() == "changed elsewhere"


def test_caption_files_are_those_that_training_reads(folder: Path) -> None:
    (folder / "01.txt").unlink()
    (folder / "00.jpg").write_bytes((folder / "00.png").read_bytes())
    (folder / "sub").mkdir()
    for name in ("a.png", "a.jpg", "b.png"):
        (folder / "sub" / name).write_bytes((folder / "00.png").read_bytes())
    found = {row.key: (row.file.name, row.shared) for row in data_captions.rows(folder)}
    assert found == {
        "00.jpg": ("00.txt", True),
        "00.png": ("00.txt", True),
        "01.png": ("01.txt", False),
        "02.png": ("02.txt", False),
        "sub/a.jpg": ("a.jpg.txt", False),
        "sub/a.png": ("a.png.txt", False),
        "sub/b.png": ("b.txt", False),
    }
    for row in data_captions.rows(folder):
        if not row.caption():
            assert not data_captions.save(row, "", f"of {row.key}")
    check = data_check.run_check(str(folder), 16, buckets=False, captions=True)
    assert not check.bad and {caption for _, caption in check.samples} >= {"of 01.png", "of sub/a.jpg", "of sub/a.png"}
    assert data_captions.why_not(str(folder)) == ""
    (folder / "metadata.jsonl").write_text('{"file_name": "00.png", "text": "a cat"}\n')
    assert "metadata file" in data_captions.why_not(str(folder))


def test_a_link_out_of_the_roots_is_refused(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = tmp_path_factory.mktemp("outside")
    (outside / "a.png").write_bytes((folder / "00.png").read_bytes())
    (folder / "sub").symlink_to(outside)
    with pytest.raises(UserError, match=r"data: .*sub leads out of the app's folders"):
        data_check.source_of(str(folder))
    with pytest.raises(UserError, match="kohya's TOML names folders of its own"):
        (folder / "a.toml").write_text("")
        data_check.source_of(str(folder / "a.toml"))


def test_uploads_are_bounded_and_checked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = (folder / "00.png").read_bytes()
    app = AppTest.from_function(script, default_timeout=60).run()
    app.segmented_control[0].set_value("Upload").run()
    files = [("a.png", image, "image/png"), ("a.txt", b"a cat", "text/plain")]
    app.file_uploader[0].set_value(files).run()
    assert not app.exception and not app.error and app.text_area[0].value == "a cat"

    target = folder / "uploads"
    target.mkdir()
    for bad, reason in {
        (("../a.py", b""),): "a.py is no image, caption file or tar",
        (("x/a.png", image), ("y/a.png", image)): "two files are named a.png",
        (("a.tar", b""), ("a.png", image)): "give one tar, or images",
        (("a.png", image),) * (data_check.MAX_UPLOADS + 1): f"give {data_check.MAX_UPLOADS} of",
    }.items():
        with pytest.raises(UserError, match=reason):
            data_check.save_uploads(bad, target)
    assert data_check.save_uploads([("../c.png", image)], target) == target and (target / "c.png").exists()
    buffer = io.BytesIO()
    Image.new("RGB", (9000, 5000)).save(buffer, "PNG")
    (folder / "00.png").write_bytes(buffer.getvalue())
    app = AppTest.from_function(script, default_timeout=60).run()
    app.text_input[0].set_value(str(folder)).run()
    assert not app.exception and "9000 × 5000 pixels" in app.warning[0].value.replace("\\", "")
