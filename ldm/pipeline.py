"""`LatentDiffusion`: text encoder, U-Net, autoencoder and solver put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging
from PIL import Image

from ldm.autoencoder import Autoencoder, Identity
from ldm.data.images import to_pil
from ldm.errors import UserError
from ldm.files import whole_folder
from ldm.sampling import guided, initial_noise, sample, with_solver
from ldm.text import NULL_PROMPT, TextEncoder


@dataclass
class LatentDiffusion:
    """A text-to-image model.

        model = LatentDiffusion.load("runs/openmoji/pipeline")
        picture = model("a red heart", seed=0)[0]

    `steps` and `guidance` are what a call uses unless told otherwise.
    """

    text: TextEncoder
    unet: UNet2DConditionModel
    autoencoder: Autoencoder
    scheduler: Any
    steps: int = 50
    guidance: float = 7.5

    @classmethod
    def load(cls, name: str | Path, device: str | torch.device | None = None) -> LatentDiffusion:
        """Loads a diffusers folder or Hub id of the Stable Diffusion kind; weights from safetensors only."""
        before = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            parts = DiffusionPipeline.load_config(str(name))
            none = {"vae": None} if parts.get("vae") == [None, None] else {}  # diffusion on pixels
            pipeline = DiffusionPipeline.from_pretrained(str(name), safety_checker=None, use_safetensors=True, **none)
        except (OSError, ValueError) as error:
            raise UserError(
                f"--model: can't load a pipeline from {str(name)!r}: {str(error).splitlines()[0]}"
            ) from None
        finally:
            logging.set_verbosity(before)
        if not isinstance(pipeline, StableDiffusionPipeline):
            raise UserError(
                f"--model: {name} is a {type(pipeline).__name__}, not a text-to-image StableDiffusionPipeline"
            )
        text = TextEncoder(pipeline.text_encoder, pipeline.tokenizer)
        model = cls(text, pipeline.unet.eval(), Autoencoder(pipeline.vae or Identity()), pipeline.scheduler)
        return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def to(self, device: str | torch.device) -> LatentDiffusion:
        device = torch.device(device)
        self.text.to(device)
        self.autoencoder.to(device)
        self.unet.to(device)
        return self

    def save(self, folder: Path) -> None:
        """Writes a folder that plain diffusers opens.

        Its `StableDiffusionPipeline` decodes with an AutoencoderKL or AutoencoderTiny. With others, ask it for
        `output_type="latent"`: in pixel space these are the pictures, and a VQModel or AutoencoderDC decodes them.
        """
        vae = None if isinstance(self.autoencoder.vae, Identity) else self.autoencoder.vae
        if isinstance(vae, AutoencoderDC):  # the pipeline counts levels by it
            vae.register_to_config(block_out_channels=vae.config.encoder_block_out_channels)
        pipeline = StableDiffusionPipeline(
            vae=vae, text_encoder=self.text.model, tokenizer=self.text.tokenizer, unet=self.unet,
            scheduler=self.scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        with whole_folder(folder) as beside:
            pipeline.save_pretrained(beside)

    @torch.no_grad()
    def latents(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int | None = None,
        guidance: float | None = None,
        solver: str | None = None,
        negative: str = NULL_PROMPT,
    ) -> torch.Tensor:
        """Normalised latents `(N, C, h, w)` of a batch of prompts, picture i from the noise of `seeds[i]`."""
        device = self.unet.device
        text = self.text.encode(prompts)
        null = self.text.encode([negative]).expand_as(text)
        side = self.unet.config.sample_size
        noise = initial_noise((self.autoencoder.channels, side, side), seeds).to(device)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        for generator in generators:  # their first draw made the noise above
            torch.randn(noise.shape[1:], generator=generator)
        denoise = guided(self.unet, text, null, self.guidance if guidance is None else guidance)
        rule = with_solver(self.scheduler, solver) if solver else self.scheduler
        return sample(denoise, rule, noise, steps or self.steps, generators)

    def __call__(
        self, prompts: str | Sequence[str], seed: int = 0, batch: int = 32, **options: Any
    ) -> list[Image.Image]:
        """Pictures for one prompt or several; picture i starts from the noise of `seed + i`, in any batch.

        `options`: `steps`, `guidance`, `solver`, `negative`, as `latents` takes them.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts or not all(prompt.strip() for prompt in prompts):
            raise UserError("prompt: an empty prompt; write what the picture shall show")
        pictures: list[Image.Image] = []
        for start in range(0, len(prompts), batch):
            part = prompts[start : start + batch]
            seeds = range(seed + start, seed + start + len(part))
            pictures += to_pil(self.autoencoder.decode(self.latents(part, seeds, **options)))
        return pictures
