"""`FolderTrainer`: trains a diffusion model of a folder of images, from Python."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

from ldm.config import loader, old_names
from ldm.config.schema import Config
from ldm.data import check, index
from ldm.diffusion.process import DiffusionProcess
from ldm.distributed.launch import join, on_main
from ldm.evaluation.report import write_report
from ldm.models import autoencoder
from ldm.sampling.pipeline import LatentDiffusion
from ldm.training import checks
from ldm.training.fingerprint import check_finished
from ldm.training.model_card import write_card
from ldm.training.run_dir import prepare_run_dir
from ldm.utils.folder_lock import release_locks
from stage2_diffusion.evaluation import check_real_images
from stage2_diffusion.finetune import prior
from stage2_diffusion.train import train

UNET = {"channels": [64, 128, 256, 256], "attention_head_dim": 32, "attention": [False, False, True, True]}


class FolderTrainer:
    """Trains a diffusion model of the images in a folder; by default unconditional and in pixel space.

        trainer = FolderTrainer(DiffusionProcess("eps", "cosine"), "images", size=64, batch=32, lr=1e-4, steps=20_000)
        model = trainer.train()
        model(count=16)[0].save("image.png")

    `size` is the images' side in pixels, `batch` the global batch, of which a device computes `device_batch` at once;
    `lr` the learning rate, `ema` the decay of the averaged weights, which are exported; `precision` is `auto`,
    `no`, `bf16` or `fp16`. `autoencoder` is `identity`, or a diffusers folder for diffusion in its latents. `run` is
    the run's folder: the same call again continues there. `keys` are any others of the configuration, written
    `stage2__model="unet-34m"`. UserError where they don't fit together.
    """

    def __init__(
        self,
        process: DiffusionProcess,
        folder: str | Path,
        *,
        size: int = 64,
        batch: int = 32,
        lr: float = 1e-4,
        steps: int = 20_000,
        device_batch: int | None = None,
        ema: float = 0.995,
        precision: str = "auto",
        autoencoder: str | Path = "identity",
        conditions: tuple[str, ...] = (),
        run: str | Path = "runs/trainer",
        **keys: Any,
    ):
        in_pixels = str(autoencoder) == "identity"
        flow = process.prediction_type == "flow"
        tree: dict[str, dict[str, Any]] = {
            "run": {"dir": str(run), "precision": precision},
            "data": {"source": str(folder), "size": size, "cache": "none" if in_pixels else "disk"},
            "text": {},
            "stage1": {"model": "identity"} if in_pixels else _loaded(autoencoder),
            "stage2": {
                "conditions": list(conditions),
                **({} if "stage2__model" in keys else UNET),
                "prediction_type": process.prediction_type,
                "timesteps": process.timesteps,
                "zero_snr": process.zero_snr,
                "shift": process.shift,
                "timestep_sampling": process.timestep_sampling or "auto",
                "logit_mean": process.logit_mean,
                "logit_std": process.logit_std,
                "steps": steps,
                "batch": batch,
                "device_batch": device_batch,
                "lr": lr,
                "ema_decay": ema,
                **({} if flow else {"beta_schedule": process.beta_schedule}),
            },
            "sample": {
                "steps": 50 if flow else min(50, process.timesteps),
                "guidance": 1.0,
                "solver": "euler" if flow else "ddim",
            },
        }
        notes: list[str] = []
        for key, value in keys.items():
            section, _, name = old_names.current_key(key.replace("__", ".", 1), notes).partition(".")
            tree.setdefault(section, {})[name] = value
        tree, more = old_names.rename_keys(Config, tree)
        old_names.print_notes([*notes, *more])
        self.config = loader.parse(tree, "FolderTrainer")
        self.autoencoder = str(autoencoder)

    @release_locks()
    def train(self) -> LatentDiffusion:
        """Trains to the end, or continues, and returns the model; `RUN/pipeline` opens in plain diffusers."""
        state = join(self.config.run)
        text = checks.check(self.config, state.num_processes)
        prior.check(self.config)
        checks.check_captions(self.config, "data__source={'path': …, 'kind': 'classes'}")
        settings = prepare_run_dir(self.config)
        pipeline = settings.run.dir / "pipeline"
        finished = on_main(pipeline.exists)
        data = settings.data if finished else prior.with_class_images(settings, text).data
        images = index.build(data, settings.cache_dir, settings.stage2.conditions)
        if finished:
            stage2 = settings.run.dir / "stage2"
            on_main(partial(check_finished, stage2, {"data": images.select("train").fingerprint()}))
        else:
            batches = (settings.stage1.batch, settings.stage2.batch)
            prior.warn_of_shared_captions(images)
            check.before_training(images, settings.run.dir, text, settings.text.model, batches)
            check_real_images(settings, images)
            train(settings, images, autoencoder.load(self.autoencoder, "autoencoder"), text)
            if state.is_main_process:
                write_card(settings)
                write_report(settings.run.dir)
        return LatentDiffusion.load(pipeline, state.device)


def _loaded(name: str | Path) -> dict[str, Any]:
    """The keys of stage one that describe an autoencoder that exists."""
    loaded = autoencoder.load(name, "autoencoder")
    family = next(key for key, kind in autoencoder.FAMILIES.items() if kind == type(loaded.vae).__name__)
    model = {"dc": "dc-f32", "vq": "vq-f4"}.get(family, family)
    width = math.lcm(64, loaded.channels) if family == "dc" else 64
    return {
        "model": model,
        "pretrained": str(name),
        "latent_channels": loaded.channels,
        "channels": [width] * (loaded.factor.bit_length()),
    }
