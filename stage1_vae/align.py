"""Features of a pretrained vision transformer, which latents can be drawn towards."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel

from ldm.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which such encoders are fed with


class Features(nn.Module):
    """Feature maps of a vision transformer (ViT, DINOv2, CLIP's image tower), without gradients; `width` channels."""

    def __init__(self, name: str):
        super().__init__()
        try:
            config = AutoConfig.from_pretrained(name)
            model = AutoModel.from_pretrained(name, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise UserError(f"stage1.align.model: can't load {name!r}: {str(error).splitlines()[0]}") from None
        config = getattr(config, "vision_config", config)
        if not hasattr(config, "patch_size") or not hasattr(config, "image_size"):
            raise UserError(f"stage1.align.model: {name} is a {config.model_type}, no vision transformer with patches")
        self.model = getattr(model, "vision_model", model).eval().requires_grad_(False)
        self.width: int = config.hidden_size
        self.side: int = config.image_size
        self.patches: int = config.image_size // config.patch_size

    @torch.no_grad()
    def forward(self, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Pictures `(N, 3, H, W)` in [-1, 1] → features `(N, D, height, width)`."""
        mean, std = (x.new_tensor(each).view(1, 3, 1, 1) for each in (MEAN, STD))
        x = F.interpolate(x, (self.side, self.side), mode="bicubic", antialias=True) / 2 + 0.5
        tokens = self.model(pixel_values=(x - mean) / std).last_hidden_state  # (N, T, D), class tokens first
        grid = tokens[:, tokens.shape[1] - self.patches**2 :].transpose(1, 2).unflatten(2, (self.patches, -1))
        return F.interpolate(grid, (height, width), mode="bilinear", antialias=True)
