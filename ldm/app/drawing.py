"""One picture from one set of settings, with the recipe that the commands use: no widgets here."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image

from ldm.app.inputs import decoded
from ldm.cli.img2img import fitting_size
from ldm.cli.recipe import weights_fingerprint
from ldm.cli.sampling_arguments import SAMPLING
from ldm.data.crops import crop_resize
from ldm.data.images import to_pil
from ldm.sampling import png_metadata
from ldm.sampling.loop import Step
from ldm.sampling.options import Sampling
from ldm.sampling.pipeline import LatentDiffusion, SamplingRequest
from ldm.utils.errors import UserError
from ldm.utils.precision import DTYPES

Adapters = tuple[tuple[str, float], ...]
Preview = Callable[[int, int, Image.Image], None]


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
    image: Upload | None = None
    mask: Upload | None = None

    @property
    def script(self) -> str:
        """The command that makes the same picture from its recipe."""
        return "inpaint.py" if self.mask else "img2img.py" if self.image else "txt2img.py"


@dataclass(frozen=True)
class Loaded:
    """A model that sessions share; its scheduler keeps a state, so one draws at a time."""

    model: LatentDiffusion
    weights: str
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def read(cls, folder: str, loras: Adapters) -> Loaded:
        """Loads a pipeline's folder with adapters, ready to draw as the commands do."""
        model = LatentDiffusion.load(folder, option="model").add_loras(*loras, option="LoRA")
        weights = weights_fingerprint(model)
        return cls(model.optimize_for_inference(), weights)


def request(model: LatentDiffusion, settings: Settings) -> SamplingRequest:
    """The library's request; UserError where an upload is no image, a prompt too long, or the model unable."""
    for name, prompt in {"Prompt": settings.prompt, "Negative prompt": str(settings.options.negative_prompt)}.items():
        if model.text and prompt and (unread := model.text.unread(prompt)):
            raise UserError(
                f"{name}: longer than the {model.text.length} tokens that the model reads; ignored would be "
                f"{unread!r}; shorten it"
            )
    inputs: dict[str, Any] = {}
    if settings.image:
        image = decoded(settings.image.data, "image")
        size = fitting_size(image.size, model)
        inputs["image"] = crop_resize(image, size)[0]
        if settings.mask:
            mask = decoded(settings.mask.data, "mask", "black")
            if mask.size != image.size:
                (w, h), (width, height) = mask.size, image.size
                raise UserError(f"mask: {w} × {h} pixels, but the image has {width} × {height}; give one of its size")
            inputs["mask"] = crop_resize(mask, size)[0]
    return SamplingRequest(settings.prompt, settings.seed, settings.label, options=settings.options, **inputs)


def draw(loaded: Loaded, settings: Settings, preview: Preview | None = None) -> Image.Image:
    """The picture; `preview` gets the number of each step, of how many, and the image that the network predicts."""
    model = loaded.model

    def show(step: Step) -> None:
        if preview:
            preview(step.number, step.total, to_pil(model.autoencoder.decode(step.x0))[0])

    sampling = request(model, settings)
    with loaded.lock:
        return model.generate(sampling, 1, show)[0]


def png(loaded: Loaded, settings: Settings, image: Image.Image) -> bytes:
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
            recipe |= {name: upload.name, f"{name}_sha256": upload.sha256, "size": image.size}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "image.png"
        png_metadata.save(image, path, recipe)
        return path.read_bytes()
