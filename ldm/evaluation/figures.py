"""A measured figure: its value, its error bar, and of how many images by which network it is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Figure:
    """A metric of a set of images."""

    value: float
    low: float | None = None
    """Lower end of the 95 % interval; None where none was computed."""
    high: float | None = None
    images: int = 0
    """Generated images that it is of."""
    network: str | None = None
    """`FeatureNetwork.label`; None where no network is involved."""

    def __str__(self) -> str:
        bar = "" if self.low is None or self.high is None else f" [{self.low:.4g}, {self.high:.4g}]"
        return f"{self.value:.4g}{bar}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Figure:
        return cls(**values)
