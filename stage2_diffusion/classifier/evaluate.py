"""Does classifier guidance generate the requested class? Measured by the guide and by an independent evaluator.

    python -m stage2_diffusion.classifier.train runs/faces --out runs/guide half=0
    python -m stage2_diffusion.classifier.train runs/faces --out runs/evaluator half=1 seed=1
    python -m stage2_diffusion.classifier.evaluate runs/faces --guide runs/guide --evaluator runs/evaluator

The evaluator is a classifier that was trained on other images: the guide's own opinion is biased. Each row is a solver
and a scale: the share of images that the guide, and that the evaluator, assigns to the requested class. All classes are
requested equally often, and every row starts from the same noise.
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
    parser.add_argument("--guide", required=True, type=Path, help="the classifier that guides sampling")
    evaluator_help = "a classifier that was trained on other images"
    parser.add_argument("--evaluator", "--judge", required=True, type=Path, help=evaluator_help)  # --judge: former name
    parser.add_argument("--count", type=int, default=128, help="images per row")
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
        raise UserError(f"{args.run}: has text or class conditions; give an unconditional model")
    guide, evaluator = (NoisyClassifier.load(path, model.unet.device) for path in (args.guide, args.evaluator))
    if guide.classes != evaluator.classes:
        raise UserError(f"--evaluator: {args.evaluator} has other classes than {args.guide}; train both on one run")
    for classifier in (guide, evaluator):
        classifier.check(model.scheduler, model.autoencoder)
    y = torch.arange(args.count) % len(guide.classes)
    print(f"accuracy on {args.count} images of {len(guide.classes)} classes")
    print(f"{'solver':6} {'steps':>5} {'scale':>6} {'guide':>7} {'evaluator':>9} {'seconds':>8}")
    for solver in args.solvers:
        steps = args.steps if solver == "ddpm" else args.steps // 2
        for scale in args.scales:
            start = time.monotonic()
            x0 = sample_latents(model, guide, y, solver, steps, scale)
            guide_accuracy, evaluator_accuracy = (accuracy(classifier, x0, y) for classifier in (guide, evaluator))
            figures = f"{guide_accuracy:>7.3f} {evaluator_accuracy:>9.3f} {time.monotonic() - start:>8.0f}"
            print(f"{solver:6} {steps:>5} {scale:>6g} {figures}", flush=True)


@torch.no_grad()
def accuracy(classifier: NoisyClassifier, x0: torch.Tensor, y: torch.Tensor) -> float:
    """Share, in [0, 1], of clean latents x0 `(N, C, h, w)` that are assigned to their class y `(N,)`."""
    t = torch.zeros((), device=classifier.device)
    logits = torch.cat([classifier(part.to(classifier.device), t) for part in x0.split(BATCH)])
    return float((logits.argmax(1).cpu() == y).double().mean())


def sample_latents(
    model: LatentDiffusion, guide: NoisyClassifier, y: torch.Tensor, solver: str, steps: int, scale: float
) -> torch.Tensor:
    """Latents `(N, C, h, w)` of images of classes y `(N,)`, from the noise of seeds 0, 1, …"""
    parts = []
    for numbers in torch.arange(len(y)).split(BATCH):
        options = Sampling(num_inference_steps=steps, solver=solver, classifier=guide, classifier_scale=scale)
        parts.append(model.latents(None, numbers.tolist(), options, labels=y[numbers].tolist()))
    return torch.cat(parts)


if __name__ == "__main__":
    sys.exit(main(None))
