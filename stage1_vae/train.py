"""Trains the autoencoder: images in, `RUN/autoencoder` out."""

from __future__ import annotations

import copy
from typing import Any

import torch

from ldm.config.schema import Config, Stage1Config
from ldm.data.dataset import sample_names, stage1_dataset
from ldm.data.draws import LatentNoise, with_draws
from ldm.data.index import Index
from ldm.data.sampler import SampleSpec
from ldm.data.stream import Stream
from ldm.distributed.launch import on_main
from ldm.models import autoencoder as autoencoders
from ldm.models.autoencoder import Autoencoder
from ldm.training.trainer import Trainer
from ldm.utils.atomic_files import tensors_sha256
from stage1_vae import evaluation
from stage1_vae.adversarial import AdversarialLoss
from stage1_vae.alignment import Features
from stage1_vae.discriminator import PatchDiscriminator
from stage1_vae.losses import Logs
from stage1_vae.model import Rebuilt, Reconstruction, draw_transform, revive
from stage1_vae.objective import Objective

STATISTICS_IMAGES = 16_384  # at most, for the latents' mean and standard deviation


def train(config: Config, data: Index | Stream) -> None:
    """Trains an autoencoder on the images of split `train` and saves it with its latent statistics."""
    stage, seed = config.stage1, config.run.seed
    train_set = data.select("train")
    spec = SampleSpec.of(config.data, stage.batch, seed)
    noise = LatentNoise("noise", seed, "stage1", stage.latent_channels, stage.factor)
    samples = with_draws(stage1_dataset(train_set, spec), noise)
    torch.manual_seed(seed)  # before the first weight is drawn; nothing later draws from torch's generator
    vae = start(stage, config.data.size)
    frozen = encoder_sha256(vae)
    features = Features(stage.align.model) if stage.align else None
    model = Reconstruction(vae, stage, features.width if features else 0)
    trainer = Trainer(
        config.run,
        stage,
        "stage1",
        model,
        {"data": train_set.fingerprint()},
        discriminator(stage),
        sample_names(train_set, spec),
    )
    objective = Objective(stage, model, features, config.data.shortest, trainer.device)
    adversarial = AdversarialLoss(stage.gan, stage.steps, seed, trainer)

    def evaluate_if_due() -> None:
        if trainer.due(stage.evaluate_every, last=True):
            evaluation.while_training(data, config, trainer, vae)

    if trainer.step:  # what a killed run did not finish
        evaluate_if_due()
    for batch in trainer.batches(samples, config.data.workers, config.data.prefetch_factor):
        with trainer.accumulate():
            x, n, step = batch["pixels"].to(vae.dtype), batch["position"], trainer.step
            h, w = x.shape[2] // stage.factor, x.shape[3] // stage.factor
            eps = batch["noise"].to(x.dtype)
            transform = draw_transform(stage.equivariance, seed, step, h, w)
            rebuilt: Rebuilt = trainer.model(x, eps, transform)

            error, logs = objective.reconstruction(rebuilt.pixels, transform(x, stage.factor) if transform else x)
            loss, latent_logs = objective.add_latent_losses(error, rebuilt, x, step)
            is_adversarial = adversarial.active(step) and not transform  # a shrunk image would give itself away
            if is_adversarial:
                generator_loss, generator_logs = adversarial.generator(rebuilt.pixels, error, model.last_layer, n)
                loss, logs = loss + generator_loss, logs | generator_logs
            trainer.backward(loss)
            if is_adversarial:
                discriminator_loss, discriminator_logs = adversarial.discriminator(x, rebuilt.pixels, n)
                trainer.backward(discriminator_loss)
                logs |= discriminator_logs

            trainer.nonfinite.track_nonfinite(n, rebuilt.pixels)
            code_logs = update_codes(config, trainer, model, rebuilt)  # before the step: it counts from the same number
            trainer.optimizer_step()
            trainer.log(loss=loss, **logs, **latent_logs, **code_logs)
        trainer.checkpoint_if_due()
        evaluate_if_due()

    assert stage.train == "all" or encoder_sha256(vae) == frozen, "a frozen encoder has changed"
    finish(config, data, trainer, vae)


def start(stage: Stage1Config, size: int) -> Any:
    """The autoencoder to train: a new one, or that of `stage1.init_from`."""
    if stage.init_from:
        vae = autoencoders.load(stage.init_from, "stage1.init_from").vae.requires_grad_(True)
    else:
        vae = autoencoders.build(stage, size)
    if stage.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    return vae


def discriminator(stage: Stage1Config) -> tuple[PatchDiscriminator, float] | None:
    """The discriminator and its learning rate, where `stage1.gan` asks for one."""
    gan = stage.gan
    return (PatchDiscriminator(gan.channels, gan.layers, gan.norm), gan.lr) if gan else None


def update_codes(config: Config, trainer: Trainer, model: Reconstruction, rebuilt: Rebuilt) -> Logs:
    """Counts the codes that all processes chose, and, every `stage1.revive` steps, revives those that none did."""
    if rebuilt.chosen is None:  # no VQ model
        return {}
    stage, step = config.stage1, trainer.step
    model.used += trainer.sum(torch.bincount(rebuilt.chosen, minlength=len(model.used)))
    shares = model.used / model.used.sum()
    logs = {
        "codes_used": (model.used > 0).float().mean(),
        "code_perplexity": torch.special.entr(shares).sum().exp(),  # as many codes, used alike, have this entropy
    }
    at_end = trainer.accelerator.sync_gradients and (step + 1) % (stage.revive or 1000) == 0
    if at_end and (stage.train == "decoder" or not stage.revive):
        model.used.zero_()
    elif at_end:
        mean = trainer.accelerator.gather(rebuilt.mean.detach())
        revived = revive(model, mean, config.run.seed, step, trainer.ema.of)
        logs["codes_revived"] = mean.new_tensor(float(revived))
    return logs


def finish(config: Config, data: Index | Stream, trainer: Trainer, vae: Any) -> None:
    """Normalises the latents of the averaged autoencoder, evaluates and saves it."""
    train_set = data.select("train")
    some = train_set.subset(STATISTICS_IMAGES)
    with trainer.ema_weights("the export"):
        trained = copy.deepcopy(vae)
    if config.stage1.train == "decoder":  # latents stay the same
        mean = std = None
        autoencoder = Autoencoder(trained)
    else:
        mean, std = autoencoders.channel_statistics(
            trained, evaluation.share(some, trainer, config.data.workers), trainer.sum
        )
        autoencoder = autoencoders.normalize_latents(trained, mean, std)
    latents = evaluation.latent_report(some, autoencoder, trainer, config.data.workers)
    facts = evaluation.when_done(data, config, autoencoder, trainer)
    trainer.close()
    on_main(
        lambda: autoencoder.save(
            config.run.dir / "autoencoder",
            steps=trainer.step,
            **{"shards" if isinstance(data, Stream) else "images": len(train_set)},
            **facts,
            raw_mean=None if mean is None else mean.tolist(),
            raw_std=None if std is None else std.tolist(),
            latents=latents,
        )
    )


def encoder_sha256(vae: Any) -> str:
    return tensors_sha256(autoencoders.encoder_tensors(vae))
