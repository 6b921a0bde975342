"""What the views of *Learn* share: rows of pictures, formulas, the model, and results that a session keeps."""

from __future__ import annotations

import html
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import streamlit as st
from PIL import Image

from ldm.app.drawing import Loaded, Settings
from ldm.app.generate import choose_model, load
from ldm.app.menu import no_model
from ldm.utils.errors import UserError

Result = TypeVar("Result")
CELL, GAP = 160, 6  # pixels of a picture in a row, and between two
MAX_REMEMBERED = 12  # results in a session
SMALL = 30_000_000  # parameters of U-Nets that draw at once; larger ones wait for the button


def row(pictures: Sequence[Image.Image], labels: Sequence[str]) -> None:
    """Pictures side by side as one image, which stays a row on narrow screens, each below its label."""
    spans = "".join(f'<span style="flex:1;text-align:center">{html.escape(label)}</span>' for label in labels)
    st.html(f'<div style="display:flex;font-size:0.8rem;opacity:0.7">{spans}</div>') if labels else None
    width = len(pictures) * (CELL + GAP) - GAP
    together = Image.new("RGBA", (width, CELL))
    for i, picture in enumerate(pictures):
        together.paste(picture.convert("RGB").resize((CELL, CELL), Image.Resampling.BICUBIC), (i * (CELL + GAP), 0))
    st.image(together, width="stretch")


def formula(text: str, source: str) -> None:
    """A formula and its source."""
    st.markdown(f"${text}$")
    st.caption(source)


def remembered(key: Hashable, compute: Callable[[], Result]) -> Result:
    """What `compute` returned in this session for the same key; the oldest results are forgotten."""
    results: dict[Hashable, Result] = st.session_state.setdefault("learn_results", {})
    if key not in results:
        results[key] = compute()
        for oldest in list(results)[:-MAX_REMEMBERED]:
            del results[oldest]
    return results[key]


def model() -> tuple[str, Loaded] | None:
    """The folder and the model that the visitor chooses; a sentence and None where there is none."""
    folder = choose_model()
    if not folder:
        no_model(note="Forward and Schedules need none.")
        return None
    loaded = load(folder)
    if loaded.model.task != "generate":
        raise UserError("model: it changes or enlarges images; choose one that makes them from noise")
    return folder, loaded


def subject(
    loaded: Loaded, folder: str, button: str, extra: int = 0, prompt: str = "red heart"
) -> tuple[Settings, bool, list[st.delta_generator.DeltaGenerator]]:
    """Widgets in one row of a form: what to draw, its noise, and the button; columns for `extra` ones between them."""
    network = loaded.model
    words, number, *others, end = st.columns([2, 1, *[1.4] * extra, 0.8], vertical_alignment="bottom")
    text = words.text_input("Prompt", prompt) if network.text else None
    label = words.selectbox("Class", network.classes) if network.classes else None
    seed = int(number.number_input("Seed", 0, 2**32 - 1, 0))
    return Settings(folder, text, label, seed), end.form_submit_button(button, type="primary"), others


def asked(view: str, loaded: Loaded, chosen: tuple[str, ...], requested: Result, pressed: bool) -> Result | None:
    """What to draw: the `requested` of the last press of the button, for the same `chosen` models.

    A small model draws once before the button is pressed.
    """
    key = f"learn_asked_{view}"
    small = sum(weight.numel() for weight in loaded.model.unet.parameters()) < SMALL
    last: tuple[tuple[str, ...], Result] | None = st.session_state.get(key)
    if pressed or (small and (last is None or last[0] != chosen)):
        st.session_state[key] = last = (chosen, requested)
    return last[1] if last and last[0] == chosen else None


def waits() -> None:
    """Says why there is no picture yet."""
    st.info("This model is large, so it draws when you press the button.")
