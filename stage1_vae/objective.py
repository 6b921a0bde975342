"""The autoencoder's objective, as `stage1` configures it: reconstruction, latents, alignment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ldm.config.schema import Stage1Config
from ldm.models import feature_networks
from stage1_vae import losses
from stage1_vae.alignment import Features
from stage1_vae.losses import Logs
from stage1_vae.model import Rebuilt, Reconstruction


class Objective:
    """Scalar losses of a forward pass, each with its parts by name. `side` is that of the images, in pixels."""

    def __init__(
        self, stage: Stage1Config, model: Reconstruction, features: Features | None, side: int, device: torch.device
    ):
        self.stage, self.model, self.features = stage, model, features
        self.lpips: Any = feature_networks.lpips(stage.lpips_net, side, device).net if stage.lpips else None
        measures: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
            "l1": F.l1_loss,
            "l2": F.mse_loss,
            "charbonnier": losses.charbonnier_loss,
            "gradient": losses.gradient_loss,
            "lpips": self._lpips,
        }
        self.measures = {name: measure for name, measure in measures.items() if getattr(stage, name)}

    def reconstruction(self, rebuilt: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, Logs]:
        """The weighted sum of `stage1`'s reconstruction losses, of `(N, 3, H, W)` each."""
        logs = {name: measure(rebuilt, target) for name, measure in self.measures.items()}
        error = torch.stack([getattr(self.stage, name) * value for name, value in logs.items()]).sum()
        if self.stage.learn_variance:
            error = losses.likelihood(error, self.model.logvar)
            logs["logvar"] = self.model.logvar
        return error, logs

    def add_latent_losses(
        self, error: torch.Tensor, rebuilt: Rebuilt, x: torch.Tensor, step: int
    ) -> tuple[torch.Tensor, Logs]:
        """`error` plus KL or VQ loss, and the latents' alignment with features of x `(N, 3, H, W)`."""
        penalty, logs = self._regularization(rebuilt, step)
        loss = error + penalty
        if self.features and self.stage.align and rebuilt.projected is not None:
            features = self.features.to(x)(x, *rebuilt.mean.shape[2:])
            logs["align"] = losses.alignment_loss(rebuilt.mean, rebuilt.projected, features)
            loss = loss + self.stage.align.weight * logs["align"]
        return loss, logs

    def _regularization(self, rebuilt: Rebuilt, step: int) -> tuple[torch.Tensor, Logs]:
        stage = self.stage
        if stage.train == "decoder":  # the encoder is frozen
            return rebuilt.mean.new_zeros(()), {}
        if rebuilt.codes is not None:
            vq = losses.vq_loss(rebuilt.mean, rebuilt.codes, stage.beta)
            return stage.commitment * vq, {"vq": vq}
        if stage.family == "kl":
            kl = losses.kl_loss(rebuilt.mean, rebuilt.logvar, stage.kl_free)
            return stage.kl * min(1.0, (step + 1) / max(1, stage.kl_warmup)) * kl, {"kl": kl}
        return rebuilt.mean.new_zeros(()), {}

    def _lpips(self, rebuilt: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Zhang et al., arXiv 1801.03924, eq. 1; not through torchmetrics' metric, which lets no gradient pass."""
        distance: torch.Tensor = self.lpips(rebuilt, target, normalize=False).mean()
        return distance
