"""Fills a hole in a picture; what lies around it stays exactly as it was.

    python scripts/inpaint.py --model runs/openmoji/pipeline --image a.png --mask hole.png --prompt "a red heart"

Any model does: an inpainting model sees what is around the hole, another one is held to it step by step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import ldm.utils.openmp  # noqa: F401  # before torch

from _cli import opened, size_of
from pictures import draw, parser
from PIL import ImageOps

from ldm.data.crops import crop_resize
from ldm.sampling.pipeline import LatentDiffusion
from ldm.utils.errors import UserError, command

LARGEST = 4  # times the side of training, which a picture may have without being asked


@command
def main(arguments: Sequence[str] | None = None) -> None:
    options = parser("inpaint.py", "Fills a hole in a picture; what lies around it stays exactly as it was.")
    options.add_argument("--image", help="the picture to complete")
    options.add_argument("--mask", help="white where it is to be made, black where it is kept; of the same size")
    options.add_argument("--invert", action="store_true", help="the mask is black where it is to be made")
    options.add_argument("--strength", type=float, default=1.0, help="below 1 keeps some of what is in the hole")
    options.add_argument("--size", type=size_of, help="brings both to 512 or 640x512; default: as the picture is")
    draw(options.parse_args(arguments), "inpaint.py", needs)


def needs(model: LatentDiffusion, args: argparse.Namespace) -> dict[str, Any]:
    if model.task == "upscale":
        raise UserError(f"--model: {args.model} enlarges pictures; give one that makes or completes them")
    if not args.image or not args.mask:
        raise UserError("--image, --mask: both are needed: the picture, and white where it is to be made")
    picture, mask = opened("--image", args.image), opened("--mask", args.mask)
    if mask.size != picture.size:
        (w, h), (width, height) = mask.size, picture.size
        raise UserError(f"--mask: {w} × {h} pixels, but the picture has {width} × {height}; bring it to that")
    if args.size:
        size = tuple(args.size)
        picture, mask = crop_resize(picture, size)[0], crop_resize(mask, size)[0]
    elif max(picture.size) > LARGEST * model.side:
        width, height = picture.size
        raise UserError(
            f"--image: {width} × {height} pixels, and the model was trained on {model.side}; give --size {model.side}"
        )
    return {"image": picture, "mask": ImageOps.invert(mask) if args.invert else mask}


if __name__ == "__main__":
    sys.exit(main())
