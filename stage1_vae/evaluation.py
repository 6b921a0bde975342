"""What is looked at while the autoencoder trains, and when it is done: held-out figures, sheets of reconstructions."""

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
from ldm.evaluation.reconstruction import Figures, scales_of
from ldm.models.autoencoder import Autoencoder, at_once, encoded
from ldm.models.latent_statistics import Report
from ldm.training.trackers import log_image
from ldm.training.trainer import Trainer
from ldm.utils.atomic_files import whole_file

SHOWN = 8  # pictures of a sheet
AMPLIFIED = 4  # how much larger than it is a difference is drawn
Rebuild = Callable[[torch.Tensor], torch.Tensor]


def held_out(data: Index | Stream) -> dict[str, Index | Stream]:
    """What stage one never sees: each held-out split that there is, and all of them together."""
    found = {name: data.select(name) for name in HELD_OUT}
    found["held_out"] = data.select(*HELD_OUT)
    return {name: part for name, part in found.items() if len(part)}


@torch.no_grad()
def figures(data: Index | Stream, rebuild: Rebuild, run: Trainer, workers: int) -> dict[str, float]:
    """PSNR, SSIM, MS-SSIM where there is room, and colour bias in 1/255, each the mean; every process has its share."""
    sides = [min(size) for size in data.sizes] if isinstance(data, Index) else [data.data.size]
    found = Figures(scales_of(min(sides)))
    for x in share(data, run, workers):
        found.add(x, rebuild(x).float().cpu())
    parts = [part for part in gather_object([found.each]) if part]
    return {name: float(torch.cat([part[name] for part in parts]).nanmean()) for name in parts[0]}


def share(data: Index | Stream, run: Trainer, workers: int) -> Iterator[torch.Tensor]:
    """This process's pictures of all, in batches, read by its `workers`."""
    state = run.accelerator
    return iter_images(data, rank=state.process_index, processes=state.num_processes, workers=workers)


def plain(vae: Any, device: torch.device) -> Rebuild:
    """Encoder and decoder of a model in training, without noise."""

    def rebuild(x: torch.Tensor) -> torch.Tensor:
        parts = (part.to(device, vae.dtype) for part in at_once(x))
        return torch.cat([vae.decode(encoded(vae, part)[0]).sample.float().cpu() for part in parts])

    return rebuild


def while_training(data: Index | Stream, config: Config, run: Trainer, vae: Any) -> None:
    """Held-out figures into the metrics, and `stage1/samples/step-….png`; both with the EMA weights."""
    with run.ema_weights("a validation"):
        rebuild = plain(vae, run.device)
        if (held := held_out(data).get("held_out")) is not None:
            held = held.subset(config.stage1.evaluate_images)
            found = figures(held, rebuild, run, config.data.workers)
            run.log_values({f"held_out_{name}": value for name, value in found.items()})
        write_sheet(data, rebuild, run)


def when_done(data: Index | Stream, config: Config, autoencoder: Autoencoder, run: Trainer) -> dict[str, Any]:
    """Figures of each held-out split, and a sheet of reconstructions where none of the last step stands."""

    def rebuild(x: torch.Tensor) -> torch.Tensor:
        return autoencoder.decode(autoencoder.encode(x))

    write_sheet(data, rebuild, run)
    found: dict[str, Any] = {
        name: figures(part.subset(config.stage1.evaluate_images), rebuild, run, config.data.workers)
        for name, part in held_out(data).items()
    }
    if run.is_main:
        for name, values in found.items():
            print(f"stage1: {name} rebuilt, psnr {values['psnr']:.2f} dB, ssim {values['ssim']:.4f}", flush=True)
    return found


def latent_report(data: Index | Stream, autoencoder: Autoencoder, run: Trainer, workers: int) -> dict[str, Any]:
    """Are the latents ready for diffusion? `stage1/latents.png`, and the facts; every process measures its share."""
    report = Report(autoencoder.channels)
    for x in share(data, run, workers):
        report.add(autoencoder.encode(x))
    for tensor in report.tensors().values():
        tensor.copy_(run.sum(tensor))
    if run.is_main:
        report.plot(run.folder / "latents.png")
        for warning in report.warnings():
            print(f"stage1: latents: {warning}", flush=True)
    return report.facts()


@torch.no_grad()
def write_sheet(data: Index | Stream, rebuild: Rebuild, run: Trainer) -> None:
    """The first held-out pictures, or of all: originals, reconstructions, and differences, amplified about grey."""
    path = run.folder / "samples" / f"step-{run.step:06d}.png"
    if path.exists() or not run.is_main:
        return
    data = held_out(data).get("held_out", data)
    x = max(iter_images(data if isinstance(data, Stream) else data.first(8 * SHOWN), SHOWN), key=len)  # of one size
    rebuilt = rebuild(x).float().cpu()
    rows = {"original": x, "rebuilt": rebuilt, f"difference, {AMPLIFIED}-fold": (rebuilt - x) / 2 * AMPLIFIED}
    pictures = [picture for row in rows.values() for picture in to_pil(row)]
    sheet = grid(pictures, [name for name, row in rows.items() for _ in row], columns=len(x))
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as tmp_path:
        sheet.save(tmp_path, "PNG")
    log_image(run.accelerator.trackers, "reconstructions", sheet, run.step)
