"""The common example trainer's loop, the reference of `scripts/benchmark.py train` and `quality`.

It is the loop of diffusers' examples/text_to_image/train_text_to_image.py with its defaults and `--use_ema`: images are
decoded, resized and encoded for every batch, captions are encoded for every batch; attention, AdamW and EMA have their
defaults; each step's loss is read twice. The noise schedule is that of the models which it is made for, Stable
Diffusion's. It has no checkpoints, no trackers and no learning rate schedule, which is constant there.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from torchvision import transforms

from ldm.config.schema import Config
from ldm.data.index import Index
from ldm.distributed.launch import accelerator, accumulated, join
from ldm.models import unet
from ldm.models.autoencoder import Autoencoder
from ldm.models.text_encoder import TextEncoder
from ldm.training.throughput import Clock
from ldm.utils.errors import UserError
from ldm.utils.precision import DTYPES


def noise_scheduler() -> DDPMScheduler:
    """Stable Diffusion 1's."""
    return DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def check(settings: Config, benchmark: str) -> None:
    """UserError, which begins with the benchmark's name, where the loop can't train what is configured."""
    stage = settings.stage2
    supported = stage.variance == "fixed" and not settings.text.train and settings.finetune.kind == "full"
    if not supported or stage.conditions != ("text",) or settings.stage1.family != "kl":
        raise UserError(
            f"{benchmark}: the reference trains all weights of a U-Net, with text of a frozen encoder, latents of an "
            "AutoencoderKL and a fixed variance; set stage2.conditions=[text] text.train=false finetune.kind=full "
            "stage2.variance=fixed stage1.model=kl"
        )


class ImageTextDataset(torch.utils.data.Dataset[tuple[torch.Tensor, str]]):
    """Images `(3, size, size)` in [-1, 1], each with one of its captions."""

    def __init__(self, index: Index, size: int):
        self.index = index
        crop = [transforms.Resize(size, transforms.InterpolationMode.BILINEAR), transforms.RandomCrop(size)]
        self.transform = transforms.Compose([*crop, transforms.ToTensor(), transforms.Normalize([0.5], [0.5])])

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, str]:
        image: Image.Image = self.index.load_image(i)
        return self.transform(image.convert("RGB")), random.choice(self.index[i].captions)


def train(
    settings: Config,
    data: Index,
    vae: Autoencoder,
    text: TextEncoder,
    after_step: Callable[[int, EMAModel], bool] | None = None,
) -> list[dict[str, float]]:
    """Trains a U-Net and discards it; returns a line of metrics every `run.log_every` steps.

    A line has step, time, a `Clock`'s figures, and fp16's skipped steps and loss scale. The configuration's U-Net,
    images, batches, learning rate, precision and loader processes are used; its other keys are not. The training ends
    after `stage2.steps`, or where `after_step`, which gets a step's number and the average, returns true.
    """
    stage, size = settings.stage2, settings.data.size
    accumulation = accumulated("stage2", stage, join(settings.run).num_processes)
    run, count = accelerator(settings.run, accumulation.steps), accumulation.images
    torch.set_float32_matmul_precision("highest")  # torch's default
    torch.backends.cudnn.benchmark = False
    model: Any = unet.build(stage, vae.channels, size // vae.factor, text.width).train()
    if stage.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    ema = EMAModel(model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=stage.lr)

    def collate(samples: list[tuple[torch.Tensor, str]]) -> dict[str, torch.Tensor]:
        pixels, captions = zip(*samples, strict=True)
        return {"pixels": torch.stack(pixels), "tokens": text.token_ids(captions).cpu()}

    sampler = torch.utils.data.RandomSampler(data, replacement=True, num_samples=stage.steps * stage.batch)
    loader: Any = torch.utils.data.DataLoader(
        ImageTextDataset(data, size), count, sampler=sampler, collate_fn=collate, num_workers=settings.data.workers
    )
    model, optimizer, loader = run.prepare(model, optimizer, loader)
    ema.to(run.device)
    dtype = DTYPES[run.mixed_precision]  # of the frozen models
    vae.vae.to(run.device, dtype)
    text.model.to(run.device, dtype)
    scheduler, clock, lines, step, skipped = noise_scheduler(), Clock(), [], 0, 0

    for batch in clock.waiting(loader):
        with run.accumulate(model):
            latents = vae.vae.encode(batch["pixels"].to(dtype)).latent_dist.sample() * vae.scale
            noise = torch.randn_like(latents)
            t = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),), device=run.device)
            noisy = scheduler.add_noise(latents, noise, t)
            with torch.no_grad():
                states = text.embed_tokens(batch["tokens"]).states
            loss = F.mse_loss(model(noisy, t, states).sample.float(), noise.float())
            run.gather(loss.repeat(count)).mean().item()
            run.backward(loss)
            if run.sync_gradients:
                run.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        clock.count(count)
        if run.sync_gradients:
            ema.step(model.parameters())
            step += 1
            skipped += run.optimizer_step_was_skipped
            if step % settings.run.log_every == 0:
                scale = float(run.scaler.get_scale()) if run.scaler else 1.0
                fp16 = {"loss_scale": scale, "skipped": skipped}
                lines.append({"step": step, "time": time.perf_counter(), **clock.read(), **fp16})
            if after_step and after_step(step, ema):
                break
        loss.detach().item()
    return lines
