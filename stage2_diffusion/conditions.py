"""The U-Net's conditions in training, and their dropout for classifier-free guidance."""

from __future__ import annotations

import torch

from ldm.config.schema import Config
from ldm.data.dataset import Item
from ldm.models.autoencoder import Autoencoder
from ldm.models.conditioning import (
    Condition,
    TextEmbedding,
    downsample,
    mask_and_masked_latents,
    noise_augmented,
)
from ldm.models.text_encoder import AnyTextEncoder
from stage2_diffusion.draws import ConditionDraws


class Conditions:
    """Builds a batch's conditions, as `stage2.conditions` lists them; batches have what its `draws` draw.

    Pass an `encoder` only if it trains, in part or in full: the text is then tokens. `classes` is their number.
    """

    def __init__(self, config: Config, autoencoder: Autoencoder, encoder: AnyTextEncoder | None, classes: int):
        self.stage, self.draws = config.stage2, ConditionDraws(config.stage2, config.run.seed, autoencoder.factor)
        self.autoencoder, self.encoder, self.classes = autoencoder, encoder, classes

    def __call__(
        self, batch: Item, x0: torch.Tensor, text: TextEmbedding | None
    ) -> tuple[Condition, torch.Tensor | None, dict[str, torch.Tensor]]:
        """The condition of latents x0 `(N, C, h, w)`; a mask `(N,)` of dropped captions; rates to log.

        The rates are the shares of samples that are dropped, or that have a mask for the loss.
        """
        stage, dropped = self.stage, batch.get("dropped")
        rates: dict[str, torch.Tensor] = {"masked": batch["masked"].float().mean()} if "masked" in batch else {}
        rates |= {name: batch[name].float().mean() for name in ("dropped", "dropped_class") if name in batch}
        sizes = image = label = None
        if stage.classes:
            unlabelled = batch.get("dropped_class", dropped)
            label = torch.where(unlabelled | (batch["class"] < 0), self.classes, batch["class"])
        if self.encoder:
            text = TextEmbedding(self.encoder.token_ids(batch["caption"]))
        if stage.sizes:
            sizes = self._sizes(batch, x0)
        if "inpaint" in stage.conditions:
            image = self._inpaint_channels(batch["pixels"], batch["hole"])
        if "upscale" in stage.conditions:
            image, label = self._low_res(batch), batch["small_noise_level"]
        condition = Condition(label=label, sizes=sizes, image=image)
        return condition.with_text(text) if text else condition, dropped if stage.text else None, rates

    def _sizes(self, batch: Item, x0: torch.Tensor) -> torch.Tensor:
        """SDXL's size conditions, `(N, 6)`: original size, crop's corner, target size, each as (height, width)."""
        original_size, corner = batch["original_size"].flip(1), batch["crop"].flip(1)  # of (width, height), (left, top)
        # Numbers of the host fill a tensor without a wait; as a tensor they would be copied.
        target_size = [torch.full_like(corner[:, :1], side * self.autoencoder.factor) for side in x0.shape[2:]]
        return torch.cat([original_size, corner, *target_size], dim=1).float()

    def _inpaint_channels(self, pixels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return mask_and_masked_latents(mask, self.autoencoder.encode(pixels * (1 - mask)))

    def _low_res(self, batch: Item) -> torch.Tensor:
        """The downsampled images with noise.

        Noise augmentation makes the model robust to the artefacts of real low-resolution images.
        """
        low_res = downsample(batch["pixels"], self.autoencoder.factor)
        return noise_augmented(low_res, batch["small_noise"], batch["small_noise_level"])
