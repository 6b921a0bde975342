"""What the scripts that make pictures share: their options, and how pictures are drawn, shown and kept."""

from __future__ import annotations

import argparse
import copy
import itertools
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

from ldm import recipe
from ldm.animation import Animation
from ldm.classifier import NoisyClassifier
from ldm.data import images
from ldm.data.records import BadSampleError
from ldm.errors import Parser, UserError
from ldm.files import read_checkpoint, tensors_sha256, whole_file
from ldm.options import Sampling
from ldm.pipeline import PRECISIONS, LatentDiffusion, Toward
from ldm.pipeline_folder import read as read_pipeline
from ldm.processes import join, on_main
from ldm.sampling import Step
from ldm.schema import SOLVERS, SPACINGS, RunConfig

# Options that change a picture, as its recipe keeps them. Others say what is asked for, or where it goes.
HOW = ("steps", "guidance", "solver", "spacing", "eta", "negative", "rescale", "interval", "threshold",
       "classifier_scale", "strength", "noise_level")  # fmt: skip
KEPT = (*HOW, "size", "model", "weaker", "classifier", "image", "mask", "invert", "precision", "compile")
FILES = ("image", "mask")
# What U-Nets are told and answer: keys of their configurations.
TOLD = ("in_channels", "out_channels", "cross_attention_dim", "num_class_embeds", "addition_embed_type",
        "time_cond_proj_dim")  # fmt: skip
Needs = Callable[[LatentDiffusion, argparse.Namespace], dict[str, Any]]


def parser(name: str, about: str) -> Parser:
    """The options that all of these scripts have."""
    found = Parser(prog=name, description=about)
    found.add_argument("--model", help="a diffusers pipeline: local folder or Hub id")
    what = found.add_argument_group("what")
    what.add_argument("--prompt", nargs="+", default=[], help="what the picture shall show; several make several")
    what.add_argument("--prompts", help="a file with a prompt a line, or - for standard input")
    what.add_argument("--label", nargs="+", default=[], help="names of classes, for a class-conditional model")
    what.add_argument("--negative", default="", help="what it shall not show")
    what.add_argument("--count", type=int, default=1, help="pictures of each prompt or class; default: 1")
    what.add_argument("--seed", type=int, default=0, help="picture i starts from the noise of seed + i; default: 0")
    what.add_argument("--cut-prompts", action="store_true", help="go on where a prompt is longer than what is read")
    what.add_argument("--again", type=Path, help="remakes a picture that these scripts wrote, bit for bit")
    how = found.add_argument_group("how; by default as the model was saved")
    how.add_argument("--steps", type=int, help="of the solver; all of the chain's for ddpm")
    how.add_argument("--solver", choices=SOLVERS)
    how.add_argument("--spacing", choices=SPACINGS, help="of the steps")
    how.add_argument("--eta", type=float, default=0.0, help="ddim's noise, 0 to 1; default: 0")
    how.add_argument("--guidance", type=float, help="scale of classifier-free guidance; 1 is none")
    how.add_argument("--rescale", type=float, default=0.0, help="takes back a share, 0 to 1, of guidance's contrast")
    how.add_argument("--interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("FROM", "TO"),
                     help="shares of noise that are guided; default: 0 1")  # fmt: skip
    how.add_argument("--threshold", type=float, help="dynamic thresholding of pixels, 0.995 for one")
    how.add_argument("--weaker", help="a pipeline, or a checkpoint of the run, to be guided away from (autoguidance)")
    how.add_argument("--classifier", help="the folder of a noisy classifier, which pulls to --label")
    how.add_argument("--classifier-scale", type=float, default=1.0, help="how hard it pulls; default: 1")
    speed = found.add_argument_group("speed")
    speed.add_argument("--batch", type=int, default=8, help="pictures drawn together; default: 8")
    speed.add_argument("--precision", default="auto", choices=("auto", *PRECISIONS),
                       help="of the U-Net; auto, the default, is bf16 where the device has it")  # fmt: skip
    speed.add_argument("--compile", default="no", choices=("no", "yes", "graphs"), help="graphs: CUDA graphs too")
    speed.add_argument("--device", help="cpu, cuda, cuda:1; default: the GPU where there is one")
    out = found.add_argument_group("result")
    out.add_argument("--out", type=Path, default=Path("pictures"),
                     help="a folder, or a .png for a single picture; default: pictures")  # fmt: skip
    out.add_argument("--grid", type=Path, help="a sheet of all pictures with their captions, .png")
    out.add_argument("--animate", type=Path, help="the denoising of the first batch: .gif, .webp or .mp4")
    return found


def draw(given: argparse.Namespace, script: str, needs: Needs) -> None:
    """Draws what the options ask for and writes it.

    `needs` gives a call's `image`, `mask` and `size` for a model. Several processes share the pictures out.
    """
    old = remembered(given, script) if given.again else {}
    if not given.model:
        raise UserError("--model: none given; a folder that training wrote, or a Hub id")
    state = join(RunConfig(device="cpu" if given.device == "cpu" else "auto"))
    jobs = [Job.of(old)] if old else on_main(lambda: asked(given))  # standard input is the main process's alone
    check(given, len(jobs))
    how = {name: getattr(given, name) for name in HOW if hasattr(given, name)}
    Sampling(**how)  # says what is wrong before a model is loaded
    model = LatentDiffusion.load(given.model, given.device or state.device)
    beside = {
        "weaker": given.weaker and weaker(model, given.weaker),
        "classifier": given.classifier and NoisyClassifier.load(given.classifier, model.device),
    }
    weights = fingerprint(model, *filter(None, beside.values()))
    if old and old["weights"] != weights:
        named = ", ".join(getattr(given, name) for name in ("model", *beside) if getattr(given, name))
        raise UserError(f"--again: {named}: other weights than those that made it; --model says where they are")
    if not (given.cut_prompts or old):
        check_prompts(model, jobs, given.negative)
    needed = needs(model, given)
    prompts, labels = words(jobs)
    if given.guidance is None:  # so that the recipe tells of them
        how["guidance"] = given.guidance = model.guidance
    if given.steps is None and given.solver != "ddpm":
        how["steps"] = given.steps = model.steps
    model.check(
        prompts, labels, len(jobs), needed.get("image"), needed.get("mask"), needed.get("size"),
        Sampling(**how, **beside),
    )  # fmt: skip
    model.faster(given.precision, given.compile)
    given.precision = next(name for name, dtype in PRECISIONS.items() if dtype == model.unet.dtype)
    if old and model.device.type == "cpu":
        torch.set_num_threads(old["threads"])

    mine = list(range(state.process_index, len(jobs), state.num_processes))
    row, of = old["row"] if old else (0, 1)
    drawn = [jobs[i] for i in mine] * of  # what is remade stands in as large a batch again
    prompts, labels = words(drawn)
    with Made(given, script, jobs, mine, row, weights, model) as made:
        if drawn:
            model(
                prompts, [job.seed for job in drawn], of if old else given.batch, labels=labels, count=len(drawn),
                toward=way(drawn), told=made.told, ready=made.ready, **needed, **how, **beside,
            )  # fmt: skip
    state.wait_for_everyone()
    if state.is_main_process:
        made.show()
    state.wait_for_everyone()
    state.destroy_process_group()


# ------------------------------------------------------------------------------------------------------ what is asked


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


def asked(given: argparse.Namespace) -> list[Job]:
    """The pictures that the options ask for, in order."""
    prompts: list[str | None] = list(given.prompt)
    if given.prompts:
        prompts += lines(given.prompts)
    if any(not prompt.strip() for prompt in prompts if prompt is not None):
        raise UserError("--prompt: empty; write what the picture shall show")
    labels: list[str | None] = list(given.label)
    if prompts and labels and 1 != len(labels) != len(prompts):
        raise UserError(f"--label: {len(labels)} for {len(prompts)} prompts; give one, or one each")
    pairs = list(zip(prompts or [None] * max(1, len(labels)), labels * len(prompts) if len(labels) == 1 and prompts else
                     labels or [None] * max(1, len(prompts)), strict=True))  # fmt: skip
    pairs = [pair for pair in pairs for _ in range(given.count)]
    jobs = [Job(prompt, label, given.seed + i) for i, (prompt, label) in enumerate(pairs)]
    between = getattr(given, "between", 0)
    if not between:
        return jobs
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


def check(given: argparse.Namespace, pictures: int) -> None:
    """UserError for what can be told before a model is loaded."""
    for name in ("count", "batch"):
        if getattr(given, name) < 1:
            raise UserError(f"--{name}: {getattr(given, name)}; give 1 or more")
    if not 0 <= given.seed < 2**63:
        raise UserError(f"--seed: {given.seed}; give 0 or more, below 2^63")
    if given.out.suffix and given.out.suffix.lower() != ".png":
        raise UserError(f"--out: {given.out} is no .png, which alone keeps how it was made; give one, or a folder")
    if given.out.suffix and pictures > 1:
        raise UserError(f"--out: {given.out} is one picture of {pictures}; give a folder, and --grid for a sheet")
    for option, path in (("--out", given.out if given.out.suffix else None), ("--grid", given.grid),
                         ("--animate", given.animate)):  # fmt: skip
        if path and not path.parent.is_dir():
            raise UserError(f"{option}: no folder {path.parent}; make it first")
    if given.grid and given.grid.suffix.lower() not in (".png", ".jpg", ".webp"):
        raise UserError(f"--grid: {given.grid} is no .png, .jpg or .webp")
    if given.animate:
        Animation.check(given.animate)
    if given.device:
        try:
            torch.empty(0, device=given.device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"--device: {given.device}: {str(error).splitlines()[0]}") from None
    if given.classifier and not given.label and not given.again:
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


def remembered(given: argparse.Namespace, script: str) -> dict[str, Any]:
    """A picture's recipe, whose options become those given; files may be named anew."""
    old = recipe.read(given.again)
    if old["script"] != script:
        raise UserError(f"--again: {given.again} was made by {old['script']}; give it to that")
    for name in KEPT:
        if name in old and not (name in ("model", "weaker", "classifier", *FILES) and getattr(given, name)):
            setattr(given, name, old[name])
    for name in FILES:
        path = getattr(given, name, None)
        if path and recipe.fingerprint(existing(f"--{name}", path)) != old[f"{name}_sha256"]:
            raise UserError(f"--again: {path} is another picture than the one that it was made from; --{name} names it")
    return old


def words(jobs: Sequence[Job]) -> tuple[list[str] | None, list[str] | None]:
    """Their prompts and their labels; None where they have none."""
    prompts, labels = ([name for name in names if name is not None] for names in
                       ([job.prompt for job in jobs], [job.label for job in jobs]))  # fmt: skip
    return prompts or None, labels or None


def way(jobs: Sequence[Job]) -> Toward | None:
    """Where pictures lie between two."""
    towards = [job.toward for job in jobs if job.toward]
    if not towards:
        return None
    prompts, seeds, shares = zip(*towards, strict=True)
    return Toward(None if prompts[0] is None else prompts, seeds, shares)


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


# ------------------------------------------------------------------------------------------------- what becomes of it


class Made:
    """Takes in pictures as they are made: writes them, and shows how far it is."""

    def __init__(
        self, given: argparse.Namespace, script: str, jobs: Sequence[Job], mine: Sequence[int], row: int, weights: str,
        model: LatentDiffusion,
    ):  # fmt: skip
        self.given, self.jobs, self.mine, self.row = given, jobs, mine, row
        self.paths = on_main(self._names)
        of_files = {f"{name}_sha256": recipe.fingerprint(Path(getattr(given, name)))
                    for name in FILES if getattr(given, name, None)}  # fmt: skip
        self.recipe = {
            "script": script, "weights": weights, "device": model.device.type, "torch": torch.__version__,
            "threads": torch.get_num_threads(), **{name: getattr(given, name) for name in KEPT if hasattr(given, name)},
            **of_files,
        }  # fmt: skip
        self._film: Animation | None = None
        self._filmed = False
        if given.animate and PartialState().is_main_process:
            first = [jobs[i].caption for i in mine[: given.batch]]
            self._film = Animation(given.animate, model.autoencoder, first)

    def __enter__(self) -> Made:
        self._writer = ThreadPoolExecutor(2)  # compressing a PNG waits for no step
        self._writing: list[Any] = []
        self._bar = tqdm(
            total=len(self.mine), unit=" pictures", disable=not PartialState().is_main_process, smoothing=0.1,
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.shutdown()
        self._bar.close()
        for each in self._writing:
            each.result()  # raises what went wrong

    def told(self, step: Step) -> None:
        self._bar.set_postfix_str(f"step {step.number} of {step.total}")
        if self._film and not self._filmed:
            self._film.step(step._replace(x0=step.x0[self.row : self.row + 1]) if self.given.again else step)
            self._filmed = step.number == step.total  # on a GPU the next batch begins before this one is ready

    def ready(self, start: int, pictures: Sequence[Image.Image]) -> None:
        """Writes a batch, whose first picture is the `start`-th of this process."""
        rows = [self.row] if self.given.again else range(len(pictures))
        for i, row in enumerate(rows):
            number = self.mine[start + i]
            job = self.jobs[number]
            own = {"prompt": job.prompt, "label": job.label, "seed": job.seed, "toward": job.toward,
                   "row": (row, len(pictures))}  # fmt: skip
            self._writing.append(
                self._writer.submit(recipe.save, pictures[row], self.paths[number], {**self.recipe, **own})
            )
        self._bar.update(len(rows))
        if self._film:
            self._film.show([pictures[row] for row in rows])
            self._film.write()
            self._film = None

    def show(self) -> None:
        """Says where the pictures are, and lays the sheet."""
        given = self.given
        if given.grid:
            pictures = [Image.open(path).convert("RGB") for path in self.paths]  # which closes the files
            sheet = images.grid(pictures, [job.caption for job in self.jobs], columns=min(8, len(pictures)))
            with whole_file(given.grid) as beside:
                sheet.save(beside, {".jpg": "JPEG"}.get(given.grid.suffix.lower(), given.grid.suffix[1:].upper()))
        where = self.paths[0] if len(self.paths) == 1 else f"{len(self.paths)} pictures in {given.out}"
        print("wrote " + ", ".join(map(str, filter(None, (where, given.grid, given.animate)))))

    def _names(self) -> list[Path]:
        """The file of each job; in a folder numbers go on from those that are there."""
        out: Path = self.given.out
        if out.suffix:
            return [out]
        try:
            out.mkdir(parents=True, exist_ok=True)
            used = [int(found[1]) for path in out.iterdir() if (found := re.match(r"(\d{5,})-.*\.png$", path.name))]
        except OSError as error:
            raise UserError(f"--out: can't write {out}: {error.strerror}; give another folder") from None
        first = max(used, default=-1) + 1
        return [out / f"{first + i:05}-{_slug(job.caption)}.png" for i, job in enumerate(self.jobs)]


def _slug(caption: str) -> str:
    slug = re.sub(r"[^\w]+", "-", caption.lower()).strip("-")[:60]
    return slug.encode()[:180].decode(errors="ignore")  # names of files have up to 255 bytes
