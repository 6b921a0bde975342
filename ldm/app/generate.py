"""The page *Generate*: text to image, image to image, inpainting, enlarging, and the pictures of this session."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import streamlit as st
from PIL import Image

from ldm.app.drawing import Adapters, Loaded, Settings, Upload, draw, png, read_base
from ldm.app.inputs import IMAGE_TYPES, decoded, plain, sentences
from ldm.app.launch import MAX_UPLOAD_MB
from ldm.app.mask_canvas import painted_mask
from ldm.app.menu import no_model
from ldm.app.results import opened, words
from ldm.app.roots import INDEX, adapter_name, allowed, loras, pipelines, roots, short, upscalers
from ldm.config.schema import SOLVERS
from ldm.models.conditioning import MAX_NOISE_LEVEL
from ldm.sampling.options import Sampling
from ldm.sampling.pipeline import LatentDiffusion
from ldm.utils.errors import UserError

TEXT, IMAGE, INPAINT, ENLARGE = "Text to image", "Image to image", "Inpainting", "Enlarging"
MODES = {"generate": (TEXT, IMAGE, INPAINT), "inpaint": (INPAINT,), "upscale": (ENLARGE,)}
"""What can be done with a model, by its task."""
MAX_KEPT = 24  # pictures in a session's gallery
AS_SAVED = "as saved"
MODEL, PROMPT, LORAS, WORDS = "generate-model", "generate-prompt", "generate-loras", "generate-words"
"""Keys of the widgets that a run's result fills in."""


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
    typed = right.text_input("Or another folder", help=f"In {where}.", placeholder="RUN/pipeline")
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
            settings = _settings(model, folder)
            pressed = st.button("Generate", type="primary", disabled=settings is None, width="stretch")
        with canvas:
            again: Settings | None = st.session_state.pop("again", None)
            if chosen := again or (settings if pressed else None):
                _draw(chosen)
            elif kept := st.session_state.get("kept"):
                st.image(kept[0].image, width="stretch")
            else:
                st.info("The picture appears here while it forms.")
    _gallery()


def _open_result() -> None:
    """Fills in what the page was opened with: a run's model, its LoRA or word, and its prompt."""
    if result := opened():
        st.session_state[MODEL] = result.model
        st.session_state[LORAS] = [result.lora] if result.lora else []
        st.session_state[WORDS] = [result.word] if result.word else []
        if result.prompt:
            st.session_state[PROMPT] = result.prompt


def _adapters() -> Adapters:
    """The LoRAs that the visitor adds, each with its scale."""
    if not (files := [str(path) for path in loras()]):
        return ()
    chosen = st.multiselect("LoRAs", files, key=LORAS, format_func=_adapter_name)
    return tuple((name, st.slider(f"Scale of {_adapter_name(name)}", -1.0, 2.0, 1.0, 0.05)) for name in chosen)


def _adapter_name(file: str) -> str:
    return adapter_name(Path(file))


def _words() -> tuple[str, ...]:
    """The files of learned words that the visitor adds; a prompt may then have them."""
    if not (files := [str(path) for path in words()]):
        return ()
    return tuple(st.multiselect("Learned words", files, key=WORDS, format_func=_word_name))


def _word_name(file: str) -> str:
    return short(Path(file).parents[1])


def _settings(model: LatentDiffusion, folder: str) -> Settings | None:
    """What the visitor chooses; None while an image or mask is missing."""
    modes = MODES[model.task]
    mode = st.segmented_control("Task", modes, default=modes[0], required=True) if len(modes) > 1 else modes[0]
    st.session_state.setdefault(PROMPT, "red heart")
    prompt = st.text_area("Prompt", key=PROMPT, height=68) if model.text else None
    negative = st.text_input("Negative prompt", help="What the picture should not show.") if model.text else ""
    label = st.selectbox("Class", model.classes) if model.classes else None
    image = _upload("Image") if mode != TEXT else None
    mask = _mask(image) if mode == INPAINT and image else None
    adapters, embeddings = _adapters(), _words() if model.text else ()
    left, right = st.columns(2)
    solver = left.selectbox("Solver", [AS_SAVED, *SOLVERS])
    steps = right.number_input("Steps", 1, 1000, model.steps)
    guidance = left.slider("Guidance", 0.0, 20.0, float(min(model.guidance, 20)), 0.5, help="1 is none.")
    seed = right.number_input("Seed", 0, 2**32 - 1, 0)
    options = Sampling(
        num_inference_steps=int(steps),
        guidance_scale=guidance,
        solver=None if solver == AS_SAVED else solver,
        negative_prompt=negative,
    )
    upscaler = None
    if mode == ENLARGE:
        help_text = "Noise on the small image: more invents more detail."
        level = st.slider("Noise level", 0, MAX_NOISE_LEVEL - 1, options.noise_level, help=help_text)
        options = replace(options, noise_level=level)
    elif image:
        options = replace(options, strength=st.slider("Strength", 0.0, 1.0, 0.6 if mode == IMAGE else 1.0, 0.05))
    elif mode == TEXT and model.text and (folders := [str(path) for path in upscalers()]):
        upscaler = st.selectbox("Enlarge it with", [None, *folders], format_func=_upscaler_name)
    if (mode != TEXT and not image) or (mode == INPAINT and not mask):
        return None
    return Settings(
        folder,
        prompt,
        label,
        int(seed),
        options,
        adapters,
        embeddings,
        image,
        mask,
        enlarges=mode == ENLARGE,
        upscaler=upscaler,
    )


def _upscaler_name(folder: str | None) -> str:
    return short(Path(folder)) if folder else "nothing"


def _upload(label: str) -> Upload | None:
    file = st.file_uploader(label, IMAGE_TYPES, max_upload_size=MAX_UPLOAD_MB)
    return Upload(file.name, file.getvalue()) if file else None


def _mask(image: Upload) -> Upload | None:
    """The mask that the visitor paints over the image, or brings; None while there is none."""
    ways = ("Paint", "Upload")
    if st.segmented_control("Mask", ways, default=ways[0], required=True) == ways[1]:
        return _upload("White where to generate, black elsewhere")
    st.caption("Paint over what to generate.")
    data = painted_mask(decoded(image.data, "image"), image.sha256[:16])
    return Upload("mask.png", data) if data else None


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
    st.caption(f"The last {MAX_KEPT} pictures. A PNG holds its settings; {commands} makes it anew.")
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
    loras = [f"{_adapter_name(name)} × {factor:g}" for name, factor in settings.loras]
    parts = [short(Path(settings.model)), *loras, *map(_word_name, settings.embeddings)]
    used = plain(" + ".join(parts))
    st.caption(f"{text}  \n{used}  \nseed {settings.seed}, {solver}, {steps} steps, guidance {scale:g}")
    if st.button("Remake", key=f"again-{number}", help="Draws it anew from its settings.", width="stretch"):
        st.session_state["again"] = settings
        st.rerun()
    name = f"{number}-seed-{settings.seed}"
    st.download_button("PNG", entry.png, f"{name}.png", "image/png", width="stretch")
    if settings.mask:  # `--again` asks for it
        st.download_button("Mask", settings.mask.data, f"{name}-mask.png", key=f"mask-{number}", width="stretch")
