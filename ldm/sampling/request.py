"""What one call of a model asks for, and whether the model can do it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ldm.diffusion.parameterization import is_flow
from ldm.sampling.inpainting import Pictures, masks_from, pixels, widened
from ldm.sampling.options import Sampling
from ldm.sampling.solvers import Solver, name_of, with_solver
from ldm.utils.errors import UserError

if TYPE_CHECKING:
    from ldm.sampling.pipeline import LatentDiffusion

Size = tuple[int, int]  # width, height
AS_SAVED = Sampling()


@dataclass(frozen=True)
class Interpolation:
    """What pictures lie a share of the way to: other prompts, from the noise of other seeds."""

    prompts: Sequence[str] | None
    seeds: Sequence[int]
    shares: Sequence[float]

    def of(self, part: slice) -> Interpolation:
        """The same for a part of the pictures."""
        return Interpolation(self.prompts and self.prompts[part], self.seeds[part], self.shares[part])


@dataclass(frozen=True)
class SamplingInputs:
    """What N images are made from, everything aligned: the i-th image has the i-th of each."""

    seeds: Sequence[int]
    prompts: Sequence[str] | None = None
    labels: Sequence[str | int] | None = None
    image: torch.Tensor | None = None
    """`(N, 3, H, W)` in [-1, 1]: what is changed, completed or enlarged."""
    mask: torch.Tensor | None = None
    """`(N, 1, H, W)`: 1 where the image is to be made."""
    size: Size | None = None
    """Width and height where there is no image; None: those of training."""
    toward: Interpolation | None = None
    options: Sampling = AS_SAVED

    def of(self, part: slice) -> SamplingInputs:
        """The same for a part of the images."""
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

    def padded(self, multiple: int) -> SamplingInputs:
        """The same with image and mask extended to sides that the network can take."""
        image, mask = (None if value is None else widened(value, multiple) for value in (self.image, self.mask))
        return replace(self, image=image, mask=mask)


@dataclass(frozen=True)
class SamplingRequest:
    """A call of `LatentDiffusion` as its user wrote it; what the fields mean stands there."""

    prompts: str | Sequence[str] | None = None
    seed: int | Sequence[int] = 0
    labels: str | int | Sequence[str | int] | None = None
    count: int = 1
    image: Pictures | None = None
    mask: Pictures | None = None
    size: Size | None = None
    toward: Interpolation | None = None
    options: Sampling = AS_SAVED

    @property
    def every_prompt(self) -> list[str] | None:
        """The prompt of each image."""
        if self.prompts is None:
            return None
        prompts = [self.prompts] if isinstance(self.prompts, str) else self.prompts
        return [prompt for prompt in prompts for _ in range(self.count)]

    @property
    def every_label(self) -> list[str | int] | None:
        """The label of each image."""
        if self.labels is None:
            return None
        labels = [self.labels] if isinstance(self.labels, (str, int)) else self.labels
        return [label for label in labels for _ in range(self.count)]

    @property
    def number(self) -> int:
        """How many images are asked for."""
        return len(self.every_prompt or self.every_label or range(self.count))

    def check(self, model: LatentDiffusion) -> None:
        """UserError, before anything is computed, where it asks for what the model can't do."""
        self._check_words(model)
        self._check_images(model)
        label_numbers(model, self.every_label, self.options)
        solver_for(model, self.options)
        options = self.options
        if model.unet.config.get("time_cond_proj_dim") and (
            options.weaker is not None or options.negative or options.rescale
            or tuple(options.interval) != (0.0, 1.0)
        ):  # fmt: skip
            raise UserError("guidance: the model was distilled, and hears its scale alone; leave out what else guides")
        for name, value in (("guidance", options.guidance), ("negative", options.negative)):
            if isinstance(value, Sequence) and not isinstance(value, str) and len(value) != self.number:
                raise UserError(f"{name}: {len(value)} for {self.number} pictures; give one, or one each")

    def _check_words(self, model: LatentDiffusion) -> None:
        prompts, labels = self.every_prompt, self.every_label
        if model.text and (not prompts or not all(prompt.strip() for prompt in prompts)):
            raise UserError("prompt: an empty prompt; write what the picture shall show")
        if prompts and not model.text:
            raise UserError("prompt: this model was trained without text; give labels, or count")
        classes, classifier = model.classes, self.options.classifier
        if classifier is not None:
            if classes:
                raise UserError("classifier: the model is told classes itself; leave it out, and give labels")
            classifier.check(model.scheduler, model.autoencoder)
            classes = classifier.classes
        if bool(labels) != bool(classes):
            raise UserError(
                "labels: this model knows no classes; leave them out"
                if labels
                else f"labels: none given; there are {', '.join(classes[:8])}"
            )
        if prompts and labels and len(prompts) != len(labels):
            raise UserError(f"labels: {len(labels)} for {len(prompts)} prompts; give one each")

    def _check_images(self, model: LatentDiffusion) -> None:
        if model.task == "generate":
            if self.mask is not None and self.image is None:
                raise UserError("mask: of no picture; give the image too")
        else:
            for name, value, needed in (("image", self.image, True), ("mask", self.mask, model.task == "inpaint")):
                if (value is not None) != needed:
                    does = {"inpaint": "completes a picture", "upscale": "enlarges a picture"}[model.task]
                    raise UserError(f"{name}: {'needed' if needed else 'leave it out'}; this model {does}")
        if self.size:
            if self.image is not None:
                raise UserError("size: is that of the image; resize it, or leave it out")
            model.check_size(self.size)
        if self.options.threshold is not None and model.autoencoder.factor != 1:
            raise UserError("threshold: is for pixels, and this model's latents have no bounds; leave it out")

    def resolve(self, model: LatentDiffusion) -> SamplingInputs:
        """The inputs of every image, images and masks as tensors; UserError as `check`."""
        self.check(model)
        number, seed = self.number, self.seed
        if not (isinstance(seed, int) or len(seed) == number):
            raise UserError(f"seed: {len(seed)} for {number} pictures; give one seed, or one each")
        image = None if self.image is None else pixels("image", self.image, number)
        mask = None if self.mask is None else masks_from(self.mask, number)
        if image is not None and mask is not None and mask.shape[2:] != image.shape[2:]:
            (h, w), (height, width) = mask.shape[2:], image.shape[2:]
            raise UserError(f"mask: {w} × {h} pixels, but the picture has {width} × {height}; give one of its size")
        seeds = range(seed, seed + number) if isinstance(seed, int) else seed
        return SamplingInputs(
            seeds, self.every_prompt, self.every_label, image, mask, self.size, self.toward, self.options
        )


def class_number(label: str | int, classes: Sequence[str]) -> int:
    """Of a class's name, or of its number; UserError where there is no such class."""
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
    """The solver that the options name, or the model's own, set to its steps; UserError where it can't take them."""
    steps, rule = options.steps or model.steps, model.scheduler
    if options.solver or options.spacing:
        learned = model.unet.config.out_channels == 2 * model.autoencoder.channels
        rule = with_solver(rule, options.solver or name_of(rule), options.spacing, learned)
        if options.solver == "ddpm" and not options.steps:
            steps = rule.config.num_train_timesteps
    most = rule.config.num_train_timesteps
    if steps > most and not is_flow(rule.config):
        raise UserError(f"steps: {steps}; the model's chain has {most}")
    return Solver(rule, steps, model.device, model.prediction_type, options.eta)
