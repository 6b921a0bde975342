"""Sheets of samples while stage two trains: what a look tells, that figures don't."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import gather_object
from PIL import Image

from ldm.config.schema import Config
from ldm.data.crops import crop_resize
from ldm.data.images import grid, to_pil, to_tensor
from ldm.data.index import Index
from ldm.data.stream import Stream
from ldm.distributed.launch import on_main
from ldm.models.conditioning import downsample
from ldm.sampling.pipeline import LatentDiffusion
from ldm.training import evaluation_sizes as sizes
from ldm.training.trackers import log_image
from ldm.training.trainer import Trainer
from ldm.utils.atomic_files import whole_file
from ldm.utils.rng import generator
from stage2_diffusion.masks import random_mask


def write_sheet(config: Config, run: Trainer, model: LatentDiffusion, data: Index | Stream) -> None:
    """`stage2/samples/step-….png`, with the EMA weights; every process draws its share.

    Text: the configured prompts, those that no training saw in a frame. Classes: one picture of each. Inpainting and
    super-resolution: what was given above what was made of it.
    """
    path = run.folder / "samples" / f"step-{run.step:06d}.png"
    stage, prompts = config.stage2, list(config.sample.prompts)
    if on_main(path.exists) or (stage.text and not stage.image and not prompts):
        return
    shown: list[Image.Image] = []
    marked: list[int] = []
    given: dict[str, Any] = {}  # a model's arguments, of each of the pictures
    if stage.image:
        assert isinstance(data, Index), "the configuration allows no stream here"
        pixels, prompts, of = _given(data, config.data.size)
        if stage.classes:
            given["labels"] = [each if each in model.classes else 0 for each in of]
        if "inpaint" in stage.conditions:
            masks = [random_mask(generator(config.run.seed, "sheet", i), *pixels.shape[2:]) for i in range(len(pixels))]
            given |= {"image": pixels, "mask": torch.stack(masks)}
            shown = to_pil(pixels * (1 - given["mask"]))
        else:
            given["image"] = downsample(pixels, model.autoencoder.factor)
            side = config.data.size
            shown = [each.resize((side, side), Image.Resampling.NEAREST) for each in to_pil(given["image"])]
        given["prompts"] = prompts
    elif stage.text:
        given["prompts"] = prompts
        if stage.classes:
            given["labels"] = [model.classes[i % len(model.classes)] for i in range(len(prompts))]
        unseen = {caption for captions in data.select("combination").captions() for caption in captions}
        marked = [i for i, prompt in enumerate(prompts) if prompt in unseen]
    elif stage.classes:
        prompts = given["labels"] = list(model.classes[: sizes.SHEET_CLASSES])
    else:
        prompts = [""] * sizes.SHEET_UNCONDITIONAL
    with run.ema_weights("a sample sheet"):
        pictures = _drawn(model, run, config.run.seed, len(prompts), given)
    if run.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet = grid(shown + pictures, ["given"] * len(shown) + prompts, columns=8, marked=marked)
        with whole_file(path) as tmp_path:
            sheet.save(tmp_path, "PNG")
        log_image(run.accelerator.trackers, "samples", sheet, run.step)


def _drawn(model: LatentDiffusion, run: Trainer, seed: int, count: int, given: dict[str, Any]) -> list[Image.Image]:
    """Picture i of all from the noise of `seed + i`; processes make equally many, some of them twice.

    Where weights are shared out too, a process that made none would keep the others waiting.
    """
    rank, processes = run.accelerator.process_index, run.accelerator.num_processes
    share = -(-count // processes)
    mine = [i % count for i in range(rank * share, (rank + 1) * share)]
    of_mine: dict[str, Any] = {
        name: values[mine] if isinstance(values, torch.Tensor) else [values[i] for i in mine]
        for name, values in given.items()
    }
    of_each = 1 if "prompts" in given or "labels" in given else share  # or in all, where nothing is asked for
    batch = min(sizes.SHEET_BATCH, run.passes.images)
    callback = run.dry_run.evaluated if run.dry_run else None
    pictures = model(seed=[seed + i for i in mine], count=of_each, batch=batch, callback=callback, **of_mine)
    return list(gather_object(pictures))[:count]


def _given(data: Index, size: int) -> tuple[torch.Tensor, list[str], list[str]]:
    """Some pictures, of those that nothing is trained on where there are some, their captions and classes."""
    held = data.select("reconstruction")
    chosen = held if len(held) else data
    numbers = range(min(sizes.SHEET_INPUTS, len(chosen)))
    pixels = [to_tensor(crop_resize(chosen.load_image(i), (size, size))[0]) for i in numbers]
    return torch.stack(pixels), [chosen[i].captions[0] for i in numbers], [chosen[i].label for i in numbers]
