"""How well images follow their prompts: is the nearest real image the one that the prompt describes?

training captions      pixels                    top1 0.71  top5 0.85
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm.data import images
from ldm.data.index import Index
from ldm.evaluation.frechet import frechet_distance
from ldm.evaluation.prompt_following import (
    generate,
    nearest_neighbors,
    pixel_features,
    prompt_following,
    prompt_groups,
    real_images,
)
from ldm.sampling.options import Sampling
from ldm.sampling.pipeline import LatentDiffusion

ENCODING_BATCH = 64

Features = dict[str, Callable[[torch.Tensor], torch.Tensor]]
"""By name: images `(N, 3, H, W)` → features `(N, D)`."""


def evaluate_prompts(
    args: argparse.Namespace,
    model: LatentDiffusion,
    records: Index,
    concept: Index | None,
    side: int,
    options: Sampling,
    is_default: bool,
) -> dict[str, Any]:
    """How well images follow their prompts; prints it, and returns it for the run's card.

    So do prompts of a `concept`, which are compared with its images too.
    """
    metrics: dict[str, Any] = {}
    real = real_images(records, range(len(records)), side)
    features: Features = {"pixels": pixel_features, "latents": lambda x: _latent_features(model, x)}
    real_features = {name: extract(real) for name, extract in features.items()}
    generated: dict[int, torch.Tensor] = {}  # by the index of the real image that the prompt describes
    groups = {name: targets for name, targets in prompt_groups(records, args.count).items() if targets}
    for name, targets in groups.items():
        prompts = [records[i].captions[0] for i in targets]
        samples = generate(model, prompts, args.seed, options)
        generated |= zip(targets, samples, strict=True)
        metrics[name] = _score(samples, targets, records, features, real_features)
        for measure, scores in metrics[name].items():
            text = "  ".join(f"{key} {value:.2f}" for key, value in scores.items())
            print(f"{name:22} {measure:25} {text}", flush=True)
        if is_default:
            _save_sheet(args.run / f"{name.replace(' ', '-')}.png", generated, targets, records, 10)
    if concept:
        metrics["concept"] = _score_concept(args, model, concept, side, options, features, real_features)
    distance = frechet_distance(model.autoencoder, real[list(generated)], torch.stack(list(generated.values())))
    metrics["Fréchet distance of latents"] = distance
    count = len(generated)
    print(f"{count} images and the real ones of their prompts: Fréchet distance of latents {distance:.2f}")
    if args.sheet:
        shown = [i for targets in groups.values() for i in targets[:: -(-len(targets) // 6)]]
        _save_sheet(args.sheet, generated, shown, records, len(shown))
    return metrics


def _score_concept(
    args: argparse.Namespace,
    model: LatentDiffusion,
    concept: Index,
    side: int,
    options: Sampling,
    features: Features,
    real_features: dict[str, torch.Tensor],
) -> dict[str, dict[str, float]]:
    """Shares of images of the concept's prompts whose nearest real image, of all, is one of the concept's, or its own.

    A caption comes as often as the others, each time with another noise.
    """
    real = real_images(concept, range(len(concept)), side)
    targets = [i % len(concept) for i in range(args.count)]
    samples = generate(model, [concept[i].captions[0] for i in targets], args.seed, options)
    scores = {}
    for name, extract in features.items():
        known = len(real_features[name])
        nearest = nearest_neighbors(extract(samples), torch.cat([real_features[name], extract(real)]), 1)[:, 0]
        exact = nearest == known + torch.tensor(targets)
        scores[name] = {"concept": float((nearest >= known).float().mean()), "top1": float(exact.float().mean())}
        text = "  ".join(f"{key} {value:.2f}" for key, value in scores[name].items())
        print(f"{'concept':22} {name:25} {text}", flush=True)
    if args.sheet:
        path = args.sheet.with_name(f"{args.sheet.stem}-concept{args.sheet.suffix}")
        shown = {i: samples[i] for i in range(min(12, len(samples)))}
        captions = [concept[targets[i]].captions[0] for i in shown]
        images.grid(images.to_pil(torch.stack(list(shown.values()))), captions, columns=6).save(path)
    return scores


def _score(
    samples: torch.Tensor,
    targets: list[int],
    records: Index,
    features: Features,
    real_features: dict[str, torch.Tensor],
) -> dict[str, dict[str, float]]:
    """Prompt-following scores by each kind of features, and chance: scores against other samples' prompts."""
    shuffled = np.roll(targets, len(targets) // 2).tolist()
    scores = {}
    for name, extract in features.items():
        neighbors = nearest_neighbors(extract(samples), real_features[name])
        scores[name] = prompt_following(neighbors, targets, records)
        if len(targets) > 1:  # a single prompt has no other
            scores[f"{name}, prompts shuffled"] = prompt_following(neighbors, shuffled, records)
    return scores


def _save_sheet(path: Path, generated: dict[int, torch.Tensor], shown: list[int], records: Index, columns: int) -> None:
    captions = [records[i].captions[0] for i in shown]
    images.grid(images.to_pil(torch.stack([generated[i] for i in shown])), captions, columns=columns).save(path)


def _latent_features(model: LatentDiffusion, x: torch.Tensor) -> torch.Tensor:
    """Images `(N, 3, H, W)` → flattened latents `(N, C·h·w)`."""
    parts = x.clamp(-1, 1).split(ENCODING_BATCH)
    return torch.cat([model.autoencoder.encode(part).cpu() for part in parts]).flatten(1)
