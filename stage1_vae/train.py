"""Trains the autoencoder: pictures in, `RUN/autoencoder` out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn

from ldm.autoencoder import Autoencoder, build, fold, statistics
from ldm.config import Config
from ldm.data.images import Pictures, load
from ldm.data.order import normal
from ldm.data.sources import Record, fingerprint
from ldm.metrics.reconstruction import reconstruction
from ldm.run import Run
from stage1_vae.losses import gradient_loss, kl_loss


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


def train(config: Config, records: Sequence[Record]) -> None:
    """Trains an autoencoder on the records of split `train` and saves it with its latent statistics."""
    stage, seed, size = config.stage1, config.run.seed, config.data.size
    train_set = [record for record in records if record.split == "train"]
    torch.manual_seed(seed)
    vae = build(stage.channels, stage.layers, stage.latent_channels, stage.groups, stage.mid_attention, size)
    run = Run(config.run, stage, "stage1", Reconstruction(vae), {"data": fingerprint(train_set)})
    latent = (stage.latent_channels, size // stage.factor, size // stage.factor)

    for batch in run.batches(Pictures(train_set, size, seed), config.data.workers):
        with run.accumulate():
            x = batch["pixels"]
            eps = normal(seed, "stage1", batch["position"], latent).to(run.device)
            rebuilt, mean, logvar = run.model(x, eps)
            l1, l2 = F.l1_loss(rebuilt, x), F.mse_loss(rebuilt, x)
            gradient, kl = gradient_loss(rebuilt, x), kl_loss(mean, logvar)
            loss = stage.l1 * l1 + stage.l2 * l2 + stage.gradient * gradient + stage.kl * kl
            run.backward(loss)
            run.update(loss=loss, l1=l1, l2=l2, gradient=gradient, kl=kl)

    if run.is_main:
        with run.averaged():
            mean, std = statistics(vae, _batches(train_set, size))
            autoencoder = Autoencoder(fold(vae, mean, std))
        facts = evaluate(autoencoder, records, size)
        autoencoder.save(
            config.run.dir / "autoencoder",
            raw_mean=mean.tolist(), raw_std=std.tolist(), steps=run.step, pictures=len(train_set), **facts,
        )  # fmt: skip
    run.accelerator.wait_for_everyone()


def evaluate(autoencoder: Autoencoder, records: Sequence[Record], size: int) -> dict[str, Any]:
    """PSNR and SSIM on the pictures that stage one never saw: each held-out split, and both together."""
    figures: dict[str, Any] = {}
    rebuilt: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for split in ("reconstruction", "combination"):
        held = [record for record in records if record.split == split]
        if held:
            x = torch.cat(list(_batches(held, size)))
            rebuilt[split] = x, torch.cat([autoencoder.decode(autoencoder.encode(part)).cpu() for part in x.split(64)])
    for split, (x, y) in rebuilt.items():
        figures[split] = reconstruction(x, y)
    if rebuilt:
        x, y = (torch.cat(parts) for parts in zip(*rebuilt.values(), strict=True))
        figures["held_out"] = reconstruction(x, y)
        print(f"stage1: held-out reconstruction {json.dumps(figures)}", flush=True)
    return figures


def _batches(records: Sequence[Record], size: int, batch: int = 64) -> Iterator[torch.Tensor]:
    for start in range(0, len(records), batch):
        yield torch.stack([load(record.path, size) for record in records[start : start + batch]])
