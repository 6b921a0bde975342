"""How well an autoencoder gives pictures back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:  # torchmetrics takes a second to import, so only what measures imports it
    from torchmetrics import Metric

KERNEL = 11  # pixels of SSIM's window
BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # weights of MS-SSIM's scales, finest first; Wang et al. 2003
COLOURS = ("red", "green", "blue")
KEEP, TUNE, RETRAIN = "keep", "tune the decoder", "retrain"
LEAST_GAIN, LEAST_CLOSED = 2.0, 0.25  # over bicubic: dB of PSNR, share of what its SSIM lacks
MOST_LPIPS = 0.5  # share of the bicubic one
UNSEEN = 40.0  # dB from which on a difference can't be seen
MOST_BIAS = 2.0  # 1/255
STD = (0.3, 3.0)  # of a latent channel


class Figures:
    """The figures of pictures and their reconstructions, gathered batch by batch.

        figures = Figures()
        for x in batches:
            figures.add(x, autoencoder.decode(autoencoder.encode(x)))
        figures.means()

    PSNR in dB, SSIM, and the colour bias: mean signed error of each channel, rebuilt less real, in 1/255. Also MS-SSIM
    where `scales` is 2 … 5 (`scales_of`), LPIPS and rFID where their metrics are given (`ldm.models.feature_networks`).
    A picture that comes back with a value that is not finite is counted as `broken` and has NaN for every figure.
    """

    def __init__(self, scales: int = 0, lpips: Metric | None = None, fid: Metric | None = None):
        self.scales, self.lpips, self.fid = scales, lpips, fid
        self.count = self.broken = 0
        self._each: dict[str, list[torch.Tensor]] = {}

    @torch.no_grad()
    def add(self, real: torch.Tensor, rebuilt: torch.Tensor) -> dict[str, torch.Tensor]:
        """Takes in a batch, each `(N, 3, H, W)` in [-1, 1], of which `rebuilt` is clipped; batches may differ in size.

        Returns the figures of each of its pictures, `(N,)` float64 on the CPU.
        """
        from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

        rebuilt = rebuilt.to(real.device)
        finite = rebuilt.flatten(1).isfinite().all(1)  # (N,)
        real, rebuilt = real / 2 + 0.5, (rebuilt.nan_to_num() / 2 + 0.5).clamp(0, 1)
        found = {
            "psnr": peak_signal_noise_ratio(rebuilt, real, data_range=1.0, reduction="none", dim=(1, 2, 3)),
            "ssim": structural_similarity_index_measure(rebuilt, real, data_range=1.0, reduction="none"),
        }
        if self.scales:
            found["ms_ssim"] = ms_ssim(rebuilt, real, self.scales)
        if self.lpips is not None:
            found["lpips"] = self.lpips(rebuilt, real)
            self.lpips.reset()  # it would keep them all
        bias = (rebuilt - real).mean((2, 3)) * 255  # (N, 3)
        found |= dict(zip(COLOURS, bias.T, strict=True))
        found = {
            name: values.reshape(-1).masked_fill(~finite, torch.nan).double().cpu() for name, values in found.items()
        }
        for name, values in found.items():
            self._each.setdefault(name, []).append(values)
        if self.fid is not None and finite.any():
            for pictures, is_real in ((real, True), (rebuilt, False)):
                self.fid.update(pictures[finite].mul(255).round().byte(), real=is_real)
        self.count += len(real)
        self.broken += int((~finite).sum())
        return found

    @property
    def each(self) -> dict[str, torch.Tensor]:
        """The figures of each picture, `(N,)` float64, in the order that they came in."""
        return {name: torch.cat(values) for name, values in self._each.items()}

    def means(self) -> dict[str, float]:
        """Each figure as the mean over the pictures that are not broken, and rFID, which only all together have."""
        figures = {name: float(values.nanmean()) for name, values in self.each.items()}
        if self.fid is not None and self.count - self.broken > 1:
            figures["rfid"] = float(self.fid.compute())
        return figures


class Bicubic:
    """What any autoencoder must beat: pictures made smaller by its factor and enlarged again."""

    channels = 3

    def __init__(self, factor: int):
        self.factor = factor

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, scale_factor=1 / self.factor, mode="bicubic", antialias=True)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return F.interpolate(z, scale_factor=self.factor, mode="bicubic")


def reconstruction(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
    """PSNR in dB and SSIM, each the mean over pictures, of batches of real and rebuilt ones.

    A batch is `(N, 3, H, W)` in [-1, 1]; batches may differ in size. NaN, if a rebuilt value is not finite.
    """
    figures = Figures()
    for real, rebuilt in pairs:
        figures.add(real, rebuilt)
    each = figures.each
    return {name: float(each[name].mean()) for name in ("psnr", "ssim")}


def verdict(
    found: Mapping[str, float], plain: Mapping[str, float], std: torch.Tensor, broken: int = 0
) -> tuple[str, list[str]]:
    """What to do with an autoencoder, `keep`, `tune the decoder` or `retrain`, and the figures that say so.

    `found` are its means, `plain` those of bicubic resampling by the same factor, there and back, on the same pictures:
    how hard these pictures are. `std` `(C,)` is that of its normalised latents there, by channel.

    - retrain, where a picture came back with a value that is not finite; where no figure (PSNR, SSIM, LPIPS if it was
      measured) is better than bicubic resampling, so that the latents carry too little; where a channel's std is
      outside 0.3 … 3: stage two's noise schedules assume 1, and no decoder mends latents;
    - tune the decoder, where a colour is off by more than 2/255, which is seen in flat areas, or the gain over bicubic
      resampling is small. It is not if LPIPS is at most half and the others are no worse; without LPIPS, if PSNR is
      2 dB up (a third of the squared error gone) and SSIM closes a quarter of the gap to 1; or at 40 dB in any case;
    - keep otherwise.
    """
    if broken or not math.isfinite(found["ssim"]):
        again = "half precision overflows in some autoencoders, float32 does not"
        return RETRAIN, [f"{broken} pictures came back with values that are not finite; {again}"]
    psnr, ssim, lpips = (found.get(name, math.nan) for name in ("psnr", "ssim", "lpips"))
    plain_psnr, plain_ssim, plain_lpips = (plain.get(name, math.nan) for name in ("psnr", "ssim", "lpips"))
    against = f"PSNR {psnr:.1f} dB (bicubic {plain_psnr:.1f}), SSIM {ssim:.3f} ({plain_ssim:.3f})"
    if not math.isnan(lpips):
        against += f", LPIPS {lpips:.3f} ({plain_lpips:.3f})"
        gains = lpips <= MOST_LPIPS * plain_lpips and psnr >= plain_psnr and ssim >= plain_ssim
    else:
        gains = psnr >= plain_psnr + LEAST_GAIN and 1 - ssim <= (1 - LEAST_CLOSED) * (1 - plain_ssim)
    gains = gains or psnr >= UNSEEN

    retrain, tune = [], []
    if not (gains or psnr > plain_psnr or ssim > plain_ssim or lpips < plain_lpips):
        retrain.append(f"no better than making pictures smaller and enlarging them: {against}")
    elif not gains:
        tune.append(f"too little detail comes back: {against}")
    off = [f"{c} {value:.2g}" for c, value in enumerate(std.tolist()) if not STD[0] <= value <= STD[1]]
    if off:
        named = ", ".join(off[:8]) + (f" and {len(off) - 8} more" if len(off) > 8 else "")
        retrain.append(
            f"std of latent channel {named}, outside {STD[0]} … {STD[1]}: measure the latents anew, or train"
        )
    bias = [found[colour] for colour in COLOURS]
    shift = "R {:+.1f}, G {:+.1f}, B {:+.1f}".format(*bias)
    if max(map(abs, bias)) > MOST_BIAS:
        tune.append(f"colours are shifted: {shift} of 255, and {MOST_BIAS:g} are seen")
    if retrain or tune:
        return RETRAIN if retrain else TUNE, retrain + tune
    return KEEP, [against, f"colours: {shift} of 255", f"latents' std {std.min():.2f} … {std.max():.2f}"]


def scales_of(side: int) -> int:
    """The scales of MS-SSIM, 2 … 5, that pictures whose shorter side is `side` pixels have room for; 0: not even two.

    The window must fit into the coarsest scale, and torchmetrics asks for (scales - 1)² windows.
    """
    return next((n for n in (5, 4, 3, 2) if side // max(2 ** (n - 1), (n - 1) ** 2) >= KERNEL), 0)


def ms_ssim(rebuilt: torch.Tensor, real: torch.Tensor, scales: int = 5) -> torch.Tensor:
    """MS-SSIM of each picture, `(N,)`, of `(N, 3, H, W)` in [0, 1].

    With fewer than five scales, the weights of those that are left are enlarged so that they add up to what all do.
    """
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    share = sum(BETAS[:scales]) / sum(BETAS)
    betas = tuple(beta / share for beta in BETAS[:scales])
    found: torch.Tensor = multiscale_structural_similarity_index_measure(
        rebuilt, real, reduction="none", data_range=1.0, kernel_size=KERNEL, betas=betas
    )
    return found.reshape(-1)
