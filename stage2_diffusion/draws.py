"""What a step of stage two draws at each position: noise, timesteps, dropped conditions, masks.

Loader workers draw it with the samples (`ldm.data.draws`); the objective and the conditions read it from the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from ldm.config.schema import Stage2Config
from ldm.data.draws import Item, latent_shape
from ldm.diffusion.timestep_sampling import stratified
from ldm.models.autoencoder import Autoencoder
from ldm.models.conditioning import MAX_NOISE_LEVEL
from ldm.utils.rng import generator, normal, uniform
from stage2_diffusion.masks import random_mask


@dataclass(frozen=True)
class NoiseDraws:
    """`noise` `(C, h, w)`, and `u` in [0, 1), from which its timestep follows.

    With `offset`, also `noise_offset` `(C, 1, 1)`; with `perturbation`, also `perturbation` `(C, h, w)`. With `strata`,
    the images of a step, their u are stratified. Latents have `channels` and 1/`factor` of the image's side.
    """

    seed: int
    channels: int
    factor: int
    offset: bool = False
    perturbation: bool = False
    strata: int | None = None

    @classmethod
    def of(cls, stage: Stage2Config, seed: int, autoencoder: Autoencoder) -> Self:
        options = bool(stage.noise_offset), bool(stage.input_perturbation), stage.batch if stage.stratified else None
        return cls(seed, autoencoder.channels, autoencoder.factor, *options)

    def __call__(self, n: int, item: Item) -> Item:
        shape = latent_shape(item, self.channels, self.factor)
        drawn: Item = {"noise": normal(self.seed, "noise", [n], shape)[0]}
        if self.offset:
            drawn["noise_offset"] = normal(self.seed, "noise offset", [n], (shape[0], 1, 1))[0]
        if self.perturbation:
            drawn["perturbation"] = normal(self.seed, "perturbation", [n], shape)[0]
        u = stratified(self.seed, "time", [n], self.strata) if self.strata else uniform(self.seed, "time", [n])
        return {**drawn, "u": u[0]}


@dataclass(frozen=True)
class ConditionDraws:
    """Whether the caption is `dropped`, and the class, `dropped_class`, where it is dropped independently.

    And for the tasks: the `hole` `(1, H, W)` to inpaint; the `small_noise` `(3, H / factor, W / factor)` of an
    upscaler's low-resolution image, and its `small_noise_level`.
    """

    stage: Stage2Config
    seed: int
    factor: int

    def __call__(self, n: int, item: Item) -> Item:
        stage, drawn = self.stage, Item()
        if stage.text or stage.classes:
            drawn["dropped"] = uniform(self.seed, "dropout", [n])[0] < item["dropout"]
        if stage.classes and stage.text and stage.dropout_each:
            drawn["dropped_class"] = uniform(self.seed, "class dropout", [n])[0] < item["dropout"]
        if "inpaint" in stage.conditions:
            drawn["hole"] = random_mask(generator(self.seed, "hole", n), *item["pixels"].shape[1:])
        if "upscale" in stage.conditions:
            drawn["small_noise_level"] = (uniform(self.seed, "small noise level", [n])[0] * MAX_NOISE_LEVEL).long()
            shape = latent_shape({"pixels": item["pixels"]}, 3, self.factor)
            drawn["small_noise"] = normal(self.seed, "small noise", [n], shape)[0]
        return drawn
