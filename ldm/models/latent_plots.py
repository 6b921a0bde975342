"""Plots of latent statistics. Importing this imports matplotlib, which is slow."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ldm.models.latent_statistics import BINS, RANGE, LatentStatistics
from ldm.utils.atomic_files import atomic_file


def plot_latents(statistics: LatentStatistics, path: Path) -> None:
    """Histograms, correlation, spectrum, mean and standard deviation, as one PNG."""
    # no layout, also where a notebook's rcParams ask for one; matplotlib's types lack it
    figure = Figure(figsize=(11, 8), dpi=110, layout="none")  # type: ignore[arg-type]
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    many = statistics.channels > 10
    shades = matplotlib.colormaps["viridis" if many else "tab10"]
    colours = [shades(c / (statistics.channels - 1) if many else c) for c in range(statistics.channels)]
    warnings = statistics.warnings()
    figure.suptitle(
        f"Latents: {statistics.channels} channels, {int(statistics.count):,} values each",
        x=0.01,
        ha="left",
        weight="bold",
    )
    lines = [*warnings[:4], *([f"and {len(warnings) - 4} more warnings"] if len(warnings) > 4 else [])]
    colour = "tab:red" if lines else "tab:green"
    figure.supxlabel("\n".join(lines) or "no warnings", x=0.01, ha="left", size=9, color=colour)
    _plot_histograms(statistics, axes[0, 0], colours)
    _plot_correlation(statistics, axes[0, 1])
    _plot_spectrum(statistics, axes[1, 0], colours)
    _plot_scale(statistics, axes[1, 1], colours)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    bottom = 0.08 + 0.02 * max(1, len(lines))  # fixed margins: matplotlib takes half a second to find them
    figure.subplots_adjust(left=0.07, right=0.98, bottom=bottom, top=0.93, hspace=0.28, wspace=0.2)
    with atomic_file(path) as tmp_path:
        canvas.print_figure(tmp_path, format="png")


def _plot_histograms(statistics: LatentStatistics, axis: Axes, colours: list[Any]) -> None:
    edges, many = torch.linspace(-RANGE, RANGE, BINS + 1), statistics.channels > 10  # too many for the legend
    centres, density = (edges[1:] + edges[:-1]) / 2, statistics.histogram / statistics.count * (BINS / (2 * RANGE))
    for c, colour in enumerate(colours):
        axis.plot(centres, density[c], color=colour, lw=1.2, label=f"{'_' * many}channel {c}")
    gaussian = (-centres.square() / 2).exp() / math.sqrt(2 * math.pi)
    axis.plot(centres, gaussian, color="black", lw=1.5, ls="--", label="Gaussian")
    axis.set(title="Distribution of values", xlabel="value", ylabel="density", xlim=(-RANGE, RANGE))
    axis.set_ylim(0, min(1.05 * max(0.5, float(density.max())), 1))  # a dead channel's peak would hide the rest
    axis.legend(frameon=False, fontsize=8)


def _plot_correlation(statistics: LatentStatistics, axis: Axes) -> None:
    r, ticks = statistics.correlation(), range(0, statistics.channels, max(1, statistics.channels // 8))
    image = axis.imshow(r.numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
    axis.figure.colorbar(image, ax=axis, label="r", shrink=0.9)
    axis.set(title="Correlation of channels", xlabel="channel", ylabel="channel", xticks=ticks, yticks=ticks)
    for a in range(statistics.channels) if statistics.channels <= 8 else ():
        for b in range(statistics.channels):
            ink = "white" if abs(r[a, b]) > 0.6 else "black"
            axis.text(b, a, f"{r[a, b]:z.2f}", ha="center", va="center", color=ink, fontsize=8)


def _plot_spectrum(statistics: LatentStatistics, axis: Axes, colours: list[Any]) -> None:
    frequency, power = statistics.spectrum()
    seen = statistics.num_coefficients > 0
    for c, colour in enumerate(colours):
        axis.plot(frequency[seen], power[c, seen].clamp_min(1e-8), color=colour, lw=1, alpha=0.6)
    axis.plot(frequency[seen], power.mean(0)[seen].clamp_min(1e-8), color="black", lw=2, label="all channels")
    axis.axhline(1, color="grey", lw=1, ls=":", label="white noise")
    axis.set(title="Spectrum", xlabel="frequency, share of Nyquist's", ylabel="power", yscale="log", xlim=(0, 1))
    low, high = axis.get_ylim()
    axis.set_ylim(min(low, 0.1), max(high, 10))
    axis.legend(frameon=False, fontsize=8)


def _plot_scale(statistics: LatentStatistics, axis: Axes, colours: list[Any]) -> None:
    mean, std = statistics.mean(), statistics.std()
    axis.axhspan(-1, 1, color="grey", alpha=0.12, lw=0)
    axis.axhline(0, color="grey", lw=1, ls=":")
    for c, colour in enumerate(colours):
        axis.errorbar(c, mean[c], std[c], fmt="o", color=colour, capsize=4)
    axis.set(title="Mean ± standard deviation (grey: the ideal)", xlabel="channel", ylabel="value")
    axis.set_xticks(range(0, statistics.channels, max(1, statistics.channels // 8)))
