"""What one call of a model requests, and whether the model can do it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ldm.diffusion.parameterization import is_flow
from ldm.models.text_encoder import NULL_PROMPT
from ldm.sampling.inpainting import Images, image_batch, mask_batch, pad_to_multiple
from ldm.sampling.options import Sampling
from ldm.sampling.solvers import Solver, solver_name, with_solver
from ldm.utils.errors import UserError

if TYPE_CHECKING:
    from ldm.sampling.pipeline import LatentDiffusion

Size = tuple[int, int]  # width, height
AS_SAVED = Sampling()


@dataclass(frozen=True)
class Interpolation:
    """Other prompts and seeds, and the share of the way that each image goes towards them."""

    prompts: Sequence[str] | None
    seeds: Sequence[int]
    shares: Sequence[float]

    def of(self, part: slice) -> Interpolation:
        """The slice `part` of the images."""
        return Interpolation(self.prompts and self.prompts[part], self.seeds[part], self.shares[part])


@dataclass(frozen=True)
class SamplingInputs:
    """The inputs of N images, aligned: element i of each sequence belongs to image i."""

    seeds: Sequence[int]
    prompts: Sequence[str] | None = None
    labels: Sequence[str | int] | None = None
    image: torch.Tensor | None = None
    """`(N, 3, H, W)` in [-1, 1]: what is changed, completed or enlarged."""
    mask: torch.Tensor | None = None
    """`(N, 1, H, W)`: 1 where the image is to be generated."""
    size: Size | None = None
    """Width and height if there is no image; None: the size of training."""
    toward: Interpolation | None = None
    options: Sampling = AS_SAVED

    def of(self, part: slice) -> SamplingInputs:
        """The slice `part` of the images."""
        return SamplingInputs(
            self.seeds[part],
            None if self.prompts is None else self.prompts[part],
            None if self.labels is None else self.labels[part],
            None if self.image is None else self.image[part],
            None if self.mask is None else self.mask[part],
            self.size,
            self.toward and self.toward.of(part),
            self.options.of(part),
        )

    def batches(self, size: int) -> Iterator[tuple[slice, SamplingInputs]]:
        """Parts of at most `size` images, each with its place; UserError if `size` is below 1."""
        if size < 1:
            raise UserError(f"batch: {size}; give 1 or more")
        for start in range(0, len(self.seeds), size):
            rows = slice(start, start + size)
            yield rows, self.of(rows)

    def request(self) -> SamplingRequest:
        """The request of these images."""
        return SamplingRequest(
            self.prompts,
            self.seeds,
            self.labels,
            1 if self.prompts or self.labels else len(self.seeds),
            self.image,
            self.mask,
            self.size,
            self.toward,
            self.options,
        )

    def padded(self, multiple: int) -> SamplingInputs:
        """The same with image and mask padded to sides that the network accepts."""
        image, mask = (None if value is None else pad_to_multiple(value, multiple) for value in (self.image, self.mask))
        return replace(self, image=image, mask=mask)


@dataclass(frozen=True)
class SamplingRequest:
    """The arguments of a call of `LatentDiffusion`, which documents them."""

    prompts: str | Sequence[str] | None = None
    seed: int | Sequence[int] = 0
    labels: str | int | Sequence[str | int] | None = None
    count: int = 1
    image: Images | None = None
    mask: Images | None = None
    size: Size | None = None
    toward: Interpolation | None = None
    options: Sampling = AS_SAVED

    @property
    def prompts_per_image(self) -> list[str] | None:
        """The prompt of each image."""
        if self.prompts is None:
            return None
        return [prompt for prompt in _listed(self.prompts) for _ in range(self.count)]

    @property
    def labels_per_image(self) -> list[str | int] | None:
        """The label of each image."""
        if self.labels is None:
            return None
        labels = [self.labels] if isinstance(self.labels, (str, int)) else self.labels
        return [label for label in labels for _ in range(self.count)]

    @property
    def number(self) -> int:
        """How many images are requested."""
        return len(self.prompts_per_image or self.labels_per_image or range(self.count))

    def check(self, model: LatentDiffusion) -> None:
        """UserError, before anything is computed, if the model can't do what is requested."""
        if self.count < 1:
            raise UserError(f"count: {self.count}; give 1 or more")
        self._check_words(model)
        self._check_images(model)
        self._check_interpolation(model)
        label_numbers(model, self.labels_per_image, self.options)
        solver_for(model, self.options)
        options = self.options
        if model.unet.config.get("time_cond_proj_dim") and (
            options.weaker is not None
            or options.negative_prompt
            or options.guidance_rescale
            or tuple(options.interval) != (0.0, 1.0)
        ):
            raise UserError(
                "guidance_scale: the model was distilled, and takes the scale alone; leave out other guidance options"
            )
        for name, value in (("guidance_scale", options.guidance_scale), ("negative_prompt", options.negative_prompt)):
            if isinstance(value, Sequence) and not isinstance(value, str) and len(value) != self.number:
                raise UserError(f"{name}: {len(value)} for {self.number} images; give one, or one each")
        for name, reason in self.without_effect(model).items():
            raise UserError(f"{name}: {reason}; leave it out")

    def without_effect(self, model: LatentDiffusion) -> dict[str, str]:
        """The options that were set and change nothing, each with the reason; UserError for an unusable solver."""
        options, reasons = self.options, {}
        if options.eta and not solver_for(model, options).takes_eta:
            reasons["eta"] = "only ddim adds noise by it"
        if options.strength is not None and (self.image is None or model.task == "upscale"):
            reasons["strength"] = "no image is changed"
        if options.noise_level != AS_SAVED.noise_level and model.task != "upscale":
            reasons["noise_level"] = "this model enlarges no image"
        if not model.text and set(_listed(options.negative_prompt)) != {NULL_PROMPT}:
            reasons["negative_prompt"] = "this model was trained without text"
        if options.classifier is None and options.classifier_scale != AS_SAVED.classifier_scale:
            reasons["classifier_scale"] = "there is no classifier"
        return reasons

    def _check_words(self, model: LatentDiffusion) -> None:
        prompts, labels = self.prompts_per_image, self.labels_per_image
        if model.text and (not prompts or not all(prompt.strip() for prompt in prompts)):
            raise UserError("prompt: an empty prompt; write what the image should show")
        if prompts and not model.text:
            raise UserError("prompt: this model was trained without text; give labels, or count")
        classes, classifier = model.classes, self.options.classifier
        if classifier is not None:
            if classes:
                raise UserError("classifier: the model is class-conditional itself; leave it out, and give labels")
            classifier.check(model.scheduler, model.autoencoder)
            classes = classifier.classes
        if bool(labels) != bool(classes):
            raise UserError(
                "labels: this model knows no classes; leave them out"
                if labels
                else f"labels: none given; there are {', '.join(classes[:8])}"
            )
        for name, values in (("prompt", prompts), ("labels", labels)):
            if values == []:
                raise UserError(f"{name}: an empty list; give one or more, or None")
        if prompts and labels and len(prompts) != len(labels):
            raise UserError(f"labels: {len(labels)} for {len(prompts)} prompts; give one each")

    def _check_images(self, model: LatentDiffusion) -> None:
        if model.task == "generate":
            if self.mask is not None and self.image is None:
                raise UserError("mask: of no image; give the image too")
        else:
            for name, value, required in (("image", self.image, True), ("mask", self.mask, model.task == "inpaint")):
                if (value is not None) != required:
                    task = {"inpaint": "completes an image", "upscale": "enlarges an image"}[model.task]
                    raise UserError(f"{name}: {'needed' if required else 'leave it out'}; this model {task}")
        if self.size:
            if self.image is not None:
                raise UserError("size: is that of the image; resize it, or leave it out")
            check_size(self.size, model.multiple)
        if self.options.threshold is not None and model.autoencoder.factor != 1:
            raise UserError("threshold: is for pixels, and this model's latents have no bounds; leave it out")

    def _check_interpolation(self, model: LatentDiffusion) -> None:
        if self.toward is None:
            return
        for name in ("prompts", "seeds", "shares"):
            values = getattr(self.toward, name)
            if values is not None and len(values) != self.number:
                raise UserError(f"toward: {len(values)} {name} for {self.number} images; give one each")
        if self.toward.prompts is not None and not model.text:
            raise UserError("toward: it has prompts, and this model was trained without text; give None for them")

    def resolve(self, model: LatentDiffusion) -> SamplingInputs:
        """The inputs of every image, images and masks as tensors; UserError as `check`."""
        self.check(model)
        number, seed = self.number, self.seed
        if not (isinstance(seed, int) or len(seed) == number):
            raise UserError(f"seed: {len(seed)} for {number} images; give one seed, or one each")
        image = None if self.image is None else image_batch("image", self.image, number)
        mask = None if self.mask is None else mask_batch(self.mask, number)
        if image is not None and mask is not None and mask.shape[2:] != image.shape[2:]:
            (h, w), (height, width) = mask.shape[2:], image.shape[2:]
            raise UserError(f"mask: {w} × {h} pixels, but the image has {width} × {height}; give one of its size")
        seeds = range(seed, seed + number) if isinstance(seed, int) else seed
        return SamplingInputs(
            seeds, self.prompts_per_image, self.labels_per_image, image, mask, self.size, self.toward, self.options
        )


def check_size(size: Size, multiple: int) -> None:
    """UserError unless both sides are multiples of `multiple` (`LatentDiffusion.multiple`)."""
    if any(side < 1 or side % multiple for side in size):
        nearest = "x".join(str(max(1, round(side / multiple)) * multiple) for side in size)
        raise UserError(
            f"size: {size[0]}x{size[1]}; this model makes sides that are multiples of {multiple}, {nearest} for one"
        )


def _listed(texts: str | Sequence[str]) -> Sequence[str]:
    return [texts] if isinstance(texts, str) else texts


def class_number(label: str | int, classes: Sequence[str]) -> int:
    """The number of a class, from its name or number; UserError if there is no such class."""
    if isinstance(label, int) and 0 <= label < len(classes):
        return label
    if label in classes:
        return classes.index(str(label))
    close = difflib.get_close_matches(str(label), classes, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"there are {len(classes)}: {', '.join(classes[:8])}"
    raise UserError(f"labels: no class {label!r}; {hint}")


def label_numbers(model: LatentDiffusion, labels: Sequence[str | int] | None, options: Sampling) -> torch.Tensor | None:
    """`(N,)` int64: the numbers of labels in the model's classes, or in those of the classifier that guides."""
    if labels is None:
        return None
    classes = model.classes if options.classifier is None else options.classifier.classes
    return torch.tensor([class_number(label, classes) for label in labels], device=model.device)


def solver_for(model: LatentDiffusion, options: Sampling) -> Solver:
    """The solver that the options name, or the model's own, set to its steps; UserError if it can't take them."""
    steps, scheduler = options.num_inference_steps or model.steps, model.scheduler
    if options.solver or options.timestep_spacing:
        learned = model.unet.config.out_channels == 2 * model.autoencoder.channels
        scheduler = with_solver(scheduler, options.solver or solver_name(scheduler), options.timestep_spacing, learned)
        if options.solver == "ddpm" and not options.num_inference_steps:
            steps = scheduler.config.num_train_timesteps
    chain_steps = scheduler.config.num_train_timesteps
    if steps > chain_steps and not is_flow(scheduler.config):
        raise UserError(f"num_inference_steps: {steps}; the model's chain has {chain_steps}")
    return Solver(scheduler, steps, model.device, model.prediction_type, options.eta)
