"""Evaluation of the autoencoder during and after training: held-out figures, grids of reconstructions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils import gather_object

from ldm.config.schema import Config
from ldm.data.dataset import iter_images
from ldm.data.images import grid, to_pil
from ldm.data.index import Index
from ldm.data.records import HELD_OUT
from ldm.data.stream import Stream
from ldm.evaluation.reconstruction import ReconstructionMetrics, max_scales, mean_metrics
from ldm.models.autoencoder import Autoencoder, encode_posterior, split_batch
from ldm.models.latent_statistics import LatentStatistics
from ldm.training.trackers import log_image
from ldm.training.trainer import Trainer
from ldm.utils.atomic_files import atomic_file

SHEET_IMAGES = 8
AMPLIFICATION = 4  # of a reconstruction's difference from its original, on grids
Rebuild = Callable[[torch.Tensor], torch.Tensor]


def held_out_splits(data: Index | Stream) -> dict[str, Index | Stream]:
    """What stage one never trains on: each held-out split that has images, and all of them as `held_out`."""
    splits = {name: data.select(name) for name in HELD_OUT}
    splits["held_out"] = data.select(*HELD_OUT)
    return {name: split for name, split in splits.items() if len(split)}


def amplified_difference(rebuilt: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """The difference of images in [-1, 1], AMPLIFICATION times as large; no difference is mid-grey, 0."""
    return AMPLIFICATION * (rebuilt - original)


@torch.no_grad()
def figures(data: Index | Stream, rebuild: Rebuild, trainer: Trainer, workers: int) -> dict[str, float]:
    """Means of PSNR, SSIM, MS-SSIM (if images are large enough), colour bias, flat areas' deviation and edges' width.

    Processes share the work.
    """
    sides = [min(size) for size in data.sizes.used()] if isinstance(data, Index) else [data.data.size]
    own = ReconstructionMetrics(max_scales(min(sides)))
    for x in share(data, trainer, workers):
        own.add(x, rebuild(x).float().cpu())
    parts = [part for part in gather_object([own.per_image]) if part]
    return mean_metrics({name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def share(data: Index | Stream, trainer: Trainer, workers: int) -> Iterator[torch.Tensor]:
    """This process's share of the images, in batches, read by its `workers`."""
    state = trainer.accelerator
    return iter_images(data, rank=state.process_index, processes=state.num_processes, workers=workers)


def rebuild_with(vae: Any, device: torch.device) -> Rebuild:
    """Encoder and decoder of a model in training, without the posterior's noise."""

    def rebuild(x: torch.Tensor) -> torch.Tensor:
        parts = (part.to(device, vae.dtype) for part in split_batch(x))
        return torch.cat([vae.decode(encode_posterior(vae, part)[0]).sample.float().cpu() for part in parts])

    return rebuild


def while_training(data: Index | Stream, config: Config, trainer: Trainer, vae: Any) -> None:
    """Held-out figures into the metrics, and `stage1/samples/step-….png`; both with the EMA weights."""
    with trainer.ema_weights("a validation"):
        rebuild = rebuild_with(vae, trainer.device)
        if (held := held_out_splits(data).get("held_out")) is not None:
            held = held.subset(config.stage1.evaluate_images)
            measured = figures(held, rebuild, trainer, config.data.workers)
            trainer.log_values({f"held_out_{name}": value for name, value in measured.items()})
        write_sheet(data, rebuild, trainer)


def when_done(data: Index | Stream, config: Config, autoencoder: Autoencoder, trainer: Trainer) -> dict[str, Any]:
    """Figures of each held-out split, and a grid of reconstructions if the last step has none."""

    def rebuild(x: torch.Tensor) -> torch.Tensor:
        return autoencoder.decode(autoencoder.encode(x))

    write_sheet(data, rebuild, trainer)
    by_split: dict[str, Any] = {
        name: figures(split.subset(config.stage1.evaluate_images), rebuild, trainer, config.data.workers)
        for name, split in held_out_splits(data).items()
    }
    if trainer.is_main:
        for name, values in by_split.items():
            print(f"stage1: {name} rebuilt, psnr {values['psnr']:.2f} dB, ssim {values['ssim']:.4f}", flush=True)
    return by_split


def latent_report(data: Index | Stream, autoencoder: Autoencoder, trainer: Trainer, workers: int) -> dict[str, Any]:
    """Are the latents ready for diffusion? Draws `stage1/latents.png`; returns the facts. Processes share the work."""
    report = LatentStatistics(autoencoder.channels)
    for x in share(data, trainer, workers):
        report.add(autoencoder.encode(x))
    for tensor in report.tensors().values():
        tensor.copy_(trainer.sum(tensor))
    if trainer.is_main:
        from ldm.models.latent_plots import plot_latents  # imports matplotlib, which is slow

        plot_latents(report, trainer.folder / "latents.png")
        for warning in report.warnings():
            print(f"stage1: latents: {warning}", flush=True)
    return report.facts()


@torch.no_grad()
def write_sheet(data: Index | Stream, rebuild: Rebuild, trainer: Trainer) -> None:
    """`stage1/samples/step-….png`: originals, reconstructions and amplified differences of the first held-out images.

    Data without held-out images shows its first ones.
    """
    path = trainer.folder / "samples" / f"step-{trainer.step:06d}.png"
    if path.exists() or not trainer.is_main:
        return
    data = held_out_splits(data).get("held_out", data)
    candidates = data if isinstance(data, Stream) else data.first(8 * SHEET_IMAGES)
    x = max(iter_images(candidates, SHEET_IMAGES), key=len)  # a batch has one size; take the fullest
    rebuilt = rebuild(x).float().cpu()
    rows = {"original": x, "rebuilt": rebuilt, f"difference, {AMPLIFICATION}-fold": amplified_difference(rebuilt, x)}
    images = [image for row in rows.values() for image in to_pil(row)]
    sheet = grid(images, [name for name, row in rows.items() for _ in row], columns=len(x))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as tmp_path:
        sheet.save(tmp_path, "PNG")
    log_image(trainer.accelerator.trackers, "reconstructions", sheet, trainer.step)
