"""The report on measured autoencoders: a table of figures, recommendations, grids of images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image

from ldm.data import images
from ldm.evaluation.reconstruction import Bicubic, ReconstructionMetrics, recommend_action
from ldm.models.autoencoder import Autoencoder
from ldm.models.latent_statistics import LatentStatistics
from stage1_vae.evaluation import AMPLIFICATION, amplified_difference

ImageName = tuple[str, str]  # key, caption

COLUMNS = {
    "psnr": ("PSNR dB", ".2f"),
    "ssim": ("SSIM", ".3f"),
    "ms_ssim": ("MS-SSIM", ".3f"),
    "lpips": ("LPIPS", ".3f"),
    "st_lpips": ("ST-LPIPS", ".3f"),
    "rfid": ("rFID", ".1f"),
    "flat": ("flat σ", ".2f"),
    "edge": ("edge width", ".2f"),
    "red": ("R bias", "+z.1f"),
    "green": ("G bias", "+z.1f"),
    "blue": ("B bias", "+z.1f"),
}
PUBLISHED = {  # arXiv 2112.10752, table 8; the model card of stabilityai/sd-vae-ft-mse
    4: "KL-f4 27.5 dB (ImageNet)",
    8: "KL-f8 of Stable Diffusion 23.4 dB, SSIM 0.69, its ft-MSE 24.5 dB, SSIM 0.71 (COCO)",
}


class Subject:
    """A row of the table: an autoencoder, or the bicubic baseline, with its figures and latent statistics."""

    def __init__(self, name: str, model: Autoencoder | Bicubic, metrics: ReconstructionMetrics):
        self.name, self.model, self.metrics = name, model, metrics
        self.latents = LatentStatistics(model.channels)

    def rebuild(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Measures a batch, `(N, 3, H, W)`; returns its reconstruction and the PSNR per image, `(N,)`."""
        z = self.model.encode(x)
        finite = z.flatten(1).isfinite().all(1)
        if finite.any():
            self.latents.add(z[finite])
        rebuilt = self.model.decode(z)
        return rebuilt, self.metrics.add(x, rebuilt)["psnr"]

    def std(self) -> torch.Tensor:
        """Standard deviation per latent channel, `(C,)`; NaN if no latent was finite."""
        return self.latents.std() if self.latents.count else torch.full((self.model.channels,), torch.nan)


class Row(NamedTuple):
    """An image on a grid, with its reconstructions."""

    rank: float  # rows are sorted by it
    number: int  # of the image in the data
    images: torch.Tensor  # (1 + subjects, 3, H, W): the original, then each subject's reconstruction


def describe(subject: Subject, baselines: Mapping[int, Mapping[str, float]]) -> dict[str, Any]:
    """A subject's entry in `report.json`; `baselines` are the bicubic figures by factor."""
    means, metrics, model = subject.metrics.means(), subject.metrics, subject.model
    facts = {
        "model": subject.name,
        "factor": model.factor,
        "channels": model.channels,
        "figures": means,
        "broken": metrics.nonfinite,
    }
    if isinstance(model, Bicubic):
        return facts
    action, reasons = recommend_action(means, baselines[model.factor], subject.std(), metrics.nonfinite)
    latents = subject.latents.facts() if subject.latents.count else {}
    return {**facts, "latents": latents, "recommendation": action, "reasons": reasons}


def table(facts: Sequence[Mapping[str, Any]]) -> str:
    """A row per model, a column per figure."""
    columns = [key for key in COLUMNS if any(key in entry["figures"] for entry in facts)]
    rows = [["model", "factor", "channels", *(COLUMNS[key][0] for key in columns)]]
    for entry in facts:
        values = entry["figures"]
        cells = (f"{values[key]:{COLUMNS[key][1]}}" if key in values else "–" for key in columns)
        rows.append([entry["model"], str(entry["factor"]), str(entry["channels"]), *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def recommendations(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines: what to do with each autoencoder, the reasons, and published figures of the same factors."""
    lines = []
    for entry in facts:
        if "recommendation" in entry:
            reasons = (f"  - {reason}" for reason in entry["reasons"])
            lines += ["", f"{entry['model']}: {entry['recommendation']}", *reasons]
    published = [PUBLISHED[f] for f in sorted({entry["factor"] for entry in facts}) if f in PUBLISHED]
    return lines + (["", f"published, at 256 px: {'; '.join(published)}"] if published else [])


def draw_sheet(rows: Sequence[Row], subjects: Sequence[Subject], names: Sequence[ImageName]) -> Image.Image:
    """A line per image: the original, then each model's reconstruction and its amplified difference from it."""
    cells, captions = [], []
    side = max(128, *(size for row in rows for size in row.images.shape[2:]))
    max_letters = side // 7  # that fit below an image

    def tail(text: str) -> str:
        return text if len(text) <= max_letters else f"…{text[-max_letters + 1 :]}"

    for row in rows:
        key, caption = names[row.number]
        cells.append(row.images[0])
        captions.append(f"{tail(key)}: {caption}" if key else caption)
        for subject, rebuilt in zip(subjects, row.images[1:], strict=False):  # the bicubic ones come last
            psnr, ssim = (float(subject.metrics.per_image[name][row.number]) for name in ("psnr", "ssim"))
            rebuilt = rebuilt.nan_to_num(-1)
            cells += [rebuilt, amplified_difference(rebuilt, row.images[0])]
            figures = f"{psnr:.1f} dB, SSIM {ssim:.2f}" if math.isfinite(ssim) else "not finite"
            captions += [f"{tail(subject.name)} {figures}", f"{AMPLIFICATION}x the difference"]
    return images.grid([images.to_pil(x[None])[0] for x in cells], captions, columns=1 + 2 * len(subjects))


def to_json(value: Any) -> Any:
    """The value without NaN and infinity, which JSON lacks: they become null. Figures are rounded to six digits."""
    if isinstance(value, Mapping):
        return {key: to_json(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [to_json(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
