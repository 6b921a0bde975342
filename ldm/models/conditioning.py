"""What a U-Net is conditioned on, and how diffusers' U-Nets take it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ldm.diffusion.schedules import TIMESTEPS, chain
from ldm.utils.precision import placement

NUM_NOISE_LEVELS = 1000  # of an upscaler's low-resolution input, as its U-Net's class embedding knows them
MAX_NOISE_LEVEL = 350  # training uses the levels below it, as Stable Diffusion's upscaler does


@dataclass(frozen=True)
class TextEmbedding:
    """What a U-Net reads of N texts."""

    states: torch.Tensor
    """`(N, T, D)`: the states of their tokens, for cross-attention."""
    pooled: torch.Tensor | None = None
    """`(N, P)`: one embedding of each text, which is added to that of the time; None where the encoder has none."""

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> TextEmbedding:
        """`function` of both tensors."""
        return TextEmbedding(function(self.states), None if self.pooled is None else function(self.pooled))

    def lerp(self, end: TextEmbedding, weight: torch.Tensor) -> TextEmbedding:
        """Texts in between: at weight 0 of `(N,)` this one, at 1 the `end`, which has N texts or one."""

        def between(start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
            return start + weight.reshape(-1, *[1] * (start.dim() - 1)) * (end - start)

        pooled = None if self.pooled is None or end.pooled is None else between(self.pooled, end.pooled)
        return TextEmbedding(between(self.states, end.states), pooled)

    @staticmethod
    def cat(parts: Sequence[TextEmbedding]) -> TextEmbedding:
        """All texts of `parts`, which come from one encoder."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return TextEmbedding(torch.cat([part.states for part in parts]), torch.cat(pooled) if pooled else None)


class Condition(NamedTuple):
    """What a batch of N is conditioned on; None for inputs that the model does not have."""

    text: torch.Tensor | None = None
    """`(N, T, D)`: captions' token states."""
    label: torch.Tensor | None = None
    """`(N,)` int64: the class, or, for an upscaler, the noise level of the low-resolution image."""
    sizes: torch.Tensor | None = None
    """`(N, 6)`: original height and width, the crop's top and left, height and width, in pixels; SDXL's order."""
    image: torch.Tensor | None = None
    """`(N, C, h, w)`: concatenated to x_t."""
    guidance: torch.Tensor | None = None
    """`(N,)`: the guidance scale of a guidance-distilled U-Net."""
    pooled: torch.Tensor | None = None
    """`(N, P)`: one embedding of each caption, where the text encoder has them."""

    def to(self, dtype: torch.dtype) -> Condition:
        """The same with texts and image in `dtype`; numbers that become sinusoids keep their precision."""
        names = ("text", "pooled", "image")
        tensors = {name: tensor.to(dtype) for name in names if (tensor := getattr(self, name)) is not None}
        return self._replace(**tensors)

    def with_text(self, embedding: TextEmbedding) -> Condition:
        return self._replace(text=embedding.states, pooled=embedding.pooled)

    def of(self, *others: Condition) -> Condition:
        """This condition and others, concatenated along the batch."""
        fields = zip(self, *others, strict=True)
        return Condition(*(None if tensors[0] is None else torch.cat(tensors) for tensors in fields))


def reads_pooled(unet: Any) -> bool:
    """Whether a U-Net with size conditions reads the text's pooled embedding too, not sizes alone."""
    config = unet.config
    sizes = getattr(config, "addition_embed_type", None) == "text_time"
    return sizes and config.projection_class_embeddings_input_dim > 6 * config.addition_time_embed_dim


def predict(unet: Any, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
    """The output of diffusers' UNet2DConditionModel or UNet2DModel for x `(N, C, h, w)` at t, `(N,)` or a scalar.

    It is in the U-Net's own precision.
    """
    _, dtype = placement(unet)
    if dtype != torch.float32:
        x, condition = x.to(dtype), condition.to(dtype)
    inputs: dict[str, Any] = {}
    if condition.text is not None:
        inputs["encoder_hidden_states"] = condition.text
    if condition.label is not None:
        inputs["class_labels"] = condition.label
    if condition.guidance is not None:
        width = unet.config.time_cond_proj_dim
        inputs["timestep_cond"] = guidance_embedding(condition.guidance, width).to(x.dtype)
    if condition.sizes is not None:
        assert condition.text is not None, "the configuration allows sizes only with text"
        pooled = condition.text.mean(1) if condition.pooled is None else condition.pooled
        if not reads_pooled(unet):
            pooled = pooled[:, :0]
        inputs["added_cond_kwargs"] = {"time_ids": condition.sizes, "text_embeds": pooled}
    if condition.image is not None:
        x = torch.cat([x, condition.image], dim=1)
    return unet(x, t, **inputs, return_dict=False)[0]  # type: ignore[no-any-return]


def guidance_embedding(scale: torch.Tensor, width: int) -> torch.Tensor:
    """The embedding `(N, width)` of guidance scales `(N,)` for a distilled U-Net; arXiv 2210.03142, section 3.1.

    Sinusoids of scale − 1, as diffusers' pipelines compute them.
    """
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=scale.device) * (-math.log(10_000) / (half - 1)))
    angles = (scale.float() - 1)[:, None] * 1000 * frequencies
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))


def mask_and_masked_latents(mask: torch.Tensor, masked_latents: torch.Tensor) -> torch.Tensor:
    """What an inpainting model's input has after x_t, `(N, 1 + C, h, w)`, in the order of diffusers' pipeline.

    `mask` `(N, 1, H, W)` is 1 where to generate; `masked_latents` `(N, C, h, w)` are those of the image with grey, 0,
    inside the mask.
    """
    return torch.cat([F.interpolate(mask, masked_latents.shape[2:]), masked_latents], dim=1)


def downsample(pixels: torch.Tensor, factor: int) -> torch.Tensor:
    """Images `(N, 3, H, W)` at 1/`factor` of their side, by averaging pixels."""
    return F.avg_pool2d(pixels, factor)


def noise_augmented(image: torch.Tensor, noise: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """An upscaler's input: a low-resolution image with noise of `level` `(N,)` in [0, 1000); arXiv 2106.15282."""
    table = chain("scaled_linear", TIMESTEPS, False, 1.0, level.device).alpha_bar
    alpha_bar = table[level].float()[:, None, None, None]
    return alpha_bar.sqrt() * image + (1 - alpha_bar).sqrt() * noise
