"""Pictures from a picture: changed as far as --strength says, towards what the prompt says.

python scripts/img2img.py --model runs/openmoji/pipeline --image a.png --prompt "man astronaut" --strength 0.6
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import ldm.utils.openmp  # noqa: F401  # before torch

from _cli import opened, size_of
from pictures import draw, parser

from ldm.data.crops import crop_resize
from ldm.sampling.pipeline import LatentDiffusion
from ldm.utils.errors import UserError, command


@command
def main(arguments: Sequence[str] | None = None) -> None:
    options = parser("img2img.py", "Pictures from a picture: changed towards what the prompt says.")
    options.add_argument("--image", help="the picture to start from")
    options.add_argument("--strength", type=float, default=0.6, help="0 gives it back, 1 ignores it; default: 0.6")
    options.add_argument("--size", type=size_of, help="512 or 640x512; default: the model's, at the picture's shape")
    draw(options.parse_args(arguments), "img2img.py", needs)


def needs(model: LatentDiffusion, args: argparse.Namespace) -> dict[str, Any]:
    if model.task != "generate":
        does = {"inpaint": "completes", "upscale": "enlarges"}[model.task]
        raise UserError(f"--model: {args.model} {does} pictures; give one that makes them")
    if not args.image:
        raise UserError("--image: none given; name the picture to start from")
    picture = opened("--image", args.image)
    size = tuple(args.size) if args.size else fitting(picture.size, model)
    model.check_size(size)
    return {"image": crop_resize(picture, size)[0]}


def fitting(size: tuple[int, int], model: LatentDiffusion) -> tuple[int, int]:
    """About the model's own area, at a picture's shape."""
    scale = model.side / (size[0] * size[1]) ** 0.5
    width, height = (max(1, round(side * scale / model.multiple)) * model.multiple for side in size)
    return width, height


if __name__ == "__main__":
    sys.exit(main())
