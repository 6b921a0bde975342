"""One picture from one set of settings, with the recipe that the commands use: no widgets here."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image

from ldm.app.inputs import decoded
from ldm.cli.img2img import fitting_size
from ldm.cli.recipe import weights_fingerprint
from ldm.cli.sampling_arguments import SAMPLING, UPSCALER
from ldm.data.crops import crop_resize
from ldm.data.images import to_pil
from ldm.sampling import png_metadata
from ldm.sampling.cascade import Cascade
from ldm.sampling.loop import Step
from ldm.sampling.options import Sampling
from ldm.sampling.pipeline import LatentDiffusion, SamplingRequest
from ldm.utils.errors import UserError
from ldm.utils.precision import DTYPES

Adapters = tuple[tuple[str, float], ...]
Preview = Callable[[int, int, Image.Image | None], None]
PREVIEW_SHARE = 0.2  # of the time, which pictures of the steps may take
MAX_ENLARGED = 4  # side of an enlarged image over that of training


@dataclass(frozen=True)
class Upload:
    """A file that someone brought."""

    name: str
    data: bytes = field(repr=False)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True)
class Settings:
    """All that decides a picture."""

    model: str
    prompt: str | None = None
    label: str | None = None
    seed: int = 0
    options: Sampling = field(default_factory=Sampling)
    loras: Adapters = ()
    embeddings: tuple[str, ...] = ()
    """Files of learned words."""
    image: Upload | None = None
    mask: Upload | None = None
    enlarges: bool = False
    """Whether the model is an upscaler."""
    upscaler: str | None = None
    """A second model, which enlarges what the first made from text."""

    @property
    def script(self) -> str:
        """The command that makes the same picture from its recipe."""
        if self.enlarges:
            return "upscale.py"
        return "inpaint.py" if self.mask else "img2img.py" if self.image else "txt2img.py"


@dataclass(frozen=True)
class Loaded:
    """A model that sessions share; its scheduler keeps a state, so one draws at a time."""

    model: LatentDiffusion
    weights: str
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, base: LatentDiffusion, loras: Adapters = (), embeddings: Sequence[str] = ()) -> Loaded:
        """A copy of a model of `read_base` with adapters and learned words, ready to draw as the commands do."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = copy.deepcopy(base).to(device).add_loras(*loras, option="LoRA").add_embeddings(*embeddings)
        weights = weights_fingerprint(model)
        return cls(model.optimize_for_inference(), weights)


def read_base(folder: str) -> LatentDiffusion:
    """A pipeline's folder as it was saved. Adapters are baked into copies, so it is read once, and kept off the GPU."""
    return LatentDiffusion.load(folder, "cpu", option="model")


def check_words(model: LatentDiffusion, settings: Settings) -> None:
    """UserError where the model would cut a prompt."""
    for name, prompt in {"Prompt": settings.prompt, "Negative prompt": str(settings.options.negative_prompt)}.items():
        if model.text and prompt and (unread := model.text.unread(prompt)):
            raise UserError(
                f"{name}: longer than the {model.text.length} tokens that the model reads; ignored would be "
                f"{unread!r}; shorten it"
            )


def request(model: LatentDiffusion, settings: Settings) -> SamplingRequest:
    """The library's request; UserError where an upload is no image, a prompt too long, or the model unable."""
    check_words(model, settings)
    return SamplingRequest(
        settings.prompt, settings.seed, settings.label, options=settings.options, **_images(model, settings)
    )


def _images(model: LatentDiffusion, settings: Settings) -> dict[str, Any]:
    """The uploads, at the size that the model draws."""
    if not settings.image:
        return {}
    image = decoded(settings.image.data, "image")
    if settings.enlarges:
        most = MAX_ENLARGED * model.side // model.upscale_factor
        if max(image.size) > most:
            width, height = image.size
            raise UserError(f"image: {width} × {height} pixels; give {most} × {most} at most, it is enlarged")
        return {"image": image}
    size = fitting_size(image.size, model)
    inputs = {"image": crop_resize(image, size)[0]}
    if settings.mask:
        mask = decoded(settings.mask.data, "mask", "black")
        if mask.size != image.size:
            (w, h), (width, height) = mask.size, image.size
            raise UserError(f"mask: {w} × {h} pixels, but the image has {width} × {height}; give one of its size")
        inputs["mask"] = crop_resize(mask, size)[0]
    return inputs


def draw(
    loaded: Loaded, settings: Settings, preview: Preview | None = None, upscaler: Loaded | None = None
) -> Image.Image:
    """The picture; `preview` gets the number of each step, of how many, and the image that the network predicts.

    That image is decoded at the first step, and then as often as it costs a small share of the time; else it is None.
    An `upscaler` enlarges the picture, with steps of its own.
    """
    models = [loaded.model, *([upscaler.model] if upscaler else [])]
    finished = 0  # models whose last step was shown
    began, spent = time.perf_counter(), 0.0

    def show(step: Step) -> None:
        nonlocal finished, spent
        now = time.perf_counter()
        if preview:
            due = spent <= PREVIEW_SHARE * (now - began)
            preview(step.number, step.total, to_pil(models[finished].autoencoder.decode(step.x0))[0] if due else None)
            spent += time.perf_counter() - now
        finished += step.number == step.total

    sampling = request(loaded.model, settings)
    with contextlib.ExitStack() as locks:
        for each in filter(None, (loaded, upscaler)):
            locks.enter_context(each.lock)
        if upscaler:
            check_words(upscaler.model, settings)
            options = upscaler_options(upscaler.model)
            return Cascade(loaded.model, upscaler.model, options).generate(sampling, 1, show)[0]
        return loaded.model.generate(sampling, 1, show)[0]


def upscaler_options(model: LatentDiffusion) -> Sampling:
    """The options of a cascade's second model: its defaults, by their values, as a recipe keeps them."""
    return Sampling(num_inference_steps=model.steps, guidance_scale=model.guidance)


def png(loaded: Loaded, settings: Settings, image: Image.Image, upscaler: Loaded | None = None) -> bytes:
    """The picture as a PNG with its recipe, from which `--again` of the command makes it anew."""
    model = loaded.model
    recipe: dict[str, Any] = {
        "script": settings.script,
        "weights": loaded.weights,
        "device": model.device.type,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "model": settings.model,
        "lora": settings.loras,
        "embedding": settings.embeddings,
        "precision": next(name for name, dtype in DTYPES.items() if dtype == model.unet.dtype),
        "compile": "no",
        "prompt": settings.prompt,
        "label": settings.label,
        "seed": settings.seed,
        "toward": None,
        "row": (0, 1),
        **{name: getattr(settings.options, key) for name, key in SAMPLING.items()},
    }
    for name, upload in (("image", settings.image), ("mask", settings.mask)):
        if upload:
            recipe |= {name: upload.name, f"{name}_sha256": upload.sha256}
    if settings.image and not settings.enlarges:
        recipe["size"] = image.size
    if upscaler:
        options = upscaler_options(upscaler.model)
        recipe |= {name: getattr(options, key) for name, key in UPSCALER.items()}
        recipe |= {"upscaler": settings.upscaler, "weights": f"{loaded.weights}+{upscaler.weights}"}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "image.png"
        png_metadata.save(image, path, recipe)
        return path.read_bytes()
