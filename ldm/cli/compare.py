"""What was written, read again and compared with what was to be written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm.sampling.loop import initial_noise
from ldm.sampling.pipeline import LatentDiffusion
from ldm.utils.errors import UserError

PROMPT, SEED, STEPS = "a photograph", 0, 4  # of the image that certifies an export


def parts_of(model: LatentDiffusion) -> dict[str, torch.nn.Module]:
    """The networks of a model, by the names of a pipeline's components."""
    parts = {"unet": model.unet, "vae": model.autoencoder.vae}
    return parts | dict(zip(("text_encoder", "text_encoder_2"), model.text.models if model.text else (), strict=False))


def compare_tensors(model: LatentDiffusion, written: Any) -> int:
    """How many tensors were read again; UserError where one differs from the model's."""
    count = 0
    for name, part in parts_of(model).items():
        read: Any = getattr(written, "vqvae" if name == "vae" and hasattr(written, "vqvae") else name)
        tensors = {key.removeprefix("text_model."): tensor for key, tensor in read.state_dict().items()}
        for key, tensor in part.state_dict().items():
            other = tensors.get(key.removeprefix("text_model."))
            if other is None or not torch.equal(other.float(), tensor.float()):
                raise UserError(f"{name}: {key} was not read again as it was; the export can't be trusted")
            count += 1
    return count


def compare_images(model: LatentDiffusion, written: Any) -> int:
    """The largest difference, of 255, between the model's image and that of diffusers from what was written."""
    for part in parts_of(model).values():
        torch.nn.Module.to(part, torch.float32)
    side, factor = model.side, model.autoencoder.factor
    noise = initial_noise((model.autoencoder.channels, side // factor, side // factor), [SEED])
    options: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 3.0}
    written.scheduler = type(model.scheduler).from_config(model.scheduler.config)
    written.set_progress_bar_config(disable=True)
    ours = np.asarray(model(PROMPT, seed=SEED, **options)[0]).astype(int)
    plain = written(PROMPT, **options, width=side, height=side, latents=noise).images[0]
    return int(np.abs(ours - np.asarray(plain).astype(int)).max())


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())
