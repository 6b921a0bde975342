"""Initial weights of an autoencoder whose residual paths carry the image from the first step on.

PyTorch's default for a convolution divides the variance of its input by three. The residual path of an `AutoencoderKL`
has two of them a level, where width and resolution change: little of the image would reach the latents, and less the
output.
"""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def add_identity_paths(vae: nn.Module) -> None:
    """Adds identities to the convolutions that are alone on a residual path; their biases become 0.

    Where the width changes, copies or sums of channels; where the resolution does, the mean of 2 x 2 pixels or copies
    of a pixel. It is what DC-AE (arXiv 2410.10733, section 3.1) has as paths of their own, as far as the weights of
    diffusers' `AutoencoderKL` and `VQModel` can express it.
    """
    for name, layer in vae.named_modules():
        if not isinstance(layer, nn.Conv2d):
            continue
        if "conv_shortcut" in name:  # 1 x 1
            layer.weight[:, :, 0, 0] += channel_map(layer)
        elif "downsamplers" in name:  # 3 x 3 with stride 2, which diffusers pads at the right and the bottom
            layer.weight[:, :, :2, :2] += channel_map(layer)[..., None, None] / 4
        elif "upsamplers" in name:  # 3 x 3, after each pixel was copied to 2 x 2
            layer.weight[:, :, 1, 1] += channel_map(layer)
        else:
            continue
        if layer.bias is not None:
            layer.bias.zero_()


def channel_map(layer: nn.Conv2d) -> torch.Tensor:
    """`(out, in)`: an output copies an input, or sums several so that the variance of independent ones is kept."""
    outputs, inputs = torch.arange(layer.out_channels), torch.arange(layer.in_channels)
    narrow = min(layer.out_channels, layer.in_channels)
    alike = (outputs[:, None] % narrow == inputs % narrow).to(layer.weight)
    return alike / alike.sum(1, keepdim=True).sqrt()
