"""The latent report: are these latents ready for diffusion?

A diffusion model starts from white Gaussian noise of variance 1. Latents are easiest to reach from there if their
channels have mean 0 and standard deviation 1, are uncorrelated and nearly Gaussian, and none is dead. The report
consists of sums, so that it can be updated in batches and added up over processes.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ldm.utils.errors import UserError

RANGE = 6.0  # histograms span -RANGE to RANGE; values outside count in the first and last bin
BINS = 96
FREQUENCIES = 16  # rings of the spectrum, at 1/16, 2/16 … 1 of the Nyquist frequency
MIN_RELATIVE_STD = 0.05  # a channel below this share of the median channel's standard deviation is dead
MIN_VALUES = 2000  # the histogram of fewer values is far from Gaussian by chance
MAX_CORRELATION, MAX_DISTANCE, MAX_MEAN, STD_RANGE = 0.9, 0.15, 0.5, (0.5, 2.0)  # beyond these there is a warning


class LatentStatistics:
    """Statistics of normalised latents `(N, C, h, w)`, collected batch by batch."""

    def __init__(self, channels: int):
        c = channels
        self.channels = c
        self.count = torch.zeros((), dtype=torch.int64)  # values per channel: the sum of N·h·w
        self.total = torch.zeros(c, dtype=torch.float64)
        self.products = torch.zeros(c, c, dtype=torch.float64)  # sum of x·xᵀ over all positions
        self.histogram = torch.zeros(c, BINS, dtype=torch.int64)
        self.power = torch.zeros(c, FREQUENCIES, dtype=torch.float64)
        self.num_coefficients = torch.zeros(FREQUENCIES, dtype=torch.int64)  # in each sum of `power`

    def add(self, latents: torch.Tensor) -> None:
        """Adds a batch `(N, C, h, w)`; h and w may differ between batches. UserError if a value is not finite."""
        x = latents.detach().cpu().double()
        if not x.isfinite().all():
            raise UserError("latents: a value is not finite, so the autoencoder is broken or its dtype too narrow")
        flat = x.transpose(0, 1).flatten(1)  # (C, N·h·w)
        self.count += flat.shape[1]
        self.total += flat.sum(1)
        self.products += flat @ flat.T
        bins = ((flat + RANGE) * (BINS / (2 * RANGE))).floor().clamp(0, BINS - 1).long()
        bins += BINS * torch.arange(self.channels)[:, None]
        self.histogram += bins.flatten().bincount(minlength=self.channels * BINS).view_as(self.histogram)

        power = torch.fft.fft2(x, norm="ortho").abs().square().sum(0).flatten(1)  # (C, h·w)
        vertical, horizontal = (torch.fft.fftfreq(n, dtype=torch.float64) * 2 for n in x.shape[2:])
        radius = torch.hypot(vertical[:, None], horizontal).flatten()  # as share of the Nyquist frequency
        inside = (radius > 0) & (radius <= 1)
        ring = (radius[inside] * FREQUENCIES + 0.5).long().clamp_min(1) - 1
        self.power.index_add_(1, ring, power[:, inside])
        self.num_coefficients += len(x) * ring.bincount(minlength=FREQUENCIES)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The sums, on the CPU. Summed over processes, in place, they make this the report of all processes."""
        names = ("count", "total", "products", "histogram", "power", "num_coefficients")
        return {name: getattr(self, name) for name in names}

    def merge(self, other: LatentStatistics) -> None:
        """Adds another report's latents to this one's."""
        other_tensors = other.tensors()
        for name, tensor in self.tensors().items():
            tensor += other_tensors[name]

    def mean(self) -> torch.Tensor:
        """Mean of each channel, `(C,)`."""
        return self.total / self.count

    def std(self) -> torch.Tensor:
        """Standard deviation of each channel, `(C,)`."""
        return self._covariance().diagonal().sqrt()

    def correlation(self) -> torch.Tensor:
        """Pearson's r of each pair of channels, `(C, C)` in [-1, 1]; a constant channel has 0 with all others."""
        std = self.std()
        r = self._covariance() / torch.outer(std, std).clamp_min(1e-12)
        return r.clamp(-1, 1).fill_diagonal_(1)

    def distance(self) -> torch.Tensor:
        """How far from Gaussian each channel is, `(C,)`: total variation distance of its histogram from the Gaussian
        with its mean and standard deviation, 0 (equal) to 1 (disjoint). A constant channel has 0."""
        edges = torch.linspace(-RANGE, RANGE, BINS + 1, dtype=torch.float64)[1:-1]
        below = torch.special.ndtr((edges - self.mean()[:, None]) / self.std()[:, None].clamp_min(1e-12))
        zeros, ones = torch.zeros(self.channels, 1), torch.ones(self.channels, 1)
        gaussian = torch.cat([zeros, below, ones], 1).diff(
            dim=1
        )  # the outer bins hold the tails, as the histogram's do
        distance = (self.histogram / self.count - gaussian).abs().sum(1) / 2
        return distance.where(self.std() > 1e-6, 0.0)

    def spectrum(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Frequencies `(F,)` as share of Nyquist's, and their power `(C, F)`; NaN where all latents were too small.

        White noise of variance v has power v at every frequency. The mean and the corners are left out.
        """
        return torch.arange(1, FREQUENCIES + 1) / FREQUENCIES, self.power / self.num_coefficients

    def dead(self) -> list[int]:
        """Channels without content: constant, or below 0.05 of the median channel's standard deviation."""
        std = self.std()
        return ((std <= 1e-6) | (std < MIN_RELATIVE_STD * std.quantile(0.5))).nonzero().flatten().tolist()

    def warnings(self) -> list[str]:
        """What would make diffusion harder: a sentence each, with the channel and the figure."""
        mean, std, distance, r = self.mean(), self.std(), self.distance(), self.correlation()
        dead, messages, far = self.dead(), list[str](), list[int]()
        for c in range(self.channels):
            if c in dead:
                messages.append(
                    f"channel {c} is dead: its std is {std[c]:.2g}, the median channel's {std.quantile(0.5):.2g}"
                )
                continue
            if abs(mean[c]) > MAX_MEAN:
                messages.append(f"channel {c} is off centre: its mean is {mean[c]:.2f}, beyond ±{MAX_MEAN}")
            if not STD_RANGE[0] <= std[c] <= STD_RANGE[1]:
                messages.append(
                    f"channel {c} is out of scale: its std is {std[c]:.2f}, outside [{STD_RANGE[0]}, {STD_RANGE[1]}]"
                )
            if distance[c] > MAX_DISTANCE and self.count >= MIN_VALUES:
                far.append(c)
        if far:  # often most of them
            which = f"channel {far[0]} is" if len(far) == 1 else f"channels {', '.join(map(str, far))} are"
            largest = f"total variation distance {distance[far].max():.2f}, above {MAX_DISTANCE}"
            messages.append(f"{which} far from Gaussian: {largest}")
        alive = [c for c in range(self.channels) if c not in dead]
        pairs = sorted(
            (-abs(float(r[a, b])), a, b) for a in alive for b in alive if a < b and abs(r[a, b]) > MAX_CORRELATION
        )
        messages += [f"channels {a} and {b} are strongly correlated: r = {r[a, b]:.2f}" for _, a, b in pairs[:5]]
        return messages + (
            [f"{len(pairs) - 5} more pairs of channels are strongly correlated"] if len(pairs) > 5 else []
        )

    def facts(self) -> dict[str, Any]:
        """The report as a small JSON object; figures to four digits, a frequency without power as null."""
        frequency, power = self.spectrum()
        off = self.correlation().triu(1)
        a, b = divmod(int(off.abs().argmax()), self.channels)
        return {
            "values_per_channel": int(self.count),
            "mean": _digits(self.mean()),
            "std": _digits(self.std()),
            "distance_from_gaussian": _digits(self.distance()),
            "strongest_correlation": {"channels": [a, b], "r": _digits(off[a, b, None])[0]},
            "spectrum": {"share_of_nyquist": _digits(frequency), "power": _digits(power.mean(0))},
            "dead_channels": self.dead(),
            "warnings": self.warnings(),
        }

    def _covariance(self) -> torch.Tensor:
        assert self.count > 0, "a report without latents"
        mean = self.mean()
        covariance = self.products / self.count - torch.outer(mean, mean)
        floor = covariance.diagonal().clamp_min(0)  # rounding can leave a constant channel below 0
        return covariance.diagonal_scatter(floor)


def _digits(values: torch.Tensor) -> list[float | None]:
    """Numbers to four significant digits; JSON has no NaN."""
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in values.tolist()]
