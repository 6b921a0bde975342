"""The methods of distillation: the student's input, the output that its teacher has it predict, and the loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import torch

from ldm.config.schema import DistillConfig
from ldm.data.dataset import Item
from ldm.diffusion.distillation import ddim_step, progressive_target, pseudo_huber, x0_weight
from ldm.diffusion.process import DiffusionProcess
from ldm.models.conditioning import Condition, TextEmbedding, predict
from ldm.models.unet import UNet
from ldm.sampling.few_steps import lcm_scheduler, noise_levels
from ldm.training.trainer import Trainer
from ldm.utils.rng import normal, uniform


class DistillationBatch(NamedTuple):
    """A student's input, of N samples."""

    z: torch.Tensor
    """`(N, C, h, w)`: the noisy latents z_t."""
    at: torch.Tensor
    """`(N,)`: timesteps, or, in progressive distillation, indices of its noise levels."""
    model_time: torch.Tensor
    """`(N,)`: the timesteps as the network takes them."""
    condition: Condition
    """With the guidance scale, where the student is conditioned on it."""


@dataclass
class DistillationMethod(ABC):
    """Distils a `teacher`, a U-Net of `process`; random numbers follow from positions.

    `null` is the embedding of no caption, `classes` the index of the null class; None where the model has no
    such input.
    """

    teacher: UNet
    process: DiffusionProcess
    settings: DistillConfig
    seed: int
    null: TextEmbedding | None
    classes: int | None

    others: TextEmbedding | None = field(default=None, kw_only=True)
    """Embeddings of K captions that those of a batch are blended with."""

    can_be_sharded: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.teacher.eval().requires_grad_(False)

    @property
    def guidance_conditioned(self) -> bool:
        return self.null is not None

    def undropped(self, batch: Item) -> Item:
        """A batch without caption dropout, where the student is conditioned on the guidance scale instead."""
        if not self.guidance_conditioned:
            return batch
        dropped = (name for name in ("dropped", "dropped_class") if name in batch)
        return {**batch, **{name: torch.zeros_like(batch[name]) for name in dropped}}

    def make_batch(self, n: torch.Tensor, x0: torch.Tensor, condition: Condition) -> DistillationBatch:
        """The student's input from latents x0 `(N, C, h, w)` of the samples at positions n."""
        u = uniform(self.seed, "distill time", n).to(x0.device)
        eps = normal(self.seed, "distill noise", n, x0.shape[1:]).to(x0.device)
        if self.guidance_conditioned:
            low, high = self.settings.guidance_from, self.settings.guidance_to
            assert high is not None, "the command sets it"
            w = low + (high - low) * uniform(self.seed, "distill guidance", n)
            condition = condition._replace(guidance=w.to(x0.device))
        return self.noisy(u, x0, eps, condition)

    def blended(self, n: torch.Tensor, condition: Condition) -> Condition:
        """Moves the embeddings of a share of the captions towards another caption's.

        A teacher responds to any text; distilled on training captions alone, a student of few steps forgets how to
        combine them.
        """
        if condition.text is None or self.others is None:
            return condition
        text = TextEmbedding(condition.text, condition.pooled)
        which, how_far, chosen = (
            uniform(self.seed, f"distill {name}", n).to(condition.text.device) for name in ("other", "way", "blended")
        )
        count = len(self.others.states)
        chosen_other = (which * count).long().clamp(max=count - 1)
        other = self.others.map(lambda tensor: tensor[chosen_other].to(condition.text))
        weight = torch.where(chosen < self.settings.blended, how_far, 0.0).to(condition.text)
        return condition.with_text(text.lerp(other, weight))

    def noisy(self, u: torch.Tensor, x0: torch.Tensor, eps: torch.Tensor, condition: Condition) -> DistillationBatch:
        """The input at timesteps from uniform numbers u `(N,)`."""
        t = replace(self.process, timestep_sampling="uniform").time(u)
        return DistillationBatch(self.process.add_noise(x0, eps, t), t, self.process.model_time(t), condition)

    @abstractmethod
    def target(self, batch: DistillationBatch, trainer: Trainer) -> torch.Tensor:
        """The teacher's output, which the student should predict."""

    @abstractmethod
    def losses(self, prediction: torch.Tensor, batch: DistillationBatch, target: torch.Tensor) -> torch.Tensor:
        """The losses `(N,)` of the student's output."""

    def guided(self, z: torch.Tensor, model_time: torch.Tensor, condition: Condition) -> torch.Tensor:
        """The output of a teacher without guidance conditioning, guided by `condition.guidance`: ∅ + w·(c − ∅)."""
        w, condition = condition.guidance, condition._replace(guidance=None)
        if w is None or condition.text is None or self.null is None:
            return predict(self.teacher, z, model_time, condition).float()
        label = condition.label
        if label is not None and self.classes is not None:
            label = torch.full_like(label, self.classes)
        count = len(condition.text)
        text = self.null.map(lambda tensor: tensor.to(condition.text).expand(count, *tensor.shape[1:]))
        null = condition.with_text(text)._replace(label=label)
        both = predict(self.teacher, torch.cat([z, z]), torch.cat([model_time, model_time]), null.of(condition)).float()
        without, with_it = both.chunk(2)
        return without + w[:, None, None, None] * (with_it - without)


@dataclass
class Guidance(DistillationMethod):
    """One forward for two: the guided teacher's output, whatever the scale; arXiv 2210.03142, section 3.1."""

    def target(self, batch: DistillationBatch, trainer: Trainer) -> torch.Tensor:
        return self.guided(batch.z, batch.model_time, batch.condition)

    def losses(self, prediction: torch.Tensor, batch: DistillationBatch, target: torch.Tensor) -> torch.Tensor:
        return (prediction - target).square().flatten(1).mean(1)


@dataclass
class ProgressiveDistillation(DistillationMethod):
    """One step for two of a teacher that takes the same conditions; arXiv 2202.00512, Algorithm 2."""

    steps: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self.levels, self.half = (
            noise_levels(self.process, n, self.teacher.device) for n in (self.steps, 2 * self.steps)
        )

    def noisy(self, u: torch.Tensor, x0: torch.Tensor, eps: torch.Tensor, condition: Condition) -> DistillationBatch:
        i = (u * len(self.levels.t)).long().clamp(max=len(self.levels.t) - 1)
        z = self.levels.alpha[i] * x0 + self.levels.sigma[i] * eps
        return DistillationBatch(z, i, self.levels.model_time[i], condition)

    def target(self, batch: DistillationBatch, trainer: Trainer) -> torch.Tensor:
        (_, model_time, alpha, sigma), half, i, middle = self.levels, self.half, batch.at, 2 * batch.at + 1
        x0 = self.process.predict_x0(self._predict(batch.z, model_time[i], batch.condition), batch.z, self.levels.t[i])
        z = ddim_step(x0, batch.z, alpha[i], sigma[i], half.alpha[middle], half.sigma[middle])
        x0 = self.process.predict_x0(self._predict(z, half.model_time[middle], batch.condition), z, half.t[middle])
        z = ddim_step(x0, z, half.alpha[middle], half.sigma[middle], alpha[i + 1], sigma[i + 1])
        return progressive_target(batch.z, z, alpha[i], sigma[i], alpha[i + 1], sigma[i + 1])

    def _predict(self, z: torch.Tensor, model_time: torch.Tensor, condition: Condition) -> torch.Tensor:
        return predict(self.teacher, z, model_time, condition).float()

    def losses(self, prediction: torch.Tensor, batch: DistillationBatch, target: torch.Tensor) -> torch.Tensor:
        i = batch.at
        x0 = self.process.predict_x0(prediction, batch.z, self.levels.t[i])
        weight = x0_weight(self.settings.loss, self.levels.alpha[i], self.levels.sigma[i])
        return (weight * (x0 - target).square()).flatten(1).mean(1)


@dataclass
class Consistency(DistillationMethod):
    """The same x0 from both ends of a teacher's step; arXiv 2310.04378, Algorithm 1."""

    can_be_sharded: ClassVar[bool] = False  # its averaged weights are called in each step

    def __post_init__(self) -> None:
        super().__post_init__()
        self.solver = lcm_scheduler(self.process, self.settings.original_steps)
        self.skip = self.process.timesteps // self.settings.original_steps  # k, as LCMScheduler counts it

    def noisy(self, u: torch.Tensor, x0: torch.Tensor, eps: torch.Tensor, condition: Condition) -> DistillationBatch:
        steps = self.settings.original_steps
        t = ((u * steps).long().clamp(max=steps - 1) + 1) * self.skip - 1
        return DistillationBatch(self.process.add_noise(x0, eps, t), t, self.process.model_time(t), condition)

    def target(self, batch: DistillationBatch, trainer: Trainer) -> torch.Tensor:
        """Of the averaged student, after the guided teacher's step."""
        process, (z, t, model_time, condition) = self.process, batch
        before = (t - self.skip).clamp(min=0)
        x0 = process.predict_x0(self.guided(z, model_time, condition), z, t)
        z = ddim_step(x0, z, *process.alpha_sigma(t), *process.alpha_sigma(before))
        averages = trainer.ema.tensors(trainer.ema.main)
        output = torch.func.functional_call(trainer.module, averages, (z, process.model_time(before), condition))
        return self._consistent(output.float(), z, before)

    def losses(self, prediction: torch.Tensor, batch: DistillationBatch, target: torch.Tensor) -> torch.Tensor:
        return pseudo_huber(self._consistent(prediction, batch.z, batch.at), target, self.settings.huber)

    def _consistent(self, prediction: torch.Tensor, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """f(z, t), x0 at the end of the path through z: z itself at t = 0."""
        c_skip, c_out = self.solver.get_scalings_for_boundary_condition_discrete(t[:, None, None, None])  # section 4
        return c_skip * z + c_out * self.process.predict_x0(prediction, z, t)
