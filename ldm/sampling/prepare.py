"""One function per task: turns the inputs of a call into the start and the conditions of the sampling loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ldm.models.conditioning import Condition, TextEmbedding, mask_and_masked_latents, noise_augmented
from ldm.models.finite import check_output
from ldm.models.text_encoder import NULL_PROMPT
from ldm.sampling.loop import InpaintMask, initial_noise, slerp
from ldm.sampling.request import SamplingInputs, label_numbers, solver_for
from ldm.sampling.solvers import Solver

if TYPE_CHECKING:
    from ldm.sampling.pipeline import LatentDiffusion


@dataclass(frozen=True)
class Prepared:
    """All that the loop needs besides the network."""

    solver: Solver
    noise: torch.Tensor
    """`(N, C, h, w)`."""
    generators: list[torch.Generator]
    """One per image, each advanced past the draw that made its noise."""
    condition: Condition
    unconditional: Condition | None = None
    """The condition that guidance leads away from; None for an unconditional model."""
    classifier_label: torch.Tensor | None = None
    """`(N,)`: the classes that a classifier guides to."""
    x0: torch.Tensor | None = None
    """Latents of an image, which start at the step `first` with its noise."""
    first: int = 0
    inpaint: InpaintMask | None = None


def prepare(model: LatentDiffusion, inputs: SamplingInputs) -> Prepared:
    """Chooses the function by the model's task and the inputs."""
    if model.task == "upscale":
        return prepare_upscaling(model, inputs)
    if inputs.mask is not None:
        return prepare_inpainting(model, inputs)
    if inputs.image is not None:
        return prepare_image_to_image(model, inputs)
    return _prepare_generation(model, inputs)


def prepare_unconditional(model: LatentDiffusion, inputs: SamplingInputs) -> Prepared:
    """From noise alone; a classifier may guide it to labels."""
    noise, generators = _noise(model, inputs)
    label = None if inputs.options.classifier is None else label_numbers(model, inputs.labels, inputs.options)
    return Prepared(solver_for(model, inputs.options), noise, generators, Condition(), classifier_label=label)


def prepare_class_conditional(model: LatentDiffusion, inputs: SamplingInputs) -> Prepared:
    """From noise and a class; the embedding after those of the classes stands for no class."""
    prepared, label = prepare_unconditional(model, inputs), label_numbers(model, inputs.labels, inputs.options)
    assert label is not None, "the request was checked"
    condition = Condition(label=label)
    return replace(
        prepared, condition=condition, unconditional=Condition(label=torch.full_like(label, len(model.classes)))
    )


def prepare_text_to_image(model: LatentDiffusion, inputs: SamplingInputs) -> Prepared:
    """From noise and prompts, with classes too where the model has them."""
    assert inputs.prompts is not None, "the request was checked"
    if inputs.labels is not None and inputs.options.classifier is None:
        prepared = prepare_class_conditional(model, inputs)
    else:
        prepared = prepare_unconditional(model, inputs)
    text = _text(model, inputs)
    condition, count, device = prepared.condition.with_text(text), len(inputs.prompts), text.states.device
    if model.unet.config.get("addition_embed_type") == "text_time":  # an image that was not cropped
        height, width = (n * model.autoencoder.factor for n in prepared.noise.shape[2:])
        sizes = torch.tensor([[height, width, 0, 0, height, width]], device=device).float()
        condition = condition._replace(sizes=sizes.expand(count, 6))
    if model.unet.config.get("time_cond_proj_dim"):  # distilled: its prediction is guided already, in one forward
        scale = torch.as_tensor(guidance_scale(model, inputs), dtype=torch.float32, device=model.device)
        return replace(prepared, condition=condition._replace(guidance=scale.expand(count)), unconditional=None)
    label = None if prepared.unconditional is None else prepared.unconditional.label
    null = condition.with_text(_negative_text(model, inputs, count))._replace(label=label)
    return replace(prepared, condition=condition, unconditional=null)


def prepare_image_to_image(model: LatentDiffusion, inputs: SamplingInputs) -> Prepared:
    """From an image with the noise of a later step: SDEdit, arXiv 2108.01073."""
    assert inputs.image is not None, "the request was checked"
    prepared = _prepare_generation(model, inputs)
    strength = inputs.options.strength
    if strength is None:
        strength = 1.0 if model.task == "inpaint" else 0.6
    steps = prepared.solver.steps
    x0 = _encode(model, inputs.image.to(model.device))
    return replace(prepared, x0=x0, first=steps - round(steps * strength))


def prepare_inpainting(model: LatentDiffusion, inputs: SamplingInputs) -> Prepared:
    """Generates the masked part of an image. A model trained for it gets the rest as input; else steps restore it."""
    assert inputs.image is not None and inputs.mask is not None, "the request was checked"
    prepared = prepare_image_to_image(model, inputs)
    image, mask = inputs.image.to(model.device), inputs.mask.to(model.device)
    assert prepared.x0 is not None
    if model.task == "inpaint":
        return _with_image_channels(prepared, mask_and_masked_latents(mask, _encode(model, image * (mask < 0.5))))
    return replace(
        prepared, inpaint=InpaintMask(prepared.x0, F.max_pool2d(mask, model.autoencoder.factor), prepared.noise)
    )


def prepare_upscaling(model: LatentDiffusion, inputs: SamplingInputs) -> Prepared:
    """A low-resolution image with noise, whose level the model is conditioned on; arXiv 2106.15282."""
    assert inputs.image is not None, "the request was checked"
    prepared, image = _prepare_generation(model, inputs), inputs.image.to(model.device)
    level = torch.full((len(inputs.seeds),), inputs.options.noise_level, device=model.device)
    eps = torch.stack([torch.randn(image.shape[1:], generator=generator) for generator in prepared.generators])
    return _with_image_channels(prepared, noise_augmented(image, eps.to(model.device), level), level)


def guidance_scale(model: LatentDiffusion, inputs: SamplingInputs) -> float | torch.Tensor:
    """The guidance scale: one for all, or one per image, `(N,)`."""
    scale = model.guidance if inputs.options.guidance_scale is None else inputs.options.guidance_scale
    if not isinstance(scale, Sequence):
        return float(scale)
    return torch.tensor(scale, dtype=torch.float32, device=model.device)


def _prepare_generation(model: LatentDiffusion, inputs: SamplingInputs) -> Prepared:
    """Noise, text and class; what an image adds comes later."""
    if model.text and inputs.prompts is not None:
        return prepare_text_to_image(model, inputs)
    if inputs.labels is not None and inputs.options.classifier is None:
        return prepare_class_conditional(model, inputs)
    return prepare_unconditional(model, inputs)


def _encode(model: LatentDiffusion, image: torch.Tensor) -> torch.Tensor:
    """The latents of images; UserError where they are not finite."""
    latents = model.autoencoder.encode(image)
    check_output(latents, "autoencoder", model.autoencoder.vae, "are the image's values in [-1, 1]?")
    return latents


def _with_image_channels(prepared: Prepared, channels: torch.Tensor, label: torch.Tensor | None = None) -> Prepared:
    """Adds channels that are concatenated to x_t, and a label, to both conditions."""
    changes = {"image": channels} if label is None else {"image": channels, "label": label}
    null = prepared.unconditional
    return replace(
        prepared,
        condition=prepared.condition._replace(**changes),
        unconditional=null if null is None else null._replace(**changes),
    )


def _noise(model: LatentDiffusion, inputs: SamplingInputs) -> tuple[torch.Tensor, list[torch.Generator]]:
    """The noise of an image, and later draws of its generator, depend on its own seed alone."""
    factor = model.autoencoder.factor
    if inputs.image is not None:
        height, width = (n * model.upscale_factor for n in inputs.image.shape[2:])
    else:
        width, height = inputs.size or (model.side, model.side)
    shape = model.autoencoder.channels, height // factor, width // factor
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in inputs.seeds]
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    if inputs.toward:
        pairs = zip(noise, initial_noise(shape, inputs.toward.seeds), inputs.toward.shares, strict=True)
        noise = torch.stack([slerp(*pair) for pair in pairs])
    return noise.to(model.device), generators


def _text(model: LatentDiffusion, inputs: SamplingInputs) -> TextEmbedding:
    """The prompts' embeddings, interpolated towards those of `toward` if it is set."""
    assert inputs.prompts is not None
    text = model.embedded(inputs.prompts)
    if inputs.toward and inputs.toward.prompts is not None:
        shares = torch.tensor(inputs.toward.shares, device=text.states.device)
        text = text.lerp(model.embedded(inputs.toward.prompts), shares)
    return text


def _negative_text(model: LatentDiffusion, inputs: SamplingInputs, count: int) -> TextEmbedding:
    """The negative prompts' embeddings, `count`; a trained null embedding replaces that of the empty prompt."""
    negative = inputs.options.negative_prompt
    prompts = [negative] if isinstance(negative, str) else negative
    null = model.embedded(prompts)
    if model.null is not None:
        empty = torch.tensor([prompt == NULL_PROMPT for prompt in prompts], device=null.states.device)
        null = replace(null, states=torch.where(empty[:, None, None], model.null.to(null.states), null.states))
    return null.map(lambda tensor: tensor.expand(count, *tensor.shape[1:]))
