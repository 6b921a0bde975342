"""Trains the autoencoder: pictures in, `RUN/autoencoder` out."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn

from ldm.autoencoder import Autoencoder, build, fold, statistics
from ldm.data.index import Index
from ldm.data.order import normal
from ldm.data.samples import pictures, whole
from ldm.data.stream import Stream
from ldm.metrics.reconstruction import reconstruction
from ldm.run import Run
from ldm.schema import Config
from stage1_vae.losses import gradient_loss, kl_loss

STATISTICS = 16_384  # pictures, at most, that the latents' mean and deviation are measured on


class Reconstruction(nn.Module):
    """One forward through encoder and decoder, so that gradients of several processes meet in one place."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, x: torch.Tensor, eps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x `(N, 3, H, W)`, eps `(N, C, h, w)` → rebuilt picture, posterior's mean and log-variance."""
        posterior = self.vae.encode(x).latent_dist
        z = posterior.mean + posterior.std * eps  # the reparameterisation trick, arXiv 1312.6114, eq. 10
        return self.vae.decode(z).sample, posterior.mean, posterior.logvar


def train(config: Config, data: Index | Stream) -> None:
    """Trains an autoencoder on the pictures of split `train` and saves it with its latent statistics."""
    stage, seed, size = config.stage1, config.run.seed, config.data.size
    train_set = data.select("train")
    torch.manual_seed(seed)
    vae = build(stage.channels, stage.layers, stage.latent_channels, stage.groups, stage.mid_attention, size)
    run = Run(config.run, stage, "stage1", Reconstruction(vae), {"data": train_set.fingerprint()})

    for batch in run.batches(pictures(train_set, config, stage.batch), config.data.workers):
        with run.accumulate():
            x = batch["pixels"]
            latent = (stage.latent_channels, x.shape[2] // stage.factor, x.shape[3] // stage.factor)
            eps = normal(seed, "stage1", batch["position"], latent).to(run.device)
            rebuilt, mean, logvar = run.model(x, eps)
            l1, l2 = F.l1_loss(rebuilt, x), F.mse_loss(rebuilt, x)
            gradient, kl = gradient_loss(rebuilt, x), kl_loss(mean, logvar)
            loss = stage.l1 * l1 + stage.l2 * l2 + stage.gradient * gradient + stage.kl * kl
            run.backward(loss)
            run.update(loss=loss, l1=l1, l2=l2, gradient=gradient, kl=kl)

    if run.is_main:
        with run.averaged():
            mean, std = statistics(vae, whole(train_set.some(STATISTICS)))
            autoencoder = Autoencoder(fold(vae, mean, std))
        facts = evaluate(autoencoder, data)
        autoencoder.save(
            config.run.dir / "autoencoder",
            raw_mean=mean.tolist(), raw_std=std.tolist(), steps=run.step,
            **{"shards" if isinstance(data, Stream) else "pictures": len(train_set)}, **facts,
        )  # fmt: skip
    run.accelerator.wait_for_everyone()


def evaluate(autoencoder: Autoencoder, data: Index | Stream) -> dict[str, Any]:
    """PSNR and SSIM on the pictures that stage one never saw: each held-out split, and both together."""
    figures: dict[str, Any] = {}
    for name, splits in (
        ("reconstruction", ("reconstruction",)),
        ("combination", ("combination",)),
        ("held_out", ("reconstruction", "combination")),
    ):
        held = data.select(*splits)
        if len(held):
            parts = ((x, autoencoder.decode(autoencoder.encode(x)).cpu()) for x in whole(held))
            figures[name] = reconstruction(parts)
    if figures:
        print(f"stage1: held-out reconstruction {json.dumps(figures)}", flush=True)
    return figures
