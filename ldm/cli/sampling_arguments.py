"""The arguments that all commands for sampling share, and their checks."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ldm.config.schema import SOLVERS, SPACINGS
from ldm.data import images
from ldm.data.records import BadSampleError
from ldm.sampling.animation import Animation
from ldm.sampling.options import Sampling
from ldm.utils.errors import Parser, UserError, first_line
from ldm.utils.paths import path_or_id
from ldm.utils.precision import DTYPES

SAMPLING = {
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "solver": "solver",
    "spacing": "timestep_spacing",
    "eta": "eta",
    "negative": "negative_prompt",
    "rescale": "guidance_rescale",
    "interval": "interval",
    "threshold": "threshold",
    "classifier_scale": "classifier_scale",
    "strength": "strength",
    "noise_level": "noise_level",
}
"""Arguments, and the fields of `ldm.sampling.options.Sampling` that they set."""
UPSCALER = {
    "upscaler_steps": "num_inference_steps",
    "upscaler_guidance": "guidance_scale",
    "upscaler_noise_level": "noise_level",
}
"""Arguments of a cascade's second model, and the fields of `Sampling` that they set."""
UPSCALER_FLAGS = {field: f"--{name.replace('_', '-')}" for name, field in UPSCALER.items()}
FLAGS = {field: f"--{name.replace('_', '-')}" for name, field in SAMPLING.items()} | {
    "prompt": "--prompt",
    "labels": "--label",
    "toward": "--between",
    "animation": "--animate",
    "recipe": "--again",
    "upscaler": "--upscaler",
    **{f"upscaler's {field}": flag for field, flag in UPSCALER_FLAGS.items()},
    **{name: f"--{name}" for name in ("count", "seed", "batch", "size", "image", "mask", "classifier", "precision")},
}
"""The first words of `ldm.sampling`'s errors, and the flags that they stand for."""
INPUT_IMAGES = ("image", "mask")
MODELS = ("model", "base", "weaker", "classifier", "upscaler")
SHEET_SUFFIXES = (".png", ".jpg", ".webp")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tiff")


@contextmanager
def errors_name_flags(flags: Mapping[str, str] = FLAGS) -> Iterator[None]:
    """UserErrors of `ldm.sampling`, `field: reason`, get the command's flag in place of the field. A decorator too."""
    try:
        yield
    except UserError as error:
        field, _, reason = str(error).partition(": ")
        if field not in flags:
            raise
        raise UserError(f"{flags[field]}: {reason}") from None


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments as fields of `Sampling`; UserError for an invalid value."""
    options = {field: getattr(args, name) for name, field in SAMPLING.items() if hasattr(args, name)}
    Sampling(**options)  # checks them, before a model is loaded
    return options


@errors_name_flags(UPSCALER_FLAGS)
def upscaler_options(args: argparse.Namespace) -> dict[str, Any]:
    """The same for a cascade's second model; UserError also for options that are set without one."""
    options = {field: value for name, field in UPSCALER.items() if (value := getattr(args, name, None)) is not None}
    for field in options:
        if not args.upscaler:
            raise UserError(f"{field}: is for an upscaler, and there is none; give --upscaler, or leave it out")
    Sampling(**options)
    return options


def sampling_parser(description: str) -> Parser:
    """A parser with the arguments that all commands for sampling share."""
    parser = Parser(description=description)
    parser.add_argument("--model", type=path_or_id, help="a diffusers folder, a Hub id, or a single .safetensors")
    base = "of a single file: a pipeline of the same family, for what a file lacks; default: the Hub's"
    parser.add_argument("--base", type=path_or_id, help=base)
    add_lora_argument(parser)
    add_embedding_argument(parser)
    what = parser.add_argument_group("what")
    what.add_argument("--prompt", nargs="+", default=[], help="what the image shall show; several give several images")
    what.add_argument("--prompts", type=path_or_id, help="a file with a prompt per line, or - for standard input")
    what.add_argument("--label", nargs="+", default=[], help="names of classes, for a class-conditional model")
    what.add_argument("--negative", default="", help="what the image shall not show")
    what.add_argument("--count", type=int, default=1, help="images per prompt or class; default: 1")
    what.add_argument("--seed", type=int, default=0, help="image i starts from the noise of seed + i; default: 0")
    what.add_argument("--cut-prompts", action="store_true", help="truncate prompts that are too long")
    again = "recreates an image of these commands bit for bit; its settings override all others"
    what.add_argument("--again", type=Path, metavar="PNG", help=again)
    how = parser.add_argument_group("how; defaults are the model's")
    how.add_argument("--steps", type=int, help="of the solver; ddpm: all of the chain's")
    how.add_argument("--solver", choices=SOLVERS)
    how.add_argument("--spacing", choices=SPACINGS, help="of the steps")
    how.add_argument("--eta", type=float, default=0.0, help="ddim's noise, 0 to 1; default: 0")
    how.add_argument("--guidance", type=float, help="scale of classifier-free guidance; 1 is none")
    how.add_argument("--rescale", type=float, default=0.0, help="share, 0 to 1, of guidance's contrast to take back")
    interval = "noise levels to guide at, as shares; default: 0 1"
    how.add_argument("--interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("FROM", "TO"), help=interval)
    how.add_argument("--threshold", type=float, help="dynamic thresholding of pixels, for example 0.995")
    how.add_argument(
        "--weaker", type=path_or_id, help="autoguidance: the weaker model, a pipeline or a checkpoint of the run"
    )
    how.add_argument(
        "--classifier", type=path_or_id, help="classifier guidance: the folder of a noisy classifier; needs --label"
    )
    how.add_argument("--classifier-scale", type=float, default=1.0, help="of classifier guidance; default: 1")
    speed = parser.add_argument_group("speed")
    speed.add_argument("--batch", type=int, default=8, help="images per batch; default: 8")
    precision = "of the U-Net; default: auto, which is bf16 if the device has it"
    speed.add_argument("--precision", default="auto", choices=("auto", *DTYPES), help=precision)
    speed.add_argument("--compile", default="no", choices=("no", "yes", "graphs"), help="graphs: with CUDA graphs")
    speed.add_argument("--device", help="cpu, cuda, cuda:1; default: the GPU if there is one")
    out = parser.add_argument_group("output")
    folder = "a folder, or a .png for a single image; default: images"
    out.add_argument("--out", type=Path, default=Path("images"), help=folder)
    out.add_argument("--grid", type=Path, help="a sheet of all images with their captions, .png")
    out.add_argument("--animate", type=Path, help="the denoising of the first batch: .gif, .webp or .mp4")
    return parser


def add_lora_argument(parser: Parser) -> None:
    """`--lora FILE[:SCALE] …`, any number of times."""
    text = "LoRA, DoRA, LoKr or LoHa: a file, a run's folder or a Hub id, and its scale; default: 1"
    options: dict[str, Any] = {"nargs": "+", "action": "extend", "default": [], "type": lora_argument}
    parser.add_argument("--lora", **options, metavar="FILE[:SCALE]", help=text)


def add_embedding_argument(parser: Parser) -> None:
    """`--embedding FILE …`, any number of times."""
    text = "a learned word (textual inversion): a file or a run's folder; several give several words"
    parser.add_argument("--embedding", nargs="+", action="extend", default=[], type=path_or_id, help=text)


def lora_argument(text: str) -> tuple[str, float]:
    """`FILE` or `FILE:SCALE`, for argparse; a file's own name may have colons."""
    match = re.fullmatch(r"(.+):([-+]?(?:\d+\.?\d*|\.\d+))", text)
    if not match or Path(text).exists():
        return path_or_id(text), 1.0
    return path_or_id(match[1]), float(match[2])


def parse_size(text: str) -> tuple[int, int]:
    """`512` or `640x512`, width first, for argparse."""
    if not (match := re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)):
        raise argparse.ArgumentTypeError(f"{text!r}; give 512, or 640x512 (width, height)")
    return int(match[1]), int(match[2] or match[1])


def check_arguments(args: argparse.Namespace, num_images: int) -> None:
    """UserError for mistakes that can be found before a model is loaded."""
    for name in ("count", "batch"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}: {getattr(args, name)}; give 1 or more")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed: {args.seed}; give 0 or more, below 2^63")
    _check_outputs(args, num_images)
    if args.device:
        try:
            torch.empty(0, device=args.device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"--device: {args.device}: {first_line(error)}") from None
    if args.animate and getattr(args, "upscaler", None):
        raise UserError("--animate: shows the steps of one model; leave out --upscaler")
    if args.classifier and not args.label and not args.again:
        raise UserError("--classifier: guides to a class; name it with --label")


def _check_outputs(args: argparse.Namespace, num_images: int) -> None:
    suffix = args.out.suffix.lower()
    if suffix in IMAGE_SUFFIXES and suffix != ".png":
        raise UserError(f"--out: {args.out} is no .png, the only format that keeps an image's settings; give one")
    if suffix == ".png" and num_images > 1:
        raise UserError(f"--out: {args.out} is one file for {num_images} images; give a folder, and --grid for a sheet")
    inputs = [Path(path) for name in INPUT_IMAGES if (path := getattr(args, name, None))]
    outputs = {"--out": args.out if suffix == ".png" else None, "--grid": args.grid, "--animate": args.animate}
    for option, path in outputs.items():
        if not path:
            continue
        if not path.parent.is_dir():
            raise UserError(f"{option}: no folder {path.parent}; create it first")
        if path.is_dir():
            raise UserError(f"{option}: {path} is a folder; give a file")
        if path.resolve() in [source.resolve() for source in inputs]:
            raise UserError(f"{option}: {path} is an input image; give another name")
    if args.grid and args.grid.suffix.lower() not in SHEET_SUFFIXES:
        raise UserError(f"--grid: {args.grid} is no {', '.join(SHEET_SUFFIXES[:-1])} or {SHEET_SUFFIXES[-1]}")
    if args.animate:
        Animation.check(args.animate)


def existing_file(option: str, path: str | Path) -> Path:
    """The path; UserError if there is no such file."""
    if not Path(path).is_file():
        raise UserError(f"{option}: no file {path}")
    return Path(path)


def open_image(option: str, path: str | Path, background: str = "white") -> Image.Image:
    """The image that an option names, as RGB, transparency over `background`; UserError if it can't be read."""
    try:
        return images.decode(existing_file(option, path).read_bytes(), background)
    except BadSampleError as error:
        raise UserError(f"{option}: {path}: {'; '.join(error.args)}") from None
