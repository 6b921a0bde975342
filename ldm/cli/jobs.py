"""Jobs: what each image of a command shows."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ldm.models.text_encoder import AnyTextEncoder
from ldm.sampling.pipeline import Interpolation
from ldm.utils.errors import UserError


@dataclass(frozen=True)
class Job:
    """One image to generate."""

    prompt: str | None
    label: str | None
    seed: int
    toward: tuple[str | None, int, float] | None = None
    """Interpolation: the other prompt, the other seed, and the share, in [0, 1], of the way to them."""

    @classmethod
    def from_recipe(cls, recipe: dict[str, Any]) -> Job:
        """The job of an image that was generated before (`ldm.sampling.png_metadata`)."""
        toward = recipe["toward"]
        return cls(recipe["prompt"], recipe["label"], recipe["seed"], None if toward is None else tuple(toward))

    @property
    def caption(self) -> str:
        caption = ", ".join(filter(None, (self.label, self.prompt))) or f"seed {self.seed}"
        if self.toward and self.toward[2]:
            prompt, seed, share = self.toward
            caption += f" to {prompt if prompt and prompt != self.prompt else f'seed {seed}'}, {share:.0%}"
        return caption


def jobs_from(args: argparse.Namespace) -> list[Job]:
    """The jobs that the arguments ask for, in order; UserError if prompts and labels don't fit together."""
    jobs = [Job(prompt, label, args.seed + i) for i, (prompt, label) in enumerate(_prompts_and_labels(args))]
    between = getattr(args, "between", 0)
    if not between:
        return jobs
    if len({job.label for job in jobs}) > 1:
        raise UserError("--between: can't interpolate between two classes; give one --label")
    if len(jobs) < 2:
        raise UserError("--between: needs two images to interpolate between; give two prompts, or --count 2")
    interpolated = [
        replace(start, toward=(end.prompt, end.seed, i / (between + 1)))
        for start, end in itertools.pairwise(jobs)
        for i in range(between + 1)
    ]
    return [*interpolated, replace(jobs[-1], toward=(jobs[-1].prompt, jobs[-1].seed, 0.0))]


def _prompts_and_labels(args: argparse.Namespace) -> list[tuple[str | None, str | None]]:
    """A pair per image; one label serves all prompts, and each pair is repeated `--count` times."""
    prompts: list[str | None] = list(args.prompt)
    if args.prompts:
        prompts += read_prompts(args.prompts)
    if any(not prompt.strip() for prompt in prompts if prompt is not None):
        raise UserError("--prompt: empty; write what the image shall show")
    labels: list[str | None] = list(args.label)
    if prompts and labels and len(labels) not in (1, len(prompts)):
        raise UserError(f"--label: {len(labels)} for {len(prompts)} prompts; give one for all, or one per prompt")
    if prompts and len(labels) == 1:
        labels *= len(prompts)
    count = max(len(prompts), len(labels), 1)
    pairs = zip(prompts or [None] * count, labels or [None] * count, strict=True)
    return [pair for pair in pairs for _ in range(args.count)]


def read_prompts(name: str) -> list[str]:
    """The prompts of a file, one per line, or of standard input (`-`); UserError if there are none."""
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts: can't read {name}: {getattr(error, 'strerror', None) or error}") from None
    if not (prompts := [line.strip() for line in text.splitlines() if line.strip()]):
        raise UserError(f"--prompts: no prompt in {'standard input' if name == '-' else name}; write one per line")
    return prompts


def check_prompts(encoder: AnyTextEncoder | None, jobs: Sequence[Job], negative: str, model: str = "model") -> None:
    """UserError if a prompt is longer than the text encoder of `model` reads."""
    options = {negative: "--negative"} | {job.prompt: "--prompt" for job in jobs}
    for prompt, option in options.items():
        if encoder and prompt and (unread := encoder.unread(prompt)):
            start = prompt if len(prompt) < 40 else f"{prompt[:39]}…"
            raise UserError(
                f"{option}: {start!r} is longer than the {model}'s {encoder.length} tokens; ignored would be "
                f"{unread!r}; shorten it, or give --cut-prompts"
            )


def prompts_of(jobs: Sequence[Job]) -> list[str] | None:
    """The jobs' prompts; None if they have none."""
    return [job.prompt for job in jobs if job.prompt is not None] or None


def labels_of(jobs: Sequence[Job]) -> list[str] | None:
    """The jobs' labels; None if they have none."""
    return [job.label for job in jobs if job.label is not None] or None


def interpolation_of(jobs: Sequence[Job]) -> Interpolation | None:
    """The jobs' interpolation, for `LatentDiffusion`; None if they have none."""
    towards = [job.toward for job in jobs if job.toward]
    if not towards:
        return None
    prompts, seeds, shares = zip(*towards, strict=True)
    return Interpolation(None if prompts[0] is None else prompts, seeds, shares)
