"""How well an autoencoder reconstructs images."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ldm.evaluation.sharpness import edge_width, flat_deviation

if TYPE_CHECKING:  # torchmetrics takes a second to import, so it is imported only where it is used
    from torchmetrics import Metric

KERNEL = 11  # pixels of SSIM's window
BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # weights of MS-SSIM's scales, finest first; Wang et al. 2003
COLOURS = ("red", "green", "blue")
KEEP, TUNE, RETRAIN = "keep", "tune the decoder", "retrain"
MIN_PSNR_GAIN = 2.0  # dB over bicubic resampling
MIN_SSIM_GAIN = 0.25  # share of the gap between bicubic resampling's SSIM and 1
MAX_LPIPS_RATIO = 0.5  # of LPIPS over that of bicubic resampling
INVISIBLE_PSNR = 40.0  # dB above which no difference is visible
MAX_BIAS = 2.0  # 1/255
STD_RANGE = (0.3, 3.0)  # of a latent channel


class ReconstructionMetrics:
    """Metrics of images and their reconstructions, gathered batch by batch.

        metrics = ReconstructionMetrics()
        for x in batches:
            metrics.add(x, autoencoder.decode(autoencoder.encode(x)))
        metrics.means()

    PSNR in dB, SSIM, and the colour bias: mean signed error of each channel, reconstructed less real, in 1/255; the
    deviation of flat areas in 1/255, `flat`, and the width of edges, `edge` (`ldm.evaluation.sharpness`). Also
    MS-SSIM if `scales` is 2 … 5 (`max_scales`), LPIPS and rFID if their metrics are passed
    (`ldm.models.feature_networks`); shift-tolerant LPIPS is `st_lpips`.
    A reconstruction with NaN or Inf is counted as `nonfinite` and has NaN for every metric.
    """

    def __init__(self, scales: int = 0, lpips: Metric | None = None, fid: Metric | None = None):
        self.scales, self.lpips, self.fid = scales, lpips, fid
        self.count = self.nonfinite = 0
        self._batches: dict[str, list[torch.Tensor]] = {}

    @torch.no_grad()
    def add(self, real: torch.Tensor, reconstructed: torch.Tensor) -> dict[str, torch.Tensor]:
        """Adds a batch: both `(N, 3, H, W)` in [-1, 1]; `reconstructed` is clipped to it. Batches may differ in size.

        Returns the batch's metrics per image, `(N,)` float64 on the CPU.
        """
        from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

        reconstructed = reconstructed.to(real.device)
        finite = reconstructed.flatten(1).isfinite().all(1)  # (N,)
        real, reconstructed = real / 2 + 0.5, (reconstructed.nan_to_num() / 2 + 0.5).clamp(0, 1)
        metrics = {
            "psnr": peak_signal_noise_ratio(reconstructed, real, data_range=1.0, reduction="none", dim=(1, 2, 3)),
            "ssim": structural_similarity_index_measure(reconstructed, real, data_range=1.0, reduction="none"),
        }
        if self.scales:
            metrics["ms_ssim"] = ms_ssim(reconstructed, real, self.scales)
        if self.lpips is not None:
            metrics[getattr(self.lpips, "figure", "lpips")] = self.lpips(reconstructed, real)
            self.lpips.reset()  # or it would accumulate every batch
        metrics |= {"flat": flat_deviation(reconstructed, real), "edge": edge_width(reconstructed, real)}
        bias = (reconstructed - real).mean((2, 3)) * 255  # (N, 3)
        metrics |= dict(zip(COLOURS, bias.T, strict=True))
        metrics = {
            name: values.reshape(-1).masked_fill(~finite, torch.nan).double().cpu() for name, values in metrics.items()
        }
        for name, values in metrics.items():
            self._batches.setdefault(name, []).append(values)
        if self.fid is not None and finite.any():
            for images, is_real in ((real, True), (reconstructed, False)):
                self.fid.update(images[finite].mul(255).round().byte(), real=is_real)
        self.count += len(real)
        self.nonfinite += int((~finite).sum())
        return metrics

    @property
    def per_image(self) -> dict[str, torch.Tensor]:
        """The metrics of every image, `(N,)` float64, in the order in which they were added."""
        return {name: torch.cat(batches) for name, batches in self._batches.items()}

    def means(self) -> dict[str, float]:
        """Each metric's mean over the finite reconstructions, and rFID, which is a metric of the whole set.

        `flat` and `edge` are those of the images that have flat areas and edges, and missing where none has.
        """
        metrics = mean_metrics(self.per_image)
        if self.fid is not None and self.count - self.nonfinite > 1:
            metrics["rfid"] = float(self.fid.compute())
        return metrics


def mean_metrics(per_image: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """The mean of each metric's `(N,)` over the images that have it; without `flat` or `edge` where none has."""
    by_name = {name: float(values.nanmean()) for name, values in per_image.items()}
    return {name: value for name, value in by_name.items() if name not in ("flat", "edge") or not math.isnan(value)}


class Bicubic:
    """The baseline that an autoencoder must beat: images shrunk by its factor and enlarged again."""

    channels = 3

    def __init__(self, factor: int):
        self.factor = factor

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, scale_factor=1 / self.factor, mode="bicubic", antialias=True)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return F.interpolate(z, scale_factor=self.factor, mode="bicubic")


def reconstruction(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
    """Mean PSNR in dB and mean SSIM over the images of batches of (real, reconstructed).

    A batch is two tensors `(N, 3, H, W)` in [-1, 1]; batches may differ in size. NaN if a value is NaN or Inf.
    """
    metrics = ReconstructionMetrics()
    for real, reconstructed in pairs:
        metrics.add(real, reconstructed)
    values = metrics.per_image
    return {name: float(values[name].mean()) for name in ("psnr", "ssim")}


def recommend_action(
    means: Mapping[str, float], bicubic: Mapping[str, float], std: torch.Tensor, nonfinite: int = 0
) -> tuple[str, list[str]]:
    """Whether to keep an autoencoder, tune its decoder or retrain it (`KEEP`, `TUNE`, `RETRAIN`), and the reasons.

    `means` are its mean metrics; `bicubic` are those of bicubic resampling by the same factor on the same images, a
    measure of how hard the images are. `std` `(C,)` is the standard deviation of its normalised latents per channel.

    - retrain if a reconstruction has NaN or Inf; if no metric (PSNR, SSIM, LPIPS where it was measured) is better than
      bicubic resampling, so that the latents carry too little; or if a channel's std is outside 0.3 … 3: stage two's
      noise schedules assume 1, and no decoder mends latents;
    - tune the decoder if a colour is off by more than 2/255, which is visible in flat areas, or if the gain over
      bicubic resampling is small. It is large if LPIPS is at most half and PSNR and SSIM are no worse; without it, if
      PSNR is 2 dB up (a third of the squared error gone) and SSIM closes a quarter of the gap to 1; or from 40 dB on;
    - keep otherwise.
    """
    if nonfinite or not math.isfinite(means["ssim"]):
        cause = "half precision overflows in some autoencoders, float32 does not"
        return RETRAIN, [f"{nonfinite} reconstructions have values that are not finite; {cause}"]
    psnr, ssim, lpips = (means.get(name, math.nan) for name in ("psnr", "ssim", "lpips"))
    bicubic_psnr, bicubic_ssim, bicubic_lpips = (bicubic.get(name, math.nan) for name in ("psnr", "ssim", "lpips"))
    comparison = f"PSNR {psnr:.1f} dB (bicubic {bicubic_psnr:.1f}), SSIM {ssim:.3f} ({bicubic_ssim:.3f})"
    if not math.isnan(lpips):
        comparison += f", LPIPS {lpips:.3f} ({bicubic_lpips:.3f})"
        gains = lpips <= MAX_LPIPS_RATIO * bicubic_lpips and psnr >= bicubic_psnr and ssim >= bicubic_ssim
    else:
        gains = psnr >= bicubic_psnr + MIN_PSNR_GAIN and 1 - ssim <= (1 - MIN_SSIM_GAIN) * (1 - bicubic_ssim)
    gains = gains or psnr >= INVISIBLE_PSNR

    retrain, tune = [], []
    if not (gains or psnr > bicubic_psnr or ssim > bicubic_ssim or lpips < bicubic_lpips):
        retrain.append(f"no better than shrinking images and enlarging them again: {comparison}")
    elif not gains:
        tune.append(f"too little detail comes back: {comparison}")
    low, high = STD_RANGE
    outside = [f"{channel} {value:.2g}" for channel, value in enumerate(std.tolist()) if not low <= value <= high]
    if outside:
        channels = ", ".join(outside[:8]) + (f" and {len(outside) - 8} more" if len(outside) > 8 else "")
        retrain.append(f"std of latent channel {channels}, outside {low} … {high}: measure the latents anew, or train")
    bias = [means[colour] for colour in COLOURS]
    shift = "R {:+.1f}, G {:+.1f}, B {:+.1f}".format(*bias)
    if max(map(abs, bias)) > MAX_BIAS:
        tune.append(f"colours are shifted: {shift} of 255, and {MAX_BIAS:g} are visible")
    if retrain or tune:
        return RETRAIN if retrain else TUNE, retrain + tune
    return KEEP, [comparison, f"colours: {shift} of 255", f"latents' std {std.min():.2f} … {std.max():.2f}"]


def max_scales(side: int) -> int:
    """How many scales of MS-SSIM, 2 … 5, fit into images whose shorter side is `side` pixels; 0 if not even two do.

    The window must fit into the coarsest scale, and torchmetrics requires (scales - 1)² windows.
    """
    return next((n for n in (5, 4, 3, 2) if side // max(2 ** (n - 1), (n - 1) ** 2) >= KERNEL), 0)


def ms_ssim(reconstructed: torch.Tensor, real: torch.Tensor, scales: int = 5) -> torch.Tensor:
    """MS-SSIM per image, `(N,)`, of `(N, 3, H, W)` in [0, 1].

    With fewer than five scales, the weights of the remaining scales are enlarged to the sum of all five.
    """
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    share = sum(BETAS[:scales]) / sum(BETAS)
    betas = tuple(beta / share for beta in BETAS[:scales])
    values: torch.Tensor = multiscale_structural_similarity_index_measure(
        reconstructed, real, reduction="none", data_range=1.0, kernel_size=KERNEL, betas=betas
    )
    return values.reshape(-1)
