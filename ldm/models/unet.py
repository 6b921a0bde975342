"""diffusers' U-Nets, built from a configuration or loaded, and the changes that tasks make to them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel, UNet2DModel
from torch import nn

from ldm.config.schema import Stage2Config
from ldm.diffusion.parameterization import DIFFUSERS_PREDICTION_TYPES, PREDICTION_TYPE_OF
from ldm.models.conditioning import NUM_NOISE_LEVELS
from ldm.models.convert import unet as single_file_unet
from ldm.models.weight_files import PICKLES, load_variant
from ldm.utils.errors import UserError, first_line

UNet: TypeAlias = Any  # diffusers' UNet2DConditionModel, or UNet2DModel without text
GUIDANCE_DIM = 256  # channels of the guidance scale's embedding in a distilled U-Net, as in arXiv 2310.04378
NUM_SIZES, SIZE_DIM = 6, 256  # size and crop are 6 numbers, each with a sinusoidal embedding, as in SDXL


def input_channels(stage: Stage2Config, channels: int) -> int:
    """Channels of the U-Net's input for latents of `channels`."""
    if "inpaint" in stage.conditions:  # x_t, the mask, and the latents of the masked image
        return 2 * channels + 1
    return channels + 3 if "upscale" in stage.conditions else channels


def output_channels(stage: Stage2Config, channels: int) -> int:
    """Channels of the U-Net's output: twice the latents' if it predicts the variance too."""
    return 2 * channels if stage.variance == "learned" else channels


def build(
    stage: Stage2Config, channels: int, side: int, text_width: int = 0, classes: int = 0, pooled_width: int = 0
) -> UNet:
    """A U-Net with random weights for latents `(N, channels, side, side)`; UserError if its levels don't divide them.

    It has one more class than `classes`, for no class. Without text it is a UNet2DModel, with self-attention alone.
    """
    levels = len(stage.channels)
    _check_side(side, levels, f"stage2.channels: {levels} levels halve", "fewer levels or ")
    config: dict[str, Any] = {
        "sample_size": side,
        "in_channels": input_channels(stage, channels),
        "out_channels": output_channels(stage, channels),
        "block_out_channels": stage.channels,
        "layers_per_block": stage.layers,
        "resnet_time_scale_shift": "scale_shift" if stage.scale_shift else "default",
        "norm_num_groups": stage.norm_num_groups,
        "num_class_embeds": classes + 1 if stage.classes else None,
    }
    if not stage.text:
        down = ["AttnDownBlock2D" if attends else "DownBlock2D" for attends in stage.attention]
        return UNet2DModel(
            **config,
            down_block_types=tuple(down),
            up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
            attention_head_dim=stage.attention_head_dim,
            add_attention=stage.mid_attention,
        )
    if "upscale" in stage.conditions:
        config["num_class_embeds"] = NUM_NOISE_LEVELS
    if stage.sizes:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": SIZE_DIM,
            "projection_class_embeddings_input_dim": NUM_SIZES * SIZE_DIM
            + ((pooled_width or text_width) if stage.pooled_text else 0),
        }
    elif stage.pooled_text:
        config |= {"addition_embed_type": "text", "addition_embed_type_num_heads": 8}
    down = ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in stage.attention]
    return UNet2DConditionModel(
        **config,
        down_block_types=tuple(down),
        mid_block_type="UNetMidBlock2DCrossAttn" if stage.mid_attention else "UNetMidBlock2D",
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
        # diffusers' `attention_head_dim` of this class is the number of heads
        attention_head_dim=tuple(max(1, width // stage.attention_head_dim) for width in stage.channels),
        cross_attention_dim=text_width,
        transformer_layers_per_block=stage.transformer_layers or 1,
        use_linear_projection=stage.linear_projection,
    )


def _check_side(side: int, levels: int, subject: str, remedy: str = "") -> None:
    """UserError if latents of `side` can't be halved between `levels` levels; its message begins with `subject`."""
    halvings = levels - 1
    if side % 2**halvings:
        raise UserError(
            f"{subject} the latents {halvings} times, but their side is {side}; use {remedy}a data.size that gives a "
            f"multiple of {2**halvings}"
        )


def load(
    stage: Stage2Config,
    channels: int,
    side: int,
    text_width: int = 0,
    classes: int = 0,
    pooled_width: int = 0,
    *,
    extend: bool = True,
) -> UNet:
    """The U-Net of `stage2.init_from`, in its own architecture, with the inputs added that it lacks.

    Without `extend` none are added, because a frozen network would not learn to read them. UserError if it does not fit
    the latents, text, classes (0: not known yet) or prediction type.
    """
    name = str(stage.init_from)
    kind = UNet2DConditionModel if stage.text else UNet2DModel
    unet, predicts = _from_file_or_diffusers(name, kind, stage)
    _check_prediction_type(stage.prediction_type, name, predicts)
    _check_side(side, len(unet.config.block_out_channels), f"stage2.init_from: {name} halves")
    if dropout := unet.config.get("dropout"):
        print(f"stage2.init_from: {name} has dropout {dropout}, which is left out: no run could repeat it", flush=True)
        for layer in unet.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0
    unet.register_to_config(sample_size=side)  # convolutions take any size; this is the default of sampling
    labels = classes + 1 if stage.classes else NUM_NOISE_LEVELS if "upscale" in stage.conditions else None
    if stage.classes and not classes:
        labels = unet.config.num_class_embeds
    required = {
        "in_channels": input_channels(stage, channels),
        "out_channels": output_channels(stage, channels),
        "num_class_embeds": labels,
    }
    if extend and unet.config.in_channels == channels:  # with other inputs it was trained for another task
        widen(unet, required)
    for key, source in (
        ("in_channels", "the latents' and the conditions'"),
        ("out_channels", "the autoencoder's latent channels"),
        ("num_class_embeds", "the classes of data.source, one more,"),
    ):
        actual = unet.config.get(key)
        if actual != required[key]:
            raise UserError(
                f"stage2.init_from: {name} has {key} {actual}, but {source} are {required[key]}; use its own"
                + ("" if extend else ", or finetune.kind=full, which learns new inputs")
            )
    if stage.text:
        _check_text(unet, stage, name, text_width, pooled_width)
    return unet


def _from_file_or_diffusers(name: str, kind: type[UNet], stage: Stage2Config) -> tuple[UNet, str | None]:
    """A U-Net of class `kind`, and diffusers' name of what it predicts, None if nothing says so."""
    path, predicts = Path(name), None
    if path.is_file() or (path.suffix in (".safetensors", *PICKLES) and not path.is_dir()):
        try:
            unet, predicts = single_file_unet.read(path, stage.attention_head_dim, stage.norm_num_groups)
        except UserError as error:
            raise UserError(f"stage2.init_from: {error}") from None
    else:
        unet = _from_diffusers(name, kind)
    if type(unet) is not kind:
        raise UserError(f"stage2.init_from: {name} has a {type(unet).__name__}; stage2.conditions need {kind.__name__}")
    if not predicts and (scheduler := scheduler_of(name)):
        predicts = scheduler.config.prediction_type
    return unet, predicts


def _check_prediction_type(prediction_type: str, name: str, predicts: str | None) -> None:
    """UserError if the loaded U-Net predicts something else, by diffusers' name `predicts`."""
    if predicts not in (None, DIFFUSERS_PREDICTION_TYPES[prediction_type]):
        trained = PREDICTION_TYPE_OF.get(str(predicts), "another")
        raise UserError(
            f"stage2.prediction_type: {prediction_type!r}, but {name} was trained to predict {trained!r}; "
            f"set stage2.prediction_type={trained}"
        )


def _from_diffusers(name: str, kind: type[UNet]) -> UNet:
    """The U-Net in a pipeline's folder, in its own folder, or in either on the Hub."""
    key, folder = "stage2.init_from", Path(name)
    subfolder = None if folder.is_dir() and not (folder / "unet").is_dir() else "unet"
    try:
        try:
            config = kind.load_config(name, subfolder=subfolder)
        except OSError:
            if folder.is_dir():
                raise
            config, subfolder = kind.load_config(name), None  # a Hub id of a U-Net alone
        if config.get("_class_name", kind.__name__) != kind.__name__:
            raise UserError(f"{key}: {name} has a {config['_class_name']}; stage2.conditions need {kind.__name__}")
        unet, loading_info = load_variant(
            kind.from_pretrained, name, subfolder, output_loading_info=True, dtype=torch.float32
        )
    except (OSError, ValueError) as error:
        reason = first_line(error)
        message = reason if reason.startswith(key) else f"{key}: can't load a U-Net from {name!r}: {reason}"
        raise UserError(message) from None
    if wrong := [*loading_info["missing_keys"], *loading_info["unexpected_keys"]]:
        raise UserError(
            f"{key}: the weights in {name} are not its config's: {wrong[0]} and {len(wrong) - 1} more differ"
        )
    return unet


def scheduler_of(name: str) -> DDIMScheduler | None:
    """The scheduler of the pipeline that a U-Net belongs to: noise levels, prediction type. None for a U-Net alone."""
    if Path(name).is_file() and (marked := single_file_unet.scheduler_config_of(Path(name))):
        return DDIMScheduler(**marked)
    folder = Path(name).parent if Path(name).is_file() else Path(name)
    if folder.is_dir():
        name = str(folder.parent if folder.name == "unet" else folder)
    try:
        return DDIMScheduler.from_config(DDIMScheduler.load_config(name, subfolder="scheduler"))
    except (OSError, ValueError, NotImplementedError):  # NotImplementedError for a schedule that DDIM doesn't have
        return None


def _check_text(unet: UNet, stage: Stage2Config, name: str, width: int, pooled_width: int) -> None:
    """UserError if a U-Net was trained with other text embeddings or sizes than `stage` has."""
    config, cross_attention_dim = unet.config, unet.config.cross_attention_dim
    kind, sizes = config.addition_embed_type, config.addition_embed_type == "text_time"
    pooled = config.projection_class_embeddings_input_dim - NUM_SIZES * config.addition_time_embed_dim if sizes else 0
    if kind not in (None, "text", "text_time") or config.class_embed_type:
        raise UserError(
            f"stage2.init_from: {name} reads {kind or config.class_embed_type}; U-Nets trained here read text, pooled "
            "text and sizes"
        )
    if cross_attention_dim != width:
        raise UserError(
            f"text.model: has {width} channels, but {name} was trained with cross_attention_dim {cross_attention_dim}; "
            "set text.model to the encoder that it was trained with"
        )
    if pooled not in (0, pooled_width or width):
        raise UserError(
            f"text.model: has a pooled embedding of {pooled_width} channels, but {name} was trained with {pooled}; set "
            "text.model to the pipeline that it was trained with"
        )
    if sizes != stage.sizes:
        raise UserError(f"stage2.conditions: size or none, as {name} has it; its U-Net's other inputs can't be changed")


def build_empty(
    stage: Stage2Config, channels: int, side: int, text_width: int = 0, classes: int = 0, pooled_width: int = 0
) -> UNet:
    """The same as `build` on the meta device: shapes without memory for weights."""
    with torch.device("meta"):
        return build(stage, channels, side, text_width, classes, pooled_width)


@torch.no_grad()
def widen(unet: UNet, required: Mapping[str, Any]) -> None:
    """Adds the input channels, the output for a variance and the class embedding that `required` has and a U-Net lacks.

    The new weights are 0, so its predictions don't change. `required` has diffusers' keys `in_channels`,
    `out_channels`, `num_class_embeds`.
    """

    def wider(old: nn.Conv2d, key: str, inputs: int, outputs: int) -> nn.Conv2d:
        new = nn.Conv2d(inputs, outputs, 3, padding=1).to(old.weight)
        for name, old_parameter in old.named_parameters():
            parameter = new.get_parameter(name).zero_()
            parameter[tuple(slice(n) for n in old_parameter.shape)] = old_parameter
        unet.register_to_config(**{key: required[key]})
        return new

    first, last = unet.conv_in, unet.conv_out
    if required["in_channels"] > first.in_channels:
        unet.conv_in = wider(first, "in_channels", required["in_channels"], first.out_channels)
    if required["out_channels"] == 2 * last.out_channels:
        unet.conv_out = wider(last, "out_channels", last.in_channels, required["out_channels"])
    if required["num_class_embeds"] and unet.class_embedding is None:
        unet.class_embedding = nn.Embedding(required["num_class_embeds"], unet.time_embedding.linear_2.out_features)
        unet.class_embedding.to(first.weight).weight.zero_()
        unet.register_to_config(num_class_embeds=required["num_class_embeds"])


@torch.no_grad()
def make_guidance_conditioned(unet: UNet) -> None:
    """Adds an input for the guidance scale to a UNet2DConditionModel; weights of 0 leave its predictions unchanged."""
    if unet.config.time_cond_proj_dim is None:
        first = unet.time_embedding.linear_1
        unet.time_embedding.cond_proj = nn.Linear(GUIDANCE_DIM, first.in_features, bias=False).to(first.weight)
        unet.time_embedding.cond_proj.weight.zero_()
        unet.register_to_config(time_cond_proj_dim=GUIDANCE_DIM)


@torch.no_grad()
def remove_variance_channels(unet: UNet, channels: int) -> None:
    """Removes a U-Net's prediction of the variance: the channels of its output beyond the first `channels`."""
    last = unet.conv_out
    if last.out_channels > channels:
        unet.conv_out = nn.Conv2d(last.in_channels, channels, last.kernel_size, padding=last.padding).to(last.weight)
        for new, old in zip(unet.conv_out.parameters(), last.parameters(), strict=True):
            new.copy_(old[:channels])
        unet.register_to_config(out_channels=channels)
