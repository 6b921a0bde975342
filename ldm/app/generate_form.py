"""The form of the page *Generate*: what a picture is drawn from, and a picture's settings put back into it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import streamlit as st

from ldm.app.drawing import Adapters, Settings, Upload
from ldm.app.inputs import IMAGE_TYPES, decoded, initial
from ldm.app.launch import MAX_UPLOAD_MB
from ldm.app.mask_canvas import painted_mask
from ldm.app.results import words
from ldm.app.roots import adapter_name, loras, pipelines, short, upscalers
from ldm.config.schema import SOLVERS
from ldm.models.conditioning import MAX_NOISE_LEVEL
from ldm.sampling.options import Sampling
from ldm.sampling.pipeline import LatentDiffusion
from ldm.sampling.solvers import solver_name
from ldm.utils.errors import UserError

TEXT, IMAGE, INPAINT, ENLARGE = "Text to image", "Image to image", "Inpainting", "Enlarging"
MODES = {"generate": (TEXT, IMAGE, INPAINT), "inpaint": (INPAINT,), "upscale": (ENLARGE,)}
"""What can be done with a model, by its task."""
AS_SAVED = "as saved"
PAINT, MASK_FROM = "Paint", "generate-mask-from"
MODEL, PROMPT, LORAS, WORDS = "generate-model", "generate-prompt", "generate-loras", "generate-words"
"""Keys of the widgets that a run's result fills in."""
FOLDER, TASK, NEGATIVE, CLASS = "generate-folder", "generate-task", "generate-negative", "generate-class"
SOLVER, STEPS, GUIDANCE, SEED = "generate-solver", "generate-steps", "generate-guidance", "generate-seed"
SCALE, STRENGTH, NOISE, UPSCALER = "generate-scale", "generate-strength", "generate-noise", "generate-upscaler"
"""Keys of the others; with a folder, file or task behind those whose first value depends on it."""


def _adapters() -> Adapters:
    """The LoRAs that the visitor adds, each with its scale."""
    if not (files := [str(path) for path in loras()]):
        return ()
    chosen = st.multiselect("LoRAs", files, key=LORAS, format_func=adapter_label)
    return tuple((name, _scale(name)) for name in chosen)


def _scale(file: str) -> float:
    label, key = f"Scale of {adapter_label(file)}", initial(f"{SCALE}-{file}", 1.0)
    return float(st.slider(label, -1.0, 2.0, step=0.05, key=key))


def adapter_label(file: str) -> str:
    return adapter_name(Path(file))


def _words() -> tuple[str, ...]:
    """The files of learned words that the visitor adds; a prompt may then have them."""
    if not (files := [str(path) for path in words()]):
        return ()
    return tuple(st.multiselect("Learned words", files, key=WORDS, format_func=word_label))


def word_label(file: str) -> str:
    return short(Path(file).parents[1])


def chosen_settings(model: LatentDiffusion, folder: str) -> Settings | str:
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


def task_of(settings: Settings) -> str:
    if settings.enlarges:
        return ENLARGE
    return INPAINT if settings.mask else IMAGE if settings.image else TEXT


def fill_in(settings: Settings) -> None:
    """Fills the form with a picture's settings, except for its image and mask."""
    options, folder, task = settings.options, settings.model, task_of(settings)
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
