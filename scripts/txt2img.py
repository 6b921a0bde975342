"""Pictures from text, from classes, or from noise alone.

    python scripts/txt2img.py --model runs/openmoji/pipeline --prompt "woman astronaut, dark skin tone" --out a.png
    python scripts/txt2img.py --model runs/openmoji/pipeline --prompt "red heart" owl --count 4 --grid sheet.png

Several processes share the prompts: `accelerate launch scripts/txt2img.py …`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import ldm.utils.openmp  # noqa: F401  # before torch

from _cli import size_of
from pictures import draw, parser

from ldm.sampling.pipeline import LatentDiffusion
from ldm.utils.errors import UserError, command


@command
def main(arguments: Sequence[str] | None = None) -> None:
    options = parser("txt2img.py", "Pictures from text, from classes, or from noise alone.")
    options.add_argument("--size", type=size_of, help="512 or 640x512; default: that of training")
    options.add_argument("--between", type=int, default=0, help="pictures on the way from each to the next")
    args = options.parse_args(arguments)
    if args.between < 0:
        raise UserError(f"--between: {args.between}; give 0 or more")
    draw(args, "txt2img.py", needs)


def needs(model: LatentDiffusion, args: argparse.Namespace) -> dict[str, Any]:
    if model.task != "generate":
        raise UserError(
            f"--model: {args.model} needs a picture; use {'inpaint' if model.task == 'inpaint' else 'upscale'}.py"
        )
    size = tuple(args.size) if args.size else None
    if size:
        model.check_size(size)
    return {"size": size}


if __name__ == "__main__":
    sys.exit(main())
