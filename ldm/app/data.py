"""The page *Data*: what training would make of a folder, an archive or an upload; captions edited in place."""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory

import streamlit as st

from ldm.app import data_captions
from ldm.app.data_caption_form import CAPTIONS, CHECK_NOW, ROWS, VIEWS, edit_captions
from ldm.app.data_check import (
    BUILT_IN,
    MAX_UPLOADS,
    Check,
    is_upload,
    keep,
    kept_path,
    run_check,
    save_uploads,
    source_of,
)
from ldm.app.inputs import IMAGE_TYPES, images_text, initial, plain, sentences
from ldm.app.launch import MAX_UPLOADS_MB
from ldm.app.menu import menu_page
from ldm.app.roots import roots
from ldm.app.train import NEW
from ldm.app.train_form import SOURCE
from ldm.app.train_settings import default_size, image_sources, tidy
from ldm.data.openmoji import ATTRIBUTION
from ldm.data.unread_files import SIDECARS
from ldm.utils.errors import UserError

FOLDER, UPLOAD, DRAWINGS = WAYS = ("Folder", "Upload", "Sample drawings")
UPLOADED = "upload"  # the name of a folder for several files
NO_CAPTION = "No image has a caption yet."


def page() -> None:
    """Draws the page."""
    st.title("Data")
    with sentences():
        source = _source()
        if not source:
            if st.session_state["data-way"] == UPLOAD:
                st.info("Upload images with their captions: the check says what training would make of them.")
                return
            st.info(
                "Choose a folder of images, a tar or a parquet file: the check says what training would make of it. "
                f"Captions can be written here too. The list has those in {_where()}; copy yours there, or upload some."
            )
            return
        check, captions = st.tabs(VIEWS, key="data-view", on_change="rerun")
        with check, sentences(stop=False):
            _check(source)
        with captions, sentences(stop=False):
            edit_captions(source)


def _where() -> str:
    return " or ".join(f"`{root}`" for root in roots())


def _source() -> str | None:
    """The path of what the visitor chose; None where nothing is chosen yet."""
    left, right = st.columns([1, 2])
    way = left.segmented_control("Images from", WAYS, key=initial("data-way", FOLDER), required=True)
    with right:
        if way == DRAWINGS:
            st.caption(plain(ATTRIBUTION))
            return BUILT_IN
        if way == UPLOAD:
            return _uploaded()
        text = st.selectbox(
            "Folder or archive",
            image_sources(),
            index=None,
            key="data-folder",
            accept_new_options=True,
            placeholder="Choose one, or type a path",
            help=f"The list has what lies in {_where()}, up to two folders deep. Any other path in there can be typed.",
        )
    return source_of(text) if text and text.strip() else None


def _uploaded() -> str | None:
    """A folder of this session with the uploads, or the tar in it."""
    types = [*IMAGE_TYPES, *(suffix[1:] for suffix in SIDECARS), "zip", "tar"]
    limits = f"At most {MAX_UPLOADS} files of {MAX_UPLOADS_MB} MB in all, also those in a zip."
    files = st.file_uploader(
        "Images with caption files, or one zip or tar of them", types, accept_multiple_files=True, help=limits
    )
    if not files:
        return None
    key = tuple(file.file_id for file in files)
    if st.session_state.get("uploaded", (None,))[0] != key:
        folder = TemporaryDirectory(prefix="ldm-upload-")  # it goes when the session forgets it
        saved = save_uploads([(file.name, file.getvalue()) for file in files], Path(folder.name))
        st.session_state["uploaded"] = (key, folder, *saved, _name(files[0].name) if len(files) == 1 else UPLOADED)
    _, _, path, left_out, _ = st.session_state["uploaded"]
    if left_out:
        more = f" and {len(left_out) - 3:,} more" if len(left_out) > 3 else ""
        st.caption(plain(f"Neither images nor captions, so left out of the zip: {', '.join(left_out[:3])}{more}."))
    return str(path)


def _name(file: str) -> str:
    """The name of a folder for what an uploaded file holds."""
    stem = Path(file.replace("\\", "/")).name.partition(".")[0]
    return re.sub(r"[^\w-]+", "-", stem).strip("-") or UPLOADED


# ----------------------------------------------------------------------------------------------------------- the check


def _check(source: str) -> None:
    left, middle, right = st.columns([1, 1, 2], vertical_alignment="bottom")
    help_text = (
        "`data.size`: the side of training's images, in pixels. It begins as that of the newest model in the app's "
        "folders, or else of the smallest configuration, with which the page Train begins."
    )
    size = left.number_input("Size", 8, 2048, step=8, help=help_text, key=initial("data-size", default_size()))
    buckets = middle.toggle(
        "Buckets", key="data-buckets", help="Sorts images by aspect ratio, so that little is cropped."
    )
    help_text = "Off: for a model without text; no caption is needed."
    captions = right.toggle("With captions", key=initial("data-captions", True), help=help_text)
    settings = (source, int(size), buckets, captions)
    if st.button("Check", type="primary") or st.session_state.pop(CHECK_NOW, False):
        st.session_state.pop("check", None)
        with st.spinner("Opening every image …"):
            st.session_state["check"] = (settings, *_checked(*settings))
    checked, check, uncaptioned = st.session_state.get("check", (None, None, []))
    if checked != settings:
        return
    if check == NO_CAPTION:
        st.error(NO_CAPTION)
    else:
        _verdict(check, source)
    if uncaptioned:
        with st.container(horizontal=True, vertical_alignment="center"):
            if check != NO_CAPTION:
                verb = "has" if len(uncaptioned) == 1 else "have"
                st.markdown(f"{images_text(len(uncaptioned))} {verb} no caption.", width="content")
            st.button("Write captions", on_click=_open_captions, args=(uncaptioned[0],))
    if isinstance(check, Check):
        _show(check)


def _checked(source: str, size: int, buckets: bool, captions: bool) -> tuple[Check | str, list[int]]:
    """The check, or why there can be none, and the numbers of the images that lack a caption."""
    uncaptioned, images = data_captions.uncaptioned(source) if captions else ([], 0)
    if uncaptioned and len(uncaptioned) == images:
        return NO_CAPTION, uncaptioned
    try:
        check: Check | str = run_check(source, size, buckets, captions)
    except UserError as error:
        check = str(error)
    return check, uncaptioned


def _open_captions(number: int) -> None:
    """Shows the captions from the page with an image on."""
    st.session_state["data-view"], st.session_state["data-captions-page"] = CAPTIONS, number // ROWS + 1


def _verdict(check: Check | str, source: str) -> None:
    """Whether training can begin, with the way to it."""
    if stop := check if isinstance(check, str) else check.stop:
        st.error(plain(f"Training would stop: {stop}"))
        return
    assert isinstance(check, Check)
    left, right = st.columns([4, 1], vertical_alignment="center")
    left.success(plain(f"Training can begin: {check.kind}."))
    name = st.session_state["uploaded"][-1] if is_upload(source) else ""
    if name:
        st.caption(f"*Train on it* copies the upload to `{tidy(kept_path(Path(source), name))}` first.")
    if right.button("Train on it", type="primary", width="stretch"):
        st.session_state[SOURCE] = source if source == BUILT_IN else str(tidy(keep(Path(source), name)))
        st.session_state["train-next-view"] = NEW
        st.switch_page(menu_page("train"))


def _show(check: Check) -> None:
    """The counts, and all that explains them."""
    left_out = sum(count for count, _ in check.left_out.values())
    duplicates = check.facts.get("duplicates", {})
    counts = {"good": check.good, "bad": check.bad, "left out": left_out, "copies": duplicates.get("exact", 0)}
    with st.container(horizontal=True):
        for label, count in counts.items():
            st.metric(label, f"{count:,}", width="content")
    if check.samples:
        st.subheader("As training sees them")
        images, captions = zip(*check.samples, strict=True)
        st.image([*images], [plain(caption) for caption in captions], width=140)
    if check.facts:
        _sizes(check)
    if check.bad_samples:
        st.subheader("Bad images")
        st.dataframe([bad.__dict__ for bad in check.bad_samples], hide_index=True)
    if check.left_out:
        st.subheader("Left out on purpose")
        table = [{"files": n, "reason": reason, "such as": ", ".join(e)} for reason, (n, e) in check.left_out.items()]
        st.dataframe(table, hide_index=True)
    if pairs := duplicates.get("pairs"):
        st.subheader("Copies, and images that look alike")
        st.dataframe([{"pair": kind, "image": a, "and": b} for kind, a, b in pairs], hide_index=True)


def _sizes(check: Check) -> None:
    facts = check.facts
    st.subheader("Sizes")
    shorter, longer = facts["shorter"], facts["longer"]
    st.markdown(
        f"The shorter side has {shorter[0]:,} to {shorter[-1]:,} pixels (median {shorter[2]:,}), the longer "
        f"{longer[0]:,} to {longer[-1]:,} (median {longer[2]:,}). Cropping removes {facts['cropped']:.1%} of the area "
        f"on average. Smaller than training's, and enlarged: {images_text(facts['upscaled'])}."
    )
    if len(facts["buckets"]) > 1:
        columns = {name: [row[i] for row in facts["buckets"]] for i, name in enumerate(("bucket", "images"))}
        st.bar_chart(columns, x="bucket", y="images", height=260, sort=False)
