"""The U-Net's conditions in training, and their dropout for classifier-free guidance."""

from __future__ import annotations

import torch

from ldm.config.schema import Config
from ldm.data.dataset import Item
from ldm.models.autoencoder import Autoencoder
from ldm.models.conditioning import (
    MAX_NOISE_LEVEL,
    Condition,
    TextEmbedding,
    downsample,
    mask_and_masked_latents,
    noise_augmented,
)
from ldm.models.text_encoder import AnyTextEncoder
from ldm.utils.rng import generator, normal, uniform
from stage2_diffusion.masks import random_mask


class Conditions:
    """Builds a batch's conditions, as `stage2.conditions` lists them; random draws depend on positions only.

    Pass an `encoder` only if it trains, in part or in full: the text is then tokens. `classes` is their number.
    """

    def __init__(self, config: Config, autoencoder: Autoencoder, encoder: AnyTextEncoder | None, classes: int):
        self.stage, self.seed = config.stage2, config.run.seed
        self.autoencoder, self.encoder, self.classes = autoencoder, encoder, classes

    def __call__(
        self, batch: Item, x0: torch.Tensor, text: TextEmbedding | None
    ) -> tuple[Condition, torch.Tensor | None, dict[str, torch.Tensor]]:
        """The condition of latents x0 `(N, C, h, w)`; a mask `(N,)` of dropped captions; rates to log.

        The rates are the shares of samples that are dropped, or that have a mask for the loss.
        """
        stage, n, device = self.stage, batch["position"], x0.device
        rates: dict[str, torch.Tensor] = {"masked": batch["masked"].float().mean()} if "masked" in batch else {}
        sizes = image = label = dropped = None
        if stage.text or stage.classes:
            dropped = uniform(self.seed, "dropout", n).to(device) < batch["dropout"]
            rates["dropped"] = dropped.float().mean()
        if stage.classes:
            unlabelled = dropped
            if stage.dropout_each and stage.text:
                unlabelled = uniform(self.seed, "class dropout", n).to(device) < batch["dropout"]
                rates["dropped_class"] = unlabelled.float().mean()
            label = torch.where(unlabelled | (batch["class"] < 0), self.classes, batch["class"])
        if self.encoder:
            text = TextEmbedding(self.encoder.token_ids(batch["caption"]))
        if stage.sizes:
            sizes = self._sizes(batch, x0)
        if "inpaint" in stage.conditions:
            image = self._inpaint_channels(batch["pixels"], n)
        if "upscale" in stage.conditions:
            image, label = self._low_res(batch["pixels"], n)
        condition = Condition(label=label, sizes=sizes, image=image)
        return condition.with_text(text) if text else condition, dropped if stage.text else None, rates

    def _sizes(self, batch: Item, x0: torch.Tensor) -> torch.Tensor:
        """SDXL's size conditions, `(N, 6)`: original size, crop's corner, target size, each as (height, width)."""
        target_size = torch.tensor(x0.shape[2:], device=x0.device) * self.autoencoder.factor
        # a batch has (width, height) and (left, top)
        sizes = [batch["original_size"].flip(1), batch["crop"].flip(1), target_size.expand(len(x0), 2)]
        return torch.cat(sizes, dim=1).float()

    def _inpaint_channels(self, pixels: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        height, width = pixels.shape[2:]
        masks = [random_mask(generator(self.seed, "hole", int(i)), height, width) for i in n]
        mask = torch.stack(masks).to(pixels.device)
        return mask_and_masked_latents(mask, self.autoencoder.encode(pixels * (1 - mask)))

    def _low_res(self, pixels: torch.Tensor, n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The downsampled images with noise, and its level `(N,)`.

        Noise augmentation makes the model robust to the artefacts of real low-resolution images.
        """
        low_res = downsample(pixels, self.autoencoder.factor)
        level = (uniform(self.seed, "small noise level", n) * MAX_NOISE_LEVEL).long().to(pixels.device)
        noise = normal(self.seed, "small noise", n, low_res.shape[1:]).to(pixels.device)
        return noise_augmented(low_res, noise, level), level
