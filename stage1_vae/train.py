"""Trains the autoencoder: pictures in, `RUN/autoencoder` out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ldm.config.schema import Config, Stage1Config
from ldm.data.dataset import sample_names, stage1_dataset
from ldm.data.index import Index
from ldm.data.sampler import SampleSpec
from ldm.data.stream import Stream
from ldm.distributed.launch import on_main
from ldm.models import autoencoder as autoencoders
from ldm.models import feature_networks
from ldm.models.autoencoder import Autoencoder
from ldm.training.trainer import Run
from ldm.utils.atomic_files import tensors_sha256
from ldm.utils.rng import normal
from stage1_vae import evaluation, losses
from stage1_vae.adversarial import AdversarialLoss, Metrics
from stage1_vae.alignment import Features
from stage1_vae.discriminator import PatchDiscriminator
from stage1_vae.model import Rebuilt, Reconstruction, draw_change, revive

STATISTICS = 16_384  # pictures, at most, that the latents' mean and deviation are measured on


def train(config: Config, data: Index | Stream) -> None:
    """Trains an autoencoder on the pictures of split `train` and saves it with its latent statistics."""
    stage, seed = config.stage1, config.run.seed
    train_set = data.select("train")
    spec = SampleSpec.of(config.data, stage.batch, seed)
    samples = stage1_dataset(train_set, spec)
    torch.manual_seed(seed)
    vae = start(stage, config.data.size)
    frozen = encoder_sha256(vae)
    features = Features(stage.align.model) if stage.align else None
    model = Reconstruction(vae, stage, features.width if features else 0)
    contract = {"data": train_set.fingerprint()}
    run = Run(config.run, stage, "stage1", model, contract, adversary(stage), sample_names(train_set, spec))
    reconstruction = Errors(stage, config.data.shortest, run.device)
    game = AdversarialLoss(stage.gan, stage.steps, seed, run)

    def evaluate_if_due() -> None:
        if run.due(stage.evaluate_every, last=True):
            evaluation.while_training(data, config, run, vae)

    if run.step:  # what a killed run still owes
        evaluate_if_due()
    for batch in run.batches(samples, config.data.workers):
        with run.accumulate():
            x, n, step = batch["pixels"].to(vae.dtype), batch["position"], run.step
            h, w = x.shape[2] // stage.factor, x.shape[3] // stage.factor
            eps = normal(seed, "stage1", n, (stage.latent_channels, h, w)).to(x)
            change = draw_change(stage.equivariance, seed, step, h, w)
            rebuilt: Rebuilt = run.model(x, eps, change)

            said: Metrics = {}  # every part of the loss by name, for the log
            error = reconstruction(rebuilt.pixels, change(x, stage.factor) if change else x, said)
            if stage.learn_variance:
                error = losses.likelihood(error, model.logvar)
                said["logvar"] = model.logvar
            loss = error + latent_losses(stage, step, rebuilt, said)
            if features and stage.align and rebuilt.projected is not None:
                said["align"] = losses.alignment_loss(rebuilt.mean, rebuilt.projected, features.to(x)(x, h, w))
                loss = loss + stage.align.weight * said["align"]
            plays = game.plays(step) and not change  # a picture that was shrunk gives itself away
            if plays:
                loss = loss + game.generator(rebuilt.pixels, error, model.last_layer, n, said)
            run.backward(loss)
            if plays:
                run.backward(game.discriminator(x, rebuilt.pixels, n, said))

            run.track_nonfinite(n, rebuilt.pixels)
            if rebuilt.chosen is not None:
                use_codes(config, run, model, rebuilt.chosen, rebuilt.mean, said)
            run.update(loss=loss, **said)
        evaluate_if_due()

    assert stage.train == "all" or encoder_sha256(vae) == frozen, "a frozen encoder has changed"
    finish(config, data, run, vae)


def start(stage: Stage1Config, size: int) -> Any:
    """The autoencoder to train: a new one, or that of `stage1.init_from`."""
    if stage.init_from:
        vae = autoencoders.load(stage.init_from, "stage1.init_from").vae.requires_grad_(True)
    else:
        vae = autoencoders.build(stage, size)
    if stage.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    return vae


def adversary(stage: Stage1Config) -> tuple[PatchDiscriminator, float] | None:
    """The discriminator and its learning rate, where there is one."""
    gan = stage.gan
    return (PatchDiscriminator(gan.channels, gan.layers, gan.norm), gan.lr) if gan else None


class Errors:
    """How far reconstructions are from pictures: the weighted sum of what `stage1` asks for."""

    def __init__(self, stage: Stage1Config, side: int, device: torch.device):
        self.weights = {
            name: getattr(stage, name)
            for name in ("l1", "l2", "charbonnier", "gradient", "lpips")
            if getattr(stage, name)
        }
        self.lpips: Any = feature_networks.lpips(stage.lpips_net, side, device).net if stage.lpips else None

    def __call__(self, rebuilt: torch.Tensor, real: torch.Tensor, said: Metrics) -> torch.Tensor:
        """`(N, 3, H, W)` each → scalar; its parts go into `said`."""
        measure: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
            "l1": F.l1_loss, "l2": F.mse_loss, "charbonnier": losses.charbonnier_loss,
            "gradient": losses.gradient_loss, "lpips": self._lpips,
        }  # fmt: skip
        found = {name: measure[name](rebuilt, real) for name in self.weights}
        said |= found
        return torch.stack([self.weights[name] * value for name, value in found.items()]).sum()

    def _lpips(self, rebuilt: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Zhang et al., arXiv 1801.03924, eq. 1; not through torchmetrics' metric, which lets no gradient pass."""
        distance: torch.Tensor = self.lpips(rebuilt, real, normalize=False).mean()
        return distance


def latent_losses(stage: Stage1Config, step: int, rebuilt: Rebuilt, said: Metrics) -> torch.Tensor:
    """What keeps latents in bounds: a KL autoencoder's KL, a VQ one's codebook loss; nothing of a frozen encoder."""
    if stage.train == "decoder":
        return rebuilt.mean.new_zeros(())
    if rebuilt.codes is not None:
        said["vq"] = losses.vq_loss(rebuilt.mean, rebuilt.codes, stage.beta)
        return stage.commitment * said["vq"]
    if stage.family == "kl":
        said["kl"] = losses.kl_loss(rebuilt.mean, rebuilt.logvar, stage.kl_free)
        return stage.kl * min(1.0, (step + 1) / max(1, stage.kl_warmup)) * said["kl"]
    return rebuilt.mean.new_zeros(())


def use_codes(
    config: Config, run: Run, model: Reconstruction, chosen: torch.Tensor, mean: torch.Tensor, said: Metrics
) -> None:
    """Counts the codes that all processes chose, and, every `stage1.revive` steps, revives those that none did."""
    stage = config.stage1
    model.used += run.total(torch.bincount(chosen, minlength=len(model.used)))
    shares = model.used / model.used.sum()
    said["codes_used"] = (model.used > 0).float().mean()
    said["code_perplexity"] = torch.special.entr(shares).sum().exp()  # as many codes, used alike, would say as much
    at_end = run.accelerator.sync_gradients and (run.step + 1) % (stage.revive or 1000) == 0
    if at_end and (stage.train == "decoder" or not stage.revive):
        model.used.zero_()
    elif at_end:
        everywhere = run.accelerator.gather(mean.detach())
        revived = revive(model, everywhere, config.run.seed, run.step, run.averages)
        said["codes_revived"] = mean.new_tensor(float(revived))


def finish(config: Config, data: Index | Stream, run: Run, vae: Any) -> None:
    """Normalises the averaged autoencoder's latents, measures it, and saves it."""
    train_set = data.select("train")
    some = train_set.some(STATISTICS)
    with run.averaged("the export"):
        trained = copy.deepcopy(vae)
    if config.stage1.train == "decoder":  # latents stay what they were
        mean = std = None
        autoencoder = Autoencoder(trained)
    else:
        mean, std = autoencoders.channel_statistics(
            trained, evaluation.share(some, run, config.data.workers), run.total
        )
        autoencoder = autoencoders.normalize_latents(trained, mean, std)
    latents = evaluation.latent_report(some, autoencoder, run, config.data.workers)
    facts = evaluation.when_done(data, config, autoencoder, run)
    run.close()
    on_main(
        lambda: autoencoder.save(
            config.run.dir / "autoencoder",
            steps=run.step, **{"shards" if isinstance(data, Stream) else "pictures": len(train_set)}, **facts,
            raw_mean=None if mean is None else mean.tolist(), raw_std=None if std is None else std.tolist(),
            latents=latents,
        )
    )  # fmt: skip


def encoder_sha256(vae: Any) -> str:
    return tensors_sha256(autoencoders.encoder_tensors(vae))
