"""Three families of generative models, each small enough to read: a GAN, a VAE, a latent diffusion model.

Each trains on images `(N, 3, S, S)` in [-1, 1] for a number of steps, and returns what draws from it. GAN and VAE draw
with the same network, from noise `(N, 64)`. Random numbers follow from the seed and the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ldm.config import loader
from ldm.config.schema import Config
from ldm.data import index
from ldm.diffusion import likelihood
from ldm.models import autoencoder
from ldm.models.conditioning import Condition, predict
from ldm.sampling.pipeline import LatentDiffusion
from ldm.training.diffusion_process import diffusion_process
from ldm.training.progress import ProgressBar
from ldm.training.run_dir import prepare_run_dir
from ldm.utils.rng import generator, normal
from stage1_vae import losses
from stage1_vae.augment import augment
from stage1_vae.discriminator import PatchDiscriminator
from stage1_vae.train import train as train_autoencoder
from stage2_diffusion.train import train as train_unet

Steps = Mapping[str, int]
NOISE = 64  # dimensions of the GAN's noise and of the VAE's code
BATCH = 32
EMA_DECAY = 0.995  # of the averaged weights, which draw
R1_EVERY = 8  # steps of the GAN
ODE_STEPS = 25  # of Heun, for the density of the diffusion model


class Images(NamedTuple):
    """What is trained on."""

    pixels: torch.Tensor
    """`(N, 3, S, S)` in [-1, 1]."""
    folder: Path
    """The same images as files, and no others."""


class Trained(NamedTuple):
    """A trained model."""

    parameters: int
    """All that were trained, discriminator and encoder included."""
    draw: Callable[[range], torch.Tensor]
    """Numbers of images → the images `(N, 3, S, S)`, roughly in [-1, 1]; each has its own noise."""
    bits: Callable[[torch.Tensor, torch.Tensor], float] | None
    """Mean upper bound on −log2 p(x) of held-out 8-bit images, per value of a pixel. The second argument are further
    held-out images, which may set what the bound needs besides weights. None: there is no bound."""


class Family(NamedTuple):
    label: str
    parts: Mapping[str, float]
    """What has steps of its own, with its share of the family's time."""
    train: Callable[[Images, Steps, int, Path], Trained]
    """Of images, steps of each part, a seed, and a new folder to write to."""


def image_network(size: int, outputs: int, width: int = 24) -> nn.Sequential:
    """`(N, 64)` → `(N, outputs, size, size)`: a linear layer to 4 × 4, then doublings, each with a convolution."""
    levels = int(math.log2(size // 4))
    widths = [width * min(4, 2 ** (levels - i)) for i in range(levels + 1)]
    parts: list[nn.Module] = [nn.Linear(NOISE, 16 * widths[0]), nn.Unflatten(1, (widths[0], 4, 4))]
    for wide, narrow in pairwise(widths):
        parts += [
            nn.Upsample(scale_factor=2),
            nn.Conv2d(wide, narrow, 3, padding=1),
            nn.GroupNorm(8, narrow),
            nn.SiLU(),
        ]
    return nn.Sequential(*parts, nn.Conv2d(widths[-1], outputs, 3, padding=1))


def batches(images: torch.Tensor, steps: int, seed: int, title: str) -> Iterator[tuple[int, torch.Tensor]]:
    """Step and batch `(32, 3, S, S)`; which images it has follows from seed and step."""
    bar = ProgressBar(title, 0, steps, BATCH, hidden=False)
    for step in range(steps):
        yield step, images[generator(seed, "batch", step).integers(len(images), size=BATCH)]
        bar.advance()
    bar.close()


def adam(network: nn.Module, lr: float, betas: tuple[float, float], steps: int) -> tuple[Any, Any]:
    """Adam, and the schedule that lets its learning rate fall to 0 with a cosine."""
    optimizer = torch.optim.Adam(network.parameters(), lr, betas)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


@torch.no_grad()
def average(averaged: nn.Module, network: nn.Module, step: int) -> None:
    """Moves the average towards the network: the plain mean at first, then exponential."""
    for a, b in zip(averaged.parameters(), network.parameters(), strict=True):
        a.lerp_(b, max(1 - EMA_DECAY, 1 / (step + 1)))


def count(*networks: nn.Module) -> int:
    return sum(p.numel() for network in networks for p in network.parameters())


# ---------------------------------------------------------------------------------------------------------------- GAN


def discriminator_loss(
    discriminator: nn.Module, real: torch.Tensor, fake: torch.Tensor, gamma: float = 0.0
) -> torch.Tensor:
    """−½ E log D(x) − ½ E log(1 − D(G(z))) + γ/2 E‖∇D(x)‖², of logits whose mean over an image's patches is D.

    Goodfellow et al., arXiv 1406.2661, eq. 1, halved; R1 of Mescheder et al., arXiv 1801.04406, eq. 9.
    """
    real = real.detach().requires_grad_(gamma > 0)
    of_real, of_fake = discriminator(real), discriminator(fake.detach())
    loss = losses.discriminator_loss(of_real, of_fake, "non_saturating")
    if gamma:
        per_pixel = losses.r1_penalty(of_real.flatten(1).mean(1), real)  # ½ E‖∇D‖² / (3·S·S)
        loss = loss + gamma * real[0].numel() * per_pixel
    return loss


def train_gan(images: Images, steps: Steps, seed: int, folder: Path) -> Trained:
    """Non-saturating, with R1 and differentiable augmentation (arXiv 2006.10738)."""
    torch.manual_seed(seed)
    size = images.pixels.shape[-1]
    network = image_network(size, 3)
    patch_layers = max(1, int(math.log2(size)) - 3)  # a patch is as large as the image: 34 pixels of 32, 70 of 64
    discriminator = PatchDiscriminator(32, patch_layers)
    averaged = deepcopy(network)
    betas = (0.0, 0.99)  # without momentum, as in arXiv 1801.04406
    generator_step, generator_decay = adam(network, 1e-3, betas, steps["gan"])
    discriminator_step, discriminator_decay = adam(discriminator, 1e-3, betas, steps["gan"])
    for step, real in batches(images.pixels, steps["gan"], seed, "GAN"):
        positions = torch.arange(step * BATCH, (step + 1) * BATCH)
        fake = network(normal(seed, "gan", positions.tolist(), (NOISE,))).tanh()
        seen_real, seen_fake = (augment(x, ("color", "translation"), seed, positions) for x in (real, fake))

        gamma = 0.5 * R1_EVERY if step % R1_EVERY == 0 else 0.0  # lazily, arXiv 1912.04958, section 3.1
        loss = discriminator_loss(discriminator, seen_real, seen_fake, gamma)
        discriminator_step.zero_grad()
        loss.backward()
        discriminator_step.step()

        # −E log D(G(z)): Goodfellow et al., section 3
        loss = losses.generator_loss(discriminator(seen_fake), "non_saturating")
        generator_step.zero_grad()
        loss.backward()
        generator_step.step()
        average(averaged, network, step)
        generator_decay.step()
        discriminator_decay.step()

    @torch.no_grad()
    def draw(numbers: range) -> torch.Tensor:
        return averaged(normal(seed, "drawn", numbers, (NOISE,))).tanh()  # type: ignore[no-any-return]

    return Trained(count(network, discriminator), draw, None)


# ---------------------------------------------------------------------------------------------------------------- VAE


class VAE(nn.Module):
    """q(z|x) is a Gaussian of 64 dimensions; p(x|z) one about an image, with a learned variance for each colour.

    A learned variance weighs the ELBO's terms, as σ-VAE, arXiv 2006.13202; 8-bit values are its bins, DDPM, eq. 13.
    """

    def __init__(self, size: int, width: int = 24):
        super().__init__()
        levels = int(math.log2(size // 4))
        widths = [3, *(width * min(4, 2**i) for i in range(1, levels + 1))]
        layers: list[nn.Module] = []
        for narrow, wide in pairwise(widths):
            layers += [nn.Conv2d(narrow, wide, 4, 2, 1), nn.GroupNorm(8, wide), nn.SiLU()]
        self.encoder = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * widths[-1], 2 * NOISE))
        self.decoder = image_network(size, 3, width)
        self.log_variance = nn.Parameter(torch.zeros(3, 1, 1))

    def negative_elbo(self, x: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        """−ELBO of 8-bit images x `(N, 3, S, S)`, with ε `(N, 64)`, in bits per value of a pixel: `(N,)`."""
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        # Kingma & Welling, arXiv 1312.6114, eq. 10: −KL(q(z|x) ‖ N(0, 1)) + log p(x|z), z = μ + σ·ε
        z = mean + (0.5 * log_variance).exp() * eps
        standard = torch.zeros(())
        kl = likelihood.gaussian_kl(mean, log_variance, standard, standard).sum(1)
        nll = likelihood.discrete_nll(x, self.decoder(z), self.log_variance).flatten(1).sum(1)
        return (nll + kl) / (x[0].numel() * math.log(2))


def train_vae(images: Images, steps: Steps, seed: int, folder: Path) -> Trained:
    """A VAE, which draws the mean of p(x|z) for z from the prior N(0, 1)."""
    torch.manual_seed(seed)
    vae = VAE(images.pixels.shape[-1])
    averaged = deepcopy(vae)
    optimizer, decay = adam(vae, 2e-3, (0.9, 0.99), steps["vae"])
    for step, x in batches(images.pixels, steps["vae"], seed, "VAE"):
        eps = normal(seed, "vae", range(step * BATCH, (step + 1) * BATCH), (NOISE,))
        loss = vae.negative_elbo(x, eps).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average(averaged, vae, step)
        decay.step()

    @torch.no_grad()
    def draw(numbers: range) -> torch.Tensor:
        return averaged.decoder(normal(seed, "drawn", numbers, (NOISE,)))  # type: ignore[no-any-return]

    @torch.no_grad()
    def bits(x: torch.Tensor, _: torch.Tensor) -> float:
        return float(averaged.negative_elbo(x, normal(0, "bits", range(len(x)), (NOISE,))).mean())

    return Trained(count(vae), draw, bits)


# --------------------------------------------------------------------------------------------- latent diffusion model


def ldm_config(images: Images, steps: Steps, seed: int, folder: Path) -> Config:
    """An unconditional model of the project's two stages: 4 pixels a latent, a flow, DPM-Solver++ in 25 steps."""
    never, size = 10**9, images.pixels.shape[-1]
    training = {"lr": 2e-3, "lr_warmup_steps": 20, "lr_scheduler": "cosine", "ema_decay": EMA_DECAY}
    training |= {"checkpoint_every": never, "evaluate_every": never, "evaluate_images": 8, "norm_num_groups": 8}
    tree = {
        "run": {"dir": folder, "seed": seed, "device": "cpu", "precision": "no", "tracker": "none", "log_every": 50},
        "data": {"source": {"path": images.folder, "kind": "images"}, "size": size, "latents": "mean"},
        "stage1": training
        | {"channels": [16, 32, 64], "layers": 1, "latent_channels": 4, "mid_attention": False, "batch": 16}
        | {"steps": steps["autoencoder"], "l1": 1.0, "l2": 3.0, "gradient": 0.3, "kl": 1e-4},
        "stage2": training
        | {"conditions": [], "channels": [32, 64], "layers": 1, "attention": [False, True], "attention_head_dim": 16}
        | {"prediction_type": "flow", "steps": steps["unet"], "batch": 64},
        "sample": {"steps": 25, "solver": "dpm++", "guidance": 1.0, "every": never},
    }
    return loader.parse(tree, "the latent diffusion model")


def train_ldm(images: Images, steps: Steps, seed: int, folder: Path) -> Trained:
    """Stage one, then stage two, as train_ldm.py has them; `folder` becomes a run."""
    config = prepare_run_dir(ldm_config(images, steps, seed, folder))
    data = index.build(config.data, config.cache_dir, config.stage2.conditions)
    train_autoencoder(config, data)
    train_unet(config, data, autoencoder.load(folder / "autoencoder"), None)
    model = LatentDiffusion.load(folder / "pipeline", "cpu")

    def draw(numbers: range) -> torch.Tensor:
        return model.autoencoder.decode(model.latents(None, [seed * 10**6 + n for n in numbers]))

    return Trained(count(model.autoencoder.vae, model.unet), draw, lambda x, more: ldm_bits(config, model, x, more))


@torch.no_grad()
def ldm_bits(config: Config, model: LatentDiffusion, x: torch.Tensor, more: torch.Tensor) -> float:
    """Vahdat et al., arXiv 2106.05931, eq. 1, with the density of the flow's ODE (arXiv 2011.13456, appendix D.2).

    The variance of the decoder is its mean squared error on `more` images.
    """
    mean, log_variance = model.autoencoder.moments(x)
    z = mean + (0.5 * log_variance).exp() * normal(0, "bits", range(len(x)), mean.shape[1:])
    error = float((model.autoencoder.decode(model.autoencoder.encode(more)) - more).square().mean())
    process = diffusion_process(config.stage2)
    probes = torch.stack([normal(i, "probe", range(len(z)), z.shape[1:]).sign() for i in range(1)])

    def denoise(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return predict(model.unet, x_t, process.model_time(t).to(x_t), Condition())

    log_p = likelihood.log_density(process, denoise, z, ODE_STEPS, probes)
    rebuilt, latent_nats = model.autoencoder.decode(z), -log_p / z[0].numel()
    return float(likelihood.through_autoencoder(latent_nats, log_variance, x, rebuilt, error).mean())


FAMILIES = {
    "gan": Family("GAN", {"gan": 1.0}, train_gan),
    "vae": Family("VAE", {"vae": 1.0}, train_vae),
    "ldm": Family("latent diffusion model", {"autoencoder": 0.3, "unet": 0.7}, train_ldm),
}
