"""An autoencoder as one `.safetensors` in the layout of CompVis and Stability AI ↔ a diffusers autoencoder.

One table of names serves both directions: the model lists its tensors, and the table has their original names.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Annotated, Any

import torch
from diffusers import AutoencoderKL, VQModel
from pydantic import BaseModel, Field, FiniteFloat, Json, PositiveInt, ValidationError
from safetensors.torch import save_file

from ldm.models.convert.safetensors_file import Shapes, check_names, opened
from ldm.models.finite import check_weights
from ldm.models.weight_files import contents
from ldm.utils.atomic_files import atomic_file
from ldm.utils.errors import UserError

PREFIXES = ("first_stage_model.", "vae.", "")  # of the autoencoder's tensors in a full checkpoint; none if it is alone
ATTENTION_NAMES = {  # of other programs, and of diffusers' versions → the original's
    "query": "q",
    "key": "k",
    "value": "v",
    "proj_attn": "proj_out",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
ATTENTION = re.compile(rf"(\.attn(?:_1|\.\d+)\.)({'|'.join(map(re.escape, ATTENTION_NAMES))})(?=\.)")
TRAINING = ("loss.", "model_ema.")  # tensors that CompVis' training saves along with the autoencoder

# Parts of names, diffusers' and the original's; in this order. Not `up_blocks`, which the original counts backwards.
RENAMES = (
    ("down_blocks.", "down."),
    ("mid_block.resnets.0.", "mid.block_1."),
    ("mid_block.resnets.1.", "mid.block_2."),
    ("mid_block.attentions.0.", "mid.attn_1."),
    (".resnets.", ".block."),
    (".attentions.", ".attn."),
    (".downsamplers.0.", ".downsample."),
    (".upsamplers.0.", ".upsample."),
    (".conv_shortcut.", ".nin_shortcut."),
    (".conv_norm_out.", ".norm_out."),
    (".group_norm.", ".norm."),
    (".to_q.", ".q."),
    (".to_k.", ".k."),
    (".to_v.", ".v."),
    (".to_out.0.", ".proj_out."),
)
LINEAR = re.compile(r"\.(to_q|to_k|to_v|to_out\.0)\.weight$")  # linear in diffusers, a 1×1 convolution in the original

# A tensor that identifies a published model, in a full checkpoint → its scaling_factor and shift_factor.
SCALES: dict[str, tuple[float, float | None]] = {
    "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": (0.13025, None),  # SDXL
    "conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias": (0.13025, None),  # SDXL's refiner
    "model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias": (1.5305, 0.0609),  # SD 3
    "model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale": (0.3611, 0.1159),  # FLUX.1
}


class Metadata(BaseModel):
    """Configuration that tensors don't show, from the file's metadata, which is all text; None if it is absent."""

    scaling_factor: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    shift_factor: FiniteFloat | None = None
    norm_num_groups: PositiveInt | None = None
    sample_size: PositiveInt | None = None
    latents_mean: Json[list[float]] | None = None
    latents_std: Json[list[float]] | None = None


def read(path: Path) -> AutoencoderKL | VQModel:
    """The autoencoder of a file, alone or inside a full checkpoint: float32, on the CPU, in evaluation mode.

    Names and shapes of its tensors determine the architecture; no other tensors are loaded. What the metadata lacks is
    guessed:
      - `norm_num_groups`: 32; if that doesn't divide all widths, the largest that does and leaves 4 channels per group;
      - `scaling_factor`, `shift_factor`: those of SDXL, SD 3 or FLUX.1 in such a model's full checkpoint; the
        `scale_factor` that CompVis saves if it measured one; else 0.18215 (Stable Diffusion 1 and 2; wrong for SDXL's
        autoencoder in a file of its own) for a KL of 4 channels, and 1 (unscaled) for all others; no shift;
      - `sample_size` (it affects tiling alone): 512.

    Raises UserError if the file is missing, damaged, or no autoencoder, or a tensor is missing, left over or misshapen.
    """
    with opened(path) as file:
        return _read(path, file)


def write(vae: AutoencoderKL | VQModel, path: Path) -> None:
    """The inverse of `read`, complete or not at all: tensors in the model's dtype, the rest of its config as metadata.

    Raises UserError for an autoencoder that the original layout has no names for.
    """
    _check_supported(vae, path)
    check_weights({"autoencoder": vae}, path)
    config, tensors = vae.config, {}
    for name, tensor in vae.state_dict().items():
        tensor = tensor[:, :, None, None] if LINEAR.search(name) else tensor
        tensors[original_name(name, len(config.block_out_channels))] = tensor.detach().cpu().contiguous()
    factor = 2 ** (len(config.block_out_channels) - 1)
    values = {key: config.get(key) for key in Metadata.model_fields}
    metadata = {
        "format": "pt",
        "class": type(vae).__name__,
        "latents": f"{config.latent_channels} channels, 1/{factor} of the image's height and width",
        **{key: json.dumps(value) for key, value in values.items() if value is not None},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as tmp_path:
        save_file(tensors, tmp_path, metadata)


def original_name(name: str, levels: int) -> str:
    """The original layout's name of a diffusers autoencoder's tensor; `levels` is its number of resolutions."""
    name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", name)
    for diffusers_part, original_part in RENAMES:
        name = name.replace(diffusers_part, original_part)
    return name


def architecture(path: Path, shapes: Shapes) -> dict[str, Any]:
    """The configuration from names and shapes: VQModel's if it has `num_vq_embeddings`, else AutoencoderKL's."""

    def size(name: str, axis: int) -> int:
        if len(shapes.get(name, ())) <= axis:
            raise UserError(f"{path}: tensor {name} is missing or has too few axes; no autoencoder of this layout")
        return shapes[name][axis]

    levels = len({match[0] for name in shapes if (match := re.match(r"encoder\.down\.\d+\.", name))})
    layers = len({match[0] for name in shapes if (match := re.match(r"encoder\.down\.0\.block\.\d+\.", name))})
    attention = [
        [any(name.startswith(f"{side}.{i}.attn.") for name in shapes) for i in range(levels)]
        for side in ("encoder.down", "decoder.up")
    ]
    config: dict[str, Any] = {
        "in_channels": size("encoder.conv_in.weight", 1),
        "out_channels": size("decoder.conv_out.weight", 0),
        "latent_channels": size("decoder.conv_in.weight", 1),
        "block_out_channels": tuple(size(f"encoder.down.{i}.block.0.conv2.weight", 0) for i in range(levels)),
        "layers_per_block": layers,
        "down_block_types": tuple(("DownEncoderBlock2D", "AttnDownEncoderBlock2D")[has] for has in attention[0]),
        "up_block_types": tuple(("UpDecoderBlock2D", "AttnUpDecoderBlock2D")[has] for has in attention[1][::-1]),
        "mid_block_add_attention": any(".mid.attn_1." in name for name in shapes),
    }
    if any(name.startswith("quantize.") for name in shapes):
        codes, width = (size("quantize.embedding.weight", axis) for axis in (0, 1))
        return {**config, "num_vq_embeddings": codes, "vq_embed_dim": width}
    use = {f"use_{conv}": f"{conv}.weight" in shapes for conv in ("quant_conv", "post_quant_conv")}
    return {**config, **use}


def _read(path: Path, file: Any) -> AutoencoderKL | VQModel:
    names = set(file.keys())
    prefix = _prefix(path, names)
    file_names: dict[str, str] = {}
    for name in sorted(names):
        if name.startswith(prefix) and not (own := name.removeprefix(prefix)).startswith(TRAINING):
            own = ATTENTION.sub(lambda match: match[1] + ATTENTION_NAMES[match[2]], own)
            if own in file_names:
                raise UserError(f"{path}: has both {file_names[own]} and {name}, which are one tensor; remove one")
            file_names[own] = name
    shapes = {name: tuple(file.get_slice(file_name).get_shape()) for name, file_name in file_names.items()}
    config = architecture(path, shapes)
    config |= _metadata(path, file, names, config)
    with torch.device("meta"):
        model = (VQModel if "num_vq_embeddings" in config else AutoencoderKL)(**config)
    expected = model.state_dict()
    original_names = {original_name(name, len(config["block_out_channels"])): name for name in expected}
    check_names(path, set(original_names), set(shapes), type(model).__name__)
    tensors = {}
    for original, name in original_names.items():
        shape, file_shape = tuple(expected[name].shape), shapes[original]
        if LINEAR.search(name) and set(file_shape[2:]) <= {1}:
            file_shape = file_shape[:2]
        if file_shape != shape:
            raise UserError(
                f"{path}: tensor {original} has shape {file_shape}; expected {shape}, by the shapes of the others"
            )
        tensor = file.get_tensor(file_names[original]).reshape(shape)
        tensors[name] = tensor.to(torch.float32, copy=True)  # else it maps the file, which may be replaced
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def _prefix(path: Path, names: set[str]) -> str:
    """The prefix of the autoencoder's tensors in this file."""
    for prefix in PREFIXES:
        if f"{prefix}encoder.down.0.block.0.conv1.weight" in names:
            return prefix
    if any("encoder.down_blocks." in name for name in names):
        raise UserError(f"{path}: is in diffusers' layout, not the original; give the folder with its config.json")
    raise UserError(
        f"{path}: holds no autoencoder, but {contents(names)}; one has tensors encoder.down.0.…, alone or after "
        f"{' or '.join(PREFIXES[:2])}"
    )


def _metadata(path: Path, file: Any, names: set[str], config: dict[str, Any]) -> dict[str, Any]:
    """The values of `Metadata`: from the file's metadata, else from tensors of a full checkpoint, else guessed."""
    try:
        recorded = Metadata.model_validate(file.metadata() or {}).model_dump(exclude_none=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: metadata {first['loc'][0]} is {first['input']!r}: {first['msg']}") from None
    scale, shift = (0.18215 if "use_quant_conv" in config and config["latent_channels"] == 4 else 1.0), None
    if "scale_factor" in names:
        measured = file.get_tensor("scale_factor")
        if measured.numel() != 1 or not 0 < float(measured) < math.inf:
            raise UserError(f"{path}: tensor scale_factor is {measured.tolist()}; it should be one number above 0")
        scale = float(measured)
    scale, shift = next((SCALES[name] for name in SCALES if name in names), (scale, shift))
    width = math.gcd(*config["block_out_channels"])
    groups = 32 if width % 32 == 0 else max(n for n in range(1, 33) if width % n == 0 and (n == 1 or width // n >= 4))
    if width % recorded.get("norm_num_groups", 1):
        raise UserError(
            f"{path}: metadata norm_num_groups is {recorded['norm_num_groups']}, "
            f"which doesn't divide the channels {config['block_out_channels']}"
        )
    guessed = {"scaling_factor": scale, "shift_factor": shift, "norm_num_groups": groups, "sample_size": 512}
    values = {**guessed, **recorded}
    if "num_vq_embeddings" in config:  # VQModel has no other keys
        values = {key: values[key] for key in ("scaling_factor", "norm_num_groups", "sample_size")}
    return values


def _check_supported(vae: Any, path: Path) -> None:
    """UserError for an autoencoder that the original layout can't express."""
    if not isinstance(vae, AutoencoderKL | VQModel):
        reason = f"it has no names for {type(vae).__name__}, only for AutoencoderKL and VQModel"
    else:
        blocks = {"DownEncoderBlock2D", "UpDecoderBlock2D", "AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D"}
        options = {"act_fn": ("silu", "swish"), "norm_type": ("group", None), "lookup_from_codebook": (False, None)}
        unsupported = sorted({*vae.config.down_block_types, *vae.config.up_block_types} - blocks)
        unsupported += [f"{key} {vae.config[key]}" for key in options if vae.config.get(key) not in options[key]]
        if not unsupported:
            return
        reason = f"it has no place for {', '.join(unsupported)}"
    raise UserError(f"{path}: can't be written in the original layout: {reason}; save a diffusers folder instead")
