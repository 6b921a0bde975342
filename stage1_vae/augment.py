"""Differentiable augmentation of the discriminator's input, so that it does not overfit a small data set."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ldm.utils.rng import uniform


def augment(x: torch.Tensor, kinds: tuple[str, ...], seed: int, positions: torch.Tensor) -> torch.Tensor:
    """Augments images `(N, 3, H, W)` differentiably, with random numbers from each sample's position.

    DiffAugment, Zhao et al., arXiv 2006.10738. `kinds`: `color` changes brightness, saturation and contrast;
    `translation` shifts by up to an eighth of the side; `cutout` erases a square of half the side. A real image and its
    reconstruction have the same position and are changed alike.
    """
    n, _, height, width = x.shape

    def draw(name: str) -> torch.Tensor:
        return uniform(seed, name, positions).to(x).view(n, 1, 1, 1)

    if "color" in kinds:
        x = x + draw("brightness") - 0.5
        grey = x.mean(1, keepdim=True)
        x = grey + (x - grey) * 2 * draw("saturation")
        mean = x.mean((1, 2, 3), keepdim=True)
        x = mean + (x - mean) * (0.5 + draw("contrast"))
    rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    if "translation" in kinds:
        down = ((draw("down") * 2 - 1) * height / 8).round().long().view(n, 1)
        right = ((draw("right") * 2 - 1) * width / 8).round().long().view(n, 1)
        y, x_ = (rows + down).clamp(-1, height) + 1, (columns + right).clamp(-1, width) + 1  # (N, H), (N, W)
        padded = F.pad(x, (1, 1, 1, 1))  # what is shifted in is 0
        sample = torch.arange(n, device=x.device).view(n, 1, 1)
        x = padded.permute(0, 2, 3, 1)[sample, y[:, :, None], x_[:, None, :]].permute(0, 3, 1, 2)
    if "cutout" in kinds:
        top = (draw("top") * (height + 1)).floor() - height // 4
        left = (draw("left") * (width + 1)).floor() - width // 4
        inside = (rows.view(1, 1, -1, 1) - top).div(height // 2).floor() == 0
        inside = inside & ((columns.view(1, 1, 1, -1) - left).div(width // 2).floor() == 0)
        x = x * ~inside
    return x
