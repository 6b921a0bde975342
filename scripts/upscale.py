"""Enlarges a picture with a super-resolution model; large ones in tiles that fade into one another.

python scripts/upscale.py --model runs/upscaler/pipeline --image small.png --prompt "a red heart"
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import ldm.utils.openmp  # noqa: F401  # before torch

from _cli import opened
from pictures import draw, parser

from ldm.sampling.pipeline import LatentDiffusion
from ldm.utils.errors import UserError, command


@command
def main(arguments: Sequence[str] | None = None) -> None:
    options = parser("upscale.py", "Enlarges a picture with a super-resolution model.")
    options.add_argument("--image", help="the small picture")
    options.add_argument("--noise-level", type=int, default=20, help="noise on it, 0 to 349: more invents more")
    draw(options.parse_args(arguments), "upscale.py", needs)


def needs(model: LatentDiffusion, args: argparse.Namespace) -> dict[str, Any]:
    if model.task != "upscale":
        raise UserError(f"--model: {args.model} does not enlarge; train one with stage2.conditions=[text,upscale]")
    if not args.image:
        raise UserError("--image: none given; name the small picture")
    return {"image": opened("--image", args.image)}


if __name__ == "__main__":
    sys.exit(main())
