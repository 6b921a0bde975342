"""The page *Data*: what training would make of a folder, an archive or an upload; captions edited in place."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import streamlit as st
from PIL import Image

from ldm.app import data_captions
from ldm.app.data_captions import Row, normalized
from ldm.app.data_check import BUILT_IN, MAX_UPLOADS, MAX_UPLOADS_MB, Check, run_check, save_uploads, source_of
from ldm.app.inputs import IMAGE_TYPES, decoded, plain, sentences
from ldm.app.roots import roots
from ldm.data.openmoji import ATTRIBUTION
from ldm.data.unread_files import SIDECARS
from ldm.utils.errors import UserError

FOLDER, UPLOAD, DRAWINGS = WAYS = ("Folder", "Upload", "Sample drawings")
ROWS = 8  # captions on a page
THUMBNAIL = 256


def page() -> None:
    """Draws the page."""
    st.title("Data")
    with sentences():
        source = _source()
        if not source:
            st.info("Name a folder, a tar or parquet file with images, or upload some: the check says what is in it.")
            return
        check, captions = st.tabs(["Check", "Captions"])
        with check, sentences(stop=False):
            _check(source)
        with captions, sentences(stop=False):
            _captions(source)


def _source() -> str | None:
    """The path of what the visitor chose; None where nothing is chosen yet."""
    left, right = st.columns([1, 2])
    way = left.segmented_control("Images from", WAYS, default=FOLDER, required=True)
    with right:
        if way == DRAWINGS:
            st.caption(plain(ATTRIBUTION))
            return BUILT_IN
        if way == UPLOAD:
            return _uploaded()
        where = " or ".join(str(root) for root in roots())
        text = st.text_input("Folder or archive", help=f"In {where}.", placeholder="a folder, a .tar or a .parquet")
    return source_of(text.strip()) if text.strip() else None


def _uploaded() -> str | None:
    """A folder of this session with the uploads, or the tar in it."""
    types = [*IMAGE_TYPES, *(suffix[1:] for suffix in SIDECARS), "tar"]
    limits = f"At most {MAX_UPLOADS} files of {MAX_UPLOADS_MB} MB in all."
    files = st.file_uploader("Images with caption files, or a tar", types, accept_multiple_files=True, help=limits)
    if not files:
        return None
    key = tuple(file.file_id for file in files)
    if st.session_state.get("uploaded", (None,))[0] != key:
        folder = TemporaryDirectory(prefix="ldm-upload-")  # it goes when the session forgets it
        path = save_uploads([(file.name, file.getvalue()) for file in files], Path(folder.name))
        st.session_state["uploaded"] = (key, folder, str(path))
    return str(st.session_state["uploaded"][2])


# ----------------------------------------------------------------------------------------------------------- the check


def _check(source: str) -> None:
    left, middle, right = st.columns([1, 1, 2], vertical_alignment="bottom")
    size = left.number_input("Size", 8, 2048, 512, 8, help="`data.size`: the side of training's images, in pixels.")
    buckets = middle.toggle("Buckets", help="Sorts images by aspect ratio, so that little is cropped.")
    captions = right.toggle("With captions", True, help="Off: for a model without text; no caption is needed.")
    settings = (source, int(size), buckets, captions)
    if st.button("Check", type="primary"):
        st.session_state.pop("check", None)
        with st.spinner("Opening every image …"):
            st.session_state["check"] = (settings, run_check(*settings))
    checked, check = st.session_state.get("check", (None, None))
    if check and checked == settings:
        _show(check)


def _show(check: Check) -> None:
    """The verdict, the counts, and all that explains them."""
    if check.stop:
        st.error(plain(f"Training would stop: {check.stop}"))
    else:
        st.success(plain(f"Training can begin: {check.kind}."))
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
        f"on average. {facts['upscaled']:,} images are smaller than training's, and are enlarged."
    )
    if len(facts["buckets"]) > 1:
        columns = {name: [row[i] for row in facts["buckets"]] for i, name in enumerate(("bucket", "images"))}
        st.bar_chart(columns, x="bucket", y="images", height=260, sort=False)


# ------------------------------------------------------------------------------------------------------------ captions


def _captions(source: str) -> None:
    if reason := "" if source == BUILT_IN else data_captions.why_not(source):
        st.info(reason)
        return
    if source == BUILT_IN:
        st.info("The drawings' captions come with them.")
        return
    rows = data_captions.rows(Path(source))
    pages = max(1, -(-len(rows) // ROWS))
    left, right = st.columns([1, 3], vertical_alignment="bottom")
    number = left.number_input(f"Page, of {pages:,}", 1, pages)
    right.caption(
        f"{len(rows):,} images. Saving writes a `.txt` beside each image; what was there before stays as `.txt.bak`."
    )
    for message in st.session_state.pop("saved", []):
        st.success(message)
    shown = rows[(int(number) - 1) * ROWS :][:ROWS]
    with st.form("captions", border=False):
        edited = [(row, *_edit(row)) for row in shown]
        if st.form_submit_button("Save", type="primary"):
            _save([(row, seen, text) for row, seen, text in edited if normalized(text) != normalized(seen)])


def _edit(row: Row) -> tuple[str, str]:
    """A row with image and caption; what the caption was when it was shown first, and what it is now."""
    picture, words = st.columns([1, 4])
    try:
        picture.image(_thumbnail(str(row.image), row.image.stat().st_mtime), width=110)
    except (UserError, OSError) as error:
        picture.warning(plain(str(error)))
    key = f"caption-{row.image}"
    seen: dict[str, str] = st.session_state.setdefault("seen", {})
    try:
        if key not in seen:
            seen[key] = row.caption()
    except UserError as error:
        words.warning(plain(str(error)))
        return "", ""
    note = " (another image has the same file)" if row.shared else ""
    return seen[key], words.text_area(plain(row.key) + note, seen[key], key=key, height=90)


@st.cache_data(max_entries=512, show_spinner=False)
def _thumbnail(path: str, changed: float) -> Image.Image:
    image = decoded(Path(path).read_bytes())
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return image


def _save(changes: list[tuple[Row, str, str]]) -> None:
    """Writes the captions that were changed, and says what was done; the page is drawn anew."""
    copied = 0
    for row, seen, text in changes:
        copied += data_captions.save(row, seen, text)
        st.session_state["seen"][f"caption-{row.image}"] = row.caption()
    if not changes:
        st.info("No caption was changed.")
        return
    noun = "caption" if len(changes) == 1 else "captions"
    copies = f" The earlier captions of {copied} are kept as `.txt.bak`." if copied else ""
    st.session_state["saved"] = [f"Saved {len(changes)} {noun}.{copies}"]
    st.rerun()
