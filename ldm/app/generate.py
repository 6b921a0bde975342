"""The page *Generate*: text to image, image to image, inpainting, and the pictures of this session."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import streamlit as st
from PIL import Image

from ldm.app.drawing import Adapters, Loaded, Settings, Upload, draw, png
from ldm.app.inputs import IMAGE_TYPES, plain, sentences
from ldm.app.roots import allowed, loras, pipelines, roots, short
from ldm.config.schema import SOLVERS
from ldm.sampling.options import Sampling
from ldm.sampling.pipeline import LatentDiffusion
from ldm.utils.errors import UserError

MODES = ("Text to image", "Image to image", "Inpainting")
MAX_KEPT = 24  # pictures in a session's gallery
AS_SAVED = "as saved"


@dataclass(frozen=True)
class Kept:
    """A picture of the gallery."""

    settings: Settings
    image: Image.Image
    png: bytes


@st.cache_resource(max_entries=2, show_spinner="Loading the model …")
def _load(folder: str, adapters: Adapters, changed: float) -> Loaded:
    """A model in memory, loaded anew where its folder has `changed`."""
    return Loaded.read(folder, adapters)


def load(folder: str, adapters: Adapters = ()) -> Loaded:
    """The model of a folder inside the roots; UserError where it is none."""
    index = allowed(folder) / "model_index.json"
    if not index.is_file():
        raise UserError(f"folder: {folder} is no pipeline (it has no model_index.json); give RUN/pipeline")
    for name, _ in adapters:
        allowed(name)
    return _load(str(index.parent), adapters, index.stat().st_mtime)


def choose_model() -> str | None:
    """The folder that the visitor chooses in the sidebar; None where there is none yet."""
    with st.sidebar:
        folders = [str(path) for path in pipelines()]
        chosen = st.selectbox("Model", folders, format_func=lambda name: short(Path(name)), placeholder="none found")
        typed = st.text_input("Or another folder", placeholder=f"inside {', '.join(map(str, roots()))}")
    return typed.strip() or chosen


def page() -> None:
    """Draws the page."""
    st.title("Generate")
    folder = choose_model()
    if not folder:
        where = ", ".join(f"`{root}`" for root in roots())
        st.info(f"No finished model in {where}. `make demo` trains one; or start the app with `--root FOLDER`.")
        return
    with sentences():
        adapters = _adapters()
        loaded = load(folder, adapters)
        model = loaded.model
        if model.task == "upscale":
            raise UserError("model: it enlarges images; use ldm-upscale, or choose another")
        controls, canvas = st.columns([1, 1], gap="large")
        with controls:
            settings = _settings(model, folder, adapters)
            pressed = st.button("Generate", type="primary", disabled=settings is None, width="stretch")
        with canvas:
            again = st.session_state.pop("again", None)
            if again:
                _draw(load(again.model, again.loras), again)
            elif pressed and settings:
                _draw(loaded, settings)
            elif kept := st.session_state.get("kept"):
                st.image(kept[0].image, width="stretch")
            else:
                st.info("The picture appears here while it forms.")
    _gallery()


def _adapters() -> Adapters:
    """The LoRAs that the visitor adds, each with its scale."""
    if not (files := [str(path) for path in loras()]):
        return ()
    with st.sidebar:
        chosen = st.multiselect("LoRAs", files, format_func=lambda name: short(Path(name)))
        return tuple((name, st.slider(short(Path(name)), -1.0, 2.0, 1.0, 0.05)) for name in chosen)


def _settings(model: LatentDiffusion, folder: str, adapters: Adapters) -> Settings | None:
    """What the visitor chooses; None while an image or mask is missing."""
    modes = MODES[2:] if model.task == "inpaint" else MODES
    mode = st.segmented_control("Task", modes, default=modes[0], required=True) if len(modes) > 1 else modes[0]
    prompt = st.text_area("Prompt", "red heart", height=68) if model.text else None
    negative = st.text_input("Negative prompt", help="What the picture should not show.") if model.text else ""
    label = st.selectbox("Class", model.classes) if model.classes else None
    image = _upload("Image") if mode != MODES[0] else None
    mask = _upload("Mask, white where to generate") if mode == MODES[2] else None
    left, right = st.columns(2)
    solver = left.selectbox("Solver", [AS_SAVED, *SOLVERS])
    steps = right.number_input("Steps", 1, 1000, model.steps)
    guidance = left.slider("Guidance", 0.0, 20.0, float(min(model.guidance, 20)), 0.5, help="1 is none.")
    seed = right.number_input("Seed", 0, 2**32 - 1, 0)
    strength = left.slider("Strength", 0.0, 1.0, 0.6 if mode == MODES[1] else 1.0, 0.05) if image else None
    if (mode != MODES[0] and not image) or (mode == MODES[2] and not mask):
        return None
    options = Sampling(
        num_inference_steps=int(steps),
        guidance_scale=guidance,
        solver=None if solver == AS_SAVED else solver,
        negative_prompt=negative,
        strength=strength,
    )
    return Settings(folder, prompt, label, int(seed), options, adapters, image, mask)


def _upload(label: str) -> Upload | None:
    file = st.file_uploader(label, IMAGE_TYPES)
    return Upload(file.name, file.getvalue()) if file else None


def _draw(loaded: Loaded, settings: Settings) -> None:
    """Draws a picture, shows it while it forms, and keeps it."""
    canvas, bar = st.empty(), st.progress(0.0)

    def preview(number: int, total: int, image: Image.Image) -> None:
        bar.progress(number / total, f"step {number} of {total}")
        canvas.image(image, width="stretch")

    image = draw(loaded, settings, preview)
    bar.empty()
    canvas.image(image, width="stretch")
    kept = Kept(settings, image, png(loaded, settings, image))
    st.session_state["kept"] = [kept, *st.session_state.get("kept", [])][:MAX_KEPT]


def _gallery() -> None:
    """The pictures of this session, the newest first."""
    kept: list[Kept] = st.session_state.get("kept", [])
    if not kept:
        return
    st.header("This session")
    st.caption(f"The last {MAX_KEPT} pictures. A PNG holds its settings; `ldm-txt2img --again` makes it anew.")
    columns = st.columns(4)
    for i, entry in enumerate(kept):
        settings, options = entry.settings, entry.settings.options
        with columns[i % 4].container(border=True):
            st.image(entry.image, width="stretch")
            words = plain(settings.prompt or settings.label or "")
            solver = options.solver or AS_SAVED
            steps, scale = options.num_inference_steps, options.guidance_scale
            st.caption(f"{words}  \nseed {settings.seed}, {solver}, {steps} steps, guidance {scale:g}")
            if st.button("Remake", key=f"again-{i}", help="Draws it anew from its settings.", width="stretch"):
                st.session_state["again"] = settings
                st.rerun()
            st.download_button("PNG", entry.png, f"{i}-seed-{settings.seed}.png", "image/png", width="stretch")
