"""`LatentDiffusion`: text encoder, U-Net, autoencoder and solver put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from PIL import Image

from ldm.data.images import to_pil
from ldm.diffusion.parameterization import PREDICTION_TYPE_OF, is_flow
from ldm.models.autoencoder import Autoencoder
from ldm.models.conditioning import NUM_NOISE_LEVELS
from ldm.models.text_encoder import TextEncoder
from ldm.models.unet import UNet
from ldm.sampling import pipeline_io
from ldm.sampling.background_worker import BackgroundWorker
from ldm.sampling.guided_network import guided_network
from ldm.sampling.inpainting import Pictures, pasted
from ldm.sampling.loop import Step, sample
from ldm.sampling.optimize import PRECISIONS, optimize
from ldm.sampling.options import Sampling
from ldm.sampling.prepare import prepare
from ldm.sampling.request import AS_SAVED, Interpolation, SamplingInputs, SamplingRequest, Size
from ldm.utils.errors import UserError

__all__ = ["PRECISIONS", "Interpolation", "LatentDiffusion", "SamplingRequest"]
MAX_CACHED_PROMPTS = 1000


@dataclass
class LatentDiffusion:
    """A model that makes pictures: from text, classes, nothing, a picture, one with a hole, or a small one.

        model = LatentDiffusion.load("runs/openmoji/pipeline")
        picture = model("a red heart", seed=0)[0]

    `steps` and `guidance` are what a call uses unless told otherwise. `null` `(T, D)` is a trained embedding of no
    caption; None: that of the empty one. `classes` are the names of a class-conditional model's classes.
    """

    text: TextEncoder | None
    unet: UNet
    autoencoder: Autoencoder
    scheduler: Any
    steps: int = 50
    guidance: float = 7.5
    null: torch.Tensor | None = None
    classes: tuple[str, ...] = ()
    _embedding_cache: dict[str, torch.Tensor] | None = field(default=None, repr=False, compare=False)  # by prompt

    @property
    def task(self) -> str:
        """`generate`, `inpaint` or `upscale`, by the inputs of the U-Net."""
        extra = self.unet.config.in_channels - self.autoencoder.channels
        if extra == 3 and self.unet.config.get("num_class_embeds") == NUM_NOISE_LEVELS:
            return "upscale"
        return "inpaint" if extra == self.autoencoder.channels + 1 else "generate"

    @property
    def side(self) -> int:
        """Of the square pictures that it was trained on, in pixels."""
        side = self.unet.config.sample_size
        return (side if isinstance(side, int) else max(side)) * self.autoencoder.factor

    @property
    def upscale_factor(self) -> int:
        """How many times the side of the picture that it is given a picture has: 1, but for an upscaler."""
        return self.autoencoder.factor if self.task == "upscale" else 1

    @property
    def multiple(self) -> int:
        """What sides of pictures are multiples of, in pixels."""
        halvings = len(self.unet.config.block_out_channels) - 1 if isinstance(self.unet, UNet2DModel) else 0
        return self.autoencoder.factor * 2**halvings

    @property
    def prediction_type(self) -> str:
        """What its network predicts: `eps`, `x0`, `v` or `flow`."""
        return "flow" if is_flow(self.scheduler.config) else PREDICTION_TYPE_OF[self.scheduler.config.prediction_type]

    @property
    def device(self) -> torch.device:
        return self.unet.device  # type: ignore[no-any-return]

    @classmethod
    def load(cls, name: str | Path, device: str | torch.device | None = None) -> LatentDiffusion:
        """Loads a diffusers folder or Hub id: of the Stable Diffusion kind, an unconditional one, or one of ours.

        Weights are read from safetensors only.
        """
        model = cls(**pipeline_io.read(name))
        return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def to(self, device: str | torch.device) -> LatentDiffusion:
        device = torch.device(device)
        if self.text:
            self.text.to(device)
        self.autoencoder.to(device)
        self.unet.to(device)
        self.null = self.null if self.null is None else self.null.to(device)
        self._embedding_cache = None if self._embedding_cache is None else {}
        return self

    def save(self, folder: Path) -> None:
        """Writes a folder that plain diffusers opens, as the pipeline of the model's task.

        What diffusers has no place for (class names, a trained null embedding, steps and guidance) stands beside, for
        `load`. Its Stable Diffusion pipelines decode with an AutoencoderKL or AutoencoderTiny. With others, ask for
        `output_type="latent"`, which a VQModel or AutoencoderDC decodes; in pixel space these are the pictures, and the
        folder opens with `vae=None`.
        """
        pipeline_io.write(self, folder)

    def optimize_for_inference(self, precision: str = "auto", compile: str = "no") -> LatentDiffusion:
        """Speeds up drawing, at the price of bits: returns itself. Not for a model that is to be saved.

        `precision` of the U-Net is `bf16`, `fp16` or `no`; `auto` is bf16 where the device computes it natively. Its
        solver, and the autoencoder on fp16, go on in float32. `compile` is `no`, `yes`, or `graphs`, which replays CUDA
        graphs: for many pictures of one size.
        """
        optimize(self, precision, compile)
        self._embedding_cache = {}
        return self

    # -------------------------------------------------------------------------------------------------------- drawing

    def latents(
        self,
        prompts: Sequence[str] | None,
        seeds: Sequence[int],
        how: Sampling = AS_SAVED,
        *,
        labels: Sequence[str | int] | None = None,
        image: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        size: Size | None = None,
        toward: Interpolation | None = None,
        callback: Callable[[Step], None] | None = None,
    ) -> torch.Tensor:
        """Normalised latents `(N, C, h, w)`, picture i from the noise of `seeds[i]`; prompts and labels are N too.

        `image` `(N, 3, H, W)` in [-1, 1] is what is changed, with `mask` `(N, 1, H, W)`, 1 where it is to be made,
        what is completed, and for an upscaler what is enlarged. `size` is the pictures' where there is no image.
        `callback` is called after every step.
        """
        return self._sample(SamplingInputs(seeds, prompts, labels, image, mask, size, toward, how), callback)

    @torch.no_grad()
    def _sample(self, inputs: SamplingInputs, callback: Callable[[Step], None] | None) -> torch.Tensor:
        prepared = prepare(self, inputs)
        predict, pull = guided_network(self, prepared, inputs)
        return sample(
            predict, prepared.solver, prepared.noise, prepared.generators, x0=prepared.x0, first=prepared.first,
            kept=prepared.kept, pull=pull, callback=callback,
        )  # fmt: skip

    def embedded(self, prompts: Sequence[str]) -> torch.Tensor:
        """`(N, T, D)`; each prompt is encoded once; after `optimize_for_inference`, once and for all."""
        assert self.text, "this model reads no text"
        known = self._embedding_cache
        if known is None or len(known) > MAX_CACHED_PROMPTS:
            known = {}
        if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]:
            known.update(zip(new, self.text.encode(new, batch=1), strict=True))  # the same bits in any company
        return torch.stack([known[prompt] for prompt in prompts])

    def __call__(
        self,
        prompts: str | Sequence[str] | None = None,
        seed: int | Sequence[int] = 0,
        batch: int = 32,
        *,
        labels: str | int | Sequence[str | int] | None = None,
        count: int = 1,
        image: Pictures | None = None,
        mask: Pictures | None = None,
        size: Size | None = None,
        toward: Interpolation | None = None,
        callback: Callable[[Step], None] | None = None,
        ready: Callable[[int, list[Image.Image]], None] | None = None,
        **options: Any,
    ) -> list[Image.Image]:
        """Pictures for one prompt or several; picture i starts from the noise of `seed + i`, in any batch, or of the
        i-th of several seeds.

        `labels`, names or numbers of classes, for a class-conditional model, or for a classifier that guides; `count`
        pictures of each, or of one that is told neither. `size` (width, height) in pixels; by default that of training.

        `image`, one or one a picture, is changed as far as `strength` says; with a `mask`, white where the picture is
        to be made, it is completed, and stays what it is elsewhere; an upscaler enlarges it. `toward` leads part of
        the way to other prompts and seeds. `callback` is called after each step of a batch with a `Step`. `ready` is
        called with the number of a finished batch's first picture and its pictures, which are not returned then, so
        that any number of them may be made; on a GPU they are decoded beside the next batch's steps. `options` are
        the fields of `ldm.sampling.options.Sampling`: `steps`, `guidance`, `solver`, `negative`, and more. UserError
        says in one line what can't be.
        """
        if batch < 1:
            raise UserError(f"batch: {batch}; give 1 or more")
        request = SamplingRequest(prompts, seed, labels, count, image, mask, size, toward, Sampling(**options))
        inputs = request.resolve(self)

        def finish(start: int, latents: torch.Tensor, *given: torch.Tensor | None) -> list[Image.Image]:
            images = self.to_images(latents, *given)
            if not ready:
                return images
            ready(start, images)
            return []

        batches: list[Future[list[Image.Image]]] = []
        with BackgroundWorker(self.device) as worker:
            for start in range(0, len(inputs.seeds), batch):
                part = inputs.of(slice(start, start + batch))
                latents = self._sample(part.padded(self.multiple // self.upscale_factor), callback)
                batches.append(worker.submit(finish, start, latents, part.image, part.mask))
                for finished in filter(Future.done, batches):
                    finished.result()  # an error is raised before more is sampled
        return [made for finished in batches for made in finished.result()]

    def to_images(
        self, latents: torch.Tensor, image: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> list[Image.Image]:
        """Decoded images, of the size of the image; with a mask, they are the image where it is 0."""
        made = self.autoencoder.decode(latents)
        if image is not None:
            height, width = (side * self.upscale_factor for side in image.shape[2:])
            made = made[..., :height, :width]
        return to_pil(made) if image is None or mask is None else pasted(made, image, mask)

    def check_size(self, size: Size) -> None:
        """UserError where pictures of `size` (width, height) can't be made."""
        multiple = self.multiple
        if any(side < 1 or side % multiple for side in size):
            nearest = "x".join(str(max(1, round(side / multiple)) * multiple) for side in size)
            raise UserError(
                f"size: {size[0]}x{size[1]}; this model makes sides that are multiples of {multiple}, {nearest} for one"
            )
