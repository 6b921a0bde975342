"""Writes generated images, their sheet and their animation, and shows the progress."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

from ldm.cli.jobs import Job
from ldm.data import images
from ldm.distributed.launch import on_main
from ldm.sampling import png_metadata
from ldm.sampling.animation import Animation
from ldm.sampling.loop import Step
from ldm.sampling.pipeline import LatentDiffusion
from ldm.utils.atomic_files import atomic_file
from ldm.utils.errors import UserError


class ImageWriter:
    """Writes the images of this process's jobs, the numbers `own` of `jobs`, as they are finished.

    `row` is the batch's row that an image is recreated from (`--again`); None otherwise, when all rows are written.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        jobs: Sequence[Job],
        own: Sequence[int],
        row: int | None,
        recipe: dict[str, Any],
        model: LatentDiffusion,
    ):
        self.args, self.jobs, self.own, self.row, self.recipe = args, jobs, own, row, recipe
        self.paths = on_main(self._choose_paths)
        self._animation: Animation | None = None
        self._denoised = False  # whether the animation has all its steps
        if args.animate and PartialState().is_main_process:
            captions = [jobs[i].caption for i in own[: args.batch]]
            self._animation = Animation(args.animate, model.autoencoder, captions)

    def __enter__(self) -> ImageWriter:
        self._pool = ThreadPoolExecutor(2)  # compressing a PNG delays no sampling step
        self._pending: list[Future[None]] = []
        hidden = not PartialState().is_main_process
        self._bar = tqdm(total=len(self.own), unit=" images", disable=hidden, smoothing=0.1)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        self._bar.close()
        for future in self._pending:
            future.result()  # raises its error

    def on_step(self, step: Step) -> None:
        """Shows a sampling step, and adds the first batch's to the animation."""
        self._bar.set_postfix_str(f"step {step.number} of {step.total}")
        if self._animation and not self._denoised:
            x0 = step.x0 if self.row is None else step.x0[self.row : self.row + 1]
            self._animation.step(step._replace(x0=x0))
            self._denoised = step.number == step.total  # on a GPU the next batch starts before this one is decoded

    def write(self, start: int, batch: Sequence[Image.Image]) -> None:
        """Writes a batch, whose first image is this process's number `start`."""
        rows = range(len(batch)) if self.row is None else [self.row]
        for i, row in enumerate(rows):
            number = self.own[start + i]
            job = self.jobs[number]
            recipe = {
                **self.recipe,
                "prompt": job.prompt,
                "label": job.label,
                "seed": job.seed,
                "toward": job.toward,
                "row": (row, len(batch)),
            }
            self._pending.append(self._pool.submit(png_metadata.save, batch[row], self.paths[number], recipe))
        self._bar.update(len(rows))
        for future in self._pending:
            if future.done():
                future.result()  # a full disk stops the command before more is sampled
        if self._animation:
            self._animation.show([batch[row] for row in rows])
            self._animation.write()
            self._animation = None

    def finish(self) -> None:
        """Writes the sheet, and prints where everything is; after all processes have written."""
        args = self.args
        if args.grid:
            written = [Image.open(path).convert("RGB") for path in self.paths]  # convert closes the files
            sheet = images.grid(written, [job.caption for job in self.jobs], columns=8)
            suffix = args.grid.suffix.lower()
            with atomic_file(args.grid) as tmp_path:
                sheet.save(tmp_path, {".jpg": "JPEG"}.get(suffix, suffix[1:].upper()))
        where = self.paths[0] if len(self.paths) == 1 else f"{len(self.paths)} images in {args.out}"
        print("wrote " + ", ".join(str(path) for path in (where, args.grid, args.animate) if path))

    def _choose_paths(self) -> list[Path]:
        """The file of each job; in a folder, numbers continue after the existing files'."""
        out: Path = self.args.out
        if out.suffix.lower() == ".png":
            return [out]
        try:
            out.mkdir(parents=True, exist_ok=True)
            names = (re.match(r"(\d{5,})-.*\.png$", path.name) for path in out.iterdir())
            used = [int(match[1]) for match in names if match]
        except OSError as error:
            raise UserError(f"--out: can't write {out}: {error.strerror}; give another folder") from None
        first = max(used, default=-1) + 1
        return [out / f"{first + i:05}-{_slug(job.caption)}.png" for i, job in enumerate(self.jobs)]


def _slug(caption: str) -> str:
    slug = re.sub(r"[^\w]+", "-", caption.lower()).strip("-")[:60]
    return slug.encode()[:180].decode(errors="ignore")  # file names are limited to 255 bytes
