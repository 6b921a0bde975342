"""What an image is made from besides noise, and how a U-Net of diffusers is told of it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ldm.diffusion.schedules import betas

NUM_NOISE_LEVELS = 1000  # noise levels of a small image that the U-Net can be told
NOISIEST = 350  # of them in training, as Stable Diffusion's upscaler


class Condition(NamedTuple):
    """What a batch of N is conditioned on; None where the model has no such input."""

    text: torch.Tensor | None = None
    """`(N, T, D)`: captions' token states."""
    label: torch.Tensor | None = None
    """`(N,)` int64: the class, or, for super-resolution, the small image's noise level."""
    sizes: torch.Tensor | None = None
    """`(N, 6)`: original height and width, the crop's top and left, height and width, in pixels; SDXL's order."""
    image: torch.Tensor | None = None
    """`(N, C, h, w)`: stands beside x_t in the U-Net's input."""
    guidance: torch.Tensor | None = None
    """`(N,)`: the scale of guidance that a distilled U-Net answers with by itself."""

    def to(self, dtype: torch.dtype) -> Condition:
        """The same with text and image in the precision of a network; numbers that become sinusoids keep theirs."""
        text, image = (None if each is None else each.to(dtype) for each in (self.text, self.image))
        return self._replace(text=text, image=image)

    def of(self, *others: Condition) -> Condition:
        """The batch of this condition and others, one after the other."""
        parts = zip(self, *others, strict=True)
        return Condition(*(None if several[0] is None else torch.cat(several) for several in parts))


def predict(unet: Any, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
    """The output of diffusers' UNet2DConditionModel or UNet2DModel for x `(N, C, h, w)` at times t, `(N,)` or one."""
    given: dict[str, Any] = {}
    if condition.text is not None:
        given["encoder_hidden_states"] = condition.text
    if condition.label is not None:
        given["class_labels"] = condition.label
    if condition.guidance is not None:
        width = unet.config.time_cond_proj_dim
        given["timestep_cond"] = guidance_embedding(condition.guidance, width).to(x.dtype)
    if condition.sizes is not None:
        assert condition.text is not None, "the configuration allows sizes beside text alone"
        wanted = unet.config.projection_class_embeddings_input_dim
        ids = 6 * unet.config.addition_time_embed_dim
        pooled = condition.text.mean(1) if wanted > ids else condition.text[:, 0, :0]
        given["added_cond_kwargs"] = {"time_ids": condition.sizes, "text_embeds": pooled}
    if condition.image is not None:
        x = torch.cat([x, condition.image], dim=1)
    return unet(x, t, **given, return_dict=False)[0]  # type: ignore[no-any-return]


def guidance_embedding(scale: torch.Tensor, width: int) -> torch.Tensor:
    """Scales of guidance `(N,)` as a distilled U-Net is told them, `(N, width)`; arXiv 2210.03142, section 3.1.

    Sinusoids of scale − 1, as diffusers' pipelines compute them.
    """
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=scale.device) * (-math.log(10_000) / (half - 1)))
    angles = (scale.float() - 1)[:, None] * 1000 * frequencies
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))


def mask_and_masked_latents(mask: torch.Tensor, masked_latents: torch.Tensor) -> torch.Tensor:
    """The inpainting model's input beside x_t, `(N, 1 + C, h, w)`, in the order of diffusers' pipeline.

    mask `(N, 1, H, W)`, 1 where the image is to be made; the latents `(N, C, h, w)` are those of the image with
    grey, 0, in the hole.
    """
    return torch.cat([F.interpolate(mask, masked_latents.shape[2:]), masked_latents], dim=1)


def downsample(pixels: torch.Tensor, factor: int) -> torch.Tensor:
    """Images `(N, 3, H, W)` shrunk `factor`-fold, each pixel the mean of those that it stands for."""
    return F.avg_pool2d(pixels, factor)


def noise_augmented(image: torch.Tensor, noise: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """A small image with noise of a level `(N,)` in [0, 1000): what the upscaler is given (arXiv 2106.15282)."""
    alpha_bar = (1 - betas("scaled_linear")).cumprod(0).to(level.device)[level].float()[:, None, None, None]
    return alpha_bar.sqrt() * image + (1 - alpha_bar).sqrt() * noise
