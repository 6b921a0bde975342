"""The denoising objective, as `stage2` configures it: noise, timesteps, losses."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from ldm.config.schema import Stage2Config
from ldm.data.dataset import Item
from ldm.diffusion import schedules
from ldm.diffusion.losses import bound_integrand, hybrid_loss, pixel_weights, training_loss
from ldm.diffusion.process import offset_noise, perturbed
from ldm.diffusion.schedules import LearnedSchedule, lower_variance
from ldm.training.diffusion_process import diffusion_process
from stage2_diffusion.denoiser import Denoiser


class LearnedProcess:
    """The forward process of a learned schedule; its timesteps are log-SNRs `(N,)`, which carry gradients to it."""

    def __init__(self, schedule: LearnedSchedule, timesteps: int):
        self.schedule, self.timesteps = schedule, timesteps

    def time(self, u: torch.Tensor) -> torch.Tensor:
        log_snr, self.slope = self.schedule.draw(u)
        return log_snr

    def add_noise(self, x0: torch.Tensor, eps: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
        alpha, sigma = schedules.alpha_sigma(log_snr)
        return alpha * x0 + sigma * eps

    def model_time(self, log_snr: torch.Tensor) -> torch.Tensor:
        return self.schedule.chain_time(log_snr, self.timesteps)


class Objective:
    """The noise and the timesteps of batches, which have what `NoiseDraws` draws, and their losses.

    `decoder` is that of the variational bound which trains a learned variance: `discrete` for pixels, `gaussian` for
    latents.
    """

    def __init__(self, stage: Stage2Config, model: Denoiser, decoder: str = "gaussian"):
        self.stage, self.model, self.decoder = stage, model, decoder
        self.process = diffusion_process(stage)
        self.noising = LearnedProcess(model.schedule, stage.timesteps) if model.schedule else self.process
        self._recorded: list[tuple[torch.Tensor, ...]] = []

    def noise(self, batch: Item) -> tuple[torch.Tensor, torch.Tensor]:
        """The noise to predict, and the one in x_t, which input perturbation makes another, `(N, C, h, w)` each."""
        stage, eps = self.stage, batch["noise"]
        if stage.noise_offset:
            eps = offset_noise(eps, batch["noise_offset"], stage.noise_offset)
        if not stage.input_perturbation:
            return eps, eps
        return eps, perturbed(eps, batch["perturbation"], stage.input_perturbation)

    def timesteps(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float]:
        """The timesteps `(N,)` of uniform numbers u `(N,)`, and the importance weights of their losses.

        The weights are 1 where timesteps are not drawn by loss.
        """
        return self.model.times.draw(u) if self.model.times else (self.noising.time(u), 1.0)

    def losses(
        self,
        output: torch.Tensor,
        x0: torch.Tensor,
        x_t: torch.Tensor,
        eps: torch.Tensor,
        t: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`(N,)` of outputs `(N, C, h, w)`, or 2C where the variance is learned, at timesteps t `(N,)`.

        A mask, `(N, 1, h, w)` in [0, 1], weighs the loss of single pixels.
        """
        stage = self.stage
        weight = None if mask is None else pixel_weights(mask, stage.unmasked_weight)
        if isinstance(self.noising, LearnedProcess):
            losses = bound_integrand(output.float(), eps, self.noising.slope, weight)
            lower_variance(losses, t, self.noising.slope)
            return losses
        if stage.variance == "learned":
            return hybrid_loss(self.process, output.float(), x0, x_t, eps, t, stage.vlb_weight, self.decoder, weight)
        if self.model.uncertainty:
            plain = training_loss(self.process, output, x0, eps, t, stage.loss, pixel_weight=weight)
            return self.model.uncertainty.weighted(plain, self.process.log_snr(t))
        options = {"gamma": stage.weight_gamma} if stage.weight_gamma else {}
        return training_loss(self.process, output, x0, eps, t, stage.loss, stage.loss_weighting, weight, **options)

    def record_losses(self, n: torch.Tensor, t: torch.Tensor, losses: torch.Tensor, accelerator: Accelerator) -> None:
        """Remembers the losses of timesteps drawn by loss; after a step's last batch, those of all processes."""
        if not self.model.times:
            return
        self._recorded.append((n.to(t.device, non_blocking=True), t, losses.detach()))
        if accelerator.sync_gradients:
            parts = [torch.cat(tensors) for tensors in zip(*self._recorded, strict=True)]
            n, t, losses = (accelerator.gather(part) for part in parts)
            order = n.argsort()
            self.model.times.update(t[order], losses[order])
            self._recorded = []
