"""LPIPS by anti-aliased networks, which a shift of a pixel hardly changes: arXiv 2207.13686.

The weights come with the wheel `stlpips-pytorch`. Each step that halves the resolution blurs before it drops positions
(arXiv 1904.11486), with padding by the whole width of the blur.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics import Metric

from ldm.models.feature_networks.weights import WeightsFile, not_weights, read

EPSILON = 1e-8  # of a squared length: bounds the gradient where no channel is active, and is torchmetrics' for LPIPS
WHEEL = {"wheel": "stlpips-pytorch", "wheel_folder": "stlpips_pytorch/weights/vST0.0"}
WEIGHTS = {
    "st-vgg": WeightsFile(
        "vgg_shift_tolerant.pth", "44597da68f49c1837c100ff52299050f274d102eb102e5837178c79be6f0e250", **WHEEL
    ),
    "st-alex": WeightsFile(
        "alex_shift_tolerant.pth", "b356b382f96010f77d085ee8343ecd9fd322d0a56e8de2b2d0549fafcad8b9ee", **WHEEL
    ),
}


class BlurPool(nn.Module):
    """Halves the resolution: a binomial blur of 3×3, then every second position."""

    filt: torch.Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("filt", torch.empty(channels, 1, 3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), self.filt, stride=2, groups=len(self.filt))


class ShiftTolerantNet(nn.Module):
    """The distance of images `(N, 3, H, W)` in [-1, 1], `(N, 1, 1, 1)`; in [0, 1] with `normalize`.

    `weights` is a file; by default the wheel's, whose SHA-256 is checked. UserError if it is missing, or has other
    tensors.
    """

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self, name: str, weights: Path | None = None):
        super().__init__()
        path = weights or WEIGHTS[name].find("LPIPS")
        tensors = read(path)
        self.features = nn.ModuleList(_vgg16() if name == "st-vgg" else _alexnet())
        widths = [layer.out_channels for layer in self.features if isinstance(layer, nn.Conv2d)]
        # One distance for the last activation of each resolution; AlexNet's are after each convolution.
        last = (1, 3, 6, 9, 12) if name == "st-vgg" else range(5)
        activations = [i for i, layer in enumerate(self.features) if isinstance(layer, nn.ReLU)]
        self.taps = [activations[i] for i in last]
        self.lins = nn.ModuleList(nn.Conv2d(widths[i], 1, 1, bias=False) for i in last)
        self.register_buffer("shift", torch.empty(1, 3, 1, 1))
        self.register_buffer("scale", torch.empty(1, 3, 1, 1))
        try:
            self.load_state_dict({_own_name(key): tensor for key, tensor in tensors.items()})
        except RuntimeError as error:
            raise not_weights(path, error) from None
        self.requires_grad_(False)

    def forward(self, a: torch.Tensor, b: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        if normalize:
            a, b = 2 * a - 1, 2 * b - 1
        distances = [
            lin((x - y).square()).mean((2, 3), keepdim=True)
            for lin, x, y in zip(self.lins, self._unit_activations(a), self._unit_activations(b), strict=True)
        ]
        return torch.stack(distances).sum(0)

    def _unit_activations(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """Of each tap, with channels as a vector of length 1, or shorter where it was about 0."""
        x = (x - self.shift) / self.scale
        for i, layer in enumerate(self.features[: self.taps[-1] + 1]):
            x = layer(x)
            if i in self.taps:
                yield x * (x.square().sum(1, keepdim=True) + EPSILON).rsqrt()


class ShiftTolerantLPIPS(Metric):
    """The metric of each image of a batch in [0, 1], `(N,)`; `net` computes it."""

    is_differentiable = True
    higher_is_better = False
    full_state_update = False
    figure = "st_lpips"
    """Its name among figures: not LPIPS', with whose values and thresholds its own are not comparable."""
    scores: list[torch.Tensor]

    def __init__(self, name: str, weights: Path | None = None):
        super().__init__()
        self.net = ShiftTolerantNet(name, weights)
        self.add_state("scores", default=[], dist_reduce_fx=None)

    def update(self, a: torch.Tensor, b: torch.Tensor) -> None:
        self.scores.append(self.net(a, b, normalize=True).flatten())

    def compute(self) -> torch.Tensor:
        return torch.cat(self.scores)


def _vgg16() -> Iterator[nn.Module]:
    """The layers of VGG-16 up to its last convolution."""
    channels = 3
    for i, (width, depth) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))):
        if i:
            yield from (nn.MaxPool2d(2, stride=1), BlurPool(channels))
        for _ in range(depth):
            yield from (nn.Conv2d(channels, width, 3, padding=1), nn.ReLU())
            channels = width


def _alexnet() -> Iterator[nn.Module]:
    """The layers of AlexNet up to its last convolution; the first one's stride of 4 is two steps of 2."""
    yield from (nn.Conv2d(3, 64, 11, padding=2), BlurPool(64), nn.ReLU(), nn.MaxPool2d(3, stride=1), BlurPool(64))
    yield from (nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, stride=1), BlurPool(192))
    for channels, width in itertools.pairwise((192, 384, 256, 256)):
        yield from (nn.Conv2d(channels, width, 3, padding=1), nn.ReLU())


def _own_name(name: str) -> str:
    """Our name of a tensor of the file."""
    name = re.sub(r"^net\.slice\d\.", "features.", name)
    return re.sub(r"^lin(\d)\.model\.1\.", r"lins.\1.", name).removeprefix("scaling_layer.")
