"""Cascades: a model's images, enlarged by a super-resolution model; Ho et al. 2021, arXiv 2106.15282."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from PIL import Image

from ldm.sampling.loop import Step
from ldm.sampling.options import Sampling
from ldm.sampling.pipeline import LatentDiffusion
from ldm.sampling.request import AS_SAVED, SamplingRequest
from ldm.utils.errors import UserError


@dataclass(frozen=True)
class Cascade:
    """A model, and a super-resolution model that enlarges what the first generates.

        cascade = Cascade(LatentDiffusion.load("runs/base/pipeline"), LatentDiffusion.load("runs/upscaler/pipeline"))
        image = cascade.generate(SamplingRequest("a red heart"))[0]

    The images are those of the two models, called one after the other with the same prompts, seeds and batches.
    `options` are the upscaler's; its negative prompt is that of the request. UserError if the second model enlarges
    nothing, or the first reads no text, as all upscalers do.
    """

    base: LatentDiffusion
    upscaler: LatentDiffusion
    options: Sampling = AS_SAVED

    def __post_init__(self) -> None:
        if self.upscaler.task != "upscale":
            raise UserError("upscaler: it enlarges no images; give one trained with stage2.conditions=[text,upscale]")
        if not self.base.text:
            raise UserError("upscaler: it reads text, and the first model none; give a first model that does")

    def check(self, request: SamplingRequest) -> None:
        """UserError, before anything is computed, if one of the models can't do what is requested."""
        request.check(self.base)
        blank = Image.new("RGB", request.size or (self.base.side, self.base.side))
        try:
            self._enlarging(request, [blank]).check(self.upscaler)
        except UserError as error:
            raise UserError(f"upscaler's {error}") from None

    def optimize_for_inference(self, precision: str = "auto", compile: str = "no") -> Cascade:
        """As `LatentDiffusion.optimize_for_inference`, for both models."""
        for model in (self.base, self.upscaler):
            model.optimize_for_inference(precision, compile)
        return self

    def generate(
        self,
        request: SamplingRequest,
        batch: int = 32,
        callback: Callable[[Step], None] | None = None,
        ready: Callable[[int, list[Image.Image]], None] | None = None,
    ) -> list[Image.Image]:
        """As `LatentDiffusion.generate`; `callback` is called after each step of both models."""
        self.check(request)
        images: list[Image.Image] = []
        for rows, inputs in request.resolve(self.base).batches(batch):
            part, cascade = inputs.request(), replace(self, options=self.options.of(rows))
            generated = self.base.generate(part, batch, callback)
            enlarged = self.upscaler.generate(cascade._enlarging(part, generated), batch, callback)
            if ready:
                ready(rows.start, enlarged)
            else:
                images += enlarged
        return images

    def _enlarging(self, request: SamplingRequest, images: list[Image.Image]) -> SamplingRequest:
        """What the upscaler does with the images that the first model made of a request."""
        options = replace(self.options, negative_prompt=request.options.negative_prompt)
        return replace(request, labels=None, image=images, mask=None, size=None, options=options)
