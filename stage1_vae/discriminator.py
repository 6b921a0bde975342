"""The patch discriminator: logits of how real each patch of an image is."""

from __future__ import annotations

from torch import nn


class PatchDiscriminator(nn.Sequential):
    """`(N, 3, H, W)` → logits `(N, 1, h, w)`, one per patch: PatchGAN, Isola et al., arXiv 1611.07004, section 3.2.2.

    With three layers a patch has 70 pixels. `norm`: `group` does not mix the images of a batch; `batch` is batch norm
    over all processes.
    """

    def __init__(self, channels: int = 64, layers: int = 3, norm: str = "group"):
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i in range(layers):
            stride = 2 if i < layers - 1 else 1
            parts += [
                nn.Conv2d(widths[i], widths[i + 1], 4, stride, 1, bias=False),
                nn.SyncBatchNorm(widths[i + 1]) if norm == "batch" else nn.GroupNorm(_groups(channels), widths[i + 1]),
                nn.LeakyReLU(0.2),
            ]
        super().__init__(*parts, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        for module in self.modules():  # pix2pix's initialization
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)


def _groups(channels: int) -> int:
    return max(groups for groups in (32, 16, 8, 4, 2, 1) if channels % groups == 0)
