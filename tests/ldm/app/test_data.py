"""The page *Data*: the check of a source, captions edited in place, uploads."""

import io
import os
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ldm.app import data_captions, data_check, roots, train_settings
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


def menu() -> None:
    import streamlit as st

    from ldm.app.menu import menu_page

    st.navigation([menu_page("data"), menu_page("train")]).run()


def press(app: AppTest, label: str) -> AppTest:
    return next(button for button in app.button if button.label == label).click().run()


def texts(elements: Iterable[Any]) -> list[str]:
    return [element.value.replace("\\", "") for element in elements]


def opened(function: Callable[[], None] = script) -> AppTest:
    return AppTest.from_function(function, default_timeout=120).run()


def chosen(source: Path | str, function: Callable[[], None] = script) -> AppTest:
    """The page with a source chosen from its list."""
    app = opened(function)
    assert str(source) in app.selectbox[0].options
    return app.selectbox[0].set_value(str(source)).run()


def test_the_page_checks_a_folder_and_saves_captions(folder: Path) -> None:
    (folder / "bad.png").write_bytes(b"no image")
    (folder / "notes.md").write_text("notes")
    app = opened()
    assert "copy yours there, or upload some" in app.info[0].value and str(folder.parent) in app.info[0].value
    for typed, message in {"/etc": "is outside of", "none": "there is no none; give", folder.name: ""}.items():
        app.selectbox[0].options.append(typed)  # a browser sends what was typed as another option
        app.selectbox[0].set_value(typed).run()
        assert [message in error for error in texts(app.error)] == [True] * bool(message)
    app.selectbox[0].set_value(str(folder)).run()
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
    assert not app.metric and not app.error  # the check was of the earlier captions
    press(app, "Save")
    assert [info.value for info in app.info] == ["No caption was changed."]
    app.text_area[1].set_value("a black dog")
    press(app, "Save")
    assert (folder / "01.txt").read_text() == "a black dog\n" and (folder / "01.txt.bak").read_text() == "a dog"
    assert (folder / "00.txt").read_text() == "a cat" and not (folder / "00.txt.bak").exists()
    (folder / "02.txt").write_text("changed elsewhere")
    app.text_area[2].set_value("mine")
    press(app, "Save")
    assert "changed elsewhere meanwhile" in app.error[-1].value
    assert (folder / "02.txt").read_text() == "changed elsewhere"


def test_saved_is_shown_by_the_button(folder: Path) -> None:
    app = chosen(folder)
    app.text_area[0].set_value("a brown cat")
    press(app, "Save")
    (row,) = (block for block in app.get("flex_container") if any(b.label == "Save" for b in block.button))
    assert [message.value for message in row.success] == [app.success[0].value]


def test_typed_captions_outlast_a_change_of_page_and_are_saved_together(
    three_shapes: Callable[[list[str]], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = three_shapes([f"image {i}" for i in range(9)])
    monkeypatch.setenv(roots.ROOTS, str(folder.parent))
    app = chosen(folder)
    app.text_area[0].set_value("a kite").run()
    app.number_input(key="data-captions-page").set_value(2).run()
    assert [area.value for area in app.text_area] == ["image 8"] and "1 unsaved, of all pages." in texts(app.markdown)
    app.text_area[0].set_value("a hat")
    app.number_input(key="data-captions-page").set_value(1).run()
    assert app.text_area[0].value == "a kite" and "2 unsaved, of all pages." in texts(app.markdown)
    press(app, "Save")
    assert not app.exception and not app.error and app.success[-1].value.startswith("Saved 2 captions.")
    assert "All images have one." in app.success[-1].value
    app.button(key="check-saved").click().run()
    assert app.session_state["data-view"] == "Check" and "Training can begin" in app.success[0].value
    assert [(folder / f"0{i}.txt").read_text() for i in (0, 8)] == ["a kite\n", "a hat\n"]
    (folder / "01.txt").unlink()
    app.text_area[0].set_value("a ship")
    press(app, "Save")
    assert "1 of 9 images still has none." in app.success[-1].value
    (folder / "00.txt").write_text("a kite")
    app = chosen(folder)
    app.text_area[0].set_value("a ship").run()
    app.text_area[0].set_value("a kite").run()
    assert not any("unsaved" in text for text in texts(app.markdown)), "as the file has it"


def test_the_list_has_folders_and_archives_of_the_roots(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, image = folder.parent, (folder / "00.png").read_bytes()
    for name in ("run/samples/a.png", "one/a.tar", "several/a.tar", "several/b.tgz", "text/a.txt", "pets/cat/a.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(image)
    (root / "run/config.yaml").write_text("")
    names = ["images", "one/a.tar", "pets/cat", "several"]
    assert train_settings.image_sources() == [str(root / name) for name in names]
    (root / "pets/dog").mkdir()
    (root / "pets/dog/a.png").write_bytes(image)
    names[2:3] = ["pets", "pets/cat", "pets/dog"]
    assert train_settings.image_sources() == [str(root / name) for name in names]
    monkeypatch.setenv(roots.ROOTS, str(folder))
    assert train_settings.image_sources() == [str(folder)]


def test_a_folder_is_typed_from_the_current_folder_or_a_root(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder.parent
    (root / "elsewhere/images").mkdir(parents=True)
    monkeypatch.chdir(root / "elsewhere")
    for typed in ("../images", f"{root.name}/images", str(folder)):
        assert roots.allowed(typed) == folder
    assert roots.allowed("images") == root / "elsewhere/images"
    monkeypatch.setenv(roots.ROOTS, str(folder))  # where the current folder's `images` is outside
    assert roots.allowed("images") == folder and roots.allowed("00.png") == folder / "00.png"


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("{root}/new", r"there is no {root}/new; give a folder or file in {root}"),
        ("new", r"there is no new; give a folder or file in {root}"),
        ("/no/such/folder", r"there is no /no/such/folder; give a folder or file in {root}"),
        ("{out}", r"{out} is outside of {root}; start the app with --root {root} --root {out}$"),
        ("{out}/a.png", r"{out}/a.png is outside of {root}; start the app with --root {root} --root {out}$"),
    ],
)
def test_a_refused_path_is_answered_by_what_can_be_done(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, typed: str, message: str
) -> None:
    names = {"root": folder.parent, "out": tmp_path_factory.mktemp("out")}
    (names["out"] / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match="^folder: " + message.format(**names)):
        roots.allowed(typed.format(**names))


def test_the_size_is_that_of_the_newest_model_or_smallest_configuration(
    folder: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    assert chosen(folder).number_input[0].value == 32  # of configs/tiny.yaml
    for changed, size in enumerate((64, 128)):
        config = (root / "configs/openmoji.yaml").read_text().replace("size: 64", f"size: {size}")
        run = folder.parent / f"run-{size}"
        (run / "pipeline").mkdir(parents=True)
        (run / "config.yaml").write_text(config)
        (run / "pipeline/model_index.json").write_text("{}")
        os.utime(run / "pipeline/model_index.json", (changed, changed))
    assert chosen(folder).number_input[0].value == 128


@pytest.mark.parametrize("captioned", [0, 9])
def test_images_without_captions_lead_to_where_they_are_written(
    three_shapes: Callable[[list[str]], Path], monkeypatch: pytest.MonkeyPatch, captioned: int
) -> None:
    folder = three_shapes([f"image {i}" for i in range(12)])
    monkeypatch.setenv(roots.ROOTS, str(folder.parent))
    for number in range(captioned, 12):
        (folder / f"{number:02}.txt").unlink()
    app = chosen(folder)
    press(app, "Check")
    assert ("3 of 12 images are bad" if captioned else "No image has a caption yet.") in app.error[0].value
    assert ("3 images have no caption." in [text.value for text in app.markdown]) == bool(captioned)
    press(app, "Write captions")
    assert (
        app.session_state["data-view"] == "Captions" and app.session_state["data-captions-page"] == captioned // 8 + 1
    )
    for area in [area for area in app.text_area if not area.value]:
        area.set_value("a shape")
    press(app, "Save")
    assert not app.exception and not app.error and (folder / f"{captioned:02}.txt").read_text() == "a shape\n"
    press(app, "Check")
    assert bool(app.success) == (captioned == 9)  # otherwise a page of eight is done


def test_train_on_it_opens_the_page_train_with_the_images(
    folder: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    app = chosen(folder, menu)
    press(app, "Check")
    press(app, "Train on it")
    assert not app.exception and app.title[0].value == "Train"
    assert app.selectbox(key="data.source").value == str(folder) and not app.error
    assert f"data.source={folder}" in app.code[0].value
    assert not any("tiny model" in button.label for button in app.button)  # which would have other images


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
        (("../a.py", b""),): "a.py is no image, caption file, zip or tar",
        (("x/a.png", image), ("y/a.png", image)): "two files are named a.png",
        (("a.tar", b""), ("a.png", image)): "give one zip or tar, or images",
        (("a.png", image),) * (data_check.MAX_UPLOADS + 1): f"give {data_check.MAX_UPLOADS} of",
    }.items():
        with pytest.raises(UserError, match=reason):
            data_check.save_uploads(bad, target)
    assert data_check.save_uploads([("../c.png", image)], target) == (target, []) and (target / "c.png").exists()
    buffer = io.BytesIO()
    Image.new("RGB", (9000, 5000)).save(buffer, "PNG")
    (folder / "00.png").write_bytes(buffer.getvalue())
    app = chosen(folder)
    assert not app.exception and "9000 × 5000 pixels" in app.warning[0].value.replace("\\", "")


def zipped(members: dict[str, bytes], links: Sequence[str] = ()) -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (0o120777 if name in links else 0o100644) << 16
            archive.writestr(info, data, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def test_a_zip_of_a_folder_is_that_folder(folder: Path) -> None:
    image = (folder / "00.png").read_bytes()
    members = {
        "cats/a.png": image,
        "cats/a.txt": b"a cat",
        "cats/sub/a.png": image,
        "cats/sub/a.txt": b"a small cat",
        "cats/model.bin": b"weights",
        "cats/.DS_Store": b"",
        **{f"__MACOSX/cats/._{number}.png": b"" for number in range(data_check.MAX_UPLOADS)},
    }
    app = opened(menu)
    app.segmented_control[0].set_value("Upload").run()
    app.file_uploader[0].set_value([("cats.zip", zipped(members), "application/zip")]).run()
    assert not app.exception and not app.error and [area.value for area in app.text_area] == ["a cat", "a small cat"]
    assert "left out of the zip: cats/model.bin." in "".join(texts(app.caption))
    app.text_area[0].set_value("a large cat")
    press(app, "Save")
    press(app, "Check")
    assert "Training can begin" in app.success[0].value and app.metric[0].value == "2"
    assert f"copies the upload to `{folder.parent}/cats` first" in "".join(texts(app.caption))
    press(app, "Train on it")
    kept = folder.parent / "cats"
    assert app.selectbox(key="data.source").value == str(kept) and not app.error
    assert (kept / "a.txt").read_text() == "a large cat\n" and (kept / "sub/a.png").read_bytes() == image


def test_an_unsafe_zip_is_refused_in_a_line_before_anything_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, target = (folder / "00.png").read_bytes(), folder / "uploads"
    target.mkdir()
    encrypted = bytearray(zipped({"a.png": image}))
    encrypted[encrypted.index(b"PK\1\2") + 8] |= 1
    damaged = bytearray(zipped({"a.png": image}))
    damaged[60] ^= 255
    monkeypatch.setattr(data_check, "MAX_UPLOADS_MB", 1)
    for data, reason in (
        (zipped({"b.png": image, "../a.png": image}), r"has \.\./a\.png, which leads out of it"),
        (zipped({"b.png": image, "/a.png": image}), "has /a.png, which leads out of it"),
        (zipped({"b.png": image, "x\\..\\..\\a.png": image}), r"has x/\.\./\.\./a\.png, which leads out of it"),
        (zipped({"b.png": image, "a.png": b"/etc/passwd"}, links=["a.png"]), "has a.png, which is a link"),
        (zipped({"a.png": bytes(2**21)}), "1 file of 2 MB; give"),
        (
            zipped({f"{i}.png": b"" for i in range(data_check.MAX_UPLOADS + 1)}),
            f"{data_check.MAX_UPLOADS + 1} files of",
        ),
        (bytes(encrypted), "is encrypted; zip the images without a password"),
        (b"no zip", r"can't be unpacked \(File is not a zip file\)"),
        (zipped({"a.bin": b""}), "has neither images nor captions"),
    ):
        with pytest.raises(UserError, match=rf"^upload: a\.zip:? {reason}"):
            data_check.save_uploads([("a.zip", data)], target)
        assert not any(target.iterdir())
    with pytest.raises(UserError, match=r"a\.zip can't be unpacked"):
        data_check.save_uploads([("a.zip", bytes(damaged))], target)
