"""The menu of pages, and links between pages, which need not import each other."""

from __future__ import annotations

from importlib import import_module

import streamlit as st

from ldm.app.roots import roots

NAMES = ("learn", "data", "train", "generate", "judge", "export")  # the app opens with the first


KEPT = tuple(f"{name}-" for name in NAMES)
"""With these begin the keys of widgets whose values stay while another page is open."""


def menu_page(name: str) -> st.Page:
    """The page of the menu that the module `name` draws, for `st.switch_page` too."""
    draw = import_module(f"ldm.app.{name}").page
    return st.Page(draw, title=name.capitalize(), url_path=name, default=name == NAMES[0])


def keep_choices() -> None:
    """Keeps what was chosen on pages that aren't drawn now: Streamlit forgets widgets that it does not draw."""
    for key in list(st.session_state):
        if str(key).startswith(KEPT):
            st.session_state[key] = st.session_state[key]


def no_model(what: str = "finished model", note: str = "") -> None:
    """Says that there is none in the roots, and what to do: first of all, the page Train, with a link."""
    where = ", ".join(f"`{root}`" for root in roots())
    st.info(
        f"No {what} in {where} yet. The page *Train* trains a small model in about a minute; `make demo`, in a "
        f"terminal, a better one. One in another folder is listed with `--root FOLDER` at the app's start. {note}"
    )
    st.page_link(menu_page("train"), label="Train a model", icon=":material/arrow_forward:")
