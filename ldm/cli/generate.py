"""Generates and writes the images that a command's arguments ask for."""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ldm.cli.image_writer import ImageWriter
from ldm.cli.jobs import Job, check_prompts, interpolation_of, jobs_from, labels_of, prompts_of
from ldm.cli.recipe import recipe_of, restore_arguments, weights_fingerprint
from ldm.cli.sampling_arguments import (
    MODELS,
    SAMPLING,
    UPSCALER,
    check_arguments,
    errors_name_flags,
    sampling_options,
    upscaler_options,
)
from ldm.config.schema import RunConfig
from ldm.distributed.launch import join, on_main
from ldm.models.classifier import NoisyClassifier
from ldm.sampling.cascade import Cascade
from ldm.sampling.options import Sampling
from ldm.sampling.pipeline import LatentDiffusion, SamplingRequest
from ldm.sampling.pipeline_io import read as read_pipeline
from ldm.training.checkpoint import read_checkpoint
from ldm.utils.errors import UserError
from ldm.utils.precision import DTYPES

PrepareInputs = Callable[[LatentDiffusion, argparse.Namespace], dict[str, Any]]
"""Loads and checks a command's inputs for a model: `image`, `mask` and `size` of `LatentDiffusion`'s call."""

UNET_INTERFACE = (
    "in_channels",
    "out_channels",
    "cross_attention_dim",
    "num_class_embeds",
    "addition_embed_type",
    "time_cond_proj_dim",
)
"""Keys of U-Net configurations that decide its inputs and outputs."""


@errors_name_flags()
def generate_images(args: argparse.Namespace, script: str, prepare_inputs: PrepareInputs) -> None:
    """Generates the images that the arguments ask for and writes them; several processes share the work.

    `script` is the command's name in the images' recipes.
    """
    recipe = restore_arguments(args, script) if args.again else {}
    if not args.model:
        raise UserError("--model: none given; name a folder that training wrote, or a Hub id")
    state = join(RunConfig(device="cpu" if args.device == "cpu" else "auto"))
    # only the main process can read standard input
    jobs = [Job.from_recipe(recipe)] if recipe else on_main(lambda: jobs_from(args))
    check_arguments(args, len(jobs))
    options, upscaling = sampling_options(args), upscaler_options(args)
    model = _load_model(args, state, "model", args.base).add_loras(*args.lora)
    model.add_embeddings(*args.embedding)
    upscaler = _load_model(args, state, "upscaler") if getattr(args, "upscaler", None) else None
    guides = {
        "weaker": args.weaker and load_weaker_unet(model, args.weaker),
        "classifier": args.classifier and NoisyClassifier.load(args.classifier, model.device),
    }
    weights = weights_fingerprint(model, *filter(None, guides.values()))
    if upscaler:
        weights += "+" + weights_fingerprint(upscaler)
    if recipe:
        _check_recipe(recipe, args, model, weights)
    elif not args.cut_prompts:
        check_prompts(model.text, jobs, args.negative)
        check_prompts(upscaler.text if upscaler else None, jobs, args.negative, "upscaler")
    inputs = prepare_inputs(model, args)
    options |= _fill_defaults(args, SAMPLING, model, args.solver) | guides
    if recipe:  # options without effect were not always refused
        for name in _request(jobs, inputs, Sampling(**options)).without_effect(model):
            del options[name]
    request = _request(jobs, inputs, Sampling(**options))
    request.check(model)
    pipeline: LatentDiffusion | Cascade = model
    if upscaler:
        upscaling |= _fill_defaults(args, UPSCALER, upscaler)
        pipeline = Cascade(model, upscaler, Sampling(**upscaling))
        pipeline.check(request)
    pipeline.optimize_for_inference(args.precision, args.compile)
    args.precision = next(name for name, dtype in DTYPES.items() if dtype == model.unet.dtype)
    if recipe and model.device.type == "cpu":
        torch.set_num_threads(recipe["threads"])

    own = list(range(state.process_index, len(jobs), state.num_processes))
    row, batch = recipe["row"] if recipe else (None, args.batch)
    # an image's bits depend on its batch's size: to recreate it, the whole batch shows it
    drawn = [jobs[i] for i in own] * (batch if recipe else 1)
    with ImageWriter(args, jobs, own, row, recipe_of(args, script, weights, model.device), model) as writer:
        if drawn:
            request = _request(drawn, inputs, Sampling(**options))
            pipeline.generate(request, batch, writer.on_step, writer.write)
    state.wait_for_everyone()
    if state.is_main_process:
        writer.finish()
    state.wait_for_everyone()
    state.destroy_process_group()


def _fill_defaults(
    args: argparse.Namespace, fields: Mapping[str, str], model: LatentDiffusion, solver: str | None = None
) -> dict[str, Any]:
    """Sets the defaults of arguments that are not given, so that the recipe keeps them; returns those set."""
    defaults: dict[str, Any] = {"guidance_scale": model.guidance, "noise_level": Sampling.noise_level}
    if solver != "ddpm":  # which takes all steps of the chain
        defaults["num_inference_steps"] = model.steps
    missing = {name: field for name, field in fields.items() if field in defaults and getattr(args, name, 0) is None}
    for name, field in missing.items():
        setattr(args, name, defaults[field])
    return {field: defaults[field] for field in missing.values()}


def _load_model(
    args: argparse.Namespace, state: PartialState, argument: str, base: str | None = None
) -> LatentDiffusion:
    """On `--device` if this process may choose: if it is the only one, or the device has a number."""
    may_choose = args.device and (state.num_processes == 1 or ":" in args.device)
    device = args.device if may_choose else state.device
    return LatentDiffusion.load(getattr(args, argument), device, base, f"--{argument}")


def _check_recipe(recipe: dict[str, Any], args: argparse.Namespace, model: LatentDiffusion, weights: str) -> None:
    """UserError if the weights are not the recipe's; a warning if device or torch are not."""
    if (recipe["device"], recipe["torch"]) != (model.device.type, torch.__version__):
        made_on = f"made on {recipe['device']} with torch {recipe['torch']}"
        print(f"{made_on}; here the last bits may differ", file=sys.stderr)
    if recipe["weights"] != weights:
        models = {f"--{name}": path for name in MODELS if name != "base" and (path := getattr(args, name, None))}
        if args.lora:
            models["--lora"] = ", ".join(f"{path}:{scale:g}" for path, scale in args.lora)
        if args.embedding:
            models["--embedding"] = ", ".join(args.embedding)
        paths, flags = ", ".join(models.values()), ", ".join(models)
        raise UserError(f"--again: {paths}: other weights than those that made it; name these with {flags}")


def _request(jobs: Sequence[Job], inputs: dict[str, Any], options: Sampling) -> SamplingRequest:
    """Jobs as one request: all of them to check them before the first image, those of this process to generate them."""
    prompts, labels = prompts_of(jobs), labels_of(jobs)
    return SamplingRequest(
        prompts,
        [job.seed for job in jobs],
        labels,
        1 if prompts or labels else len(jobs),
        toward=interpolation_of(jobs),
        options=options,
        **inputs,
    )


def load_weaker_unet(model: LatentDiffusion, name: str) -> Any:
    """The U-Net of a pipeline, or the averaged weights of a checkpoint, to guide away from (autoguidance)."""
    folder = Path(name)
    if not (folder / "state.json").exists():
        unet = read_pipeline(name, "--weaker")["unet"]
        for key in UNET_INTERFACE:
            if (value := unet.config.get(key)) != (expected := model.unet.config.get(key)):
                raise UserError(f"--weaker: {name} has {key} {value}, and the model {expected}; give one of its kind")
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
