"""Rules between keys of the configuration. Each is a function that raises ValueError with keys, values and a fix.

Creating a section checks the rules of the section; creating a `Config` checks `CONFIG`.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import ImageColor

if TYPE_CHECKING:
    from ldm.config.schema import (
        BudgetConfig,
        ClassifierConfig,
        Config,
        DistillConfig,
        EvaluateConfig,
        FinetuneConfig,
        Stage1Config,
        Stage2Config,
        Training,
    )

Checked = TypeVar("Checked")

TRACKERS = (
    "aim",
    "clearml",
    "comet_ml",
    "dvclive",
    "mlflow",
    "swanlab",
    "tensorboard",
    "trackio",
    "wandb",
)  # accelerate's, which imports torch
FIGURES = ("fid", "sfid", "kid", "is", "precision", "recall", "density", "coverage", "cmmd", "clip_score")
FEATURE_NETWORKS = ("efficientnet-lite0", "inception", "clip", "dinov2", "latents")
FIGURES_OF_NETWORKS = {  # figures that not every network's features give
    "is": ("efficientnet-lite0", "inception"),
    "sfid": ("efficientnet-lite0", "inception"),
    "cmmd": ("clip",),
    "clip_score": ("clip",),
}
LEAST_IMAGES = 10  # that a figure is of: fewer tell nothing
FLOW_SOLVERS = ("euler", "dpm++", "dpm++sde", "unipc")  # solvers that diffusers' pipelines can run on a flow


def check(section: Checked, rules: Iterable[Callable[[Any], None]]) -> Checked:
    """Applies the rules to a section and returns it."""
    for rule in rules:
        rule(section)
    return section


def divides(key: str, value: int, divisor: int, reason: str) -> None:
    """ValueError, with the nearest multiple, where `divisor` does not divide `value`."""
    if value % divisor:
        nearest = max(1, round(value / divisor)) * divisor
        raise ValueError(f"{key}: {value} is not a multiple of {divisor} ({reason}); {nearest} would be")


def _is_set(section: FinetuneConfig | Stage1Config, key: str) -> bool:
    """Whether a key is not its default. A run's config.yaml names all keys."""
    return bool(getattr(section, key) != type(section).model_fields[key].get_default(call_default_factory=True))


# ------------------------------------------------------------------------------------------------------ every training


def learning_rate_suits_prodigy(training: Training) -> None:
    if training.optimizer == "prodigy" and not 0.1 <= training.lr <= 10:
        raise ValueError(
            f"lr: {training.lr}; prodigy finds its step size and multiplies it by lr, so 1 is usual; set it"
        )


def schedule_free_has_no_schedule(training: Training) -> None:
    if training.optimizer != "schedulefree":
        return
    if training.lr_scheduler != "constant":
        raise ValueError(
            f"lr_scheduler: {training.lr_scheduler}, which schedulefree replaces; set it to constant (warm-up stays)"
        )
    if training.ema_widths:
        raise ValueError("ema_widths: schedulefree averages the weights itself; set it to []")
    if not training.betas[0]:
        raise ValueError("betas: the first is 0, by which schedulefree would divide; 0.9 is usual")


TRAINING = (learning_rate_suits_prodigy, schedule_free_has_no_schedule)


# ---------------------------------------------------------------------------------------------------------- stage one


def reconstruction_is_learned(stage1: Stage1Config) -> None:
    if not stage1.l1 + stage1.l2 + stage1.charbonnier + stage1.gradient + stage1.lpips:
        raise ValueError("l1, l2, charbonnier, gradient and lpips are all 0; nothing would be learned, set one of them")


def decoder_training_has_an_encoder(stage1: Stage1Config) -> None:
    if stage1.train == "decoder" and not stage1.init_from:
        raise ValueError("train: decoder needs init_from, the autoencoder whose encoder stays")


def pretrained_or_init_from(stage1: Stage1Config) -> None:
    if stage1.pretrained and stage1.init_from:
        raise ValueError("pretrained is loaded and not trained, init_from is trained; set one of them")


def checkpointing_suits_autoencoder(stage1: Stage1Config) -> None:
    if stage1.gradient_checkpointing and stage1.family != "kl":
        raise ValueError(
            f"gradient_checkpointing: diffusers has none that is sound for {stage1.model}; set it to false"
        )


def channels_suit_autoencoder(stage1: Stage1Config) -> None:
    if stage1.family == "tiny" and len(set(stage1.channels)) > 1:
        raise ValueError(f"channels: {list(stage1.channels)}; AutoencoderTiny has the same width at every level")
    if stage1.family == "identity" and (stage1.factor, stage1.latent_channels) != (1, 3):
        raise ValueError("channels, latent_channels: identity has one level and 3 channels; leave them out")
    if stage1.family in ("kl", "vq"):
        for width in stage1.channels:
            divides("channels", width, stage1.norm_num_groups, "norm_num_groups")


def channels_suit_dc(stage1: Stage1Config) -> None:
    """The shortcuts of AutoencoderDC average and repeat channels, and its attention has heads of 32."""
    if stage1.family != "dc":
        return
    levels = len(stage1.channels)
    if len(stage1.decoder_channels) not in (0, levels):
        raise ValueError(f"decoder_channels: {list(stage1.decoder_channels)}; give {levels} widths, one for a level")
    for key, widths in (("channels", stage1.channels), ("decoder_channels", stage1.decoder_channels)):
        for above, width in itertools.pairwise(widths):
            if 4 * above % width:
                raise ValueError(f"{key}: {width} after {above}; the shortcut needs a divisor of {4 * above}")
        for width in widths[(levels + 1) // 2 :] if stage1.mid_attention else ():
            divides(key, width, 32, "size of a head")
        for width in widths[-1:]:
            divides(key, width, stage1.latent_channels, "latent_channels")
    for width in stage1.channels[1:]:
        divides("channels", width, 4, "pixels that become channels")


def decoder_keys_suit_autoencoder(stage1: Stage1Config) -> None:
    for key in ("decoder_channels", "decoder_layers"):
        if stage1.family != "dc" and getattr(stage1, key):
            raise ValueError(f"{key}: is of dc, and model is {stage1.model}; leave it out")


def kl_loss_has_a_posterior(stage1: Stage1Config) -> None:
    for key in ("kl", "kl_free", "kl_warmup"):
        if stage1.family == "dc" and _is_set(stage1, key) and getattr(stage1, key):
            raise ValueError(f"{key}: {stage1.model} has no posterior, its latents are exact; leave it out")


def alignment_trains_the_encoder(stage1: Stage1Config) -> None:
    if stage1.align and stage1.train == "decoder":
        raise ValueError("align: draws the latents of an encoder that train: decoder leaves as it is; drop one")


def discriminator_is_used(stage1: Stage1Config) -> None:
    if not (gan := stage1.gan):
        return
    start = int(gan.start * stage1.steps) if gan.start < 1 else int(gan.start)
    if start + gan.warmup >= stage1.steps:
        raise ValueError(
            f"gan: begins at step {start} and is warmed up for {gan.warmup}, so in {stage1.steps} steps the "
            "autoencoder would never be trained with it; lower gan.start or gan.warmup"
        )
    if stage1.equivariance == 1:
        raise ValueError("equivariance: 1 leaves no step to the discriminator, which sees whole images; lower it")
    if gan.norm == "batch" and gan.r1:
        raise ValueError("gan.r1: batch norm over processes has no second derivative; gan.norm=group has")
    if stage1.optimizer == "prodigy" and not 0.1 <= gan.lr <= 10:
        raise ValueError(f"gan.lr: {gan.lr}; the discriminator has stage1.optimizer too, and prodigy's lr is usually 1")


STAGE1 = (
    reconstruction_is_learned,
    decoder_training_has_an_encoder,
    pretrained_or_init_from,
    checkpointing_suits_autoencoder,
    channels_suit_autoencoder,
    channels_suit_dc,
    decoder_keys_suit_autoencoder,
    kl_loss_has_a_posterior,
    alignment_trains_the_encoder,
    discriminator_is_used,
)


# ---------------------------------------------------------------------------------------------------------- stage two


def conditions_go_together(stage2: Stage2Config) -> None:
    if {"inpaint", "upscale"} <= set(stage2.conditions):
        raise ValueError("conditions: a model has one task; give inpaint or upscale")
    if "upscale" in stage2.conditions and stage2.classes:
        raise ValueError("conditions: upscale passes its noise level as the class label; drop class")
    for key in stage2.conditions:
        if key in ("size", "inpaint", "upscale") and not stage2.text:
            raise ValueError(f"conditions: {key} needs text; give [text, {key}]")


def text_keys_need_text(stage2: Stage2Config) -> None:
    for key, is_set in (
        ("pooled_text", stage2.pooled_text),
        ("uncond_embedding", stage2.uncond_embedding == "learned"),
    ):
        if is_set and not stage2.text:
            raise ValueError(f"{key}: there is no text in conditions, {list(stage2.conditions)}; leave it out")


def chain_keys_exclude_flow(stage2: Stage2Config) -> None:
    if stage2.prediction_type != "flow":
        return
    for key, is_set in (
        ("zero_snr", stage2.zero_snr),
        ("variance", stage2.variance == "learned"),
        ("timestep_sampling", stage2.timestep_sampling == "loss"),
        ("beta_schedule", stage2.beta_schedule == "learned"),
    ):
        if is_set:
            value = getattr(stage2, key)
            raise ValueError(f"{key}: {value!r} is for discrete timesteps, which flow has none of; leave it out")
    if stage2.timesteps != 1000:  # samplers round model times to integers
        raise ValueError(f"timesteps: {stage2.timesteps}; flow passes its time in thousandths, leave it out")


def sampling_by_loss_has_a_plain_loss(stage2: Stage2Config) -> None:
    if stage2.loss_weighting == "learned" and stage2.timestep_sampling == "loss":
        raise ValueError(
            "timestep_sampling: loss has little effect where loss_weighting is learned, which makes all alike; drop one"
        )


def zero_snr_predicts_more_than_eps(stage2: Stage2Config) -> None:
    if stage2.zero_snr and stage2.prediction_type == "eps":
        raise ValueError("zero_snr: eps can't be learned at pure noise; set prediction_type to v or x0")


def learned_variance_has_a_plain_loss(stage2: Stage2Config) -> None:
    if stage2.variance == "learned" and (stage2.loss, stage2.loss_weighting) != ("l2", "uniform"):
        raise ValueError("variance: learned has its own weighting; set loss to l2 and loss_weighting to uniform")


def learned_schedule_has_a_plain_loss(stage2: Stage2Config) -> None:
    if stage2.beta_schedule != "learned":
        return
    for key, plain in (
        ("prediction_type", "eps"),
        ("loss", "l2"),
        ("loss_weighting", "uniform"),
        ("timestep_sampling", "auto"),
        ("variance", "fixed"),
        ("zero_snr", False),
        ("shift", 1.0),
        ("noise_offset", 0.0),
        ("input_perturbation", 0.0),
    ):
        if getattr(stage2, key) != plain:
            raise ValueError(
                f"beta_schedule: learned minimises the bound's variance, which is defined with {key}={plain}; "
                f"not {getattr(stage2, key)!r}"
            )


def gamma_has_its_weighting(stage2: Stage2Config) -> None:
    if stage2.weight_gamma and stage2.loss_weighting not in ("min_snr", "soft_min_snr", "p2"):
        raise ValueError(f"weight_gamma: loss_weighting {stage2.loss_weighting!r} has no γ; leave it out")


def chain_is_long_enough(stage2: Stage2Config) -> None:
    for key, is_set in (
        ("loss_weighting 'sigmoid'", stage2.loss_weighting == "sigmoid"),
        ("zero_snr", stage2.zero_snr),
    ):
        if is_set and stage2.timesteps < 2:
            raise ValueError(f"timesteps: {key} needs 2 at least")


STAGE2 = (
    conditions_go_together,
    text_keys_need_text,
    chain_keys_exclude_flow,
    sampling_by_loss_has_a_plain_loss,
    zero_snr_predicts_more_than_eps,
    learned_variance_has_a_plain_loss,
    learned_schedule_has_a_plain_loss,
    gamma_has_its_weighting,
    chain_is_long_enough,
)


# ---------------------------------------------------------------------------------------- figures of generated images


def check_figures(metrics: Sequence[str], network: str, images: int, keys: tuple[str, str, str]) -> None:
    """ValueError where a network's features of so many images can't give a figure.

    `keys` are the names of metrics, network and images, as the user knows them.
    """
    for metric in metrics:
        if metric not in FIGURES:
            close = difflib.get_close_matches(metric, FIGURES, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(f"{keys[0]}: {metric!r} is not known; {hint}known are {', '.join(FIGURES)}")
        able = FIGURES_OF_NETWORKS.get(metric, FEATURE_NETWORKS)
        if network not in able:
            raise ValueError(
                f"{keys[0]}: {metric} is not of {network}'s features; leave it out, or set {keys[1]} to "
                f"{' or '.join(able)}"
            )
    if len(set(metrics)) < len(metrics):
        raise ValueError(f"{keys[0]}: an entry is listed twice; name each once")
    if images < LEAST_IMAGES:
        raise ValueError(f"{keys[2]}: {images} are too few for {metrics[0]}; give {LEAST_IMAGES} or more")


def figures_can_be_measured(evaluate: EvaluateConfig) -> None:
    check_figures(evaluate.metrics, evaluate.network, evaluate.images, ("metrics", "network", "images"))


def latents_have_no_weights(evaluate: EvaluateConfig) -> None:
    if evaluate.weights and evaluate.network == "latents":
        raise ValueError("weights: latents are those of the run's autoencoder; leave it out")


EVALUATE = (figures_can_be_measured, latents_have_no_weights)


# --------------------------------------------------------------------------------------------------------- fine-tuning


def adapter_keys_need_an_adapter(finetune: FinetuneConfig) -> None:
    if finetune.adapter:
        return
    for key in ("rank", "alpha", "dropout", "targets", "rank_pattern", "text_encoder", "merge"):
        if _is_set(finetune, key):
            raise ValueError(f"{key}: is of lora, dora, lokr and loha, and kind is {finetune.kind}; leave it out")
    if finetune.base_precision != "no" and finetune.kind == "full":
        raise ValueError(f"base_precision: {finetune.base_precision}, but kind full freezes no weights; leave it out")


def quantised_weights_suit_the_adapter(finetune: FinetuneConfig) -> None:
    if finetune.base_precision not in ("8bit", "4bit"):
        return
    if finetune.kind not in ("lora", "inversion"):  # DoRA's magnitudes need the weights, before they are on a GPU
        raise ValueError(f"base_precision: {finetune.base_precision} suits lora and inversion; take bf16")
    if finetune.merge:
        raise ValueError(
            f"merge: {finetune.base_precision} weights would lose precision; leave it out, and merge the adapter into "
            "the model itself with scripts/merge.py"
        )


def rank_patterns_are_regular_expressions(finetune: FinetuneConfig) -> None:
    for pattern in finetune.rank_pattern:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"rank_pattern: {pattern!r} is no regular expression ({error})") from None


def dropout_is_of_lora(finetune: FinetuneConfig) -> None:
    if finetune.dropout and finetune.kind not in ("lora", "dora"):
        raise ValueError(f"dropout: is of lora and dora, and kind is {finetune.kind}; leave it out")


def inversion_has_a_token(finetune: FinetuneConfig) -> None:
    if finetune.kind == "inversion":
        if not finetune.token or len(finetune.token.split()) != 1:
            raise ValueError(f"token: {finetune.token!r}; give the new word that captions contain, such as <cat-toy>")
        if not finetune.initializer.strip():
            raise ValueError("initializer: give words that the new one starts from, such as toy")
        return
    for key in ("token", "initializer", "vectors"):
        if _is_set(finetune, key):
            raise ValueError(f"{key}: is of inversion, and kind is {finetune.kind}; leave it out")


def prior_keys_need_a_prior_weight(finetune: FinetuneConfig) -> None:
    for key in ("class_prompt", "class_images", "num_class_images"):
        if _is_set(finetune, key) and finetune.prior_weight is None:
            raise ValueError(f"{key}: is of prior preservation; set prior_weight, 1 is usual, or leave it out")
    if finetune.class_images and not finetune.class_prompt.strip():
        raise ValueError("class_prompt: missing; class_images need their caption, such as 'a photo of a dog'")
    if _is_set(finetune, "num_class_images") and not finetune.class_prompt.strip():
        raise ValueError("class_prompt: missing; images are drawn with it, such as 'a photo of a dog'")
    if finetune.class_images and _is_set(finetune, "num_class_images"):
        raise ValueError("num_class_images: counts images that are drawn, and class_images are given; leave it out")


FINETUNE = (
    adapter_keys_need_an_adapter,
    quantised_weights_suit_the_adapter,
    rank_patterns_are_regular_expressions,
    dropout_is_of_lora,
    inversion_has_a_token,
    prior_keys_need_a_prior_weight,
)


# ---------------------------------------------------------------------------------------- distillation and classifier


def guidance_range_is_not_empty(distill: DistillConfig) -> None:
    if distill.guidance_to is not None and distill.guidance_to <= distill.guidance_from:
        raise ValueError(f"guidance_to: {distill.guidance_to} is not more than guidance_from, {distill.guidance_from}")


def classifier_levels_fit(classifier: ClassifierConfig) -> None:
    if len(classifier.attention) != len(classifier.channels):
        raise ValueError(
            f"attention: {len(classifier.attention)} values for {len(classifier.channels)} levels of channels; "
            "give one a level"
        )
    last = len(classifier.channels) - 1
    for level, (width, attends) in enumerate(zip(classifier.channels, classifier.attention, strict=True)):
        divides("channels", width, classifier.norm_num_groups, "norm_num_groups")
        if attends or level == last:
            divides("channels", width, classifier.attention_head_dim, "attention_head_dim")


def distillation_needs_its_own_average(distill: DistillConfig) -> None:
    if distill.optimizer == "schedulefree":
        raise ValueError("optimizer: schedulefree, but distillation's targets are averages by ema_decay; use another")


DISTILLATION = (guidance_range_is_not_empty, distillation_needs_its_own_average)
CLASSIFIER = (classifier_levels_fit,)


# -------------------------------------------------------------------------------------------------- the configuration


def size_is_whole_latents(config: Config) -> None:
    divides(
        "data.size",
        config.data.size,
        config.stage1.factor,
        f"2 per level after the first of stage1.channels, {config.stage1.channels}",
    )


def tracker_is_known(config: Config) -> None:
    tracker = config.run.tracker
    if tracker not in (*TRACKERS, "none"):
        close = difflib.get_close_matches(tracker, TRACKERS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"one of {', '.join(TRACKERS)}, none"
        raise ValueError(f"run.tracker: {tracker!r} is not known to accelerate; {hint}")


def background_is_a_colour(config: Config) -> None:
    try:
        ImageColor.getrgb(config.data.background)
    except ValueError:
        raise ValueError(f"data.background: {config.data.background!r} is no colour; white, or #ffffff") from None


def sources_go_together(config: Config) -> None:
    for source in config.data.source:
        if "{}" not in source.template:
            raise ValueError(f"data.source.template: {source.template!r} has no {{}}, where the class's name goes")
    weighted = [source.weight is not None for source in config.data.source]
    if any(weighted) and not all(weighted):
        raise ValueError("data.source: some have a weight and some have none; give all of them one, or none")


def buckets_hold_whole_latents(config: Config) -> None:
    data = config.data
    if not (buckets := data.buckets):
        return
    divides("data.buckets.step", buckets.step, config.stage1.factor, "2 per level after the first of stage1.channels")
    low, high = data.shortest, buckets.largest or data.size * 2
    if not buckets.step <= low <= data.size <= high:
        raise ValueError(
            f"data.buckets: step {buckets.step}, smallest {low}, data.size {data.size}, largest {high}; "
            "each must be no more than the next"
        )


def streaming_needs_no_index(config: Config) -> None:
    data = config.data
    defaults = {name: field.default for name, field in type(data).model_fields.items()}
    if not data.streaming:
        if data.stream_lanes != defaults["stream_lanes"]:
            raise ValueError("data.stream_lanes: is of data.streaming; set that to true, or leave it out")
        return
    if data.buckets or data.cache != "none":
        raise ValueError(
            "data.streaming: sizes aren't known beforehand; it needs data.buckets=null and data.cache=none"
        )
    if data.val_fraction:
        raise ValueError("data.val_fraction: with data.streaming nothing is held out; set it to 0")
    if any(source.mask for source in data.source):
        raise ValueError("data.source.mask: a stream's masks aren't read; set data.streaming=false, or leave it out")
    if any(source.repeats > 1 or source.weight or source.limit for source in data.source):
        raise ValueError("data.source: repeats, weight and limit have no meaning with data.streaming; leave them out")
    if data.prefetch_factor != defaults["prefetch_factor"]:
        raise ValueError("data.prefetch_factor: is of indexed data; with data.streaming leave it out")


def figures_suit_model_and_data(config: Config) -> None:
    stage2, evaluate = config.stage2, config.stage2.evaluate
    if not evaluate:
        return
    if config.data.streaming:
        raise ValueError("stage2.evaluate: generated images are compared with an index; set data.streaming=false")
    if stage2.image:
        raise ValueError(
            f"stage2.evaluate: is of models that generate whole images, not of {stage2.conditions[-1]}; set it to null"
        )
    if "clip_score" in evaluate.metrics and not stage2.text:
        raise ValueError("stage2.evaluate.metrics: clip_score needs prompts, and stage2.conditions have no text")
    guided = stage2.text or stage2.classes
    if evaluate.guidance not in (None, 1.0) and not guided:
        raise ValueError("stage2.evaluate.guidance: a model without conditions has none; leave it out")
    if evaluate.steps and evaluate.steps > stage2.timesteps and stage2.prediction_type != "flow":
        raise ValueError(
            f"stage2.evaluate.steps: {evaluate.steps}, but stage2.timesteps are {stage2.timesteps}; lower it"
        )


def unmasked_weight_has_masks(config: Config) -> None:
    masks = (source.mask or source.kind == "kohya" or source.path.endswith(".toml") for source in config.data.source)
    if "unmasked_weight" in config.stage2.model_fields_set and config.stage2.unmasked_weight and not any(masks):
        raise ValueError("stage2.unmasked_weight: no source has masks; set data.source.mask, or leave it out")


def unet_levels_fit(config: Config) -> None:
    stage2 = config.stage2
    for width in stage2.channels:
        divides("stage2.channels", width, stage2.norm_num_groups, "stage2.norm_num_groups")
    if len(stage2.attention) != len(stage2.channels):
        raise ValueError(
            f"stage2.attention: {len(stage2.attention)} values for {len(stage2.channels)} levels of stage2.channels; "
            "give one a level"
        )
    if len(stage2.transformer_layers) not in (0, len(stage2.channels)):
        raise ValueError(
            f"stage2.transformer_layers: {len(stage2.transformer_layers)} values for {len(stage2.channels)} levels of "
            "stage2.channels; give one a level"
        )
    if not stage2.text and (stage2.transformer_layers or stage2.linear_projection):
        raise ValueError(
            "stage2.transformer_layers, stage2.linear_projection: have no effect without text among stage2.conditions; "
            "leave them out"
        )
    for width, attends in zip(stage2.channels, stage2.attention, strict=True):
        if attends:
            divides("stage2.channels", width, stage2.attention_head_dim, "stage2.attention_head_dim")


def images_are_large_enough(config: Config) -> None:
    stage1, shortest = config.stage1, config.data.shortest
    if stage1.equivariance and shortest < 32:
        raise ValueError(f"stage1.equivariance: shrinks images to a quarter of {shortest} px; they need 32")
    if stage1.gan and shortest < (least := 3 * 2**stage1.gan.layers):
        raise ValueError(
            f"stage1.gan.layers: {stage1.gan.layers} need sides of {least} px, and the shortest has {shortest}; "
            "fewer layers, or larger images"
        )


def solver_uses_learned_variance(config: Config) -> None:
    if config.stage2.variance == "learned" and config.sample.solver != "ddpm":
        raise ValueError(f"sample.solver: {config.sample.solver!r} makes no use of stage2.variance 'learned'; use ddpm")


def sampling_has_no_more_steps_than_the_chain(config: Config) -> None:
    steps, timesteps = config.sample.steps, config.stage2.timesteps
    if steps > timesteps and config.stage2.prediction_type != "flow":
        raise ValueError(f"sample.steps: {steps}, but stage2.timesteps are {timesteps}; lower it")


def solver_can_be_exported_for_pixels(config: Config) -> None:
    if config.stage2.conditions or config.stage1.family != "identity":
        return
    known = ("euler", "dpm++") if config.stage2.prediction_type == "flow" else ("ddpm", "ddim", "dpm++")
    if config.sample.solver not in known:
        raise ValueError(
            f"sample.solver: {config.sample.solver!r} can't be exported for pixels without conditions, whose "
            f"pipeline in diffusers runs {', '.join(known)}; take one of these"
        )


def conditions_suit_data_and_autoencoder(config: Config) -> None:
    stage1, stage2, data = config.stage1, config.stage2, config.data
    if "upscale" in stage2.conditions and stage1.family != "kl":
        raise ValueError(
            f"stage2.conditions: upscale needs an AutoencoderKL, and stage1.model is {stage1.model!r}: diffusers' "
            "pipeline would change the scale of another"
        )
    if stage2.sizes and data.streaming:
        raise ValueError("stage2.conditions: size needs data.streaming=false, where sizes are known")
    if stage2.image and (data.streaming or data.buckets):
        raise ValueError("stage2.conditions: inpaint and upscale need data.streaming=false and data.buckets=null")
    if "upscale" in stage2.conditions and stage1.factor < 2:
        raise ValueError("stage1.channels: upscale enlarges by the autoencoder's factor, which is 1; more levels")
    if stage2.classes and data.streaming:
        raise ValueError("stage2.conditions: a stream's classes aren't known beforehand; set data.streaming=false")


def trained_text_encoder_has_text(config: Config) -> None:
    if config.text.train and not config.stage2.text:
        raise ValueError("text.train: there is no text in stage2.conditions; leave it out")


def solver_suits_prediction(config: Config) -> None:
    solver, prediction_type = config.sample.solver, config.stage2.prediction_type
    if prediction_type == "flow" and solver not in FLOW_SOLVERS:
        raise ValueError(
            f"sample.solver: {solver!r} can't be saved with stage2.prediction_type 'flow'; use "
            f"{', '.join(FLOW_SOLVERS)}, and another one when you sample"
        )
    if prediction_type == "x0" and solver == "euler_a":
        raise ValueError("sample.solver: 'euler_a' of diffusers does not know stage2.prediction_type 'x0'; use another")


def prompts_are_not_empty(config: Config) -> None:
    for prompt in config.sample.prompts if config.stage2.text else ():
        if not prompt.strip():
            raise ValueError("sample.prompts: an empty prompt; write what the image shows")


def finetuning_has_a_model(config: Config) -> None:
    finetune = config.finetune
    if finetune.kind != "full" and not config.stage2.init_from:
        raise ValueError(f"stage2.init_from: finetune.kind {finetune.kind} changes a model; name it")
    if finetune.kind == "inversion" and not config.stage2.text:
        raise ValueError("finetune.kind: inversion learns a word, and stage2.conditions have no text")
    if finetune.text_encoder and not config.stage2.text:
        raise ValueError("finetune.text_encoder: there is no text in stage2.conditions; leave it out")
    if finetune.kind != "full" and config.text.train:
        raise ValueError(
            f"text.train: trains all of the text encoder, and finetune.kind is {finetune.kind}; "
            "set finetune.text_encoder, or leave it out"
        )


def prior_preservation_has_a_class(config: Config) -> None:
    finetune, stage2, data = config.finetune, config.stage2, config.data
    marked = [source for source in data.source if source.prior]
    if finetune.prior_weight is None:
        if marked:
            raise ValueError("data.source.prior: is of prior preservation; set finetune.prior_weight, 1 is usual")
        return
    if data.streaming:
        raise ValueError("finetune.prior_weight: the class and the subject take turns in an index; no data.streaming")
    if not stage2.text:
        raise ValueError("finetune.prior_weight: the subject and its class differ by captions; add text to conditions")
    if not finetune.class_prompt.strip():
        if not marked:
            raise ValueError(
                "finetune.class_prompt: missing; give the caption of the class, such as 'a photo of a dog'"
            )
    elif stage2.classes:
        raise ValueError(
            "finetune.class_prompt: images of the class need labels, as stage2.conditions has class; give them as a "
            "data.source with prior: true"
        )
    elif not finetune.class_images:
        if not stage2.init_from:
            raise ValueError(
                "stage2.init_from: no model to draw the class with; name one, or give finetune.class_images"
            )
        if stage2.image:
            raise ValueError(
                "finetune.class_images: missing; only a model conditioned on text alone can draw the class"
            )


def frozen_model_has_nothing_else_to_train(config: Config) -> None:
    stage2 = config.stage2
    if config.finetune.kind == "full":
        return
    for key, is_set in (
        ("uncond_embedding", stage2.uncond_embedding == "learned"),
        ("beta_schedule", stage2.beta_schedule == "learned"),
        ("variance", stage2.variance == "learned"),
        ("channels_last", stage2.channels_last and config.finetune.base_precision in ("8bit", "4bit")),
    ):
        if is_set:
            raise ValueError(
                f"stage2.{key}: {getattr(stage2, key)!r} can't be trained with finetune.kind {config.finetune.kind}; "
                "leave it out, or set finetune.kind=full"
            )


def normalized_states_are_of_a_new_model(config: Config) -> None:
    text, stage2 = config.text, config.stage2
    if not text.normalize:
        return
    if stage2.init_from:
        raise ValueError(
            f"text.normalize: {stage2.init_from} reads the states of its own encoder; set text.normalize=false and, "
            f"if it is a pipeline, text.model={stage2.init_from}"
        )
    if config.data.streaming:
        raise ValueError(
            "text.normalize: needs all captions before it starts; set data.streaming=false, or leave it out"
        )


def points_ascend(config: BudgetConfig) -> None:
    for number, (fewer, more) in enumerate(itertools.pairwise(config.points), start=2):
        if more.stage1 < fewer.stage1 or more.stage2 <= fewer.stage2:
            raise ValueError(
                f"points: number {number} has {more.stage1} + {more.stage2} steps, the one before "
                f"{fewer.stage1} + {fewer.stage2}; order them by steps"
            )


BUDGET = (points_ascend,)

CONFIG = (
    normalized_states_are_of_a_new_model,
    size_is_whole_latents,
    finetuning_has_a_model,
    prior_preservation_has_a_class,
    frozen_model_has_nothing_else_to_train,
    tracker_is_known,
    background_is_a_colour,
    sources_go_together,
    buckets_hold_whole_latents,
    streaming_needs_no_index,
    figures_suit_model_and_data,
    unmasked_weight_has_masks,
    unet_levels_fit,
    images_are_large_enough,
    solver_uses_learned_variance,
    sampling_has_no_more_steps_than_the_chain,
    solver_can_be_exported_for_pixels,
    conditions_suit_data_and_autoencoder,
    trained_text_encoder_has_text,
    solver_suits_prediction,
    prompts_are_not_empty,
)
