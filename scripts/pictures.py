"""What the scripts that make pictures share: their options, and how pictures are drawn, shown and kept."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from _cli import (
    FILES,
    HOW,
    KEPT,
    Job,
    asked,
    check,
    check_prompts,
    fingerprint,
    remembered,
    way,
    weaker,
    words,
)
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

from ldm.config.schema import SOLVERS, SPACINGS, RunConfig
from ldm.data import images
from ldm.distributed.launch import join, on_main
from ldm.models.classifier import NoisyClassifier
from ldm.sampling import png_metadata
from ldm.sampling.animation import Animation
from ldm.sampling.loop import Step
from ldm.sampling.options import Sampling
from ldm.sampling.pipeline import LatentDiffusion, SamplingRequest
from ldm.utils.atomic_files import whole_file
from ldm.utils.errors import Parser, UserError
from ldm.utils.precision import DTYPES

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
    what.add_argument(
        "--again",
        type=Path,
        help="remakes a picture that these scripts wrote, bit for bit, as it says, whatever else is given",
    )
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
    speed.add_argument("--precision", default="auto", choices=("auto", *DTYPES),
                       help="of the U-Net; auto, the default, is bf16 where the device has it")  # fmt: skip
    speed.add_argument("--compile", default="no", choices=("no", "yes", "graphs"), help="graphs: CUDA graphs too")
    speed.add_argument("--device", help="cpu, cuda, cuda:1; default: the GPU where there is one")
    out = found.add_argument_group("result")
    out.add_argument("--out", type=Path, default=Path("pictures"),
                     help="a folder, or a .png for a single picture; default: pictures")  # fmt: skip
    out.add_argument("--grid", type=Path, help="a sheet of all pictures with their captions, .png")
    out.add_argument("--animate", type=Path, help="the denoising of the first batch: .gif, .webp or .mp4")
    return found


def draw(args: argparse.Namespace, script: str, needs: Needs) -> None:
    """Draws what the options ask for and writes it.

    `needs` gives a call's `image`, `mask` and `size` for a model. Several processes share the pictures out.
    """
    old = remembered(args, script) if args.again else {}
    if not args.model:
        raise UserError("--model: none given; a folder that training wrote, or a Hub id")
    state = join(RunConfig(device="cpu" if args.device == "cpu" else "auto"))
    jobs = [Job.of(old)] if old else on_main(lambda: asked(args))  # standard input is the main process's alone
    check(args, len(jobs))
    how = {name: getattr(args, name) for name in HOW if hasattr(args, name)}
    Sampling(**how)  # says what is wrong before a model is loaded
    alone = state.num_processes == 1 or ":" in (args.device or "")
    model = LatentDiffusion.load(args.model, args.device if args.device and alone else state.device)
    here = {"device": model.device.type, "torch": torch.__version__}
    if old and any(old[name] != found for name, found in here.items()):
        print(f"made on {old['device']} with torch {old['torch']}; here the last bits may differ", file=sys.stderr)
    beside = {
        "weaker": args.weaker and weaker(model, args.weaker),
        "classifier": args.classifier and NoisyClassifier.load(args.classifier, model.device),
    }
    weights = fingerprint(model, *filter(None, beside.values()))
    if old and old["weights"] != weights:
        named = ", ".join(getattr(args, name) for name in ("model", *beside) if getattr(args, name))
        raise UserError(f"--again: {named}: other weights than those that made it; --model says where they are")
    if not (args.cut_prompts or old):
        check_prompts(model, jobs, args.negative)
    needed = needs(model, args)
    prompts, labels = words(jobs)
    if args.guidance is None:  # so that the recipe tells of them
        how["guidance"] = args.guidance = model.guidance
    if args.steps is None and args.solver != "ddpm":
        how["steps"] = args.steps = model.steps
    SamplingRequest(
        prompts, labels=labels, count=1 if prompts or labels else len(jobs), image=needed.get("image"),
        mask=needed.get("mask"), size=needed.get("size"), options=Sampling(**how, **beside),
    ).check(model)  # fmt: skip
    model.optimize_for_inference(args.precision, args.compile)
    args.precision = next(name for name, dtype in DTYPES.items() if dtype == model.unet.dtype)
    if old and model.device.type == "cpu":
        torch.set_num_threads(old["threads"])

    mine = list(range(state.process_index, len(jobs), state.num_processes))
    row, of = old["row"] if old else (0, 1)
    drawn = [jobs[i] for i in mine] * of  # what is remade stands in as large a batch again
    prompts, labels = words(drawn)
    with Made(args, script, jobs, mine, row, weights, model) as made:
        if drawn:
            model(
                prompts, [job.seed for job in drawn], of if old else args.batch, labels=labels,
                count=1 if prompts or labels else len(drawn),
                toward=way(drawn), callback=made.on_step, ready=made.ready, **needed, **how, **beside,
            )  # fmt: skip
    state.wait_for_everyone()
    if state.is_main_process:
        made.show()
    state.wait_for_everyone()
    state.destroy_process_group()


class Made:
    """Takes in pictures as they are made: writes them, and shows how far it is."""

    def __init__(
        self, args: argparse.Namespace, script: str, jobs: Sequence[Job], mine: Sequence[int], row: int, weights: str,
        model: LatentDiffusion,
    ):  # fmt: skip
        self.given, self.jobs, self.mine, self.row = args, jobs, mine, row
        self.paths = on_main(self._names)
        of_files = {f"{name}_sha256": png_metadata.fingerprint(Path(getattr(args, name)))
                    for name in FILES if getattr(args, name, None)}  # fmt: skip
        self.recipe = {
            "script": script, "weights": weights, "device": model.device.type, "torch": torch.__version__,
            "threads": torch.get_num_threads(), **{name: getattr(args, name) for name in KEPT if hasattr(args, name)},
            **of_files,
        }  # fmt: skip
        self._film: Animation | None = None
        self._filmed = False
        if args.animate and PartialState().is_main_process:
            first = [jobs[i].caption for i in mine[: args.batch]]
            self._film = Animation(args.animate, model.autoencoder, first)

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

    def on_step(self, step: Step) -> None:
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
                self._writer.submit(png_metadata.save, pictures[row], self.paths[number], {**self.recipe, **own})
            )
        self._bar.update(len(rows))
        for each in self._writing:
            if each.done():
                each.result()  # a disk that is full is said before more is drawn
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
            with whole_file(given.grid) as tmp_path:
                sheet.save(tmp_path, {".jpg": "JPEG"}.get(given.grid.suffix.lower(), given.grid.suffix[1:].upper()))
        where = self.paths[0] if len(self.paths) == 1 else f"{len(self.paths)} pictures in {given.out}"
        print("wrote " + ", ".join(map(str, filter(None, (where, given.grid, given.animate)))))

    def _names(self) -> list[Path]:
        """The file of each job; in a folder numbers go on from those that are there."""
        out: Path = self.given.out
        if out.suffix.lower() == ".png":
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
