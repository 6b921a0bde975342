"""Trains the latent U-Net: cached latents and what they are conditioned on in, `RUN/pipeline` out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from ldm.config.schema import Config
from ldm.data.cache import CacheOptions
from ldm.data.dataset import sample_names, stage2_dataset
from ldm.data.draws import with_draws
from ldm.data.index import Index
from ldm.data.records import PRIOR, TRAINED
from ldm.data.sampler import SampleSpec
from ldm.data.stream import Stream
from ldm.diffusion.process import DiffusionProcess
from ldm.distributed.launch import join, on_main, precision
from ldm.models.attention import use_attention
from ldm.models.autoencoder import Autoencoder
from ldm.models.compilation import compile_blocks
from ldm.models.text_encoder import NULL_PROMPT, AnyTextEncoder
from ldm.models.text_normalization import normalized, statistics_of_run
from ldm.models.unet import UNet, build, load
from ldm.sampling.pipeline import LatentDiffusion
from ldm.sampling.solvers import scheduler
from ldm.training.trainer import Trainer
from ldm.utils.precision import DTYPES
from stage2_diffusion.conditions import Conditions
from stage2_diffusion.denoiser import Denoiser
from stage2_diffusion.draws import NoiseDraws
from stage2_diffusion.evaluation import Evaluation
from stage2_diffusion.finetune import prior
from stage2_diffusion.finetune.deliver import deliver
from stage2_diffusion.finetune.freeze import base_fingerprint, freeze, seed_dropout
from stage2_diffusion.finetune.inversion import check_word_in_captions
from stage2_diffusion.objective import Objective
from stage2_diffusion.samples import write_sheet
from stage2_diffusion.validation import Validation

NORMALIZED_OVER = 256


def train(
    config: Config, data: Index | Stream, autoencoder: Autoencoder, text: AnyTextEncoder | None, pause_after: int = 0
) -> None:
    """Trains the U-Net on the images of split `train`, and of `prior`; exports the pipeline with its EMA weights.

    `Paused`, with a checkpoint, after step `pause_after`.
    """
    stage, seed = config.stage2, config.run.seed
    train_set = data.select(*TRAINED)
    classes = train_set.labels() if stage.classes and isinstance(train_set, Index) else []
    check_word_in_captions(config.finetune, train_set, text)
    text = normalized_encoder(config, train_set, text)
    device = join(config.run).device

    # Weights, in the order in which random numbers are drawn for them.
    torch.manual_seed(seed)
    unet = build_unet(config, autoencoder, text, len(classes))
    base = base_fingerprint(config, unet, text)
    trained_encoder = freeze(config, unet, text)
    use_attention(unet.to(device), stage.attention_backend, device, DTYPES[precision(config.run)])
    frozen_encoder = None if trained_encoder else text
    uncond = frozen_encoder.embed([NULL_PROMPT]) if frozen_encoder else None
    denoiser = Denoiser(unet, stage, uncond, trained_encoder, frozen=bool(base))

    # The trainer wraps the weights for precision and processes, then resumes; only then may blocks be compiled.
    spec = SampleSpec.of(config.data, stage.batch, seed, stage.cond_dropout)
    latents = autoencoder.latent_fingerprint(config.data.size)
    fingerprint = {**latents, "data": data.select("train").fingerprint(), **base}
    if len(of_class := data.select(PRIOR)):
        fingerprint[PRIOR] = of_class.fingerprint()
    name = sample_names(train_set, spec)
    trainer = Trainer(
        config.run, stage, "stage2", denoiser, fingerprint, name=name, sharded=True, pause_after=pause_after
    )
    if stage.compile:
        compile_blocks(unet, dynamic=bool(config.data.buckets))

    autoencoder.to(device)
    if text:
        text.to(device)
    cache = CacheOptions.of(config.data, config.cache_dir)
    samples = stage2_dataset(train_set, spec, cache, autoencoder, frozen_encoder, device, stage.image, with_masks=True)
    conditions = Conditions(config, autoencoder, trained_encoder, len(classes))
    dataset = with_draws(samples.dataset, NoiseDraws.of(stage, seed, autoencoder), conditions.draws)
    objective = Objective(stage, denoiser, "discrete" if autoencoder.factor == 1 else "gaussian")
    model = pipeline_of(config, denoiser, autoencoder, text, objective.process, classes)
    validation = Validation(config, data, model, conditions, objective.process)
    evaluation = Evaluation(config, data, model, device)

    def evaluate_if_due() -> None:
        if trainer.due(config.sample.every):
            write_sheet(config, trainer, model, data)
        if trainer.due(stage.evaluate_every, last=True):
            validation(trainer)
        if stage.evaluate and trainer.due(stage.evaluate.every, last=True):
            evaluation(trainer)

    if trainer.step or stage.init_from:  # what a killed run did not finish; what a fine-tune starts from
        evaluate_if_due()
    for batch in trainer.batches(dataset, config.data.workers, config.data.prefetch_factor):
        with trainer.accumulate():
            n = batch["position"]
            x0, states = samples.encode(batch)
            condition, dropped, rates = conditions(batch, x0, states)  # dropped for classifier-free guidance
            eps, added = objective.noise(batch)  # drawn by position in the loader's workers, as u is
            t, importance = objective.timesteps(batch["u"])

            x_t = objective.noising.add_noise(x0, added, t)
            seed_dropout(config, n)
            prediction = trainer.model(x_t, objective.noising.model_time(t), condition, dropped)
            losses = objective.losses(prediction, x0, x_t, eps, t, batch.get("mask"))
            weight = prior.sample_weights(batch, config.finetune.prior_weight)
            loss = (importance * weight * losses).mean()

            trainer.nonfinite.track_nonfinite(n, losses[:, None])
            trainer.backward(loss)
            objective.record_losses(n, t, losses, trainer.accelerator)
            trainer.optimizer_step()
            trainer.log(loss=loss, **rates, **prior.loss_metrics(batch, losses))
        trainer.checkpoint_if_due()
        evaluate_if_due()

    trained = trainer.export_ema()
    model = replace(model, unet=trained.unet, text=trained.text or text, null=trained.null)
    write_sheet(config, trainer, model, data)
    trainer.close()
    on_main(partial(deliver, config, model))  # last: where it stands, the stage is finished


def normalized_encoder(config: Config, data: Index | Stream, text: AnyTextEncoder | None) -> AnyTextEncoder | None:
    """The text encoder, with `text.normalize` a copy whose states are normalised over captions of the data.

    Those of `NORMALIZED_OVER` images, evenly spread, or of all: a deviation is right to a few hundredths.
    """
    if not (text and config.text.normalize):
        return text
    assert isinstance(data, Index), "the configuration refuses a stream, whose captions are not known"
    some = np.linspace(0, len(data) - 1, min(len(data), NORMALIZED_OVER)).round().astype(np.int64)
    captions = itertools.chain.from_iterable(data.captions(some))
    return normalized(text, on_main(partial(statistics_of_run, config.run.dir, text, captions, data.fingerprint())))


def build_unet(config: Config, autoencoder: Autoencoder, text: AnyTextEncoder | None, classes: int) -> UNet:
    """The U-Net to train, of `stage2.init_from` or with random weights."""
    stage = config.stage2
    widths = (text.width, classes, text.pooled_width) if text else (0, classes)
    shape = (autoencoder.channels, config.data.size // autoencoder.factor, *widths)
    unet = load(stage, *shape) if stage.init_from else build(stage, *shape)
    if stage.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if stage.channels_last:
        unet.to(memory_format=torch.channels_last)
    return unet


def pipeline_of(
    config: Config,
    denoiser: Denoiser,
    autoencoder: Autoencoder,
    text: AnyTextEncoder | None,
    process: DiffusionProcess,
    classes: Sequence[str],
) -> LatentDiffusion:
    """The pipeline of the weights in training, which sample grids are drawn with and which is exported."""
    stage, sample = config.stage2, config.sample
    clip = autoencoder.factor == 1 and not stage.text  # diffusers' text-to-image pipelines switch it off when they load
    solver = scheduler(process, sample.solver, stage.variance == "learned", clip)
    return LatentDiffusion(
        text, denoiser.unet, autoencoder, solver, sample.steps, sample.guidance, denoiser.null, tuple(classes)
    )
