"""What would stop a run later and can be known now: checked before anything is trained."""

from __future__ import annotations

import math
import sys
from functools import partial

import torch
from accelerate.tracking import get_available_trackers

from ldm.config.schema import Config
from ldm.data import source_kinds
from ldm.data.sources import CONFIRMATION, Sources
from ldm.distributed import sharding
from ldm.distributed.launch import accumulated, on_main, precision
from ldm.models import attention, autoencoder, compilation, feature_networks, text_encoder, unet
from ldm.models.adapters.base_precision import QUANTISED, check_base_precision
from ldm.models.adapters.inject import AdapterSpec, check_targets
from ldm.models.adapters.token_embedding import check_token
from ldm.models.text_normalization import output_norm
from ldm.training.diffusion_process import diffusion_process
from ldm.training.optimizer import check_optimizer
from ldm.utils.errors import UserError


def check(config: Config, processes: int) -> text_encoder.AnyTextEncoder | None:
    """UserError for whatever would stop the run later and can be known now; returns the text encoder."""
    stage1, stage2 = config.stage1, config.stage2
    accumulated("stage2", stage2, processes)
    sharding.check(stage2, config.run.precision, processes)
    source_kinds.check(config.data.source, config.data.streaming, stage2.conditions)
    on_gpu = torch.cuda.is_available() and config.run.device != "cpu"
    _check_finetuning(config, on_gpu, processes)
    if config.run.precision == "fp16" and not on_gpu:
        raise UserError("run.precision: fp16 needs a GPU; take bf16, or no")
    if not stage1.needs_none:
        accumulated("stage1", stage1, processes)
        if stage1.init_from:
            check_autoencoder(config, "stage1.init_from", stage1.init_from)
        if stage1.lpips:
            feature_networks.lpips(stage1.lpips_net, config.data.shortest // (4 if stage1.equivariance else 1))
        if stage1.gan and stage1.gan.norm == "batch" and not on_gpu and processes > 1:
            raise UserError("stage1.gan.norm: batch norm over several processes needs GPUs; take group")
    if stage2.evaluate and stage2.evaluate.network != "latents":
        _check_feature_network(stage2.evaluate.network, stage2.evaluate.weights)
    for key, stage in (("stage1", stage1), ("stage2", stage2)):
        on_main(partial(check_optimizer, stage, key))
    tracker = config.run.tracker
    if tracker != "none" and tracker not in map(str, get_available_trackers()):
        raise UserError(f"run.tracker: {tracker} is not installed; pip install {tracker}, or take tensorboard, or none")
    attention.check_backend(stage2.attention_backend, on_gpu)
    if stage2.compile and stage2.attention_backend == "xformers" and precision(config.run) != "no":
        raise UserError(compilation.NO_XFORMERS)
    if stage1.pretrained:
        check_autoencoder(config, "stage1.pretrained", stage1.pretrained)
    encoder = text_encoder.of(config.text) if stage2.text else None
    if encoder and config.text.normalize:
        output_norm(encoder)
    if encoder and config.finetune.kind == "inversion":
        check_token(encoder, config.finetune.token, config.finetune.initializer, config.finetune.vectors)
    widths = (encoder.width, 0, encoder.pooled_width) if encoder else ()
    shape = (stage1.latent_channels, config.data.size // stage1.factor, *widths)
    if stage2.init_from:
        loaded = unet.load(stage2, *shape, extend=config.finetune.kind == "full")
        if config.finetune.adapter:
            encoders = encoder.models if encoder and config.finetune.text_encoder else []
            check_targets((loaded, *encoders), AdapterSpec.of(config.finetune))
        trained = on_main((config.run.dir / "autoencoder").exists)
        if not (stage1.needs_none or stage1.init_from or trained):
            raise UserError(
                f"stage2.init_from: {stage2.init_from} was trained in the latents of its own autoencoder, and stage "
                "one would train another; set stage1.pretrained, to the same where it is a whole pipeline or checkpoint"
            )
        on_main(lambda: _check_noise(config))
    else:
        unet.build_empty(stage2, *shape)
    return encoder


def _check_feature_network(name: str, weights: str | None) -> None:
    """UserError where the weights of `stage2.evaluate` are missing; the main process may fetch them."""

    def load() -> None:
        try:
            feature_networks.load(name, torch.device("cpu"), weights)
        except UserError as error:
            raise UserError(f"stage2.evaluate: {error}") from None

    on_main(load)


def _check_finetuning(config: Config, on_gpu: bool, processes: int) -> None:
    """UserError where a part of a model can't be trained on this machine."""
    finetune = config.finetune
    check_base_precision(finetune.base_precision, on_gpu)
    if (computed := precision(config.run)) != finetune.base_precision == "fp16":  # else no scale keeps gradients
        raise UserError(f"finetune.base_precision: fp16, but run.precision is {computed} here; set both to the same")
    if finetune.kind != "full" and processes > 1 and sharding.sharding_kind() == "deepspeed":
        raise UserError(f"finetune.kind: {finetune.kind} trains with DDP or FSDP here, not with DeepSpeed; take FSDP")
    if finetune.base_precision in QUANTISED and processes > 1 and sharding.sharding_kind() == "fsdp":
        raise UserError(f"finetune.base_precision: {finetune.base_precision} weights can't be sharded; take bf16")


def check_captions(config: Config, confirmation: str = CONFIRMATION) -> None:
    """UserError, naming the `confirmation`, where all images share a caption guessed from a folder's name."""
    data = config.data

    def check() -> None:  # it may have to walk the folder
        sources = Sources(data.source, data.size, config.cache_dir, config.stage2.conditions)
        if problem := sources.unconfirmed_caption(confirmation):
            raise UserError(problem)

    on_main(check)


def _check_noise(config: Config) -> None:
    """Warns where the noise schedule differs from the one that the U-Net to start from was trained with."""
    stage2, process = config.stage2, diffusion_process(config.stage2)
    pretrained = unet.scheduler_of(str(stage2.init_from))
    if pretrained is None or process.prediction_type == "flow":
        return
    alpha_bar = process.chain().alpha_bar.float()
    if len(alpha_bar) != len(pretrained.alphas_cumprod):
        differ = f"{len(alpha_bar)} steps, not {len(pretrained.alphas_cumprod)}"
    elif (off := float((alpha_bar.sqrt() - pretrained.alphas_cumprod.sqrt()).abs().max())) > 0.01:
        differ = f"√ᾱ up to {off:.2f} apart"
    else:
        return
    print(
        f"stage2.beta_schedule: {stage2.init_from} was trained with other noise levels ({differ}); "
        "is that intended? stage2.beta_schedule, .timesteps, .zero_snr and .shift decide them",
        file=sys.stderr,
        flush=True,
    )


def check_autoencoder(config: Config, key: str, name: str) -> None:
    """UserError where the autoencoder to load is not one as `stage1` describes it."""
    stage1, loaded = config.stage1, autoencoder.load(name, key)
    for key_name, configured, actual in (
        ("stage1.model", autoencoder.FAMILIES[stage1.family], type(loaded.vae).__name__),
        ("stage1.latent_channels", stage1.latent_channels, loaded.channels),
        ("stage1.channels (its factor)", stage1.factor, loaded.factor),
    ):
        if configured != actual:
            raise UserError(f"{key_name}: {configured}, but {name} has {actual}; set it to that")


def check_on_images(config: Config, pixels: torch.Tensor, device: torch.device) -> None:
    """UserError where a pretrained autoencoder expects pixels in [0, 1], or its output is not finite.

    `pixels` `(N, 3, H, W)` in [-1, 1]. Warns where it reconstructs them worse than a single colour would.
    """

    def error(rebuilt: torch.Tensor) -> float:
        return float((rebuilt.cpu() - pixels).square().mean())

    stage1 = config.stage1
    key, name = (
        ("stage1.pretrained", stage1.pretrained) if stage1.pretrained else ("stage1.init_from", stage1.init_from)
    )
    if not name or (stage1.init_from and stage1.train == "all"):
        return
    loaded = autoencoder.load(name, key).to(device)
    reconstructed = error(loaded.decode(loaded.encode(pixels)))
    from_0_to_1 = error(loaded.decode(loaded.encode(pixels / 2 + 0.5)) * 2 - 1)
    flat = error(pixels.mean((2, 3), keepdim=True).expand_as(pixels))
    message = f"{key}: {name} reconstructs images with a mean squared error of {reconstructed:.3g}"
    if not math.isfinite(reconstructed):
        raise UserError(f"{message}: its weights are broken; take another")
    if from_0_to_1 < min(reconstructed, flat) / 2:
        raise UserError(f"{message}, and {from_0_to_1:.3g} with pixels in [0, 1]: it was trained so; take another")
    if reconstructed > max(flat, 0.01):
        print(
            f"{message}, and a single colour would have {flat:.3g}; is it the right one?", file=sys.stderr, flush=True
        )
