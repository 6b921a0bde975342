"""What the options of the scripts that make pictures ask for: which pictures, of what."""

from __future__ import annotations

import argparse
import copy
import itertools
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ldm.data import images
from ldm.data.records import BadSampleError
from ldm.sampling import png_metadata
from ldm.sampling.animation import Animation
from ldm.sampling.pipeline import Interpolation, LatentDiffusion
from ldm.sampling.pipeline_io import read as read_pipeline
from ldm.training.checkpoint import read_checkpoint
from ldm.utils.atomic_files import tensors_sha256
from ldm.utils.errors import UserError

# Options that change a picture, as its recipe keeps them. Others say what is asked for, or where it goes.
HOW = ("steps", "guidance", "solver", "spacing", "eta", "negative", "rescale", "interval", "threshold",
       "classifier_scale", "strength", "noise_level")  # fmt: skip
KEPT = (*HOW, "size", "model", "weaker", "classifier", "image", "mask", "invert", "precision", "compile")
FILES = ("image", "mask")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tiff")
# What U-Nets are told and answer: keys of their configurations.
TOLD = ("in_channels", "out_channels", "cross_attention_dim", "num_class_embeds", "addition_embed_type",
        "time_cond_proj_dim")  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One picture: what is asked for."""

    prompt: str | None
    label: str | None
    seed: int
    toward: tuple[str | None, int, float] | None = None
    """The prompt and the seed that it lies a share of the way to."""

    @classmethod
    def of(cls, old: dict[str, Any]) -> Job:
        """The one that a recipe tells of."""
        toward = old["toward"]
        return cls(old["prompt"], old["label"], old["seed"], None if toward is None else tuple(toward))

    @property
    def caption(self) -> str:
        words = ", ".join(filter(None, (self.label, self.prompt))) or f"seed {self.seed}"
        if self.toward and self.toward[2]:
            prompt, seed, share = self.toward
            words += f" to {prompt if prompt and prompt != self.prompt else f'seed {seed}'}, {share:.0%}"
        return words


def asked(args: argparse.Namespace) -> list[Job]:
    """The pictures that the options ask for, in order."""
    prompts: list[str | None] = list(args.prompt)
    if args.prompts:
        prompts += lines(args.prompts)
    if any(not prompt.strip() for prompt in prompts if prompt is not None):
        raise UserError("--prompt: empty; write what the picture shall show")
    labels: list[str | None] = list(args.label)
    if prompts and labels and 1 != len(labels) != len(prompts):
        raise UserError(f"--label: {len(labels)} for {len(prompts)} prompts; give one, or one each")
    pairs = list(zip(prompts or [None] * max(1, len(labels)), labels * len(prompts) if len(labels) == 1 and prompts else
                     labels or [None] * max(1, len(prompts)), strict=True))  # fmt: skip
    pairs = [pair for pair in pairs for _ in range(args.count)]
    jobs = [Job(prompt, label, args.seed + i) for i, (prompt, label) in enumerate(pairs)]
    between = getattr(args, "between", 0)
    if not between:
        return jobs
    if len({job.label for job in jobs}) > 1:
        raise UserError("--between: there is nothing between two classes; give one --label")
    if len(jobs) < 2:
        raise UserError("--between: leads from a picture to the next; give two prompts, or --count 2")
    ways = [
        replace(here, toward=(there.prompt, there.seed, i / (between + 1)))
        for here, there in itertools.pairwise(jobs)
        for i in range(between + 1)
    ]
    return [*ways, replace(jobs[-1], toward=(jobs[-1].prompt, jobs[-1].seed, 0.0))]


def lines(name: str) -> list[str]:
    """The prompts of a file, or of standard input."""
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts: can't read {name}: {getattr(error, 'strerror', None) or error}") from None
    if not (found := [line.strip() for line in text.splitlines() if line.strip()]):
        raise UserError(f"--prompts: no prompt in {'standard input' if name == '-' else name}; write one a line")
    return found


def check(args: argparse.Namespace, pictures: int) -> None:
    """UserError for what can be told before a model is loaded."""
    for name in ("count", "batch"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}: {getattr(args, name)}; give 1 or more")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed: {args.seed}; give 0 or more, below 2^63")
    if args.out.suffix.lower() in PICTURES and args.out.suffix.lower() != ".png":
        raise UserError(f"--out: {args.out} is no .png, which alone keeps how it was made; give one, or a folder")
    single = args.out.suffix.lower() == ".png"
    if single and pictures > 1:
        raise UserError(f"--out: {args.out} is one picture of {pictures}; give a folder, and --grid for a sheet")
    for option, path in (("--out", args.out if single else None), ("--grid", args.grid),
                         ("--animate", args.animate)):  # fmt: skip
        if path and not path.parent.is_dir():
            raise UserError(f"{option}: no folder {path.parent}; make it first")
        if path and path.is_dir():
            raise UserError(f"{option}: {path} is a folder; give a file")
        for name in FILES:
            source = getattr(args, name, None)
            if path and source and path.resolve() == Path(source).resolve():
                raise UserError(f"{option}: {path} is the picture that is read; give another name")
    if args.grid and args.grid.suffix.lower() not in (".png", ".jpg", ".webp"):
        raise UserError(f"--grid: {args.grid} is no .png, .jpg or .webp")
    if args.animate:
        Animation.check(args.animate)
    if args.device:
        try:
            torch.empty(0, device=args.device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"--device: {args.device}: {str(error).splitlines()[0]}") from None
    if args.classifier and not args.label and not args.again:
        raise UserError("--classifier: pulls to a class; name it with --label")


def check_prompts(model: LatentDiffusion, jobs: Sequence[Job], negative: str) -> None:
    """UserError where the end of a prompt would not be read."""
    options = {negative: "--negative"} | {job.prompt: "--prompt" for job in jobs}
    for prompt, option in options.items():
        if model.text and prompt and (unread := model.text.unread(prompt)):
            start = prompt if len(prompt) < 40 else f"{prompt[:39]}…"
            raise UserError(
                f"{option}: {start!r} is longer than the {model.text.length} tokens that are read; not read would be "
                f"{unread!r}; shorten it, or give --cut-prompts"
            )


def remembered(args: argparse.Namespace, script: str) -> dict[str, Any]:
    """A picture's recipe, whose options become those given; files may be named anew."""
    old = png_metadata.read(args.again)
    if old["script"] != script:
        raise UserError(f"--again: {args.again} was made by {old['script']}; give it to that")
    for name in KEPT:
        if name in old and not (name in ("model", "weaker", "classifier", *FILES) and getattr(args, name)):
            setattr(args, name, old[name])
    for name in FILES:
        path = getattr(args, name, None)
        if path and png_metadata.fingerprint(existing(f"--{name}", path)) != old[f"{name}_sha256"]:
            raise UserError(f"--again: {path} is another picture than the one that it was made from; --{name} names it")
    return old


def words(jobs: Sequence[Job]) -> tuple[list[str] | None, list[str] | None]:
    """Their prompts and their labels; None where they have none."""
    prompts, labels = ([name for name in names if name is not None] for names in
                       ([job.prompt for job in jobs], [job.label for job in jobs]))  # fmt: skip
    return prompts or None, labels or None


def way(jobs: Sequence[Job]) -> Interpolation | None:
    """Where pictures lie between two."""
    towards = [job.toward for job in jobs if job.toward]
    if not towards:
        return None
    prompts, seeds, shares = zip(*towards, strict=True)
    return Interpolation(None if prompts[0] is None else prompts, seeds, shares)


# -------------------------------------------------------------------------------------------------- what it is made of


def fingerprint(model: LatentDiffusion, *beside: torch.nn.Module) -> str:
    """SHA-256 of all weights that draw a picture, and of the scheduler's settings."""
    parts = [model.unet, model.autoencoder.vae, *([model.text.model] if model.text else []), *beside]
    tensors = {f"{i}.{name}": tensor for i, part in enumerate(parts) for name, tensor in part.state_dict().items()}
    if model.null is not None:
        tensors["null"] = model.null
    settings = {name: value for name, value in model.scheduler.config.items() if not name.startswith("_")}
    return tensors_sha256(tensors, type(model.scheduler).__name__, sorted(settings.items()))


def existing(option: str, path: str | Path) -> Path:
    """UserError where an option names no file."""
    if not Path(path).is_file():
        raise UserError(f"{option}: no file {path}")
    return Path(path)


def opened(option: str, path: str | Path) -> Image.Image:
    """The picture that an option names, as RGB; UserError where it is none."""
    try:
        return images.decode(existing(option, path).read_bytes())
    except BadSampleError as error:
        raise UserError(f"{option}: {path}: {'; '.join(error.args)}") from None


def size_of(text: str) -> tuple[int, int]:
    """`512` or `640x512`, width first, for argparse."""
    if not (found := re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)):
        raise argparse.ArgumentTypeError(f"{text!r}; give 512, or 640x512 (width, height)")
    return int(found[1]), int(found[2] or found[1])


def weaker(model: LatentDiffusion, name: str) -> Any:
    """The U-Net to be guided away from: of a pipeline, or of a checkpoint, with its averaged weights."""
    folder = Path(name)
    if not (folder / "state.json").exists():
        unet = read_pipeline(name, "--weaker")["unet"]
        for key in TOLD:
            if (theirs := unet.config.get(key)) != (own := model.unet.config.get(key)):
                raise UserError(f"--weaker: {name} has {key} {theirs}, and the model {own}; give one of its kind")
        return unet.to(model.device)
    try:
        parts, _ = read_checkpoint(folder)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--weaker: {folder} is damaged ({error})") from None
    tensors = {key.removeprefix("unet."): t for key, t in parts["ema"].items() if key.startswith("unet.")}
    unet = copy.deepcopy(model.unet)
    try:
        unet.load_state_dict(tensors)
    except RuntimeError:
        raise UserError(f"--weaker: {folder} is of another U-Net than {model.unet.config._name_or_path}") from None
    return unet
