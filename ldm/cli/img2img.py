"""Image to image: changed towards the prompt, as far as --strength says.

ldm-img2img --model runs/openmoji/pipeline --image a.png --prompt "man astronaut" --strength 0.6
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ldm.cli.generate import generate_images
from ldm.cli.sampling_arguments import open_image, parse_size, sampling_parser
from ldm.data.crops import crop_resize
from ldm.sampling.pipeline import LatentDiffusion
from ldm.sampling.request import check_size
from ldm.utils.errors import UserError, command
from ldm.utils.paths import path_or_id


@command
def main(arguments: Sequence[str] | None = None) -> None:
    parser = sampling_parser("Image to image: changed towards the prompt.")
    parser.add_argument("--image", type=path_or_id, help="the image to start from")
    parser.add_argument("--strength", type=float, default=0.6, help="0 keeps the image, 1 ignores it; default: 0.6")
    parser.add_argument("--size", type=parse_size, help="512 or 640x512; default: the model's, in the image's shape")
    generate_images(parser.parse_args(arguments), "img2img.py", prepare_inputs)


def prepare_inputs(model: LatentDiffusion, args: argparse.Namespace) -> dict[str, Any]:
    if model.task != "generate":
        does = {"inpaint": "completes", "upscale": "enlarges"}[model.task]
        raise UserError(f"--model: {args.model} {does} images; give a text-to-image model")
    if not args.image:
        raise UserError("--image: none given; name the image to start from")
    image = open_image("--image", args.image)
    size = tuple(args.size) if args.size else fitting_size(image.size, model)
    check_size(size, model.multiple)
    return {"image": crop_resize(image, size)[0]}


def fitting_size(size: tuple[int, int], model: LatentDiffusion) -> tuple[int, int]:
    """The size of about the model's own area that has the aspect ratio of `size`; width first."""
    scale = model.side / (size[0] * size[1]) ** 0.5
    width, height = (max(1, round(side * scale / model.multiple)) * model.multiple for side in size)
    return width, height
