"""The adversarial loss: when the discriminator learns, and how much it counts for the autoencoder."""

from __future__ import annotations

import torch

from ldm.config.schema import GanConfig
from ldm.training.trainer import Trainer
from stage1_vae import losses
from stage1_vae.augment import augment
from stage1_vae.losses import Logs


class AdversarialLoss:
    """Both sides of a step:

        if adversarial.active(step):
            loss = loss + adversarial.generator(…)[0]   # the autoencoder's side: no gradients for the discriminator
        trainer.backward(loss)
        if adversarial.active(step):
            trainer.backward(adversarial.discriminator(…)[0])   # the discriminator's: none for the autoencoder

    Without a `config` it is never active.
    """

    def __init__(self, config: GanConfig | None, steps: int, seed: int, trainer: Trainer):
        self.config, self.seed, self.trainer = config or GanConfig(), seed, trainer
        start = self.config.start
        self.start = steps + 1 if config is None else int(start * steps) if start < 1 else int(start)

    def active(self, step: int) -> bool:
        """Whether the discriminator learns at `step`."""
        return step >= self.start

    def weight(self, step: int) -> float:
        """Of the generator loss: 0 until the discriminator is warmed up, then it rises."""
        since = step - self.start - self.config.warmup
        return self.config.weight * min(1.0, max(0.0, (since + 1) / max(1, self.config.ramp)))

    def generator(
        self, fake: torch.Tensor, error: torch.Tensor, last: torch.nn.Parameter, positions: torch.Tensor
    ) -> tuple[torch.Tensor, Logs]:
        """The weighted loss of reconstructions `fake` `(N, 3, H, W)`, a scalar.

        `error` is their reconstruction loss and `last` the decoder's last layer, for the adaptive weight.
        """
        gan, weight = self.config, self.weight(self.trainer.step)
        if not weight:
            return fake.new_zeros(()), {}
        loss = losses.generator_loss(self._frozen_discriminator(self._augment(fake, positions)), gan.loss)
        logs = {"generator": loss}
        if gan.adaptive:
            scale = self.trainer.loss_scale  # small gradients vanish in half precision
            gradients = [torch.autograd.grad(scale * part, last, retain_graph=True)[0] for part in (error, loss)]
            gradients = self.trainer.accelerator.reduce(torch.stack(gradients), "mean")
            logs["adaptive_weight"] = losses.adaptive_weight(gradients, gan.cap)
            loss = logs["adaptive_weight"] * loss
        return weight * loss, logs

    def discriminator(
        self, real: torch.Tensor, fake: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, Logs]:
        """The discriminator's loss for images and their reconstructions, `(N, 3, H, W)` each."""
        gan, discriminator = self.config, self.trainer.discriminator
        assert discriminator, "the trainer was made without one"
        real, fake = (self._augment(images.detach(), positions) for images in (real, fake))
        real.requires_grad_(gan.r1 > 0)
        of_real, of_fake = discriminator.ddp_model(torch.cat([real, fake])).chunk(2)  # one forward, for DDP's sake
        loss = losses.discriminator_loss(of_real, of_fake, gan.loss)
        accuracy = ((of_real > 0).float().mean() + (of_fake < 0).float().mean()) / 2
        logs = {"discriminator": loss, "discriminator_accuracy": accuracy}
        if gan.r1:
            logs["r1"] = losses.r1_penalty(of_real, real, self.trainer.loss_scale)
            loss = loss + gan.r1 * logs["r1"]
        return loss, logs

    def _frozen_discriminator(self, x: torch.Tensor) -> torch.Tensor:
        """The discriminator's output for `x`, with gradients for `x` and none for the discriminator."""
        assert self.trainer.discriminator, "the trainer was made without one"
        module = self.trainer.discriminator.module
        frozen = {name: p.detach() for name, p in module.named_parameters()}
        return torch.func.functional_call(module, frozen, (x,))  # type: ignore[no-any-return]

    def _augment(self, images: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return augment(images, self.config.augment, self.seed, positions)
