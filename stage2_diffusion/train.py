"""Trains the latent U-Net: cached latents and what they are conditioned on in, `RUN/pipeline` out."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from ldm.config.schema import Config
from ldm.data.cache import CacheOptions
from ldm.data.dataset import sample_names, stage2_dataset
from ldm.data.index import Index
from ldm.data.sampler import SampleSpec
from ldm.data.stream import Stream
from ldm.distributed.launch import join, on_main, precision
from ldm.models.attention import use_attention
from ldm.models.autoencoder import Autoencoder
from ldm.models.compilation import compile_blocks
from ldm.models.text_encoder import NULL_PROMPT, TextEncoder
from ldm.models.unet import build, load
from ldm.sampling.pipeline import LatentDiffusion
from ldm.sampling.solvers import scheduler
from ldm.training.optimizer import DTYPES
from ldm.training.trainer import Run
from stage2_diffusion.conditions import Conditions
from stage2_diffusion.denoiser import Denoiser
from stage2_diffusion.objective import Objective
from stage2_diffusion.samples import write_sheet
from stage2_diffusion.validation import Validation


def train(config: Config, data: Index | Stream, autoencoder: Autoencoder, text: TextEncoder | None) -> None:
    """Trains the U-Net on the pictures of split `train` and exports the pipeline with its EMA weights."""
    stage, seed = config.stage2, config.run.seed
    train_set = data.select("train")
    classes = train_set.labels() if stage.classes and isinstance(train_set, Index) else []
    contract = {**autoencoder.latent_fingerprint(config.data.size), "data": train_set.fingerprint()}

    torch.manual_seed(seed)
    shape = (autoencoder.channels, config.data.size // autoencoder.factor, text.width if text else 0, len(classes))
    unet = load(stage, *shape) if stage.init_from else build(stage, *shape)
    if stage.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if stage.channels_last:
        unet.to(memory_format=torch.channels_last)
    encoder = text if config.text.train else None
    null = text.encode([NULL_PROMPT])[0] if text and not encoder else None
    denoiser = Denoiser(unet, stage, null, encoder)
    device = join(config.run).device
    use_attention(unet.to(device), stage.attention_backend, device, DTYPES[precision(config.run)])
    spec = SampleSpec.of(config.data, stage.batch, seed, stage.cond_dropout)
    name = sample_names(train_set, spec)
    run = Run(config.run, stage, "stage2", denoiser, contract, name=name, sharded=True)
    if stage.compile:
        compile_blocks(unet, dynamic=bool(config.data.buckets))
    autoencoder.to(run.device)
    if text:
        text.to(run.device)
    cache, frozen = CacheOptions.of(config.data, config.cache_dir), None if encoder else text
    samples = stage2_dataset(train_set, spec, cache, autoencoder, frozen, run.device, stage.image)
    conditions = Conditions(config, autoencoder, encoder, len(classes))
    objective = Objective(stage, seed, denoiser, "discrete" if autoencoder.factor == 1 else "gaussian")
    clip = autoencoder.factor == 1 and not stage.text  # diffusers' text-to-image pipelines switch it off when they load
    model = LatentDiffusion(
        text, unet, autoencoder,
        scheduler(objective.process, config.sample.solver, stage.variance == "learned", clip),
        config.sample.steps, config.sample.guidance, denoiser.null, tuple(classes),
    )  # fmt: skip
    validation = Validation(config, data, model, conditions, objective.process)

    def evaluate_if_due() -> None:
        if run.due(config.sample.every):
            write_sheet(config, run, model, data)
        if run.due(stage.evaluate_every, last=True):
            validation(run)

    if run.step or stage.init_from:  # what a killed run still owes; what a fine-tune starts from
        evaluate_if_due()
    for batch in run.batches(samples.dataset, config.data.workers):
        with run.accumulate():
            n = batch["position"]
            x0, states = samples.encode(batch)
            condition, dropped, rates = conditions(batch, x0, states)  # classifier-free guidance needs some without
            eps, added = objective.noise(x0, n)
            t, importance = objective.times(n)

            x_t = objective.forward.add_noise(x0, added, t)
            prediction = run.model(x_t, objective.forward.model_time(t), condition, dropped)
            losses = objective.losses(prediction, x0, x_t, eps, t)
            loss = (importance * losses).mean()
            run.track_nonfinite(n, losses[:, None])
            run.backward(loss)
            objective.record_losses(n, t, losses, run.accelerator)
            run.update(loss=loss, **rates)
        evaluate_if_due()

    trained = run.export_ema()
    model = replace(model, unet=trained.unet, text=trained.text or text, null=trained.null)
    write_sheet(config, run, model, data)
    run.close()
    on_main(partial(model.save, config.run.dir / "pipeline"))  # last: where it stands, the stage is finished
