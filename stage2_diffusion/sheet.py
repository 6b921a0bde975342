"""Sheets of samples while stage two trains: what a look tells, that figures don't."""

from __future__ import annotations

import torch

from ldm.condition import small
from ldm.data.images import cut, grid, to_pil, to_tensor
from ldm.data.index import Index
from ldm.data.order import generator
from ldm.data.stream import Stream
from ldm.pipeline import LatentDiffusion
from ldm.run import Run
from ldm.schema import Config
from stage2_diffusion.holes import holes

COUNT = 16  # pictures of a model that takes no prompts


def write_sheet(config: Config, run: Run, model: LatentDiffusion, data: Index | Stream) -> None:
    """`stage2/samples/step-….png`, with the EMA weights.

    Text: the configured prompts, those that no training saw in a frame. Classes: one picture of each. Inpainting and
    super-resolution: what was given above what was made of it.
    """
    path = run.folder / "samples" / f"step-{run.step:06d}.png"
    stage, prompts, seed = config.stage2, list(config.sample.prompts), config.run.seed
    if not run.is_main or path.exists() or (stage.text and not stage.image and not prompts):
        return
    marked: list[int] = []
    with run.averaged():
        if stage.image:
            assert isinstance(data, Index), "the configuration allows no stream here"
            pixels, captions, of = _given(data, config.data.size)
            labels = [each if each in model.classes else 0 for each in of] if stage.classes else None
            if "inpaint" in stage.conditions:
                masks = [holes(generator(seed, "sheet", i), *pixels.shape[2:]) for i in range(len(pixels))]
                mask = torch.stack(masks)
                pictures = model(captions, seed, labels=labels, image=pixels, mask=mask)
                shown = to_pil(pixels * (1 - mask))
            else:
                low = small(pixels, model.autoencoder.factor)
                pictures = model(captions, seed, image=low)
                shown = [each.resize(pictures[0].size, 0) for each in to_pil(low)]
            pictures, prompts = shown + pictures, ["given"] * len(shown) + captions
        elif stage.text:
            labels = [model.classes[i % len(model.classes)] for i in range(len(prompts))] if stage.classes else None
            pictures = model(prompts, seed, labels=labels, batch=8)
            unseen = {caption for captions in data.select("combination").captions() for caption in captions}
            marked = [i for i, prompt in enumerate(prompts) if prompt in unseen]
        elif stage.classes:
            prompts = list(model.classes[:64])
            pictures = model(labels=prompts, seed=seed, batch=8)
        else:
            pictures, prompts = model(count=COUNT, seed=seed, batch=8), [""] * COUNT
    path.parent.mkdir(parents=True, exist_ok=True)
    grid(pictures, prompts, columns=8, marked=marked).save(path)


def _given(data: Index, size: int) -> tuple[torch.Tensor, list[str], list[str]]:
    """Eight pictures, of those that nothing is trained on where there are some, their captions and classes."""
    held = data.select("reconstruction")
    chosen = held if len(held) else data
    numbers = range(min(8, len(chosen)))
    pixels = [to_tensor(cut(chosen.picture(i), (size, size))[0]) for i in numbers]
    return torch.stack(pixels), [chosen[i].captions[0] for i in numbers], [chosen[i].label for i in numbers]
