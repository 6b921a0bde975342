"""What a feature network sees in images: the input of the metrics of generated images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class Features:
    """Of N images, in their order; float32 tensors on the CPU."""

    pooled: torch.Tensor
    """`(N, D)`, a vector per image, of FID, KID, precision and recall, CMMD, nearest images."""
    spatial: torch.Tensor | None = None
    """`(N, S)`, which keeps where things are, of sFID; None where the network has no such layer."""
    logits: torch.Tensor | None = None
    """`(N, K)`, of the Inception score; None where the network does not classify."""

    def __len__(self) -> int:
        return len(self.pooled)

    def __getitem__(self, images: torch.Tensor | slice) -> Features:
        """Those of some images, by index or slice."""
        spatial, logits = (None if value is None else value[images] for value in (self.spatial, self.logits))
        return Features(self.pooled[images], spatial, logits)

    @classmethod
    def cat(cls, parts: Iterable[Features]) -> Features:
        """Features of several batches as those of one."""
        batches = list(parts)
        spatial = [part.spatial for part in batches if part.spatial is not None]
        logits = [part.logits for part in batches if part.logits is not None]
        pooled = torch.cat([part.pooled for part in batches])
        return cls(pooled, torch.cat(spatial) if spatial else None, torch.cat(logits) if logits else None)


class FeatureNetwork(Protocol):
    """A pretrained network, without dropout, whose weights do not change."""

    name: str
    """As configurations and commands have it: `inception`, `clip`, `dinov2`, `efficientnet-lite0`, `latents`."""
    label: str
    """For people, with the layer's width: `Inception-v3, 2048`."""
    fingerprint: str
    """SHA-256 of the weights; features of another fingerprint are not comparable."""

    def __call__(self, images: torch.Tensor) -> Features:
        """Features of images `(N, 3, H, W)` uint8; the network resizes and normalises them as it was trained."""
        ...
