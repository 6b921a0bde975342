"""`LatentDiffusion`: text encoder, U-Net, autoencoder and solver put together."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from PIL import Image
from torch import nn

from ldm.data.images import to_pil
from ldm.diffusion.parameterization import PREDICTION_TYPE_OF, is_flow
from ldm.models.autoencoder import Autoencoder
from ldm.models.conditioning import NUM_NOISE_LEVELS, Condition, mask_and_masked_latents, noise_augmented, predict
from ldm.models.text_encoder import NULL_PROMPT, TextEncoder
from ldm.models.unet import UNet, use_attention
from ldm.sampling import pipeline_io
from ldm.sampling.background_worker import BackgroundWorker
from ldm.sampling.guidance import by_classifier, classifier_free, thresholded
from ldm.sampling.inpainting import Pictures, masks_from, pasted, pixels, widened
from ldm.sampling.loop import InpaintMask, Step, between, in_tiles, initial_noise, sample
from ldm.sampling.options import Sampling
from ldm.sampling.solvers import Solver, name_of, with_solver
from ldm.utils.errors import UserError

Size = tuple[int, int]  # width, height
AS_SAVED = Sampling()
MANY = 1000  # embeddings of prompts that are kept
PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Interpolation:
    """What pictures lie a share of the way to: other prompts, from the noise of other seeds."""

    prompts: Sequence[str] | None
    seeds: Sequence[int]
    shares: Sequence[float]

    def of(self, part: slice) -> Interpolation:
        """The same for a part of the pictures."""
        return Interpolation(self.prompts and self.prompts[part], self.seeds[part], self.shares[part])


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
    _known: dict[str, torch.Tensor] | None = field(default=None, repr=False, compare=False)  # prompts' embeddings

    @property
    def task(self) -> str:
        """`generate`, `inpaint` or `upscale`, by the inputs of the U-Net."""
        beside = self.unet.config.in_channels - self.autoencoder.channels
        if beside == 3 and self.unet.config.get("num_class_embeds") == NUM_NOISE_LEVELS:
            return "upscale"
        return "inpaint" if beside == self.autoencoder.channels + 1 else "generate"

    @property
    def side(self) -> int:
        """Of the square pictures that it was trained on, in pixels."""
        side = self.unet.config.sample_size
        return (side if isinstance(side, int) else max(side)) * self.autoencoder.factor

    @property
    def enlarges(self) -> int:
        """How many times the side of the picture that it is given a picture has: 1, but for an upscaler."""
        return self.autoencoder.factor if self.task == "upscale" else 1

    @property
    def multiple(self) -> int:
        """What sides of pictures are multiples of, in pixels."""
        halvings = len(self.unet.config.block_out_channels) - 1 if isinstance(self.unet, UNet2DModel) else 0
        return self.autoencoder.factor * 2**halvings

    @property
    def target(self) -> str:
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
        self._known = None if self._known is None else {}
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
        gpu = self.device.type == "cuda"
        if precision == "auto":
            native = torch.cuda.is_bf16_supported(including_emulation=False) if gpu else _fast_bf16()
            precision = "bf16" if native else "no"
        if precision not in PRECISIONS:
            raise UserError(f"precision: {precision!r}; give auto, {', '.join(PRECISIONS)}")
        if precision == "fp16" and not gpu:
            raise UserError("precision: fp16 is for GPUs; use bf16 or no")
        if compile not in ("no", "yes", "graphs") or (compile == "graphs" and not gpu):
            raise UserError(f"compile: {compile!r}; give no, yes or, on a GPU, graphs")
        self._known = {}
        use_attention(self.unet, "auto", self.device)
        nn.Module.to(self.unet, PRECISIONS[precision])  # diffusers' warns of layers to be kept
        if gpu:
            self.unet.to(memory_format=torch.channels_last)
            if precision == "bf16":
                self.autoencoder.bfloat16()
        if compile != "no":
            self.unet.compile(mode="reduce-overhead" if compile == "graphs" else None)
        return self

    # -------------------------------------------------------------------------------------------------------- drawing

    @torch.no_grad()
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
        `callback` hears of every step.
        """
        shape = self._shape(image, size)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        noise = initial_noise(shape, seeds)
        for generator in generators:  # their first draw made the noise above
            torch.randn(shape, generator=generator)
        if toward:
            pairs = zip(noise, initial_noise(shape, toward.seeds), toward.shares, strict=True)
            noise = torch.stack([between(*pair) for pair in pairs])
        noise = noise.to(self.device)

        solver = self._solver(how)
        x0 = kept = beside = None
        first, label = 0, self._numbers(labels, how)
        if image is not None:
            image = image.to(self.device)
            mask = None if mask is None else mask.to(self.device)
            if self.task == "upscale":
                level = torch.full((len(seeds),), how.noise_level, device=self.device)
                with_noise = [torch.randn(image.shape[1:], generator=generator) for generator in generators]
                beside, label = noise_augmented(image, torch.stack(with_noise).to(self.device), level), level
            else:
                strength = how.strength if how.strength is not None else 1.0 if self.task == "inpaint" else 0.6
                first = solver.steps - round(solver.steps * strength)
                x0 = self.autoencoder.encode(image)
                if first == solver.steps:
                    return x0
                if mask is not None and self.task == "inpaint":
                    beside = mask_and_masked_latents(mask, self.autoencoder.encode(image * (mask < 0.5)))
                elif mask is not None:
                    kept = InpaintMask(x0, F.max_pool2d(mask, self.autoencoder.factor), noise)
        condition, null = self._conditions(prompts, how, label, beside, shape, toward)
        denoise, pull = self._denoiser(how, solver, condition, null, label)
        return sample(denoise, solver, noise, generators, x0=x0, first=first, kept=kept, pull=pull, callback=callback)

    def _shape(self, image: torch.Tensor | None, size: Size | None) -> tuple[int, int, int]:
        """Of the latents of a picture."""
        factor = self.autoencoder.factor
        if image is not None:
            height, width = (n * self.enlarges for n in image.shape[2:])
        else:
            width, height = size or (self.side, self.side)
        return self.autoencoder.channels, height // factor, width // factor

    def _solver(self, how: Sampling) -> Solver:
        steps, rule = how.steps or self.steps, self.scheduler
        if how.solver or how.spacing:
            solver = how.solver or name_of(rule)
            learned = self.unet.config.out_channels == 2 * self.autoencoder.channels
            rule = with_solver(rule, solver, how.spacing, learned)
            if how.solver == "ddpm" and not how.steps:
                steps = rule.config.num_train_timesteps
        most = rule.config.num_train_timesteps
        if steps > most and not is_flow(rule.config):
            raise UserError(f"steps: {steps}; the model's chain has {most}")
        return Solver(rule, steps, self.device, self.target, how.eta)

    def _denoiser(
        self, how: Sampling, solver: Solver, condition: Condition, null: Condition | None, label: torch.Tensor | None
    ) -> tuple[Any, Any]:
        """The guided network, and the classifier's pull on ddpm's means."""
        network = self._network(self.unet)
        weaker = self._network(how.weaker) if how.weaker is not None else None
        denoise = classifier_free(
            network, condition, null, self._scale(how), rescale=how.rescale, interval=how.interval, weaker=weaker
        )
        if how.threshold is not None:
            denoise = thresholded(denoise, self.target, how.threshold)
        if how.classifier is None or not how.classifier_scale:
            return denoise, None

        def gradient(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return how.classifier.gradient(x, t.expand(len(x)), label)  # type: ignore[no-any-return]

        if solver.ancestral:
            return denoise, (gradient, how.classifier_scale)
        return by_classifier(denoise, self.target, gradient, how.classifier_scale), None

    def _scale(self, how: Sampling) -> float | torch.Tensor:
        """Of guidance: one, or one a picture, `(N,)`."""
        scale = self.guidance if how.guidance is None else how.guidance
        if not isinstance(scale, Sequence):
            return float(scale)
        return torch.tensor(scale, dtype=torch.float32, device=self.device)

    def _network(self, unet: UNet) -> Callable[[torch.Tensor, torch.Tensor, Condition], torch.Tensor]:
        dtype = unet.dtype

        def network(x: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
            if dtype != torch.float32:
                x, condition = x.to(dtype), condition.to(dtype)
            return predict(unet, x, t, condition).to(torch.float32, copy=True)  # CUDA graphs reuse the output's memory

        return in_tiles(network, self.side // self.autoencoder.factor) if self.task == "upscale" else network

    def _conditions(
        self,
        prompts: Sequence[str] | None,
        how: Sampling,
        label: torch.Tensor | None,
        image: torch.Tensor | None,
        shape: tuple[int, int, int],
        toward: Interpolation | None,
    ) -> tuple[Condition, Condition | None]:
        """What is asked for, and the same without it; None where nothing is asked for."""
        text = sizes = guidance = None
        if self.text and prompts is not None:
            text = self.embedded(prompts)
            if toward and toward.prompts is not None:
                shares = torch.tensor(toward.shares, device=text.device)[:, None, None]
                text = text + shares * (self.embedded(toward.prompts) - text)
            if self.unet.config.get("addition_embed_type") == "text_time":  # a picture that was not cut
                height, width = (n * self.autoencoder.factor for n in shape[1:])
                sizes = torch.tensor([[height, width, 0, 0, height, width]], device=text.device).float()
                sizes = sizes.expand(len(text), 6)
        if how.classifier is not None:
            label = None
        if self.unet.config.get("time_cond_proj_dim"):  # distilled: it answers as guided, in one forward
            guidance = torch.as_tensor(self._scale(how), dtype=torch.float32, device=self.device)
            guidance = guidance.expand(len(prompts or ()))
        condition = Condition(text, label, sizes, image, guidance)
        nothing_asked = text is None and (label is None or self.task == "upscale")  # there it is the noise level
        if nothing_asked or guidance is not None:
            return condition, None
        nothing = label
        if label is not None and self.task != "upscale":
            nothing = torch.full_like(label, len(self.classes))
        if text is None:
            return condition, condition._replace(label=nothing)
        negative = [how.negative] if isinstance(how.negative, str) else how.negative
        null = self.embedded(negative)
        if self.null is not None:
            null = torch.stack(
                [self.null if each == NULL_PROMPT else e for each, e in zip(negative, null, strict=True)]
            )
        return condition, condition._replace(text=null.to(text).expand_as(text), label=nothing)

    def embedded(self, prompts: Sequence[str]) -> torch.Tensor:
        """`(N, T, D)`; each prompt is encoded once, by a `optimize_for_inference` model once and for all."""
        assert self.text, "this model reads no text"
        known = {} if self._known is None or len(self._known) > MANY else self._known
        if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]:
            known.update(zip(new, self.text.encode(new, batch=1), strict=True))  # the same bits in any company
        return torch.stack([known[prompt] for prompt in prompts])

    def _numbers(self, labels: Sequence[str | int] | None, how: Sampling) -> torch.Tensor | None:
        names = self.classes if how.classifier is None else how.classifier.classes
        if labels is None:
            return None
        return torch.tensor([class_number(each, names) for each in labels], device=self.device)

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
        to be made, it is completed, and stays what it is elsewhere; an upscaler enlarges it. `toward` leads part of the
        way to other prompts and seeds. `callback` is called after each step of a batch with a `Step`. `ready` is called
        with the number of a finished batch's first picture and its pictures, which are not returned then, so that any
        number of them may be made; on a GPU they are decoded beside the next batch's steps. `options` are the fields of
        `ldm.sampling.options.Sampling`: `steps`, `guidance`, `solver`, `negative`, and more. UserError says in one line
        what can't be.
        """
        how = Sampling(**options)
        prompts = [prompts] if isinstance(prompts, str) else prompts
        labels = [labels] if isinstance(labels, (str, int)) else labels
        if prompts and count > 1:
            prompts = [prompt for prompt in prompts for _ in range(count)]
        if labels and count > 1:
            labels = [label for label in labels for _ in range(count)]
        number = self.check(prompts, labels, count, image, mask, size, how)
        if batch < 1 or not (isinstance(seed, int) or len(seed) == number):
            raise UserError(f"seed, batch: {seed}, {batch}; give one seed or {number}, and batches of 1 or more")
        given = None if image is None else pixels("image", image, number)
        masks = None if mask is None else masks_from(mask, number)
        multiple = self.multiple // self.enlarges
        if given is not None and masks is not None and masks.shape[2:] != given.shape[2:]:
            (h, w), (height, width) = masks.shape[2:], given.shape[2:]
            raise UserError(f"mask: {w} × {h} pixels, but the picture has {width} × {height}; give one of its size")

        def finish(start: int, *drawn: torch.Tensor | None) -> list[Image.Image]:
            pictures = self._shown(*drawn)  # type: ignore[arg-type]
            if not ready:
                return pictures
            ready(start, pictures)
            return []

        made: list[Future[list[Image.Image]]] = []
        with BackgroundWorker(self.device) as beside:
            for start in range(0, number, batch):
                part = slice(start, min(start + batch, number))
                seeds = range(seed, seed + number)[part] if isinstance(seed, int) else seed[part]
                picture, hole = (None if whole is None else whole[part] for whole in (given, masks))
                wide, wide_hole = (None if each is None else widened(each, multiple) for each in (picture, hole))
                latents = self.latents(
                    None if prompts is None else prompts[part], seeds, how.of(part),
                    labels=None if labels is None else labels[part], image=wide, mask=wide_hole, size=size,
                    toward=toward and toward.of(part), callback=callback,
                )  # fmt: skip
                made.append(beside.do(finish, start, latents, picture, hole))
                for each in made:
                    if each.done():
                        each.result()  # what went wrong is said before more is drawn
        return [picture for each in made for picture in each.result()]

    def _shown(
        self, latents: torch.Tensor, image: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> list[Image.Image]:
        """Decoded pictures, of the size of the image; with a mask, they are the image where it is 0."""
        made = self.autoencoder.decode(latents)
        if image is not None:
            height, width = (side * self.enlarges for side in image.shape[2:])
            made = made[..., :height, :width]
        return to_pil(made) if image is None or mask is None else pasted(made, image, mask)

    def check(
        self,
        prompts: Sequence[str] | None,
        labels: Sequence[str | int] | None,
        count: int,
        image: Any,
        mask: Any,
        size: Size | None,
        how: Sampling,
    ) -> int:
        """The number of pictures that a call with these makes; UserError where it asks for what the model can't do."""
        if self.text and (not prompts or not all(prompt.strip() for prompt in prompts)):
            raise UserError("prompt: an empty prompt; write what the picture shall show")
        if prompts and not self.text:
            raise UserError("prompt: this model was trained without text; give labels, or count")
        known = self.classes
        if how.classifier is not None:
            if self.classes:
                raise UserError("classifier: the model is told classes itself; leave it out, and give labels")
            how.classifier.check(self.scheduler, self.autoencoder)
            known = how.classifier.classes
        if bool(labels) != bool(known):
            raise UserError(
                "labels: this model knows no classes; leave them out"
                if labels
                else f"labels: none given; there are {', '.join(known[:8])}"
            )
        if prompts and labels and len(prompts) != len(labels):
            raise UserError(f"labels: {len(labels)} for {len(prompts)} prompts; give one each")
        if self.task == "generate":
            if mask is not None and image is None:
                raise UserError("mask: of no picture; give the image too")
        else:
            for name, value, wanted in (("image", image, True), ("mask", mask, self.task == "inpaint")):
                if (value is not None) != wanted:
                    does = {"inpaint": "completes a picture", "upscale": "enlarges a picture"}[self.task]
                    raise UserError(f"{name}: {'needed' if wanted else 'leave it out'}; this model {does}")
        if size:
            if image is not None:
                raise UserError("size: is that of the image; resize it, or leave it out")
            self.check_size(size)
        if how.threshold is not None and self.autoencoder.factor != 1:
            raise UserError("threshold: is for pixels, and this model's latents have no bounds; leave it out")
        self._numbers(labels, how)
        self._solver(how)
        if self.unet.config.get("time_cond_proj_dim") and (
            how.weaker is not None or how.negative or how.rescale or tuple(how.interval) != (0.0, 1.0)
        ):
            raise UserError("guidance: the model was distilled, and hears its scale alone; leave out what else guides")
        number = len(prompts or labels or range(count))
        for name, value in (("guidance", how.guidance), ("negative", how.negative)):
            if isinstance(value, Sequence) and not isinstance(value, str) and len(value) != number:
                raise UserError(f"{name}: {len(value)} for {number} pictures; give one, or one each")
        return number

    def check_size(self, size: Size) -> None:
        """UserError where pictures of `size` (width, height) can't be made."""
        multiple = self.multiple
        if any(side < 1 or side % multiple for side in size):
            nearest = "x".join(str(max(1, round(side / multiple)) * multiple) for side in size)
            raise UserError(
                f"size: {size[0]}x{size[1]}; this model makes sides that are multiples of {multiple}, {nearest} for one"
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


def _fast_bf16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported())
