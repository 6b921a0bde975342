"""The latent report: are these latents ready for diffusion?

A diffusion model starts from white Gaussian noise of variance 1. Latents are easiest to reach from there if their
channels have mean 0 and standard deviation 1, are uncorrelated and nearly Gaussian, and none is dead. The report
consists of sums, so that it can be updated in batches and added up over processes.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ldm.utils.atomic_files import atomic_file
from ldm.utils.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RANGE = 6.0  # histograms span -RANGE to RANGE; values outside count in the first and last bin
BINS = 96
FREQUENCIES = 16  # rings of the spectrum, at 1/16, 2/16 … 1 of the Nyquist frequency
MIN_RELATIVE_STD = 0.05  # a channel below this share of the median channel's standard deviation is dead
MIN_VALUES = 2000  # the histogram of fewer values is far from Gaussian by chance
MAX_CORRELATION, MAX_DISTANCE, MAX_MEAN, STD_RANGE = 0.9, 0.15, 0.5, (0.5, 2.0)  # beyond these there is a warning


class Report:
    """Statistics of normalised latents `(N, C, h, w)`, collected batch by batch."""

    def __init__(self, channels: int):
        c = channels
        self.channels = c
        self.count = torch.zeros((), dtype=torch.int64)  # values per channel: the sum of N·h·w
        self.total = torch.zeros(c, dtype=torch.float64)
        self.products = torch.zeros(c, c, dtype=torch.float64)  # sum of x·xᵀ over all positions
        self.histogram = torch.zeros(c, BINS, dtype=torch.int64)
        self.power = torch.zeros(c, FREQUENCIES, dtype=torch.float64)
        self.waves = torch.zeros(FREQUENCIES, dtype=torch.int64)  # number of coefficients in each sum of `power`

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
        self.waves += len(x) * ring.bincount(minlength=FREQUENCIES)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The sums, on the CPU. Summed over processes, in place, they make this the report of all processes."""
        names = ("count", "total", "products", "histogram", "power", "waves")
        return {name: getattr(self, name) for name in names}

    def merge(self, other: Report) -> None:
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
        return torch.arange(1, FREQUENCIES + 1) / FREQUENCIES, self.power / self.waves

    def dead(self) -> list[int]:
        """Channels without content: constant, or below 0.05 of the median channel's standard deviation."""
        std = self.std()
        return ((std <= 1e-6) | (std < MIN_RELATIVE_STD * std.quantile(0.5))).nonzero().flatten().tolist()

    def warnings(self) -> list[str]:
        """What would make diffusion harder: a sentence each, with the channel and the figure."""
        mean, std, distance, r = self.mean(), self.std(), self.distance(), self.correlation()
        dead, messages = self.dead(), []
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
                messages.append(
                    f"channel {c} is far from Gaussian: total variation distance {distance[c]:.2f}, "
                    f"above {MAX_DISTANCE}"
                )
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

    def plot(self, path: Path) -> None:
        """Histograms, correlation, spectrum, mean and standard deviation, as one PNG."""
        import matplotlib  # slow to import, so only to plot
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 8), dpi=110)
        canvas = FigureCanvasAgg(figure)
        axes = figure.subplots(2, 2)
        many = self.channels > 10
        shades = matplotlib.colormaps["viridis" if many else "tab10"]
        colours = [shades(c / (self.channels - 1) if many else c) for c in range(self.channels)]
        warnings = self.warnings()
        figure.suptitle(
            f"Latents: {self.channels} channels, {int(self.count):,} values each", x=0.01, ha="left", weight="bold"
        )
        lines = [*warnings[:4], *([f"and {len(warnings) - 4} more warnings"] if len(warnings) > 4 else [])]
        colour = "tab:red" if lines else "tab:green"
        figure.supxlabel("\n".join(lines) or "no warnings", x=0.01, ha="left", size=9, color=colour)
        self._plot_histograms(axes[0, 0], colours)
        self._plot_correlation(axes[0, 1])
        self._plot_spectrum(axes[1, 0], colours)
        self._plot_scale(axes[1, 1], colours)
        for axis in axes.flat:
            axis.spines[["top", "right"]].set_visible(False)
        bottom = 0.08 + 0.02 * max(1, len(lines))  # fixed margins: matplotlib takes half a second to find them
        figure.subplots_adjust(left=0.07, right=0.98, bottom=bottom, top=0.93, hspace=0.28, wspace=0.2)
        with atomic_file(path) as tmp_path:
            canvas.print_figure(tmp_path, format="png")

    def _covariance(self) -> torch.Tensor:
        assert self.count > 0, "a report without latents"
        mean = self.mean()
        covariance = self.products / self.count - torch.outer(mean, mean)
        floor = covariance.diagonal().clamp_min(0)  # rounding can leave a constant channel below 0
        return covariance.diagonal_scatter(floor)

    def _plot_histograms(self, axis: Axes, colours: list[Any]) -> None:
        edges, many = torch.linspace(-RANGE, RANGE, BINS + 1), self.channels > 10  # too many for the legend
        centres, density = (edges[1:] + edges[:-1]) / 2, self.histogram / self.count * (BINS / (2 * RANGE))
        for c, colour in enumerate(colours):
            axis.plot(centres, density[c], color=colour, lw=1.2, label=f"{'_' * many}channel {c}")
        gaussian = (-centres.square() / 2).exp() / math.sqrt(2 * math.pi)
        axis.plot(centres, gaussian, color="black", lw=1.5, ls="--", label="Gaussian")
        axis.set(title="Distribution of values", xlabel="value", ylabel="density", xlim=(-RANGE, RANGE))
        axis.set_ylim(0, min(1.05 * max(0.5, float(density.max())), 1))  # a dead channel's peak would hide the rest
        axis.legend(frameon=False, fontsize=8)

    def _plot_correlation(self, axis: Axes) -> None:
        r, ticks = self.correlation(), range(0, self.channels, max(1, self.channels // 8))
        image = axis.imshow(r.numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
        axis.figure.colorbar(image, ax=axis, label="r", shrink=0.9)
        axis.set(title="Correlation of channels", xlabel="channel", ylabel="channel", xticks=ticks, yticks=ticks)
        for a in range(self.channels) if self.channels <= 8 else ():
            for b in range(self.channels):
                ink = "white" if abs(r[a, b]) > 0.6 else "black"
                axis.text(b, a, f"{r[a, b]:z.2f}", ha="center", va="center", color=ink, fontsize=8)

    def _plot_spectrum(self, axis: Axes, colours: list[Any]) -> None:
        frequency, power = self.spectrum()
        seen = self.waves > 0
        for c, colour in enumerate(colours):
            axis.plot(frequency[seen], power[c, seen].clamp_min(1e-8), color=colour, lw=1, alpha=0.6)
        axis.plot(frequency[seen], power.mean(0)[seen].clamp_min(1e-8), color="black", lw=2, label="all channels")
        axis.axhline(1, color="grey", lw=1, ls=":", label="white noise")
        axis.set(title="Spectrum", xlabel="frequency, share of Nyquist's", ylabel="power", yscale="log", xlim=(0, 1))
        low, high = axis.get_ylim()
        axis.set_ylim(min(low, 0.1), max(high, 10))
        axis.legend(frameon=False, fontsize=8)

    def _plot_scale(self, axis: Axes, colours: list[Any]) -> None:
        mean, std = self.mean(), self.std()
        axis.axhspan(-1, 1, color="grey", alpha=0.12, lw=0)
        axis.axhline(0, color="grey", lw=1, ls=":")
        for c, colour in enumerate(colours):
            axis.errorbar(c, mean[c], std[c], fmt="o", color=colour, capsize=4)
        axis.set(title="Mean ± standard deviation (grey: the ideal)", xlabel="channel", ylabel="value")
        axis.set_xticks(range(0, self.channels, max(1, self.channels // 8)))


def _digits(values: torch.Tensor) -> list[float | None]:
    """Numbers to four significant digits; JSON has no NaN."""
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in values.tolist()]
