"""Enlarges an image with a super-resolution model; a large image in overlapping tiles.

ldm-upscale --model runs/upscaler/pipeline --image small.png --prompt "a red heart"
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ldm.cli.generate import generate_images
from ldm.cli.sampling_arguments import open_image, sampling_parser
from ldm.sampling.pipeline import LatentDiffusion
from ldm.utils.errors import UserError, command
from ldm.utils.paths import path_or_id


@command
def main(arguments: Sequence[str] | None = None) -> None:
    parser = sampling_parser("Enlarges an image with a super-resolution model.")
    parser.add_argument("--image", type=path_or_id, help="the small image")
    parser.add_argument("--noise-level", type=int, default=20, help="noise on it, 0 to 349: more invents more detail")
    generate_images(parser.parse_args(arguments), "upscale.py", prepare_inputs)


def prepare_inputs(model: LatentDiffusion, args: argparse.Namespace) -> dict[str, Any]:
    if model.task != "upscale":
        raise UserError(f"--model: {args.model} does not enlarge; train one with stage2.conditions=[text,upscale]")
    if not args.image:
        raise UserError("--image: none given; name the small image")
    return {"image": open_image("--image", args.image)}
