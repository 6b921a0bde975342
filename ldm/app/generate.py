"""The page *Generate*: text to image, image to image, inpainting, enlarging, and the pictures of this session."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import streamlit as st
from PIL import Image

from ldm.app.drawing import Adapters, Loaded, Settings, draw, png, read_base
from ldm.app.generate_form import (
    AS_SAVED,
    FOLDER,
    IMAGE,
    INPAINT,
    LORAS,
    MODEL,
    PROMPT,
    TEXT,
    WORDS,
    adapter_label,
    chosen_settings,
    fill_in,
    task_of,
    word_label,
)
from ldm.app.inputs import plain, sentences
from ldm.app.menu import no_model
from ldm.app.results import opened
from ldm.app.roots import INDEX, allowed, pipelines, roots, short
from ldm.sampling.pipeline import LatentDiffusion
from ldm.utils.errors import UserError

MAX_KEPT = 24  # pictures in a session's gallery
STICKY = """<style>
@media (min-width: 640px) { [data-testid="stColumn"]:has(.st-key-generate-picture) {
    position: sticky; top: 4rem; align-self: flex-start; } }
</style>"""
"""Keeps the picture in view next to a long form."""


@dataclass(frozen=True)
class Kept:
    """A picture of the gallery."""

    settings: Settings
    image: Image.Image
    png: bytes


@st.cache_resource(max_entries=2, show_spinner="Reading the model …")
def _base(folder: str, changed: float) -> LatentDiffusion:
    """A model as it was saved, read anew where its folder has `changed`."""
    return read_base(folder)


@st.cache_resource(max_entries=2, show_spinner="Preparing the model …")
def _loaded(folder: str, adapters: Adapters, embeddings: tuple[str, ...], changed: tuple[float, ...]) -> Loaded:
    """A model with adapters and words, prepared anew where a file has `changed`; the base stays in memory."""
    return Loaded.of(_base(folder, changed[0]), adapters, embeddings)


def base(folder: str) -> LatentDiffusion:
    """The model of a folder inside the roots; UserError where it is none."""
    index = _index(folder)
    return _base(str(index.parent), index.stat().st_mtime)


def load(folder: str, adapters: Adapters = (), embeddings: tuple[str, ...] = ()) -> Loaded:
    """The same with adapters and learned words, ready to draw."""
    index = _index(folder)
    files = (index, *(allowed(name) for name in (*(name for name, _ in adapters), *embeddings)))
    return _loaded(str(index.parent), adapters, embeddings, tuple(file.stat().st_mtime for file in files))


def _index(folder: str) -> Path:
    index = allowed(folder) / INDEX
    if not index.is_file():
        raise UserError(f"folder: {folder} is no pipeline (it has no {INDEX}); give RUN/pipeline")
    return index


def choose_model() -> str | None:
    """The folder that the visitor chooses; None where there is none yet."""
    left, right = st.columns(2)
    folders = [str(path) for path in pipelines()]
    chosen = left.selectbox(
        "Model", folders, key=MODEL, format_func=lambda name: short(Path(name)), placeholder="none found"
    )
    where = " or ".join(str(root) for root in roots())
    typed = right.text_input("Or another folder", key=FOLDER, help=f"In {where}.", placeholder="RUN/pipeline")
    return typed.strip() or chosen


def page() -> None:
    """Draws the page."""
    st.title("Generate")
    _open_result()
    folder = choose_model()
    if not folder:
        no_model()
        return
    with sentences():
        model = base(folder)
        controls, canvas = st.columns([1, 1], gap="large")
        with controls:
            settings = chosen_settings(model, folder)
            missing = settings if isinstance(settings, str) else ""
            with st.container(horizontal=True, vertical_alignment="center"):
                pressed = st.button("Generate", type="primary", disabled=bool(missing), width="stretch")
                if missing:
                    st.markdown(missing, width="content")
        st.html(STICKY)
        with canvas, st.container(key="generate-picture"):
            again: Settings | None = st.session_state.pop("again", None)
            if chosen := again or (settings if pressed and isinstance(settings, Settings) else None):
                _draw(chosen)
            elif kept := st.session_state.get("kept"):
                st.image(kept[0].image, width="stretch")
            else:
                st.info("The picture appears here while it forms.")
    _gallery()


def _open_result() -> None:
    """Fills in what the page was opened with: a run's model, its LoRA or word, and its prompt."""
    if result := opened():
        st.session_state[MODEL], st.session_state[FOLDER] = result.model, ""
        st.session_state[LORAS] = [result.lora] if result.lora else []
        st.session_state[WORDS] = [result.word] if result.word else []
        if result.prompt:
            st.session_state[PROMPT] = result.prompt


def _draw(settings: Settings) -> None:
    """Draws a picture, shows it while it forms, and keeps it."""
    loaded = load(settings.model, settings.loras, settings.embeddings)
    upscaler = load(settings.upscaler) if settings.upscaler else None
    canvas, bar = st.empty(), st.progress(0.0)

    def preview(number: int, total: int, image: Image.Image | None) -> None:
        bar.progress(number / total, f"step {number} of {total}")
        if image:
            canvas.image(image, width="stretch")

    image = draw(loaded, settings, preview, upscaler)
    bar.empty()
    canvas.image(image, width="stretch")
    kept = Kept(settings, image, png(loaded, settings, image, upscaler))
    st.session_state["kept"] = [kept, *st.session_state.get("kept", [])][:MAX_KEPT]


def _gallery() -> None:
    """The pictures of this session, the newest first."""
    kept: list[Kept] = st.session_state.get("kept", [])
    if not kept:
        return
    st.header("This session")
    scripts = sorted({entry.settings.script.removesuffix(".py") for entry in kept})
    commands = ", ".join(f"`ldm-{script} --again`" for script in scripts)
    last = f"The last {MAX_KEPT} pictures. " if len(kept) == MAX_KEPT else ""
    st.caption(
        f"{last}Kept until the page is reloaded; download what you want to keep. "
        f"A PNG holds its settings; {commands} makes it anew."
    )
    columns = st.columns(4)
    for i, entry in enumerate(kept):
        with columns[i % 4].container(border=True):
            _card(i, entry)


def _card(number: int, entry: Kept) -> None:
    settings, options = entry.settings, entry.settings.options
    st.image(entry.image, width="stretch")
    text = plain(settings.prompt or settings.label or "")
    solver = options.solver or AS_SAVED
    steps, scale = options.num_inference_steps, options.guidance_scale
    loras = [f"{adapter_label(name)} × {factor:g}" for name, factor in settings.loras]
    parts = [short(Path(settings.model)), *loras, *map(word_label, settings.embeddings)]
    used = plain(" + ".join(parts))
    task = task_of(settings)
    strength = f", strength {options.strength:g}" if task in (IMAGE, INPAINT) else ""
    numbers = f"seed {settings.seed}, {solver}, {steps} steps, guidance {scale:g}"
    how = numbers if task == TEXT else f"{task}{strength}, {numbers}"
    st.caption(f"{text}  \n{used}  \n{how}")
    help_text = "Fills in the form" + (", but not the image." if settings.image else ".")
    st.button(
        "Use these settings", key=f"use-{number}", help=help_text, on_click=fill_in, args=(settings,), width="stretch"
    )
    if st.button("Remake", key=f"again-{number}", help="Draws it anew from its settings.", width="stretch"):
        st.session_state["again"] = settings
        st.rerun()
    name = f"{number}-seed-{settings.seed}"
    st.download_button("PNG", entry.png, f"{name}.png", "image/png", width="stretch")
    if settings.mask:  # `--again` asks for it
        st.download_button("Mask", settings.mask.data, f"{name}-mask.png", key=f"mask-{number}", width="stretch")
