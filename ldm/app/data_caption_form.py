"""The captions on the page *Data*: written and edited in place, kept over pages until they are saved."""

from __future__ import annotations

from pathlib import Path

import streamlit as st
from PIL import Image

from ldm.app import data_captions
from ldm.app.data_captions import Row, normalized
from ldm.app.data_check import BUILT_IN, is_upload
from ldm.app.inputs import decoded, images_text, plain, sentences
from ldm.utils.errors import UserError

CHECK, CAPTIONS = VIEWS = ("Check", "Captions")
CHECK_NOW = "check-now"  # in the session: the check runs without its button
ROWS = 8  # captions on a page
THUMBNAIL = 256


def edit_captions(source: str) -> None:
    """Draws the captions of a source, a page at a time, or why they aren't edited here."""
    if reason := "" if source == BUILT_IN else data_captions.why_not(source):
        st.info(reason)
        return
    if source == BUILT_IN:
        st.info("The drawings' captions come with them.")
        return
    rows = data_captions.rows(Path(source))
    kept = "The upload goes with this session; *Train on it*, after a check, keeps a copy." if is_upload(source) else ""
    saving = "Saving writes a `.txt` beside each; what was there before stays as `.txt.bak`."
    st.caption(f"{images_text(len(rows))}. {saving} {kept}")
    pages = max(1, -(-len(rows) // ROWS))
    number = st.session_state["data-captions-page"] = min(st.session_state.get("data-captions-page", 1), pages)
    for row in rows[(number - 1) * ROWS :][:ROWS]:
        _edit(row)
    with st.container(horizontal=True, vertical_alignment="bottom"), sentences(stop=False):
        st.number_input(f"Page, of {pages:,}", 1, pages, key="data-captions-page", width=160)
        pressed = st.button("Save", type="primary")
        changes = [(row, _drafts()[str(row.image)]) for row in rows if str(row.image) in _drafts()]
        if pressed:
            _save(changes, source)
        elif changes:
            st.markdown(f"{len(changes):,} unsaved, of all pages.", width="content")
        elif message := st.session_state.pop("saved", ""):
            st.success(message)
            st.button("Check", key="check-saved", on_click=_check_now)


def _drafts() -> dict[str, str]:
    """The captions that were typed and not saved, by the image's path: pages that aren't drawn lose their widgets."""
    drafts: dict[str, str] = st.session_state.setdefault("drafts", {})
    return drafts


def _edit(row: Row) -> None:
    """A row with image and caption."""
    picture, words = st.columns([1, 4])
    try:
        picture.image(_thumbnail(str(row.image), row.image.stat().st_mtime), width=110)
    except (UserError, OSError) as error:
        picture.warning(plain(str(error)))
    image, seen = str(row.image), _seen()
    try:
        if image not in seen:
            seen[image] = row.caption()
    except UserError as error:
        words.warning(plain(str(error)))
        return
    note = " (another image has the same file)" if row.shared else ""
    key = f"caption-{image}"
    st.session_state[key] = _drafts().get(image, seen[image])
    words.text_area(plain(row.key) + note, key=key, height=90, on_change=_draft, args=(image, key))


def _seen() -> dict[str, str]:
    """What captions were when they were shown first, by the image's path."""
    seen: dict[str, str] = st.session_state.setdefault("seen", {})
    return seen


def _draft(image: str, key: str) -> None:
    """Keeps what was typed, unless it is what the file has."""
    _drafts()[image] = st.session_state[key]
    if normalized(st.session_state[key]) == normalized(_seen()[image]):
        del _drafts()[image]


@st.cache_data(max_entries=512, show_spinner=False)
def _thumbnail(path: str, changed: float) -> Image.Image:
    image = decoded(Path(path).read_bytes())
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return image


def _save(changes: list[tuple[Row, str]], source: str) -> None:
    """Writes the captions that were changed, and says what was done; the page is drawn anew."""
    if not changes:
        st.info("No caption was changed.")
        return
    st.session_state.pop("check", None)  # its result is of the earlier captions
    copied = 0
    for row, text in changes:
        copied += data_captions.save(row, _seen()[str(row.image)], text)
        _seen()[str(row.image)] = row.caption()
        del _drafts()[str(row.image)]
    noun = "caption" if len(changes) == 1 else "captions"
    copies = f" The earlier captions of {copied} are kept as `.txt.bak`." if copied else ""
    without, images = data_captions.uncaptioned(source)
    rest = f"{len(without):,} of {images_text(images)} still {'has' if len(without) == 1 else 'have'} none."
    left = rest if without else "All images have one."
    st.session_state["saved"] = f"Saved {len(changes)} {noun}.{copies} {left}"
    st.rerun()


def _check_now() -> None:
    """Shows the check, and runs it."""
    st.session_state["data-view"], st.session_state[CHECK_NOW] = CHECK, True
