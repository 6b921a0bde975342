"""Text to pictures.

    python scripts/txt2img.py --model runs/openmoji/pipeline --prompt "woman astronaut, dark skin tone" --out a.png

Several prompts (or --count) make a captioned sheet. Picture i starts from the noise of seed + i.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ldm.data.images import grid
from ldm.errors import Parser, UserError, command
from ldm.pipeline import LatentDiffusion
from ldm.schema import SOLVERS

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@command
def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(prog="txt2img.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, help="a diffusers pipeline: local folder or Hub id")
    parser.add_argument("--prompt", required=True, nargs="+", help="what the picture shall show; several make a sheet")
    parser.add_argument("--negative", default="", help="what it shall not show")
    parser.add_argument("--count", type=int, default=1, help="pictures of each prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="steps of the solver; default: the model's own")
    parser.add_argument("--guidance", type=float, help="scale of classifier-free guidance; default: the model's own")
    parser.add_argument("--solver", choices=SOLVERS, help="default: the one the model was saved with")
    parser.add_argument("--out", type=Path, default=Path("picture.png"), help="the PNG to write")
    given = parser.parse_args(arguments)
    for name, value in (("--count", given.count), ("--steps", given.steps), ("--guidance", given.guidance)):
        if value is not None and value < 1:
            raise UserError(f"{name}: {value}; give 1 or more")
    if not all(prompt.strip() for prompt in given.prompt):
        raise UserError("--prompt: empty; write what the picture shall show")
    if not given.out.parent.is_dir():
        raise UserError(f"--out: no folder {given.out.parent}; make it first")
    if given.out.suffix.lower() not in SUFFIXES:
        raise UserError(f"--out: {given.out} has no suffix of a picture; give one of {', '.join(SUFFIXES)}")

    prompts = [prompt for prompt in given.prompt for _ in range(given.count)]
    model = LatentDiffusion.load(given.model)
    pictures = model(
        prompts, given.seed, steps=given.steps, guidance=given.guidance, solver=given.solver, negative=given.negative
    )
    sheet = pictures[0] if len(pictures) == 1 else grid(pictures, prompts, columns=min(8, len(pictures)))
    sheet.save(given.out)
    print(f"wrote {given.out}")


if __name__ == "__main__":
    sys.exit(main())
