"""Features of a pretrained vision transformer, to which latents can be aligned."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel
from transformers.utils import cached_file

from ldm.utils.errors import UserError, first_line

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, where the encoder has none of its own


class Features(nn.Module):
    """Feature maps of a vision transformer (ViT, DINOv2, CLIP's image tower), without gradients; `width` channels."""

    def __init__(self, name: str):
        super().__init__()
        try:
            config = AutoConfig.from_pretrained(name)
            model = AutoModel.from_pretrained(name, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise UserError(f"stage1.align.model: can't load {name!r}: {first_line(error)}") from None
        config = getattr(config, "vision_config", config)
        self.model = getattr(model, "vision_model", model).eval().requires_grad_(False)
        try:
            self.width, self.side = int(config.hidden_size), int(config.image_size)
            self.patches = self.side // int(config.patch_size)
            processor = AutoImageProcessor.from_pretrained(name) if _has_processor(name) else None
            self.mean: Sequence[float] = processor.image_mean if processor else MEAN
            self.std: Sequence[float] = processor.image_std if processor else STD
            assert self(torch.zeros(1, 3, 8, 8), 2, 2).shape == (1, self.width, 2, 2)
        except (AttributeError, TypeError, RuntimeError):
            raise UserError(
                f"stage1.align.model: {name} is a {config.model_type}; give a ViT, DINOv2 or CLIP"
            ) from None

    @torch.no_grad()
    def forward(self, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Images `(N, 3, H, W)` in [-1, 1] → features `(N, D, height, width)`."""
        mean, std = (x.new_tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        x = F.interpolate(x, (self.side, self.side), mode="bicubic", antialias=True) / 2 + 0.5
        tokens = self.model(pixel_values=(x - mean) / std).last_hidden_state  # (N, T, D), class tokens first
        grid = tokens[:, tokens.shape[1] - self.patches**2 :].transpose(1, 2).unflatten(2, (self.patches, -1))
        return F.interpolate(grid, (height, width), mode="bilinear", antialias=True)


def _has_processor(name: str) -> bool:
    path = cached_file(name, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    return path is not None
