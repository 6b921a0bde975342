"""An image's recipe: all that recreates it bit for bit, kept in its PNG (`--again`)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from ldm.cli.sampling_arguments import INPUT_IMAGES, MODELS, SAMPLING, UPSCALER, existing_file
from ldm.sampling import png_metadata
from ldm.sampling.pipeline import LatentDiffusion
from ldm.utils.atomic_files import tensors_sha256
from ldm.utils.errors import UserError

ADDITIONS = ("lora", "embedding")
ARGUMENTS = (*SAMPLING, *UPSCALER, "size", *MODELS, *ADDITIONS, *INPUT_IMAGES, "invert", "precision", "compile")


def restore_arguments(args: argparse.Namespace, script: str) -> dict[str, Any]:
    """The recipe of the image `--again`, whose settings replace those in `args`.

    Models and input images may have moved: a path on the command line counts. UserError if an input image is not the
    one that the recipe was written for.
    """
    recipe = png_metadata.read(args.again)
    if recipe["script"] != script:
        raise UserError(f"--again: {args.again} was made by {recipe['script']}; give it to that")
    for name in ARGUMENTS:
        moved = name in (*MODELS, *ADDITIONS, *INPUT_IMAGES) and getattr(args, name, None)
        if name in recipe and not moved:
            setattr(args, name, recipe[name])
    for name in INPUT_IMAGES:
        path = getattr(args, name, None)
        if path and png_metadata.fingerprint(existing_file(f"--{name}", path)) != recipe[f"{name}_sha256"]:
            raise UserError(f"--again: {path} is not the input that it was made from; name that with --{name}")
    return recipe


def recipe_of(args: argparse.Namespace, script: str, weights: str, device: torch.device) -> dict[str, Any]:
    """The part of the recipe that all images of a command share."""
    inputs = {
        f"{name}_sha256": png_metadata.fingerprint(Path(getattr(args, name)))
        for name in INPUT_IMAGES
        if getattr(args, name, None)
    }
    return {
        "script": script,
        "weights": weights,
        "device": device.type,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **{name: getattr(args, name) for name in ARGUMENTS if hasattr(args, name)},
        **inputs,
    }


def weights_fingerprint(model: LatentDiffusion, *others: torch.nn.Module) -> str:
    """SHA-256 of all weights that an image depends on, `others` included, and of the scheduler's configuration."""
    parts = [model.unet, model.autoencoder.vae, *(model.text.models if model.text else []), *others]
    tensors = {f"{i}.{name}": tensor for i, part in enumerate(parts) for name, tensor in part.state_dict().items()}
    if model.null is not None:
        tensors["null"] = model.null
    # an embedding's word too decides what a prompt's tokens are
    words = [encoder.added_words for encoder in model.text.encoders if encoder.added_words] if model.text else []
    settings = {name: value for name, value in model.scheduler.config.items() if not name.startswith("_")}
    return tensors_sha256(tensors, type(model.scheduler).__name__, sorted(settings.items()), *words)
