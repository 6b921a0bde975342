"""Adapters baked into a model's weights, for programs that load none; what was written is read again and compared.

    ldm-merge BASE --lora style.safetensors:0.8 runs/dog:1 --out merged

LoRA, DoRA, LoKr and LoHa in the layout of diffusers or kohya. The result is a diffusers folder, or one file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ldm.cli.export import check_out, write_and_compare
from ldm.cli.sampling_arguments import add_lora_argument
from ldm.sampling import pipeline_io
from ldm.sampling.pipeline import LatentDiffusion
from ldm.utils.errors import Parser, UserError, command
from ldm.utils.paths import path_or_id
from ldm.utils.precision import DTYPES


@command
def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=path_or_id, help="a finished run, a diffusers folder, a Hub id, or a file")
    parser.add_argument("--base", type=path_or_id, help="of a single file: a pipeline of the same family")
    add_lora_argument(parser)
    parser.add_argument("--to", default="diffusers", choices=("single-file", "diffusers"), help="default: diffusers")
    parser.add_argument("--precision", default="no", choices=DTYPES, help="of all weights; default: no, float32")
    parser.add_argument("--out", required=True, type=Path, help="the folder, or the .safetensors, to write")
    args = parser.parse_args(arguments)
    if not args.lora:
        raise UserError("--lora: none given; name the adapters to bake in")
    check_out(args.out, args.to)
    run_pipeline = Path(args.model) / "pipeline"
    name = str(run_pipeline) if run_pipeline.is_dir() else args.model
    model = LatentDiffusion(**pipeline_io.read(name, "model", args.base)).add_loras(*args.lora)
    write_and_compare(model, args.base or name, args.to, args.precision, args.out)
