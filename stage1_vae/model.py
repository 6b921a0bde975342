"""The autoencoder in training: one forward through encoder and decoder, so that DDP can wrap both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, VQModel
from diffusers.models.autoencoders.autoencoder_dc import DCUpBlock2d
from torch import nn

from ldm.config.schema import Stage1Config
from ldm.models.autoencoder import encode_posterior
from ldm.utils.rng import generator


class LatentTransform(NamedTuple):
    """A transform of images and latents alike: quarter turns, then the size to shrink to."""

    turns: int
    height: int  # in latents
    width: int

    def __call__(self, x: torch.Tensor, factor: int = 1) -> torch.Tensor:
        """`(N, C, h, w)` → `(N, C, height·factor, width·factor)`, turned."""
        size = (self.height * factor, self.width * factor)
        if x.shape[2:] != size:
            x = F.interpolate(x, size, mode="bicubic", antialias=True)
        return torch.rot90(x, self.turns, (2, 3))


def draw_transform(share: float, seed: int, step: int, height: int, width: int) -> LatentTransform | None:
    """For a `share` of the steps, a turn and a scale in [¼, 1] of latents `height` × `width`; for all processes alike.

    EQ-VAE, Kouzelis et al., arXiv 2502.09509, section 3: latents that turn and shrink with their image have less
    detail that only the decoder understands, and are easier to generate.
    """
    rng = generator(seed, "change", step)
    if rng.random() >= share:
        return None
    scale = rng.uniform(0.25, 1)
    return LatentTransform(int(rng.integers(4)), max(1, round(height * scale)), max(1, round(width * scale)))


class Rebuilt(NamedTuple):
    pixels: torch.Tensor  # (N, 3, H, W), transformed like the latents
    mean: torch.Tensor  # (N, C, h, w), of the encoder's posterior
    logvar: torch.Tensor
    codes: torch.Tensor | None  # (N, C, h, w): with VQ, the nearest code at each position
    chosen: torch.Tensor | None  # (N·h·w,): the codes' indices
    projected: torch.Tensor | None  # (N, D, h, w): as wide as the features that the latents are aligned to


class Reconstruction(nn.Module):
    """Encoder, latents, decoder, and the few parameters that only training has.

    With `stage.train: decoder` the encoder is frozen. `features`: channels of the features that latents are aligned to.
    """

    used: torch.Tensor  # (K,): how often each code was chosen since the last revival

    def __init__(self, vae: Any, stage: Stage1Config, features: int = 0):
        super().__init__()
        self.vae = vae
        self.frozen = stage.train == "decoder"
        for part in (vae.encoder, getattr(vae, "quant_conv", None), getattr(vae, "quantize", None)):
            if part is not None and self.frozen:
                part.requires_grad_(False)
        if stage.learn_variance:
            self.logvar = nn.Parameter(torch.zeros(()))
        if isinstance(vae, VQModel):
            self.register_buffer("used", torch.zeros(vae.config.num_vq_embeddings, dtype=torch.int64))
        if features:
            self.project = nn.Conv2d(vae.config.latent_channels, features, 1, bias=False)

    def forward(self, x: torch.Tensor, eps: torch.Tensor, transform: LatentTransform | None = None) -> Rebuilt:
        """x `(N, 3, H, W)` in [-1, 1], eps `(N, C, h, w)`."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            mean, logvar = encode_posterior(self.vae, x)
        projected = self.project(mean) if hasattr(self, "project") else None
        if isinstance(self.vae, VQModel):
            codes, chosen = quantise(mean, self.vae.quantize.embedding.weight)
            z = mean + (codes - mean).detach()  # the straight-through estimator, arXiv 1711.00937, section 3.2
            pixels = self.vae.decode(transform(z) if transform else z, force_not_quantize=True).sample
            return Rebuilt(pixels, mean, logvar, codes, chosen, projected)
        z = mean + (0.5 * logvar).exp() * eps  # the reparameterisation trick, arXiv 1312.6114, eq. 10
        pixels = self.vae.decode(transform(z) if transform else z).sample
        return Rebuilt(pixels, mean, logvar, None, None, projected)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weights of the decoder's last convolution."""
        decoder = self.vae.decoder
        layer = decoder.layers[-1] if isinstance(self.vae, AutoencoderTiny) else decoder.conv_out
        layer = layer.conv if isinstance(layer, DCUpBlock2d) else layer  # of an AutoencoderDC without blocks at the top
        weight: nn.Parameter = layer.weight
        return weight


def quantise(z: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest code at each position of z, `(N, C, h, w)`, and its index, `(N·h·w,)`; codebook `(K, C)`."""
    vectors = z.permute(0, 2, 3, 1)  # (N, h, w, C)
    chosen = torch.cdist(vectors.reshape(-1, z.shape[1]).float(), codebook.float()).argmin(1)
    return F.embedding(chosen, codebook).view(vectors.shape).permute(0, 3, 1, 2), chosen


@torch.no_grad()
def revive(
    model: Reconstruction,
    mean: torch.Tensor,
    seed: int,
    step: int,
    averages: Callable[[nn.Parameter], list[torch.Tensor]],
) -> int:
    """Replaces codes that were not chosen since the last call by random latents of this batch; returns how many.

    mean `(N, C, h, w)` is that of the global batch, the same in all processes. `averages` returns the moving averages
    of a parameter, which change with it. Dhariwal et al., arXiv 2005.00341, section 3.1.
    """
    codebook = model.vae.quantize.embedding.weight
    dead = (model.used == 0).nonzero().flatten()
    vectors = mean.permute(0, 2, 3, 1).reshape(-1, mean.shape[1])
    drawn = torch.from_numpy(generator(seed, "revive", step).integers(len(vectors), size=len(dead)))
    for target in (codebook, *averages(codebook)):
        target[dead] = vectors[drawn.to(vectors.device)].to(target.dtype)
    model.used.zero_()
    return len(dead)
