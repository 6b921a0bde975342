"""Images from text, from classes, or from noise alone.

    ldm-txt2img --model runs/openmoji/pipeline --prompt "woman astronaut, dark skin tone" --out a.png
    ldm-txt2img --model runs/openmoji/pipeline --prompt "red heart" owl --count 4 --grid sheet.png

    ldm-txt2img --model runs/base/pipeline --upscaler runs/upscaler/pipeline --prompt "red heart" --out large.png

Several processes share the prompts: `accelerate launch scripts/txt2img.py …`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ldm.cli.generate import generate_images
from ldm.cli.sampling_arguments import parse_size, sampling_parser
from ldm.sampling.pipeline import LatentDiffusion
from ldm.sampling.request import check_size
from ldm.utils.errors import UserError, command
from ldm.utils.paths import path_or_id


@command
def main(arguments: Sequence[str] | None = None) -> None:
    parser = sampling_parser("Images from text, from classes, or from noise alone.")
    parser.add_argument("--size", type=parse_size, help="512 or 640x512; default: the size of training")
    parser.add_argument("--between", type=int, default=0, help="images to interpolate between each and the next")
    cascade = parser.add_argument_group("a cascade")
    cascade.add_argument("--upscaler", type=path_or_id, help="a super-resolution model that enlarges the images")
    cascade.add_argument("--upscaler-noise-level", type=int, help="noise on its input, 0 to 349; default: 20")
    cascade.add_argument("--upscaler-steps", type=int, help="of its solver; default: the upscaler's")
    cascade.add_argument("--upscaler-guidance", type=float, help="scale of its guidance; default: the upscaler's")
    args = parser.parse_args(arguments)
    if args.between < 0:
        raise UserError(f"--between: {args.between}; give 0 or more")
    generate_images(args, "txt2img.py", prepare_inputs)


def prepare_inputs(model: LatentDiffusion, args: argparse.Namespace) -> dict[str, Any]:
    if model.task != "generate":
        raise UserError(
            f"--model: {args.model} needs an image; use {'inpaint' if model.task == 'inpaint' else 'upscale'}.py"
        )
    size = tuple(args.size) if args.size else None
    if size:
        check_size(size, model.multiple)
    return {"size": size}
