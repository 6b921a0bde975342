"""`LatentDiffusion`: text encoder, U-Net, autoencoder and scheduler in one."""

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
from ldm.models.adapters.embedding_files import add_embedding_file
from ldm.models.adapters.merge import add_to_weights
from ldm.models.adapters.reader import locate, read_adapter
from ldm.models.autoencoder import Autoencoder
from ldm.models.conditioning import NUM_NOISE_LEVELS, TextEmbedding
from ldm.models.finite import check_output
from ldm.models.text_encoder import AnyTextEncoder
from ldm.models.unet import UNet
from ldm.sampling import pipeline_io
from ldm.sampling.background_worker import BackgroundWorker
from ldm.sampling.guided_network import guided_network
from ldm.sampling.inpainting import Images, composite
from ldm.sampling.loop import Step, sample
from ldm.sampling.optimize import optimize
from ldm.sampling.options import Sampling
from ldm.sampling.prepare import prepare
from ldm.sampling.request import AS_SAVED, Interpolation, SamplingInputs, SamplingRequest, Size
from ldm.utils.precision import placement

__all__ = ["Interpolation", "LatentDiffusion", "SamplingRequest"]
MAX_CACHED_PROMPTS = 1000
OVERFLOW = (
    "lower guidance or the classifier's scale, take more steps, or another solver",
    "fp16 is too narrow for it; compute in bf16 or float32 (--precision bf16 or no)",
)
"""What to do where sampling leaves the range of numbers: in general, and in fp16."""


@dataclass
class LatentDiffusion:
    """A model that generates images from text, classes or noise alone, and changes, inpaints or enlarges images.

        model = LatentDiffusion.load("runs/openmoji/pipeline")
        image = model("a red heart", seed=0)[0]

    `steps` and `guidance` are the defaults of a call. `null` `(T, D)` is a trained unconditional embedding; None: the
    embedding of the empty prompt. `classes` are the names of a class-conditional model's classes.
    """

    text: AnyTextEncoder | None
    unet: UNet
    autoencoder: Autoencoder
    scheduler: Any
    steps: int = 50
    guidance: float = 7.5
    null: torch.Tensor | None = None
    classes: tuple[str, ...] = ()
    _embedding_cache: dict[str, TextEmbedding] | None = field(default=None, repr=False, compare=False)  # by prompt

    @property
    def task(self) -> str:
        """`generate`, `inpaint` or `upscale`, as the U-Net's inputs tell."""
        extra = self.unet.config.in_channels - self.autoencoder.channels
        if extra == 3 and self.unet.config.get("num_class_embeds") == NUM_NOISE_LEVELS:
            return "upscale"
        return "inpaint" if extra == self.autoencoder.channels + 1 else "generate"

    @property
    def side(self) -> int:
        """Side of the square training images, in pixels."""
        side = self.unet.config.sample_size
        return (side if isinstance(side, int) else max(side)) * self.autoencoder.factor

    @property
    def upscale_factor(self) -> int:
        """Side of the output over that of the input image: 1, except for an upscaler."""
        return self.autoencoder.factor if self.task == "upscale" else 1

    @property
    def multiple(self) -> int:
        """The sides of images must be multiples of this many pixels."""
        halvings = len(self.unet.config.block_out_channels) - 1 if isinstance(self.unet, UNet2DModel) else 0
        return self.autoencoder.factor * 2**halvings

    @property
    def prediction_type(self) -> str:
        """What the U-Net predicts: `eps`, `x0`, `v` or `flow`."""
        return "flow" if is_flow(self.scheduler.config) else PREDICTION_TYPE_OF[self.scheduler.config.prediction_type]

    @property
    def device(self) -> torch.device:
        return placement(self.unet)[0]

    @classmethod
    def load(
        cls,
        name: str | Path,
        device: str | torch.device | None = None,
        base: str | None = None,
        option: str = "--model",
    ) -> LatentDiffusion:
        """Loads a diffusers folder or Hub id: Stable Diffusion 1, 2 or XL, an unconditional one, or one of `save`.

        Or one file of Stable Diffusion 1, 2 or XL, whose configuration and tokenizers are those of `base`, a folder or
        Hub id of the same family; default: the published one. Weights are read from safetensors only. `option` is what
        errors call the name.
        """
        model = cls(**pipeline_io.read(name, option, base))
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

    @property
    def networks(self) -> dict[str, torch.nn.Module]:
        """U-Net and text encoders, by the names of a pipeline's components."""
        encoders = self.text.models if self.text else ()
        return {"unet": self.unet, **dict(zip(("text_encoder", "text_encoder_2"), encoders, strict=False))}

    def add_loras(self, *loras: tuple[str | Path, float], option: str = "--lora") -> LatentDiffusion:
        """Bakes adapters into the weights, each with its scale, and returns the model; call it before others.

        LoRA, DoRA, LoKr or LoHa in the layout of diffusers or kohya: a file, a folder or Hub id with
        `pytorch_lora_weights.safetensors`. The scale is that of diffusers' `set_adapters`. UserError, naming `option`,
        if one can't be read, or is of another base.
        """
        adapters = [(read_adapter(locate(str(name), option), self.networks, option), scale) for name, scale in loras]
        add_to_weights(self.networks, adapters)
        return self

    def add_embeddings(self, *paths: str | Path) -> LatentDiffusion:
        """Adds words that were learned by textual inversion, each from a file or a run's folder; returns the model.

        Layouts: diffusers', `emb_params`, and SDXL's `clip_l` and `clip_g` (`ldm/models/adapters/embedding_files.py`).
        """
        for path in paths:
            add_embedding_file(self.text, path)
        self._embedding_cache = None if self._embedding_cache is None else {}
        return self

    def save(self, folder: Path) -> None:
        """Writes a folder that plain diffusers opens, as the pipeline of the model's task.

        Extra files hold what diffusers has no field for (class names, a trained null embedding, steps and guidance);
        `load` reads them. Diffusers' Stable Diffusion pipelines decode with an AutoencoderKL or AutoencoderTiny. With
        other autoencoders, pass `output_type="latent"` and decode with the VQModel or AutoencoderDC; in pixel space the
        latents are the images, and the folder opens with `vae=None`.
        """
        pipeline_io.write(self, folder)

    def optimize_for_inference(self, precision: str = "auto", compile: str = "no") -> LatentDiffusion:
        """Speeds up sampling, without bit-exact results, and returns the model. Don't save the model afterwards.

        `precision` of the U-Net is `bf16`, `fp16` or `no`; `auto` is bf16 where the device computes it natively. The
        solver stays in float32, as does the autoencoder with fp16. `compile` is `no`, `yes`, or `graphs`, which replays
        CUDA graphs: for many images of one size.
        """
        optimize(self, precision, compile)
        self._embedding_cache = {}
        return self

    def latents(
        self,
        prompts: Sequence[str] | None,
        seeds: Sequence[int],
        options: Sampling = AS_SAVED,
        *,
        labels: Sequence[str | int] | None = None,
        image: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        size: Size | None = None,
        toward: Interpolation | None = None,
        callback: Callable[[Step], None] | None = None,
    ) -> torch.Tensor:
        """Normalised latents `(N, C, h, w)`, image i from the noise of `seeds[i]`; there are N prompts and labels too.

        `image` `(N, 3, H, W)` in [-1, 1] is changed; with `mask` `(N, 1, H, W)`, 1 where to generate, it is inpainted;
        an upscaler enlarges it. `size` is the size of the output if there is no image. `callback` is called after every
        step.
        """
        return self._sample(SamplingInputs(seeds, prompts, labels, image, mask, size, toward, options), callback)

    @torch.no_grad()
    def _sample(self, inputs: SamplingInputs, callback: Callable[[Step], None] | None) -> torch.Tensor:
        prepared = prepare(self, inputs)
        denoise, classifier = guided_network(self, prepared, inputs)
        return sample(
            denoise,
            prepared.solver,
            prepared.noise,
            prepared.generators,
            x0=prepared.x0,
            first=prepared.first,
            inpaint=prepared.inpaint,
            classifier=classifier,
            callback=callback,
        )

    def embedded(self, prompts: Sequence[str]) -> TextEmbedding:
        """Encodes each prompt once per call, and after `optimize_for_inference` once for all calls."""
        assert self.text, "this model reads no text"
        cache = {} if self._embedding_cache is None else self._embedding_cache
        if len(cache) > MAX_CACHED_PROMPTS:
            cache.clear()
        if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in cache]:
            encoded = [self.text.embed([prompt]) for prompt in new]  # one at a time: bits depend on a batch
            states = TextEmbedding.cat(encoded).states
            for model in self.text.models:
                check_output(states, "text encoder", model, "take another one")
            cache.update(zip(new, encoded, strict=True))
        return TextEmbedding.cat([cache[prompt] for prompt in prompts])

    def __call__(
        self,
        prompts: str | Sequence[str] | None = None,
        seed: int | Sequence[int] = 0,
        batch: int = 32,
        *,
        labels: str | int | Sequence[str | int] | None = None,
        count: int = 1,
        image: Images | None = None,
        mask: Images | None = None,
        size: Size | None = None,
        toward: Interpolation | None = None,
        callback: Callable[[Step], None] | None = None,
        ready: Callable[[int, list[Image.Image]], None] | None = None,
        **options: Any,
    ) -> list[Image.Image]:
        """Images for one prompt or several. Image i starts from the noise of `seed + i`, in any batch, or of `seed[i]`.

        `labels` are names or numbers of classes, for a class-conditional model or a guiding classifier. `count` is the
        number of images per prompt or label, or the total for an unconditional model. `size` is (width, height) in
        pixels; by default that of training.

        `image`, one for all or one per output, is changed as far as `strength` says. With a `mask`, white where to
        generate, it is inpainted, and stays unchanged elsewhere. An upscaler enlarges it. `toward` interpolates towards
        other prompts and seeds. `callback` is called with a `Step` after each step of a batch. `ready` is called for
        each finished batch with the number of its first image and its images, which are then not returned, so that any
        number can be made; on a GPU they are decoded while the next batch is sampled. `options` are the fields of
        `ldm.sampling.options.Sampling`: `num_inference_steps`, `guidance_scale`, … UserError, in one line,
        if the model can't do what is requested.
        """
        request = SamplingRequest(prompts, seed, labels, count, image, mask, size, toward, Sampling(**options))
        return self.generate(request, batch, callback, ready)

    def generate(
        self,
        request: SamplingRequest,
        batch: int = 32,
        callback: Callable[[Step], None] | None = None,
        ready: Callable[[int, list[Image.Image]], None] | None = None,
    ) -> list[Image.Image]:
        """The images of a request; the arguments are those of a call, in one object."""
        inputs = request.resolve(self)

        def finish(start: int, latents: torch.Tensor, part: SamplingInputs) -> list[Image.Image]:
            check_output(latents, "U-Net", self.unet, OVERFLOW[placement(self.unet)[1] == torch.float16])
            images = self.to_images(latents, part.image, part.mask)
            if ready:
                ready(start, images)
            return [] if ready else images

        batches: list[Future[list[Image.Image]]] = []
        with BackgroundWorker(self.device) as worker:
            for rows, part in inputs.batches(batch):
                latents = self._sample(part.padded(self.multiple // self.upscale_factor), callback)
                batches.append(worker.submit(finish, rows.start, latents, part))
                for finished in filter(Future.done, batches):
                    finished.result()  # raises its error before more is sampled
        return [image for finished in batches for image in finished.result()]

    def to_images(
        self, latents: torch.Tensor, image: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> list[Image.Image]:
        """Decoded images, cropped to the size of `image`; where `mask` is 0 they are the image itself."""
        pixels = self.autoencoder.decode(latents)
        check_output(pixels, "autoencoder", self.autoencoder.vae, "its input is finite; take another autoencoder")
        if image is not None:
            height, width = (side * self.upscale_factor for side in image.shape[2:])
            pixels = pixels[..., :height, :width]
        return to_pil(pixels) if image is None or mask is None else composite(pixels, image, mask)
