"""Figures of a run's images: FID and its kin, against real images and against another model; is it copying?"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ldm.config.rules import FEATURE_NETWORKS, check_figures
from ldm.config.schema import Config, EvaluateConfig
from ldm.data.index import Index
from ldm.evaluation import bootstrap, distances
from ldm.evaluation.features import FeatureNetwork, Features
from ldm.evaluation.figures import Figure
from ldm.evaluation.generation import GenerationPlan, features_of
from ldm.evaluation.memorization import memorization, missed_modes
from ldm.evaluation.model_figures import RealImages, draw_images, measure, prompt_following, usual_metrics
from ldm.evaluation.networks import default_network, load_network, prompt_features, reads_text
from ldm.evaluation.retrieval import TOP
from ldm.evaluation.sample_files import write_best_and_worst, write_closest_pairs, write_grid
from ldm.models.attention import use_attention
from ldm.sampling.options import Sampling
from ldm.sampling.pipeline import LatentDiffusion
from ldm.utils.errors import UserError, unknown_choice

GROUPS = {
    "train": "training captions",
    "reconstruction": "held-out images",
    "combination": "held-out combinations",
}
"""Of prompts, by the split of the image that has them."""
KEYS = ("--metrics", "--network", "--images")
DEFAULT_IMAGES, DEFAULT_BATCH = (EvaluateConfig.model_fields[name].default for name in ("images", "batch"))


@dataclass
class Request:
    """What is measured, as flags and the run's `stage2.evaluate` say."""

    metrics: dict[str, list[str]]
    """By network."""
    weights: str | None
    images: int
    batch: int
    options: Sampling
    bootstrap: int
    """Splits into halves; 0 for no error bars."""
    precision: str = "no"
    """Of the U-Net."""
    named: bool = False
    """Whether the user named the metrics."""

    @classmethod
    def of(cls, args: argparse.Namespace, options: Sampling, settings: Config | None = None) -> Request:
        """UserError where a network can't give a metric that is named. Without `settings`, of folders of images."""
        evaluate = settings.stage2.evaluate if settings else None
        text = settings is not None and settings.stage2.text
        networks = args.network or ([evaluate.network] if evaluate else [default_network()])
        for name in networks:
            if name not in FEATURE_NETWORKS:
                raise unknown_choice("--network", name, FEATURE_NETWORKS)
        named = args.metrics or (list(evaluate.metrics) if evaluate and not args.network else None)
        images = args.images if args.images is not None else evaluate.images if evaluate else DEFAULT_IMAGES
        if "clip_score" in (named or ()) and not text:
            raise UserError("--metrics: clip_score needs prompts, and there are none; leave it out")
        metrics = {name: named or usual_metrics(name, text) for name in networks}
        for name, chosen in metrics.items():
            try:
                check_figures(chosen, name, images or DEFAULT_IMAGES, KEYS)
            except ValueError as error:
                raise UserError(str(error)) from None
        weights = args.weights or (evaluate.weights if evaluate and not args.network else None)
        if weights and (len(metrics) > 1 or "latents" in metrics):
            raise UserError("--weights: are of one network, other than latents; name it with --network")
        if evaluate:
            options = replace(
                options,
                num_inference_steps=options.num_inference_steps or evaluate.steps,
                guidance_scale=evaluate.guidance if options.guidance_scale is None else options.guidance_scale,
            )
        batch = args.batch or (evaluate.batch if evaluate else DEFAULT_BATCH)
        return cls(metrics, weights, images, batch, options, args.bootstrap, args.precision, named is not None)

    def check_real_images(self, count: int) -> None:
        """Leaves out metrics that so many training images are too few for; UserError where they were named."""
        for name, metrics in self.metrics.items():
            able = possible(metrics, count)
            if lost := [metric for metric in metrics if metric not in able]:
                least = distances.METRICS[lost[0]].min_images
                reason = f"{lost[0]} needs {least} training images, and there are {count}"
                if self.named or not able:
                    raise UserError(f"--metrics: {reason}; leave it out, or draw no images for figures: --images 0")
                print(f"without {', '.join(lost)}: {reason}", flush=True)
            self.metrics[name] = able

    def networks(self, device: torch.device, model: LatentDiffusion | None) -> list[FeatureNetwork]:
        autoencoder = model.autoencoder if model else None
        return [load_network(name, device, self.weights, autoencoder) for name in self.metrics]


def possible(metrics: Sequence[str], images: int) -> list[str]:
    """The metrics that so many images are enough for."""
    return [metric for metric in metrics if images >= distances.METRICS[metric].min_images]


def prepare(model: LatentDiffusion, precision: str, settings: Config) -> None:
    """Sets the U-Net's precision. In float32 it computes as the run's training does, so that the bits are the same."""
    model.optimize_for_inference(precision)
    if precision == "no":
        stage = settings.stage2
        use_attention(model.unet, stage.attention_backend, model.device)
        model.unet.to(memory_format=torch.channels_last if stage.channels_last else torch.contiguous_format)


@dataclass
class Measured:
    """What one network saw."""

    network: FeatureNetwork
    real: Features
    generated: Features
    figures: dict[str, Figure]
    ceiling: dict[str, Figure] = field(default_factory=dict)


def evaluate_model(
    args: argparse.Namespace,
    request: Request,
    settings: Config,
    model: LatentDiffusion,
    records: Index,
    folder: Path | None,
    networks: Sequence[FeatureNetwork],
    other: LatentDiffusion | None,
) -> dict[str, Any]:
    """Draws a model's images, prints what they are like, and returns it for `evaluation.json`.

    `folder` gets a few of the images. They are compared with those of an `other` model.
    """
    conditions = settings.stage2.conditions
    plan = GenerationPlan.of(records, conditions, request.images, args.seed, request.batch, request.options)
    real = RealImages(records, settings.data.size, settings.cache_dir)
    images = draw_images(plan, model)
    measured = measure_figures(request, plan, images, real, networks)
    metrics: dict[str, Any] = {
        "figures": {seen.network.name: json_of(seen.figures) for seen in measured},
        "real against real": {seen.network.name: json_of(seen.ceiling) for seen in measured},
        "sampling of figures": {
            "steps": request.options.num_inference_steps or model.steps,
            "guidance": model.guidance if request.options.guidance_scale is None else request.options.guidance_scale,
            "precision": request.precision,
        },
        "references": {seen.network.name: real.fingerprint(seen.network) for seen in measured},
    }
    metrics["memorization"] = measure_memorization(measured[0], plan, real, images, folder)
    if plan.prompts:
        metrics["retrieval"] = measure_prompts(measured, plan, real, images, folder)
    if other:
        prepare(other.to(model.device), request.precision, settings)
        metrics["comparison"] = compare_models(request, plan, measured, real, other, args.compare)
    if args.seeds > 1:
        metrics["seeds"] = measure_seeds(args.seeds, request, plan, model, measured)
    if args.grid and folder:
        write_grid(folder / "grid.png", plan, model)
    return metrics


def measure_figures(
    request: Request, plan: GenerationPlan, images: torch.Tensor, real: RealImages, networks: Sequence[FeatureNetwork]
) -> list[Measured]:
    """Measures and prints the figures of generated images `(N, 3, H, W)` uint8, by network."""
    held, training = real.ceiling(plan.count)
    measured = []
    for network in networks:
        metrics = request.metrics[network.name]
        seen = Measured(network, real.features(real.training, network), features_of(images, network, plan.batch), {})
        seen.figures = measure(metrics, seen.real, seen.generated, network, plan.prompts, request.bootstrap)
        captions = [captions[0] for captions in held.captions()] if plan.prompts else None
        others = (real.features(training, network), real.features(held, network))
        seen.ceiling = measure(possible(metrics, min(map(len, others))), *others, network, captions, 0)
        print(f"{plan.count} images against {len(seen.real)} training images, by {network.label}", flush=True)
        for name, figure in seen.figures.items():
            best = f"real against real {seen.ceiling.get(name, 'has too few')}"
            print(f"  {name:10} {figure!s:32} {best}  {distances.METRICS[name].help}", flush=True)
        measured.append(seen)
    return measured


def measure_seeds(
    seeds: int, request: Request, plan: GenerationPlan, model: LatentDiffusion, measured: Sequence[Measured]
) -> dict[str, Any]:
    """Draws the same prompts from other noise, and returns each figure's value of each seed, by network and metric.

    Prints mean ± standard deviation: what noise alone does to a figure, while its interval also has the choice of
    images in it.
    """
    values = {seen.network.name: {name: [figure.value] for name, figure in seen.figures.items()} for seen in measured}
    for k in range(1, seeds):
        images = draw_images(replace(plan, seed=plan.seed + k * plan.count), model, f"drawing images, seed {k + 1}")
        for seen in measured:
            generated = features_of(images, seen.network, plan.batch)
            metrics = request.metrics[seen.network.name]
            figures = measure(metrics, seen.real, generated, seen.network, plan.prompts, bootstrap=0)
            for name, figure in figures.items():
                values[seen.network.name][name].append(figure.value)
    for network, by_metric in values.items():
        print(f"over {seeds} seeds, by {network}", flush=True)
        for name, of_seeds in by_metric.items():
            print(f"  {name:10} {statistics.mean(of_seeds):.4g} ± {statistics.stdev(of_seeds):.2g}", flush=True)
    return values


def measure_memorization(
    seen: Measured, plan: GenerationPlan, real: RealImages, images: torch.Tensor, folder: Path | None
) -> dict[str, Any]:
    """Prints and returns whether images are copies of training images; writes the closest pairs to `folder`."""
    held_out = real.features(real.held_out_at_random, seen.network) if len(real.held_out_at_random) else None
    copies = memorization(seen.real, seen.generated, held_out, seen.network.label, plan.prompts)
    missed = missed_modes(seen.real, seen.generated, held_out)
    print(f"copying, by {seen.network.label}: {copies} (calibrated with {copies.calibration})", flush=True)
    if folder:
        write_closest_pairs(folder / "memorization.png", copies.pairs, images, real.training)
    return {**copies.to_json(), "missed modes": missed.to_json()}


def measure_prompts(
    measured: Sequence[Measured], plan: GenerationPlan, real: RealImages, images: torch.Tensor, folder: Path | None
) -> dict[str, Any]:
    """Prints and returns how well images fit their prompts; writes the best and worst to `folder`, by one network."""
    assert plan.prompts and plan.described, "a model of text"
    result: dict[str, Any] = {}
    scores = []
    for seen in measured:
        following = prompt_following(plan, seen.generated, real, seen.network)
        scores.append((reads_text(seen.network), following.scores))
        result |= following.figures(seen.network)
        what = "prompts" if reads_text(seen.network) else "real images"
        print(f"prompt following, among {following.ranks.candidates} {what}, by {seen.network.label}", flush=True)
        for name, figure in following.ranks.figures().items():
            context = [f"chance {following.ranks.chance(int(name.removeprefix('R@'))):.3g}"]
            context += [f"shuffled prompts {following.shuffled.figures()[name]}"] if following.shuffled else []
            context += [f"real images {following.real.figures()[name]}"] if following.real else []
            print(f"  {name:10} {figure!s:32} {', '.join(context)}", flush=True)
    if folder:
        own = plan.described.column("split").tolist()
        groups = [GROUPS[own[i % len(own)]] for i in range(plan.count)]
        best = max(scores, key=lambda entry: entry[0])[1]  # by text where there is such a network
        write_best_and_worst(folder, images, plan.prompts, best, groups)
    return result


def load_other(name: str, model: LatentDiffusion) -> LatentDiffusion:
    """Another run's model, or a pipeline, on the CPU; UserError where it has other conditions."""
    folder = Path(name) / "pipeline"
    other = LatentDiffusion.load(folder if folder.is_dir() else name, "cpu", option="--compare")
    kinds = [(m.task, m.text is not None, m.classes, m.side) for m in (model, other)]
    if kinds[0] != kinds[1]:
        raise UserError(f"--compare: {name} draws other images, by task, conditions, classes or size; name another")
    return other


def compare_models(
    request: Request,
    plan: GenerationPlan,
    measured: Sequence[Measured],
    real: RealImages,
    other: LatentDiffusion,
    name: str,
) -> dict[str, Any]:
    """Prints and returns whether another model is better, on the same prompts and noise, by network and metric."""
    images = draw_images(plan, other, f"drawing images of {name}")
    result: dict[str, Any] = {}
    for seen in measured:
        metrics, generated = request.metrics[seen.network.name], features_of(images, seen.network, plan.batch)
        text = prompt_features(seen.network, plan.prompts) if "clip_score" in metrics else None
        theirs = measure(metrics, seen.real, generated, seen.network, plan.prompts, request.bootstrap)
        compared = distances.compare(
            possible(metrics, min(len(seen.real), plan.count) // 2),
            seen.real,
            seen.generated,
            generated,
            text=text,
            bootstrap=request.bootstrap,
        )
        own = seen.figures
        if plan.prompts:
            following, others = (prompt_following(plan, x, real, seen.network) for x in (seen.generated, generated))
            own, theirs = own | following.ranks.figures(), theirs | others.ranks.figures()
            for k in TOP:
                compared[f"R@{k}"] = bootstrap.compare(following.ranks.scores(k), others.ranks.scores(k))
        print(f"compared with {name}, by {seen.network.label}", flush=True)
        for metric, comparison in compared.items():
            print(f"  {metric:10} {own[metric]} against {theirs[metric]}: {comparison}", flush=True)
        result[seen.network.name] = {
            metric: {**compared[metric].to_json(), "other": theirs[metric].to_json()} for metric in compared
        }
    return {"with": name, **result}


def json_of(figures: dict[str, Figure]) -> dict[str, Any]:
    return {name: figure.to_json() for name, figure in figures.items()}
