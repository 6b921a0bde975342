"""`LatentDiffusion`: text encoder, U-Net, autoencoder and solver put together."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    LDMPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
)
from diffusers.utils import logging
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm.autoencoder import Autoencoder, Identity, fold
from ldm.condition import LEVELS, NOISIEST, Condition, augmented, predict, with_hole
from ldm.data.images import to_pil, to_tensor
from ldm.errors import UserError
from ldm.files import whole_folder
from ldm.sampling import guided, initial_noise, sample, with_solver
from ldm.schedules import betas
from ldm.text import NULL_PROMPT, TextEncoder
from ldm.unet import UNet

FACTS, NULL = "ldm.json", "null.safetensors"  # what a pipeline's folder has beside what plain diffusers reads
KNOWN = (
    StableDiffusionPipeline, StableDiffusionInpaintPipeline, StableDiffusionUpscalePipeline, DDPMPipeline, LDMPipeline,
)  # fmt: skip
UPSCALER = 0.08333  # the only latent scale that diffusers' StableDiffusionUpscalePipeline leaves alone
Pictures = torch.Tensor | Image.Image | Sequence[Image.Image]


@dataclass
class LatentDiffusion:
    """A model that makes pictures: from text, classes, nothing, a picture with a hole, or a small picture.

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

    @property
    def task(self) -> str:
        """`generate`, `inpaint` or `upscale`, by the inputs of the U-Net."""
        beside = self.unet.config.in_channels - self.autoencoder.channels
        if beside == 3 and self.unet.config.get("num_class_embeds") == LEVELS:
            return "upscale"
        return "inpaint" if beside == self.autoencoder.channels + 1 else "generate"

    @classmethod
    def load(cls, name: str | Path, device: str | torch.device | None = None) -> LatentDiffusion:
        """Loads a diffusers folder or Hub id: of the Stable Diffusion kind, an unconditional one, or one of ours.

        Weights are read from safetensors only.
        """
        before = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            parts = DiffusionPipeline.load_config(str(name))
            none = {"vae": None} if parts.get("vae") == [None, None] else {}  # diffusion on pixels
            given = {"safety_checker": None} if "safety_checker" in parts else {}
            pipeline = DiffusionPipeline.from_pretrained(str(name), use_safetensors=True, **none, **given)
        except (OSError, ValueError) as error:
            raise UserError(
                f"--model: can't load a pipeline from {str(name)!r}: {str(error).splitlines()[0]}"
            ) from None
        finally:
            logging.set_verbosity(before)
        if not isinstance(pipeline, KNOWN):
            known = ", ".join(kind.__name__ for kind in KNOWN)
            raise UserError(f"--model: {name} is a {type(pipeline).__name__}; known are {known}")
        facts, null = _facts(Path(name))
        encoder = getattr(pipeline, "text_encoder", None)
        text = TextEncoder(encoder, pipeline.tokenizer) if encoder else None
        vae = getattr(pipeline, "vqvae", None) or getattr(pipeline, "vae", None) or Identity()
        used = {key: facts[key] for key in ("steps", "guidance") if key in facts}
        model = cls(
            text, pipeline.unet.eval(), Autoencoder(vae), pipeline.scheduler, null=null,
            classes=tuple(facts.get("classes", ())), **used,
        )  # fmt: skip
        return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def to(self, device: str | torch.device) -> LatentDiffusion:
        device = torch.device(device)
        if self.text:
            self.text.to(device)
        self.autoencoder.to(device)
        self.unet.to(device)
        self.null = self.null if self.null is None else self.null.to(device)
        return self

    def save(self, folder: Path) -> None:
        """Writes a folder that plain diffusers opens, as the pipeline of the model's task.

        What diffusers has no place for (class names, a trained null embedding, steps and guidance) stands beside, for
        `load`. Its Stable Diffusion pipelines decode with an AutoencoderKL or AutoencoderTiny. With others, ask for
        `output_type="latent"`, which a VQModel or AutoencoderDC decodes; in pixel space these are the pictures, and the
        folder opens with `vae=None`.
        """
        with whole_folder(folder) as beside:
            self._pipeline().save_pretrained(beside)
            facts = {"steps": self.steps, "guidance": self.guidance, "classes": list(self.classes)}
            (beside / FACTS).write_text(json.dumps(facts, indent=2) + "\n")
            if self.null is not None:
                save_file({"null": self.null.detach().float().cpu().contiguous()}, beside / NULL)

    def _pipeline(self) -> DiffusionPipeline:
        vae = None if isinstance(self.autoencoder.vae, Identity) else self.autoencoder.vae
        if not self.text:
            if vae is None:
                return DDPMPipeline(unet=self.unet, scheduler=self.scheduler)
            return LDMPipeline(vqvae=vae, unet=self.unet, scheduler=self.scheduler)
        if isinstance(vae, AutoencoderDC):  # the pipeline counts levels by it
            vae.register_to_config(block_out_channels=vae.config.encoder_block_out_channels)
        parts: dict[str, Any] = {
            "text_encoder": self.text.model, "tokenizer": self.text.tokenizer, "unet": self.unet,
            "scheduler": self.scheduler, "safety_checker": None, "feature_extractor": None,
        }  # fmt: skip
        if self.task == "inpaint":
            return StableDiffusionInpaintPipeline(vae=vae, **parts, requires_safety_checker=False)
        if self.task == "upscale":
            if isinstance(vae, AutoencoderKL):
                ours, none = self.autoencoder.scale, torch.zeros(self.autoencoder.channels)
                vae = fold(vae, none, torch.full_like(none, UPSCALER / ours))
                vae.register_to_config(scaling_factor=UPSCALER)
            low = DDPMScheduler(trained_betas=betas("scaled_linear").tolist())
            return StableDiffusionUpscalePipeline(
                vae=vae, **parts, low_res_scheduler=low, watermarker=None, max_noise_level=NOISIEST
            )
        return StableDiffusionPipeline(vae=vae, **parts, requires_safety_checker=False)

    @torch.no_grad()
    def latents(
        self,
        prompts: Sequence[str] | None,
        seeds: Sequence[int],
        steps: int | None = None,
        guidance: float | None = None,
        solver: str | None = None,
        negative: str = NULL_PROMPT,
        labels: Sequence[str | int] | None = None,
        image: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        noise_level: int = 20,
    ) -> torch.Tensor:
        """Normalised latents `(N, C, h, w)`, picture i from the noise of `seeds[i]`; prompts and labels are N too.

        `image` `(N, 3, H, W)` in [-1, 1] with `mask` `(N, 1, H, W)`, 1 where it is to be made, for inpainting, or
        the small pictures to be enlarged, which get noise of `noise_level` in [0, 350).
        """
        device, side = self.unet.device, self.unet.config.sample_size
        h, w = image.shape[2:] if image is not None and self.task == "upscale" else (side, side)
        shape = (self.autoencoder.channels, int(h), int(w))
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        noise = initial_noise(shape, seeds).to(device)
        for generator in generators:  # their first draw made the noise above
            torch.randn(shape, generator=generator)
        label = (
            torch.tensor([self.class_number(each) for each in labels], device=device) if labels is not None else None
        )
        beside = None
        if self.task == "inpaint" and image is not None and mask is not None:
            image, mask = image.to(device), mask.to(device)
            beside = with_hole(mask, self.autoencoder.encode(image * (mask < 0.5)))
        elif self.task == "upscale" and image is not None:
            if not 0 <= noise_level < NOISIEST:
                raise UserError(f"noise_level: {noise_level}; give 0 to {NOISIEST - 1}")
            label = torch.full((len(seeds),), noise_level, device=device)
            with_noise = [torch.randn(image.shape[1:], generator=generator) for generator in generators]
            beside = augmented(image.to(device), torch.stack(with_noise).to(device), label)
        condition, null = self._conditions(prompts, negative, label, beside, shape)
        scale = self.guidance if guidance is None else guidance

        def network(x: torch.Tensor, t: torch.Tensor, told: Condition) -> torch.Tensor:
            return predict(self.unet, x, t, told)

        rule = with_solver(self.scheduler, solver) if solver else self.scheduler
        return sample(guided(network, condition, null, scale), rule, noise, steps or self.steps, generators)

    def _conditions(
        self,
        prompts: Sequence[str] | None,
        negative: str,
        label: torch.Tensor | None,
        image: torch.Tensor | None,
        shape: tuple[int, int, int],
    ) -> tuple[Condition, Condition | None]:
        """What is asked for, and the same without it; None where nothing is asked for."""
        text = sizes = None
        if self.text and prompts is not None:
            text = self.text.encode(prompts)
            if self.unet.config.get("addition_embed_type") == "text_time":  # a picture that was not cut
                height, width = (n * self.autoencoder.factor for n in shape[1:])
                sizes = torch.tensor([[height, width, 0, 0, height, width]], device=text.device).float()
                sizes = sizes.expand(len(text), 6)
        condition = Condition(text, label, sizes, image)
        if text is None and label is None:
            return condition, None
        nothing = label
        if label is not None and self.task != "upscale":
            nothing = torch.full_like(label, len(self.classes))
        if text is None or self.text is None:
            return condition, condition._replace(label=nothing)
        null = self.text.encode([negative]) if negative or self.null is None else self.null[None]
        return condition, condition._replace(text=null.to(text).expand_as(text), label=nothing)

    def class_number(self, label: str | int) -> int:
        """Of a class's name, or of its number; UserError where there is no such class."""
        if isinstance(label, int) and 0 <= label < len(self.classes):
            return label
        if label in self.classes:
            return self.classes.index(str(label))
        close = difflib.get_close_matches(str(label), self.classes, n=1)
        hint = (
            f"did you mean {close[0]!r}?" if close else f"there are {len(self.classes)}: {', '.join(self.classes[:8])}"
        )
        raise UserError(f"labels: no class {label!r}; {hint}")

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
        **options: Any,
    ) -> list[Image.Image]:
        """Pictures for one prompt or several; picture i starts from the noise of `seed + i`, in any batch, or of the
        i-th of several seeds.

        `labels`, names or numbers of classes, for a class-conditional model; `count` for one that is told neither.
        `image`, one or one a prompt, is what an inpainting model completes where `mask` is white, and what an upscaler
        enlarges. `options`: `steps`, `guidance`, `solver`, `negative`, `noise_level`, as `latents` takes them.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        labels = [labels] if isinstance(labels, (str, int)) else labels
        number = self._check(prompts, labels, count, image, mask)
        given = None if image is None else _pixels("image", image, number)
        holes = None if mask is None else _pixels("mask", mask, number)
        if given is not None and holes is not None:
            if not isinstance(mask, torch.Tensor):
                holes = holes / 2 + 0.5
            holes = (holes[:, :1] >= 0.5).float()
            side = self.unet.config.sample_size * self.autoencoder.factor
            for name, (h, w) in (("image", given.shape[2:]), ("mask", holes.shape[2:])):
                if (h, w) != (side, side):
                    raise UserError(f"{name}: {w} × {h} pixels; this model completes {side} × {side}, resize it")
        pictures: list[Image.Image] = []
        for start in range(0, number, batch):
            part = slice(start, min(start + batch, number))
            seeds = range(seed, seed + number)[part] if isinstance(seed, int) else seed[part]
            of_part = {
                name: None if whole is None else whole[part]
                for name, whole in (("labels", labels), ("image", given), ("mask", holes))
            }
            latents = self.latents(None if prompts is None else prompts[part], seeds, **of_part, **options)  # type: ignore[arg-type]
            pictures += to_pil(self.autoencoder.decode(latents))
        return pictures

    def _check(
        self, prompts: Sequence[str] | None, labels: Sequence[str | int] | None, count: int, image: Any, mask: Any
    ) -> int:
        """The number of pictures asked for; UserError where what is given is not what the model is told."""
        if self.text and (not prompts or not all(prompt.strip() for prompt in prompts)):
            raise UserError("prompt: an empty prompt; write what the picture shall show")
        if prompts and not self.text:
            raise UserError("prompt: this model was trained without text; give labels, or count")
        if bool(labels) != bool(self.classes):
            raise UserError(
                "labels: this model knows no classes; leave them out"
                if labels
                else f"labels: none given; there are {', '.join(self.classes[:8])}"
            )
        if prompts and labels and len(prompts) != len(labels):
            raise UserError(f"labels: {len(labels)} for {len(prompts)} prompts; give one each")
        needed = {"inpaint": (True, True), "upscale": (True, False)}.get(self.task, (False, False))
        for name, value, wanted in (("image", image, needed[0]), ("mask", mask, needed[1])):
            if (value is not None) != wanted:
                doing = {"inpaint": "completes a picture", "upscale": "enlarges a picture"}.get(
                    self.task, "starts from noise"
                )
                raise UserError(f"{name}: {'needed' if wanted else 'leave it out'}; this model {doing}")
        return len(prompts or labels or range(count))


def _facts(folder: Path) -> tuple[dict[str, Any], torch.Tensor | None]:
    """What `save` wrote for `load`; nothing in a folder that others made, or of the Hub."""
    facts = json.loads((folder / FACTS).read_text("utf-8")) if (folder / FACTS).exists() else {}
    return facts, load_file(folder / NULL)["null"] if (folder / NULL).exists() else None


def _pixels(name: str, pictures: Pictures, number: int) -> torch.Tensor:
    """`(number, C, H, W)`: pictures in [-1, 1]; tensors as they are."""
    if isinstance(pictures, Image.Image):
        pictures = [pictures]
    if len(pictures) not in (1, number):
        raise UserError(f"{name}: {len(pictures)} for {number} pictures; give one, or one each")
    if not isinstance(pictures, torch.Tensor):
        if len(sizes := {picture.size for picture in pictures}) > 1:
            raise UserError(f"{name}: of {len(sizes)} sizes; bring all to one")
        pictures = torch.stack([to_tensor(picture.convert("RGB")) for picture in pictures])
    return pictures.expand(number, *pictures.shape[1:])
