"""A model's work in pictures: what it predicts, how noise becomes an image, what steps and guidance do. No widgets."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image

from ldm.app.drawing import Loaded, Settings, request
from ldm.data.crops import crop_resize
from ldm.data.images import to_pil
from ldm.models.classifier import NoisyClassifier
from ldm.sampling.loop import Step
from ldm.sampling.predictions import Prediction, Predictions, predict_at_levels
from ldm.sampling.solvers import Level

SIDE = 256  # pixels of a picture, at most
LEVELS = 20
"""Noise levels at which predictions are shown."""
LATENT_RANGE = 3.0
"""Latents have a standard deviation of 1; colours show them within ± this."""
Progress = Callable[[float], object]
SOLVERS = {
    "ddpm": (
        "DDPM",
        r"x_{t-1} = \tilde\mu_t(x_t, \hat x_0) + \sqrt{\tilde\beta_t}\,z",
        "arXiv 2006.11239, eqs. 6, 7 and algorithm 2: fresh noise z in every step",
    ),
    "ddim": (
        "DDIM",
        r"x_s = \alpha_s\,\hat x_0 + \sigma_s\,\hat\varepsilon",
        "arXiv 2010.02502, eq. 12 with η = 0: no fresh noise",
    ),
    "dpm++": (
        "DPM-Solver++",
        r"\begin{aligned}x_s &= \tfrac{\sigma_s}{\sigma_t}\,x_t - \alpha_s\,(e^{-h} - 1)\,D \\"
        r"D &= (1 + \tfrac{1}{2r})\,\hat x_0 - \tfrac{1}{2r}\,\hat x_0^{\text{before}}\end{aligned}",
        "arXiv 2211.01095, algorithm 2: uses the prediction before, too",
    ),
}
"""The solvers that films show: name, the step from t to s < t, and its source."""
X0_FORMULAS = {
    "eps": (r"\hat x_0 = (x_t - \sigma\,\hat\varepsilon) / \alpha", "DDPM, arXiv 2006.11239, eq. 15"),
    "x0": (r"\hat x_0\ \text{is the output};\quad \hat\varepsilon = (x_t - \alpha\,\hat x_0) / \sigma", "DDPM, eq. 4"),
    "v": (
        r"\hat x_0 = \alpha\,x_t - \sigma\,\hat v,\quad \hat\varepsilon = \sigma\,x_t + \alpha\,\hat v",
        "Progressive distillation, arXiv 2202.00512, appendix D",
    ),
    "flow": (
        r"\hat x_0 = x_t - t\,\hat u,\quad \hat\varepsilon = x_t + (1 - t)\,\hat u",
        "Rectified flow, arXiv 2209.03003, eq. 1, solved for both ends",
    ),
}
"""x_0 and ε from the output of each prediction type, and the source."""


def latent_picture(latents: torch.Tensor) -> Image.Image:
    """Latents `(C, h, w)` as colours: the first three channels, or the first alone, within ±`LATENT_RANGE`."""
    channels = (latents[:3] if len(latents) >= 3 else latents[:1].expand(3, -1, -1)) / LATENT_RANGE
    picture = to_pil(channels[None].float().clamp(-1, 1))[0]
    return picture.resize((SIDE, SIDE), Image.Resampling.NEAREST)


def _decoded(loaded: Loaded, latents: list[torch.Tensor]) -> list[Image.Image]:
    """Latents, `(1, C, h, w)` each, decoded one by one, so that memory does not grow with their number."""
    pictures = []
    for latent in latents:
        (picture,) = to_pil(loaded.model.autoencoder.decode(latent))
        picture.thumbnail((SIDE, SIDE))
        pictures.append(picture)
    return pictures


@dataclass(frozen=True)
class Look:
    """What the network sees and predicts at one noise level."""

    level: Level
    x_t: Image.Image
    x0: Image.Image
    eps: Image.Image
    x0_error: float
    """Mean squared error of the predicted x_0, in latents."""
    eps_error: float


@dataclass(frozen=True)
class Looks:
    """An image's true noise and reconstruction, and a look at every level, the cleanest first."""

    x0: Image.Image
    eps: Image.Image
    at: list[Look]


def looks(loaded: Loaded, settings: Settings, image: Image.Image) -> Looks:
    """The predictions for an image at `LEVELS` noise levels; the settings' steps and solver have no effect."""
    model = loaded.model
    options = replace(settings.options, solver="ddim", num_inference_steps=LEVELS)
    square = crop_resize(image, (model.side, model.side))[0]
    with loaded.lock, torch.no_grad():
        found = predict_at_levels(model, replace(request(model, replace(settings, options=options)), image=square))
        at = [_look(loaded, prediction, found) for prediction in reversed(found.at)]
        return Looks(_decoded(loaded, [found.x0])[0], latent_picture(found.eps[0]), at)


def _look(loaded: Loaded, prediction: Prediction, truth: Predictions) -> Look:
    x_t, x0 = _decoded(loaded, [prediction.x_t, prediction.x0])
    errors = [prediction.x0 - truth.x0, prediction.eps - truth.eps]
    x0_error, eps_error = (float(error.square().mean()) for error in errors)
    return Look(prediction.level, x_t, x0, latent_picture(prediction.eps[0]), x0_error, eps_error)


@dataclass(frozen=True)
class Film:
    """The steps from noise to an image: frame i shows the state before step i, the last one the image."""

    x_t: list[Image.Image]
    x0: list[Image.Image]
    """What the network predicts from each x_t."""
    seconds: float
    """Of the sampling, without the decoding of frames."""

    def frame(self, share: float) -> int:
        """The number of the frame at a share, in [0, 1], of the way."""
        return round(share * (len(self.x_t) - 1))


def film(loaded: Loaded, settings: Settings, progress: Progress) -> Film:
    """Draws a picture and keeps every step; `progress` gets shares in [0, 1]."""
    steps: list[Step] = []

    def show(step: Step) -> None:
        steps.append(step)
        progress(step.number / step.total)

    with loaded.lock:
        before = time.perf_counter()
        (image,) = loaded.model.generate(request(loaded.model, settings), 1, show)
        seconds = time.perf_counter() - before
        x_t = _decoded(loaded, [step.x_t for step in steps])
        x0 = _decoded(loaded, [step.x0 for step in steps])
    image.thumbnail((SIDE, SIDE))
    return Film([*x_t, image], [*x0, image], seconds)


def timed(loaded: Loaded, settings: Settings) -> tuple[Image.Image, float]:
    """A picture, and the seconds that it took."""
    with loaded.lock:
        sampling = request(loaded.model, settings)
        if loaded.model.text and settings.prompt:
            loaded.model.embedded([settings.prompt, ""])  # encoded once for all, so that no picture pays for it
        before = time.perf_counter()
        (image,) = loaded.model.generate(sampling, 1)
        seconds = time.perf_counter() - before
    image.thumbnail((SIDE, SIDE))
    return image, seconds


def guidance_row(
    loaded: Loaded, settings: Settings, scales: Sequence[float], classifier: NoisyClassifier | None = None
) -> list[Image.Image]:
    """The same noise at each scale of classifier-free guidance, or, where there is a `classifier`, of its guidance."""
    pictures = []
    for scale in scales:
        scaled: dict[str, object] = {"guidance_scale": scale}
        if classifier:  # at scale 0 it has no effect, yet its class must be known
            scaled = {"guidance_scale": 1.0, "classifier": classifier, "classifier_scale": scale}
        options = replace(settings.options, **scaled)  # type: ignore[arg-type]
        with loaded.lock:
            (image,) = loaded.model.generate(request(loaded.model, replace(settings, options=options)), 1)
        image.thumbnail((SIDE, SIDE))
        pictures.append(image)
    return pictures
