"""Sample grids while stage two trains: they show what metrics miss."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object
from PIL import Image

from ldm.config.schema import Config
from ldm.data.crops import crop_resize
from ldm.data.images import grid, to_pil, to_tensor
from ldm.data.index import Index
from ldm.data.records import HELD_OUT
from ldm.data.stream import Stream
from ldm.distributed.launch import on_main
from ldm.models.conditioning import downsample
from ldm.sampling.pipeline import LatentDiffusion
from ldm.training import evaluation_sizes as sizes
from ldm.training.trackers import log_image
from ldm.training.trainer import Trainer
from ldm.utils.atomic_files import atomic_file
from ldm.utils.rng import generator
from stage2_diffusion.masks import random_mask


@dataclass
class SheetInputs:
    """What a sample grid shows: the captions of its samples, and the model's arguments, an entry per sample."""

    captions: list[str]
    arguments: dict[str, Any] = field(default_factory=dict)
    sources: list[Image.Image] = field(default_factory=list)
    """The images that samples complete or enlarge; shown before the samples."""
    marked: list[int] = field(default_factory=list)
    """Samples in a frame."""


def write_sheet(config: Config, trainer: Trainer, model: LatentDiffusion, data: Index | Stream) -> None:
    """`stage2/samples/step-….png`, with the EMA weights; every process generates its share.

    Text: the configured prompts, with a frame around held-out ones. Classes: one image each. Inpainting and
    super-resolution: the inputs, then the results.
    """
    path = trainer.folder / "samples" / f"step-{trainer.step:06d}.png"
    stage = config.stage2
    if on_main(path.exists) or (stage.text and not stage.image and not config.sample.prompts):
        return
    inputs = _image_inputs(config, model, data) if stage.image else _inputs(config, model, data)
    with trainer.ema_weights("a sample grid"):
        samples = _generate(model, trainer, config.run.seed, len(inputs.captions), inputs.arguments)
    if trainer.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        captions = ["input"] * len(inputs.sources) + inputs.captions
        sheet = grid(inputs.sources + samples, captions, columns=8, marked=inputs.marked)
        with atomic_file(path) as tmp_path:
            sheet.save(tmp_path, "PNG")
        log_image(trainer.accelerator.trackers, "samples", sheet, trainer.step)


def _inputs(config: Config, model: LatentDiffusion, data: Index | Stream) -> SheetInputs:
    """Of a model that generates from text, from classes, or from noise alone."""
    stage, prompts = config.stage2, list(config.sample.prompts)
    if stage.text:
        arguments: dict[str, Any] = {"prompts": prompts}
        if stage.classes:
            arguments["labels"] = [model.classes[i % len(model.classes)] for i in range(len(prompts))]
        held_out = {caption for captions in data.select("combination").captions() for caption in captions}
        return SheetInputs(prompts, arguments, marked=[i for i, prompt in enumerate(prompts) if prompt in held_out])
    if stage.classes:
        labels = list(model.classes[: sizes.SHEET_CLASSES])
        return SheetInputs(labels, {"labels": labels})
    return SheetInputs([""] * sizes.SHEET_UNCONDITIONAL)


def _image_inputs(config: Config, model: LatentDiffusion, data: Index | Stream) -> SheetInputs:
    """Of a model that completes or enlarges images: held-out ones, or training images if none are held out."""
    assert isinstance(data, Index), "the configuration allows no stream here"
    stage, size = config.stage2, config.data.size
    held_out = data.select("reconstruction")
    chosen = held_out if len(held_out) else data.select("train", *HELD_OUT)
    numbers = range(min(sizes.SHEET_INPUTS, len(chosen)))
    pixels = torch.stack([to_tensor(crop_resize(chosen.load_image(i), (size, size))[0]) for i in numbers])
    captions = [chosen[i].captions[0] for i in numbers]
    arguments: dict[str, Any] = {"prompts": captions}
    if stage.classes:
        labels = [chosen[i].label for i in numbers]
        arguments["labels"] = [label if label in model.classes else 0 for label in labels]
    if "inpaint" in stage.conditions:
        height, width = pixels.shape[2:]
        masks = [random_mask(generator(config.run.seed, "sheet", i), height, width) for i in numbers]
        arguments |= {"image": pixels, "mask": torch.stack(masks)}
        return SheetInputs(captions, arguments, to_pil(pixels * (1 - arguments["mask"])))
    arguments["image"] = downsample(pixels, model.autoencoder.factor)
    sources = [image.resize((size, size), Image.Resampling.NEAREST) for image in to_pil(arguments["image"])]
    return SheetInputs(captions, arguments, sources)


def _generate(
    model: LatentDiffusion, trainer: Trainer, seed: int, count: int, arguments: dict[str, Any]
) -> list[Image.Image]:
    """Images, number i from the noise of `seed + i`; all processes generate equally many, a few of them twice.

    With sharded weights a process that generates nothing would block the others.
    """
    rank, processes = trainer.accelerator.process_index, trainer.accelerator.num_processes
    share = -(-count // processes)
    own = [i % count for i in range(rank * share, (rank + 1) * share)]
    own_arguments: dict[str, Any] = {
        name: values[own] if isinstance(values, torch.Tensor) else [values[i] for i in own]
        for name, values in arguments.items()
    }
    per_prompt = 1 if "prompts" in arguments or "labels" in arguments else share  # an unconditional call is one prompt
    batch = min(sizes.SHEET_BATCH, trainer.accumulation.images)
    callback = trainer.dry_run.evaluated if trainer.dry_run else None
    images = model(seed=[seed + i for i in own], count=per_prompt, batch=batch, callback=callback, **own_arguments)
    return list(gather_object(images))[:count]
