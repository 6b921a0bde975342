"""Inpainting: generates the masked part of an image; the rest keeps its exact pixels.

    ldm-inpaint --model runs/openmoji/pipeline --image a.png --mask mask.png --prompt "a red heart"

Every model can do it: an inpainting model sees the rest of the image; for others it is imposed at each step.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from PIL import ImageOps

from ldm.cli.generate import generate_images
from ldm.cli.sampling_arguments import open_image, parse_size, sampling_parser
from ldm.data.crops import crop_resize
from ldm.sampling.inpainting import check_mask, mask_batch
from ldm.sampling.pipeline import LatentDiffusion
from ldm.utils.errors import UserError, command
from ldm.utils.paths import path_or_id

MAX_SCALE = 4  # of an image's side over that of training, without --size


@command
def main(arguments: Sequence[str] | None = None) -> None:
    parser = sampling_parser("Inpainting: generates the masked part of an image; the rest keeps its exact pixels.")
    parser.add_argument("--image", type=path_or_id, help="the image to complete")
    parser.add_argument(
        "--mask", type=path_or_id, help="an image of the same size: white is generated, black and transparent are kept"
    )
    parser.add_argument("--invert", action="store_true", help="black is generated, white and transparent are kept")
    parser.add_argument("--strength", type=float, default=1.0, help="below 1 keeps something of the masked part")
    parser.add_argument("--size", type=parse_size, help="resizes both to 512 or 640x512; default: the image's size")
    generate_images(parser.parse_args(arguments), "inpaint.py", prepare_inputs)


def prepare_inputs(model: LatentDiffusion, args: argparse.Namespace) -> dict[str, Any]:
    if model.task == "upscale":
        raise UserError(f"--model: {args.model} enlarges images; give a text-to-image or an inpainting model")
    if not args.image or not args.mask:
        raise UserError("--image, --mask: both are needed: the image, and a mask, white where to generate")
    image, mask = open_image("--image", args.image), open_image("--mask", args.mask, "black")
    check_mask(mask)
    if args.invert:  # laid over what is kept, transparent pixels are kept
        mask = ImageOps.invert(open_image("--mask", args.mask, "white"))
    if mask.size != image.size:
        (mask_width, mask_height), (width, height) = mask.size, image.size
        raise UserError(f"--mask: {mask_width} × {mask_height} pixels, but the image has {width} × {height}; resize it")
    if args.size:
        size = tuple(args.size)
        image, mask = crop_resize(image, size)[0], crop_resize(mask, size)[0]
    elif max(image.size) > MAX_SCALE * model.side:
        width, height = image.size
        raise UserError(
            f"--image: {width} × {height} pixels, and the model was trained on {model.side}; give --size {model.side}"
        )
    mask_batch(mask, 1)  # its errors, before anything is sampled
    return {"image": image, "mask": mask}
