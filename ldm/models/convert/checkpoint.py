"""A whole model as one `.safetensors` in the layouts of Stable Diffusion 1, 2 and XL, which desktop programs open.

model.diffusion_model.*                                      the U-Net, in CompVis' names
first_stage_model.*                                          the autoencoder
cond_stage_model.transformer.*                               1: CLIP's text encoder, in transformers' names
cond_stage_model.model.*                                     2: OpenCLIP's text tower
conditioner.embedders.0.transformer.*, embedders.1.model.*   XL: one of each
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import CHECKPOINT_KEY_NAMES, SingleFileComponentError
from diffusers.utils import logging
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from ldm.models.convert.autoencoder import LINEAR
from ldm.models.convert.autoencoder import original_name as autoencoder_name
from ldm.models.convert.safetensors_file import opened
from ldm.utils.errors import UserError, first_line

Layout = Literal["sd1", "sd2", "sdxl"]
Tensors = dict[str, torch.Tensor]

UNET, AUTOENCODER = "model.diffusion_model.", "first_stage_model."
TEXT: dict[Layout, tuple[str, ...]] = {
    "sd1": ("cond_stage_model.transformer.",),
    "sd2": ("cond_stage_model.model.",),
    "sdxl": ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."),
}
RECOGNIZED = {
    "cond_stage_model.transformer.": CHECKPOINT_KEY_NAMES["clip"],
    "cond_stage_model.model.": CHECKPOINT_KEY_NAMES["open_clip"],
    "conditioner.embedders.0.transformer.": CHECKPOINT_KEY_NAMES["clip_sdxl"],
    "conditioner.embedders.1.model.": CHECKPOINT_KEY_NAMES["open_clip_sdxl"],
}
"""A tensor of each text encoder; without it diffusers takes the weights of the configuration's folder instead."""
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")  # diffusers' names, in the order of `TEXT`
READING_ERRORS = (OSError, ValueError, KeyError, AttributeError, TypeError, RuntimeError)
SCALING_FACTOR = {"sd1": 0.18215, "sd2": 0.18215, "sdxl": 0.13025}
"""Of the latents, which programs take for granted by the layout."""
ARCHITECTURES: dict[str, str] = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2",
    "sdxl": "stable-diffusion-xl-v1-base",
}
"""Names of the specification of metadata, https://github.com/Stability-AI/ModelSpec."""
WIDTHS: dict[Layout, tuple[int, ...]] = {
    "sd1": (320, 640, 1280, 1280),
    "sd2": (320, 640, 1280, 1280),
    "sdxl": (320, 640, 1280),
}
"""Of the published U-Nets, the only ones that ComfyUI and A1111 recognise."""
SD2_LAYERS = 23  # of SD 2's text encoder; the published file has a 24th, which is never computed

UNET_FIXED = (
    ("conv_in.", "input_blocks.0.0."),
    ("conv_norm_out.", "out.0."),
    ("conv_out.", "out.2."),
    ("time_embedding.linear_1.", "time_embed.0."),
    ("time_embedding.linear_2.", "time_embed.2."),
    ("add_embedding.linear_1.", "label_emb.0.0."),
    ("add_embedding.linear_2.", "label_emb.0.2."),
    ("class_embedding.", "label_emb."),
    ("mid_block.resnets.0.", "middle_block.0."),
    ("mid_block.attentions.0.", "middle_block.1."),
    ("mid_block.resnets.1.", "middle_block.2."),
)
RESNET = (
    (".norm1.", ".in_layers.0."),
    (".conv1.", ".in_layers.2."),
    (".time_emb_proj.", ".emb_layers.1."),
    (".norm2.", ".out_layers.0."),
    (".conv2.", ".out_layers.3."),
    (".conv_shortcut.", ".skip_connection."),
)
BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)")
OPEN_CLIP = (
    ("embeddings.token_embedding.weight", "token_embedding.weight"),
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("encoder.layers.", "transformer.resblocks."),
    ("final_layer_norm.", "ln_final."),
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".self_attn.out_proj.", ".attn.out_proj."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
)
TEXT_LAYER = re.compile(r"(?:text_model\.encoder\.layers|transformer\.resblocks)\.(\d+)\.")
QKV = re.compile(r"(.*)\.self_attn\.q_proj\.(weight|bias)")


def layout_of(unet: Any, autoencoder: Any, encoders: list[Any]) -> Layout:
    """The layout that has names for a model's tensors; ValueError, which says why, if none has."""
    if not isinstance(unet, UNet2DConditionModel):
        raise ValueError(f"its U-Net is a {type(unet).__name__}; the layout knows a UNet2DConditionModel")
    config = unet.config
    kinds = {*config.down_block_types, *config.up_block_types, config.mid_block_type}
    if unknown := kinds - {
        "DownBlock2D",
        "CrossAttnDownBlock2D",
        "UpBlock2D",
        "CrossAttnUpBlock2D",
        "UNetMidBlock2DCrossAttn",
    }:
        raise ValueError(f"its U-Net has a {min(unknown)}, for which the layout has no names")
    for key, known in {
        "resnet_time_scale_shift": ("default",),
        "addition_embed_type": (None, "text_time"),
        "class_embed_type": (None,),
        "time_cond_proj_dim": (None,),
        "encoder_hid_dim": (None,),
    }.items():
        if config.get(key) not in known:
            raise ValueError(f"its U-Net has {key} {config[key]!r}, for which the layout has no names")
    if not isinstance(autoencoder, AutoencoderKL):
        raise ValueError(f"its autoencoder is a {type(autoencoder).__name__}; the layout knows an AutoencoderKL")
    kinds_of_text = [type(encoder) for encoder in encoders]
    if kinds_of_text == [CLIPTextModel, CLIPTextModelWithProjection]:
        if config.addition_embed_type != "text_time":
            raise ValueError("its U-Net reads no pooled text and sizes, as that of two text encoders does")
        return "sdxl"
    if kinds_of_text != [CLIPTextModel]:
        names = ", ".join(kind.__name__ for kind in kinds_of_text) or "none"
        raise ValueError(f"its text encoder is {names}; the layout knows CLIP's")
    if config.addition_embed_type:
        raise ValueError("its U-Net reads sizes, which the layout knows with two text encoders only")
    return "sd2" if config.use_linear_projection else "sd1"


def known_layout(unet: Any, autoencoder: Any, encoders: list[Any]) -> Layout | None:
    """As `layout_of`; None for a model that no layout has names for."""
    try:
        return layout_of(unet, autoencoder, encoders)
    except ValueError:
        return None


def layout_of_names(names: Collection[str]) -> Layout | None:
    """The layout of a file with tensors of these names; None for another file, SDXL's refiner among them."""
    for layout, prefixes in TEXT.items():
        if all(any(name.startswith(prefix) for name in names) for prefix in prefixes):
            return layout
    return None


def read_pipeline(
    path: Path, kind: Any, key: str, base: str | None = None, base_key: str = "--base", **components: Any
) -> Any:
    """The pipeline of class `kind` of a file with all its parts, in float32 on the CPU, as diffusers reads it.

    Its configuration and tokenizers are those of `base`, a diffusers folder or Hub id, by default of the published
    model. `components` replace the pipeline's own; None leaves one out. UserError, naming `key` or `base_key`, where
    the file and the configuration don't fit together; text encoders are checked to have come from the file in full.
    """
    with opened(path) as file:
        names = set(file.keys())
    layout = layout_of_names(names)
    assert layout, f"{path} has no known layout"
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # our own error repeats what it logs
    configuration = f"the configuration of {base}" if base else "the Hub's configuration"
    hint = "is it of the same family, and whole?" if base else f"give {base_key}, a diffusers folder of the same family"
    try:
        for prefix in TEXT[layout]:
            if RECOGNIZED[prefix] not in names:  # diffusers would take the weights of the base
                raise UserError(f"{key}: {path} lacks tensor {RECOGNIZED[prefix]}; is the file whole and unaltered?")
        if base:
            check_base(base, kind.load_config(base), path, layout, base_key)
        pipeline = kind.from_single_file(str(path), config=base, torch_dtype=torch.float32, **components)
        for prefix, part in zip(TEXT[layout], TEXT_ENCODERS, strict=False):
            tokenizer = getattr(pipeline, part.replace("text_encoder", "tokenizer"))
            check_text_encoder(part, getattr(pipeline, part), tokenizer, names, prefix)
    except UserError:
        raise
    except (*READING_ERRORS, SingleFileComponentError) as error:
        reason = "it lacks weights" if "meta tensor" in str(error) else first_line(error).split(". If you want")[0]
        raise UserError(f"{key}: can't read {path} with {configuration}: {reason}; {hint}") from None
    finally:
        logging.set_verbosity(verbosity)
    return pipeline


def check_base(base: str, index: Mapping[str, Any], path: Path, layout: Layout, base_key: str) -> None:
    """UserError where a pipeline, with its `index` of components, has other text encoders than a file's layout."""
    encoders = TEXT_ENCODERS[: len(TEXT[layout])]
    expected = [*encoders, *(part.replace("text_encoder", "tokenizer") for part in encoders)]
    parts = sorted(part for part in index if part.startswith(("text_encoder", "tokenizer")) and index[part][0])
    if parts != expected:
        raise UserError(
            f"{base_key}: {base} has {', '.join(parts) or 'no text encoder'}, but {path}, of layout {layout}, needs "
            f"{', '.join(expected)}: is it of the same family?"
        )


def check_text_encoder(part: str, encoder: Any, tokenizer: Any, names: Collection[str], prefix: str) -> None:
    """ValueError where a text encoder did not get all of its weights from tensors of these names, or not all layers.

    Or where the tokenizer is not its own: transformers makes one without tokens where files are missing.
    """
    if missing := [name for name, tensor in encoder.state_dict().items() if tensor.is_meta]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"its {part} lacks tensor {missing[0]}{more}")
    own = (name.removeprefix(prefix) for name in names if name.startswith(prefix))
    layers = 1 + max(int(match[1]) for name in own if (match := TEXT_LAYER.match(name)))
    expected = encoder.config.num_hidden_layers
    if layers > expected + (prefix in TEXT["sd2"]):  # whose file has one more than is computed
        raise ValueError(f"its {part} has {layers} layers, the configuration {expected}")
    if len(tokenizer) < encoder.config.vocab_size:
        raise ValueError(f"its {part} knows {encoder.config.vocab_size:,} tokens, the tokenizer {len(tokenizer):,}")


def tensors_of(layout: Layout, unet: Any, autoencoder: Any, encoders: list[Any]) -> Tensors:
    """All tensors of a model by their names in the layout."""
    tensors = {UNET + unet_name(name, unet.config): tensor for name, tensor in unet.state_dict().items()}
    levels = len(autoencoder.config.block_out_channels)
    for name, tensor in autoencoder.state_dict().items():
        shaped = tensor[:, :, None, None] if LINEAR.search(name) else tensor
        tensors[AUTOENCODER + autoencoder_name(name, levels)] = shaped
    for prefix, encoder in zip(TEXT[layout], encoders, strict=True):
        converted = open_clip_tensors(encoder) if prefix.endswith(".model.") else clip_tensors(encoder)
        tensors |= {prefix + name: tensor for name, tensor in converted.items()}
    return tensors


def unet_name(name: str, config: Any) -> str:
    """CompVis' name of a tensor of a diffusers U-Net."""
    for diffusers_part, original_part in UNET_FIXED:
        if name.startswith(diffusers_part):
            name = original_part + name.removeprefix(diffusers_part)
    if match := BLOCK.match(name):
        direction, block, kind, number, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        first = block * (config.layers_per_block + 1)  # the original counts blocks of all levels through
        if direction == "down" and kind == "downsamplers":
            name = f"input_blocks.{1 + first + config.layers_per_block}.0.op.{rest.removeprefix('conv.')}"
        elif direction == "down":
            name = f"input_blocks.{1 + first + number}.{0 if kind == 'resnets' else 1}.{rest}"
        elif kind == "upsamplers":
            position = 2 if "CrossAttn" in config.up_block_types[block] else 1
            name = f"output_blocks.{first + config.layers_per_block}.{position}.{rest}"
        else:
            name = f"output_blocks.{first + number}.{0 if kind == 'resnets' else 1}.{rest}"
    if ".transformer_blocks." in name:
        return name
    for diffusers_part, original_part in RESNET:
        name = name.replace(diffusers_part, original_part)
    return name


def clip_tensors(encoder: Any) -> Tensors:
    """transformers' names, which the original layout has too, with the prefix that they had before version 5."""
    return {f"text_model.{name.removeprefix('text_model.')}": t for name, t in encoder.state_dict().items()}


def open_clip_tensors(encoder: Any) -> Tensors:
    """OpenCLIP's names: query, key and value are one tensor, and the projection is transposed."""
    tensors = {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}
    result: Tensors = {}
    for name, tensor in tensors.items():
        if ".k_proj." in name or ".v_proj." in name or name.endswith("position_ids"):
            continue
        if match := QKV.fullmatch(name):
            joined = [tensors[f"{match[1]}.self_attn.{letter}_proj.{match[2]}"] for letter in "qkv"]
            name, tensor = f"{match[1]}.attn.in_proj_{match[2]}", torch.cat(joined)
        elif name == "text_projection.weight":
            name, tensor = "text_projection", tensor.T
        for transformers_part, original_part in OPEN_CLIP:
            name = name.replace(transformers_part, original_part)
        result[name] = tensor
    if encoder.config.num_hidden_layers == SD2_LAYERS:  # programs build 24 layers, and read 23
        last = f"transformer.resblocks.{SD2_LAYERS - 1}."
        result |= {
            name.replace(last, f"transformer.resblocks.{SD2_LAYERS}."): tensor.clone()
            for name, tensor in result.items()
            if name.startswith(last)
        }
    return result
