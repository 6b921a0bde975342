"""Does a classifier's guidance make what was asked for? Asks it, and a judge that learned from other pictures.

    python -m stage2_diffusion.classifier.train runs/faces --out runs/guide half=0
    python -m stage2_diffusion.classifier.train runs/faces --out runs/judge half=1 seed=1
    python -m stage2_diffusion.classifier.evaluate runs/faces --guide runs/guide --judge runs/judge

Each row is a solver and a scale: the share of pictures that either takes for the class that was asked for. The classes
come equally often, and every row starts from the same noise.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import ldm.utils.openmp  # noqa: F401  # before torch

import torch

from ldm.models.classifier import NoisyClassifier
from ldm.sampling.options import Sampling
from ldm.sampling.pipeline import LatentDiffusion
from ldm.utils.errors import Parser, UserError, command

BATCH = 32


@command
def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(prog="stage2_diffusion.classifier.evaluate", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="the folder of a finished run, or of a pipeline")
    parser.add_argument("--guide", required=True, type=Path, help="the classifier that guides")
    parser.add_argument("--judge", required=True, type=Path, help="one that was trained on other pictures")
    parser.add_argument("--count", type=int, default=128, help="pictures a row")
    parser.add_argument("--scales", type=float, nargs="+", default=[0.0, 1.0, 2.0, 4.0, 8.0])
    parser.add_argument("--solvers", nargs="+", choices=("ddpm", "ddim"), default=["ddpm", "ddim"])
    parser.add_argument("--steps", type=int, default=100, help="steps of ddpm; ddim takes half as many")
    args = parser.parse_args(arguments)
    for option, number, least in (("--count", args.count, 1), ("--steps", args.steps, 2)):
        if number < least:
            raise UserError(f"{option}: {number}; give {least} or more")
    folder = args.run / "pipeline" if (args.run / "pipeline").is_dir() else args.run
    model = LatentDiffusion.load(folder)
    if model.text or model.classes:
        raise UserError(f"{args.run}: told captions or classes itself; give an unconditional model")
    guide, judge = (NoisyClassifier.load(name, model.unet.device) for name in (args.guide, args.judge))
    if guide.classes != judge.classes:
        raise UserError(f"--judge: {args.judge} knows other classes than {args.guide}; train both on the same run")
    for each in (guide, judge):
        each.check(model.scheduler, model.autoencoder)
    y = torch.arange(args.count) % len(guide.classes)
    print(f"{args.count} pictures of {len(guide.classes)} classes; taken for what they should be by")
    print(f"{'solver':6} {'steps':>5} {'scale':>6} {'guide':>7} {'judge':>7} {'seconds':>8}")
    for solver in args.solvers:
        steps = args.steps if solver == "ddpm" else args.steps // 2
        for scale in args.scales:
            begun = time.monotonic()
            x0 = latents(model, guide, y, solver, steps, scale)
            shares = [recognised(each, x0, y) for each in (guide, judge)]
            seconds = time.monotonic() - begun
            print(f"{solver:6} {steps:>5} {scale:>6g} {shares[0]:>7.3f} {shares[1]:>7.3f} {seconds:>8.0f}", flush=True)


@torch.no_grad()
def recognised(classifier: NoisyClassifier, x0: torch.Tensor, y: torch.Tensor) -> float:
    """Share of latents without noise, `(N, C, h, w)`, that are taken for their class `(N,)`."""
    t = torch.zeros((), device=classifier.device)
    logits = torch.cat([classifier(part.to(classifier.device), t) for part in x0.split(BATCH)])
    return float((logits.argmax(1).cpu() == y).double().mean())


def latents(
    model: LatentDiffusion, guide: NoisyClassifier, y: torch.Tensor, solver: str, steps: int, scale: float
) -> torch.Tensor:
    """Pictures of classes y `(N,)` from the noise of seeds 0, 1, …, `(N, C, h, w)`."""
    parts = []
    for numbers in torch.arange(len(y)).split(BATCH):
        how = Sampling(steps=steps, solver=solver, classifier=guide, classifier_scale=scale)
        parts.append(model.latents(None, numbers.tolist(), how, labels=y[numbers].tolist()))
    return torch.cat(parts)


if __name__ == "__main__":
    sys.exit(main(None))
