"""What is said of autoencoders that were measured: rows of a table, verdicts, sheets of pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image

from ldm.data import images
from ldm.evaluation.reconstruction import Bicubic, Figures, verdict
from ldm.models.autoencoder import Autoencoder
from ldm.models.latent_statistics import Report

Name = tuple[str, str]  # a picture's key and its caption

AMPLIFIED = 4  # times that differences are shown stronger
COLUMNS = {
    "psnr": ("PSNR dB", ".2f"), "ssim": ("SSIM", ".3f"), "ms_ssim": ("MS-SSIM", ".3f"), "lpips": ("LPIPS", ".3f"),
    "rfid": ("rFID", ".1f"), "red": ("R bias", "+z.1f"), "green": ("G bias", "+z.1f"), "blue": ("B bias", "+z.1f"),
}  # fmt: skip
PUBLISHED = {  # arXiv 2112.10752, table 8; the model card of stabilityai/sd-vae-ft-mse
    4: "KL-f4 27.5 dB (ImageNet)",
    8: "KL-f8 of Stable Diffusion 23.4 dB, SSIM 0.69, its ft-MSE 24.5 dB, SSIM 0.71 (COCO)",
}


class Subject:
    """A row of the table: an autoencoder, or the bicubic one, and what was found of it."""

    def __init__(self, name: str, model: Autoencoder | Bicubic, figures: Figures):
        self.name, self.model, self.figures = name, model, figures
        self.latents = Report(model.channels)

    def rebuild(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Measures a batch, `(N, 3, H, W)`; returns it rebuilt, and the PSNR of each picture, `(N,)`."""
        z = self.model.encode(x)
        finite = z.flatten(1).isfinite().all(1)
        if finite.any():
            self.latents.add(z[finite])
        rebuilt = self.model.decode(z)
        return rebuilt, self.figures.add(x, rebuilt)["psnr"]

    def std(self) -> torch.Tensor:
        """Of each latent channel, `(C,)`; NaN where no latent was finite."""
        return self.latents.std() if self.latents.count else torch.full((self.model.channels,), torch.nan)


class Row(NamedTuple):
    """A picture of a sheet: its place there, its number among all, the original and as each subject rebuilt it."""

    rank: float
    number: int
    pictures: torch.Tensor  # (1 + subjects, 3, H, W)


def describe(subject: Subject, baselines: Mapping[int, Mapping[str, float]]) -> dict[str, Any]:
    """What `report.json` says of a subject; `baselines` are the bicubic figures by factor."""
    means, figures, model = subject.figures.means(), subject.figures, subject.model
    facts = {
        "model": subject.name, "factor": model.factor, "channels": model.channels, "figures": means,
        "broken": figures.broken,
    }  # fmt: skip
    if isinstance(model, Bicubic):
        return facts
    answer, reasons = verdict(means, baselines[model.factor], subject.std(), figures.broken)
    latents = subject.latents.facts() if subject.latents.count else {}
    return {**facts, "latents": latents, "verdict": answer, "reasons": reasons}


def table(facts: Sequence[Mapping[str, Any]]) -> str:
    """A row a model, a column a figure."""
    columns = [key for key in COLUMNS if any(key in each["figures"] for each in facts)]
    rows = [["model", "factor", "channels", *(COLUMNS[key][0] for key in columns)]]
    for each in facts:
        figures = (f"{each['figures'][key]:{COLUMNS[key][1]}}" if key in each["figures"] else "–" for key in columns)
        rows.append([each["model"], str(each["factor"]), str(each["channels"]), *figures])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def verdicts(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for each in facts:
        if "verdict" in each:
            lines += ["", f"{each['model']}: {each['verdict']}", *(f"  - {reason}" for reason in each["reasons"])]
    known = [PUBLISHED[f] for f in sorted({each["factor"] for each in facts}) if f in PUBLISHED]
    return lines + (["", f"published, at 256 px: {'; '.join(known)}"] if known else [])


def sheet(rows: Sequence[Row], subjects: Sequence[Subject], names: Sequence[Name]) -> Image.Image:
    """A line a picture: the original, then of each model the reconstruction and its difference from it, amplified."""
    pictures, captions = [], []
    side = max(128, *(size for row in rows for size in row.pictures.shape[2:]))
    room = side // 7  # letters that fit below a picture

    def tail(text: str) -> str:
        return text if len(text) <= room else f"…{text[-room + 1 :]}"

    for row in rows:
        key, caption = names[row.number]
        pictures.append(row.pictures[0])
        captions.append(f"{tail(key)}: {caption}" if key else caption)
        for subject, rebuilt in zip(subjects, row.pictures[1:], strict=False):  # the bicubic ones come last
            psnr, ssim = (float(subject.figures.each[figure][row.number]) for figure in ("psnr", "ssim"))
            rebuilt = rebuilt.nan_to_num(-1)
            pictures += [rebuilt, AMPLIFIED * (rebuilt - row.pictures[0])]
            figures = f"{psnr:.1f} dB, SSIM {ssim:.2f}" if math.isfinite(ssim) else "not finite"
            captions += [f"{tail(subject.name)} {figures}", f"{AMPLIFIED}x the difference"]
    return images.grid([images.to_pil(x[None])[0] for x in pictures], captions, columns=1 + 2 * len(subjects))


def plain(value: Any) -> Any:
    """The same for JSON, which has no NaN and no infinity; figures to six digits."""
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
