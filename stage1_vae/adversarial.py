"""The autoencoder against the discriminator: when they play, what each is told, and how much it counts."""

from __future__ import annotations

import torch

from ldm.config.schema import GanConfig
from ldm.training.trainer import Run
from stage1_vae import losses
from stage1_vae.augment import augment

Metrics = dict[str, torch.Tensor]


class AdversarialLoss:
    """Both sides of one step; `None` as configuration is no game.

    if game.plays(step):
        loss = loss + game.generator(…)   # the autoencoder's side: gradients for it, none for the discriminator
    run.backward(loss)
    if game.plays(step):
        run.backward(game.discriminator(…))      # the discriminator's side: the reverse
    """

    def __init__(self, config: GanConfig | None, steps: int, seed: int, run: Run):
        self.config, self.seed, self.run = config or GanConfig(), seed, run
        start = self.config.start
        self.start = steps + 1 if config is None else int(start * steps) if start < 1 else int(start)

    def plays(self, step: int) -> bool:
        """Whether the discriminator learns."""
        return step >= self.start

    def weight(self, step: int) -> float:
        """Of the verdict in the autoencoder's loss: 0 until the discriminator was warmed up, then it rises."""
        since = step - self.start - self.config.warmup
        return self.config.weight * min(1.0, max(0.0, (since + 1) / max(1, self.config.ramp)))

    def generator(
        self, fake: torch.Tensor, error: torch.Tensor, last: torch.nn.Parameter, positions: torch.Tensor, said: Metrics
    ) -> torch.Tensor:
        """The autoencoder's loss for its pictures `(N, 3, H, W)`, weighted.

        `error` is its reconstruction loss and `last` the decoder's last layer, for the adaptive weight.
        """
        gan, weight = self.config, self.weight(self.run.step)
        if not weight:
            return fake.new_zeros(())
        verdict = losses.generator_loss(self.run.frozen_discriminator(self._seen(fake, positions)), gan.loss)
        said["generator"] = verdict
        if gan.adaptive:
            scale = self.run.loss_scale  # small gradients vanish in half precision
            gradients = [torch.autograd.grad(scale * each, last, retain_graph=True)[0] for each in (error, verdict)]
            said["adaptive_weight"] = losses.adaptive_weight(self.run.mean(torch.stack(gradients)), gan.cap)
            verdict = said["adaptive_weight"] * verdict
        return weight * verdict

    def discriminator(
        self, real: torch.Tensor, fake: torch.Tensor, positions: torch.Tensor, said: Metrics
    ) -> torch.Tensor:
        """The discriminator's loss for real and rebuilt pictures, `(N, 3, H, W)` each."""
        gan = self.config
        real, fake = (self._seen(each.detach(), positions) for each in (real, fake))
        real.requires_grad_(gan.r1 > 0)
        of_real, of_fake = self.run.adversary(torch.cat([real, fake])).chunk(2)  # one forward, for DDP's sake
        loss = said["discriminator"] = losses.discriminator_loss(of_real, of_fake, gan.loss)
        said["discriminator_accuracy"] = ((of_real > 0).float().mean() + (of_fake < 0).float().mean()) / 2
        if gan.r1:
            said["r1"] = losses.r1_penalty(of_real, real, self.run.loss_scale)
            loss = loss + gan.r1 * said["r1"]
        return loss

    def _seen(self, pictures: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return augment(pictures, self.config.augment, self.seed, positions)
