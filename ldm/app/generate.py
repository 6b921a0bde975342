"""The page *Generate*: text to image, image to image, inpainting, enlarging, and the pictures of this session."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import streamlit as st
from PIL import Image

from ldm.app.drawing import Adapters, Loaded, Settings, Upload, draw, png, read_base
from ldm.app.inputs import IMAGE_TYPES, decoded, initial, plain, sentences
from ldm.app.launch import MAX_UPLOAD_MB
from ldm.app.mask_canvas import painted_mask
from ldm.app.menu import no_model
from ldm.app.results import opened, words
from ldm.app.roots import INDEX, adapter_name, allowed, loras, pipelines, roots, short, upscalers
from ldm.config.schema import SOLVERS
from ldm.models.conditioning import MAX_NOISE_LEVEL
from ldm.sampling.options import Sampling
from ldm.sampling.pipeline import LatentDiffusion
from ldm.sampling.solvers import solver_name
from ldm.utils.errors import UserError

TEXT, IMAGE, INPAINT, ENLARGE = "Text to image", "Image to image", "Inpainting", "Enlarging"
MODES = {"generate": (TEXT, IMAGE, INPAINT), "inpaint": (INPAINT,), "upscale": (ENLARGE,)}
"""What can be done with a model, by its task."""
MAX_KEPT = 24  # pictures in a session's gallery
AS_SAVED = "as saved"
PAINT, MASK_FROM = "Paint", "generate-mask-from"
MODEL, PROMPT, LORAS, WORDS = "generate-model", "generate-prompt", "generate-loras", "generate-words"
"""Keys of the widgets that a run's result fills in."""
FOLDER, TASK, NEGATIVE, CLASS = "generate-folder", "generate-task", "generate-negative", "generate-class"
SOLVER, STEPS, GUIDANCE, SEED = "generate-solver", "generate-steps", "generate-guidance", "generate-seed"
SCALE, STRENGTH, NOISE, UPSCALER = "generate-scale", "generate-strength", "generate-noise", "generate-upscaler"
"""Keys of the others; with a folder, file or task behind those whose first value depends on it."""
STICKY = """<style>
@media (min-width: 640px) { [data-testid="stColumn"]:has(.st-key-generate-picture) {
    position: sticky; top: 4rem; align-self: flex-start; } }
</style>"""
"""Keeps the picture in view beside a long form."""


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
            settings = _settings(model, folder)
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


def _adapters() -> Adapters:
    """The LoRAs that the visitor adds, each with its scale."""
    if not (files := [str(path) for path in loras()]):
        return ()
    chosen = st.multiselect("LoRAs", files, key=LORAS, format_func=_adapter_name)
    return tuple((name, _scale(name)) for name in chosen)


def _scale(file: str) -> float:
    label, key = f"Scale of {_adapter_name(file)}", initial(f"{SCALE}-{file}", 1.0)
    return float(st.slider(label, -1.0, 2.0, step=0.05, key=key))


def _adapter_name(file: str) -> str:
    return adapter_name(Path(file))


def _words() -> tuple[str, ...]:
    """The files of learned words that the visitor adds; a prompt may then have them."""
    if not (files := [str(path) for path in words()]):
        return ()
    return tuple(st.multiselect("Learned words", files, key=WORDS, format_func=_word_name))


def _word_name(file: str) -> str:
    return short(Path(file).parents[1])


def _settings(model: LatentDiffusion, folder: str) -> Settings | str:
    """What the visitor chooses, or what is missing for it."""
    modes = MODES[model.task]
    mode = modes[0]
    if len(modes) > 1:
        mode = st.segmented_control("Task", modes, key=initial(TASK, mode), required=True) or mode
    initial(PROMPT, "red heart")
    prompt = st.text_area("Prompt", key=PROMPT, height=68) if model.text else None
    help_text = "What the picture should not show."
    negative = st.text_input("Negative prompt", key=NEGATIVE, help=help_text) if model.text else ""
    label = st.selectbox("Class", model.classes, key=f"{CLASS}-{folder}") if model.classes else None
    image = _upload("Image") if mode != TEXT else None
    mask = _mask(image) if mode == INPAINT and image else None
    adapters, embeddings = _adapters(), _words() if model.text else ()
    options, seed = _options(model, folder, negative)
    upscaler = None
    if mode == ENLARGE:
        help_text = "Noise on the small image: more invents more detail."
        key = initial(NOISE, options.noise_level)
        level = st.slider("Noise level", 0, MAX_NOISE_LEVEL - 1, key=key, help=help_text)
        options = replace(options, noise_level=level)
    elif image:
        key = initial(f"{STRENGTH}-{mode}", 0.6 if mode == IMAGE else 1.0)
        options = replace(options, strength=st.slider("Strength", 0.0, 1.0, step=0.05, key=key))
    elif mode == TEXT and model.text and (folders := [str(path) for path in upscalers()]):
        upscaler = st.selectbox("Enlarge it with", [None, *folders], key=UPSCALER, format_func=_upscaler_name)
    if mode != TEXT and not image:
        return "Choose an image first."
    if mode == INPAINT and not mask:
        return "Paint a mask first." if st.session_state[MASK_FROM] == PAINT else "Choose a mask first."
    return Settings(
        folder,
        prompt,
        label,
        seed,
        options,
        adapters,
        embeddings,
        image,
        mask,
        enlarges=mode == ENLARGE,
        upscaler=upscaler,
    )


def _options(model: LatentDiffusion, folder: str, negative: str) -> tuple[Sampling, int]:
    """How it is drawn, and the seed."""
    left, right = st.columns(2)
    solver = left.selectbox("Solver", [AS_SAVED, *SOLVERS], key=SOLVER, format_func=partial(_solver, model))
    steps = right.number_input("Steps", 1, 1000, key=initial(f"{STEPS}-{folder}", model.steps))
    key = initial(f"{GUIDANCE}-{folder}", float(min(model.guidance, 20)))
    guidance = left.slider("Guidance", 0.0, 20.0, step=0.5, key=key, help="1 is none.")
    seed = right.number_input("Seed", 0, 2**32 - 1, key=initial(SEED, 0))
    options = Sampling(
        num_inference_steps=int(steps),
        guidance_scale=guidance,
        solver=None if solver == AS_SAVED else solver,
        negative_prompt=negative,
    )
    return options, int(seed)


def _solver(model: LatentDiffusion, name: str) -> str:
    """A solver as the menu shows it: the saved one with its name, where it has one here."""
    if name == AS_SAVED:
        with suppress(UserError):
            return f"{AS_SAVED} ({solver_name(model.scheduler)})"
    return name


def _task(settings: Settings) -> str:
    if settings.enlarges:
        return ENLARGE
    return INPAINT if settings.mask else IMAGE if settings.image else TEXT


def _use(settings: Settings) -> None:
    """Fills the form with a picture's settings, except for its image and mask."""
    options, folder, task = settings.options, settings.model, _task(settings)
    listed = folder in map(str, pipelines())
    filled = {
        MODEL: folder if listed else st.session_state.get(MODEL),
        FOLDER: "" if listed else folder,
        TASK: task,
        PROMPT: settings.prompt,
        NEGATIVE: options.negative_prompt,
        f"{CLASS}-{folder}": settings.label,
        LORAS: [name for name, _ in settings.loras],
        **{f"{SCALE}-{name}": scale for name, scale in settings.loras},
        WORDS: [*settings.embeddings],
        SOLVER: options.solver or AS_SAVED,
        f"{STEPS}-{folder}": options.num_inference_steps,
        f"{GUIDANCE}-{folder}": options.guidance_scale,
        SEED: settings.seed,
        f"{STRENGTH}-{task}": options.strength,
        NOISE: options.noise_level,
        UPSCALER: settings.upscaler,
    }
    st.session_state.update({key: value for key, value in filled.items() if value is not None or key == UPSCALER})


def _upscaler_name(folder: str | None) -> str:
    return short(Path(folder)) if folder else "nothing"


def _upload(label: str) -> Upload | None:
    file = st.file_uploader(label, IMAGE_TYPES, max_upload_size=MAX_UPLOAD_MB)
    return Upload(file.name, file.getvalue()) if file else None


def _mask(image: Upload) -> Upload | None:
    """The mask that the visitor paints over the image, or brings; None while there is none."""
    ways = (PAINT, "Upload")
    if st.segmented_control("Mask", ways, key=initial(MASK_FROM, PAINT), required=True) != PAINT:
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
    loras = [f"{_adapter_name(name)} × {factor:g}" for name, factor in settings.loras]
    parts = [short(Path(settings.model)), *loras, *map(_word_name, settings.embeddings)]
    used = plain(" + ".join(parts))
    task = _task(settings)
    strength = f", strength {options.strength:g}" if task in (IMAGE, INPAINT) else ""
    numbers = f"seed {settings.seed}, {solver}, {steps} steps, guidance {scale:g}"
    how = numbers if task == TEXT else f"{task}{strength}, {numbers}"
    st.caption(f"{text}  \n{used}  \n{how}")
    help_text = "Fills in the form" + (", but not the image." if settings.image else ".")
    st.button(
        "Use these settings", key=f"use-{number}", help=help_text, on_click=_use, args=(settings,), width="stretch"
    )
    if st.button("Remake", key=f"again-{number}", help="Draws it anew from its settings.", width="stretch"):
        st.session_state["again"] = settings
        st.rerun()
    name = f"{number}-seed-{settings.seed}"
    st.download_button("PNG", entry.png, f"{name}.png", "image/png", width="stretch")
    if settings.mask:  # `--again` asks for it
        st.download_button("Mask", settings.mask.data, f"{name}-mask.png", key=f"mask-{number}", width="stretch")
