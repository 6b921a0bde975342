"""Figures of a folder of generated images against a folder of real ones: needs no model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from ldm.cli.evaluate_figures import Request, json_of
from ldm.config.rules import LEAST_IMAGES
from ldm.data import images
from ldm.data.crops import crop_resize
from ldm.data.formats import is_image_file
from ldm.data.images import Size
from ldm.data.records import BadSampleError
from ldm.evaluation.features import FeatureNetwork, Features
from ldm.evaluation.generation import BAR_DELAY, REAL_BATCH, stack
from ldm.evaluation.model_figures import measure
from ldm.evaluation.networks import load_network
from ldm.sampling.options import Sampling
from ldm.utils.errors import UserError


def evaluate_folders(args: argparse.Namespace) -> dict[str, Any]:
    """Prints and returns the figures, by network; UserError where images can't be read or are too few."""
    request = Request.of(args, Sampling())
    if "latents" in request.metrics:
        raise UserError("--network: latents are of a run's autoencoder; take efficientnet-lite0, inception, … here")
    files = {option: _image_files(option, getattr(args, option[2:])) for option in ("--real", "--generated")}
    sizes = {option: _read(option, paths[0]).size for option, paths in files.items()}
    if not args.size and sizes["--real"] != sizes["--generated"]:
        raise UserError(f"--real, --generated: images of two sizes, {_named(*sizes.values())}; --size makes all alike")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures: dict[str, Any] = {}
    for name, metrics in request.metrics.items():
        network = load_network(name, device, request.weights)
        real, generated = (folder_features(option, paths, network, args.size) for option, paths in files.items())
        measured = measure(metrics, real, generated, network, None, request.bootstrap)
        print(f"{len(generated)} images against {len(real)} real ones, by {network.label}", flush=True)
        for metric, figure in measured.items():
            print(f"  {metric:10} {figure}", flush=True)
        figures[name] = json_of(measured)
    return {"real": str(args.real), "generated": str(args.generated), "figures": figures}


def folder_features(option: str, paths: list[Path], network: FeatureNetwork, side: int | None) -> Features:
    """Features of a folder's images, in the order of their names; UserError where they have two sizes and no `side`."""
    parts, first = [], None
    starts = range(0, len(paths), REAL_BATCH)
    for start in tqdm(starts, f"features of {option}", unit="batch", delay=BAR_DELAY, leave=False):
        batch = [_read(option, path) for path in paths[start : start + REAL_BATCH]]
        if side:
            batch = [crop_resize(image, (side, side))[0] for image in batch]
        first = first or batch[0].size
        for path, image in zip(paths[start:], batch, strict=False):
            if image.size != first:
                sizes = _named(first, image.size)
                raise UserError(f"{option}: images of two sizes, {sizes} ({path.name}); --size makes all alike")
        parts.append(network(stack(batch)))
    return Features.cat(parts)


def _image_files(option: str, folder: Path) -> list[Path]:
    """The images in a folder and its folders; UserError where there are too few."""
    if not folder.is_dir():
        raise UserError(f"{option}: no folder {folder}")
    paths = sorted(path for path in folder.rglob("*") if is_image_file(path.name) and path.is_file())
    if len(paths) < LEAST_IMAGES:
        raise UserError(f"{option}: {len(paths)} images in {folder}; figures need {LEAST_IMAGES} or more")
    return paths


def _named(*sizes: Size) -> str:
    return " and ".join(f"{width}×{height}" for width, height in sizes) + " px"


def _read(option: str, path: Path) -> Image.Image:
    try:
        return images.decode(path.read_bytes())
    except BadSampleError as error:
        raise UserError(f"{option}: {path}: {'; '.join(error.args)}") from None
    except OSError as error:
        raise UserError(f"{option}: {path}: can't be read ({error.strerror})") from None
