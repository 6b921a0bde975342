"""A text-conditioned U-Net from one `.safetensors`, in the layout of CompVis and Stability AI, or in diffusers' own.

diffusers' own conversion translates the original names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.loaders.single_file_utils import LDM_UNET_KEY, convert_ldm_unet_checkpoint

from ldm.models.convert.safetensors_file import Shapes, check_names, opened
from ldm.models.weight_files import contents
from ldm.utils.errors import UserError, first_line

PREFIXES = (LDM_UNET_KEY, "diffusion_model.", "unet.", "")  # of a U-Net's tensors; none if it is alone
FIRST = ("input_blocks.0.0.weight", "conv_in.weight")  # the original's, diffusers'
SD1 = (320, 640, 1280, 1280)  # widths of Stable Diffusion 1 and 2
V_MARKERS = {"v_pred", "ztsnr"}  # empty tensors that mark SDXL models that predict v
NOISE_SCHEDULE: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
"""Of Stable Diffusion 1, 2 and XL, by diffusers' names."""
MODELSPEC_PREDICTION_TYPES = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}


def read(
    path: Path, attention_head_dim: int, norm_num_groups: int
) -> tuple[UNet2DConditionModel | UNet2DModel, str | None]:
    """The U-Net of a file, alone or inside a full checkpoint, in float32 on the CPU; and what it predicts, if known.

    For a file in diffusers' layout, a `config.json` in the same folder is its configuration. Otherwise names and shapes
    of tensors determine the architecture, except for the attention heads and the normalisation groups. These are
      - 64 channels per head, 32 groups if projections are linear and 64 divides the widths: Stable Diffusion 2 and XL;
      - 8 heads per level, 32 groups for the widths of Stable Diffusion 1 in the original layout;
      - `attention_head_dim` channels per head, and `norm_num_groups`, for all others.
    Averaged weights (`model_ema.*`) are ignored, as with diffusers' `extract_ema=False`.

    UserError if the file is missing, damaged, or no such U-Net, or if a tensor is missing, left over or misshapen.
    """
    with opened(path) as file:
        names = set(file.keys())
        file_names, unused = name_table(path, names)
        shapes = {name: tuple(file.get_slice(file_name).get_shape()) for name, file_name in file_names.items()}
        original = not all(file_name.endswith(name) for name, file_name in file_names.items())
        unet = _build_empty(path, shapes, attention_head_dim, norm_num_groups, original)
        expected = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
        check_names(path, set(expected), {*shapes, *unused}, type(unet).__name__)
        for name, shape in expected.items():
            if shapes[name] != shape:
                raise UserError(
                    f"{path}: tensor {file_names[name]} has shape {shapes[name]}; expected {shape}, by the shapes of "
                    f"the others, and by stage2.attention_head_dim={attention_head_dim} and "
                    f"stage2.norm_num_groups={norm_num_groups} where shapes don't tell"
                )
        # copies: else they map the file, which may be replaced
        tensors = {name: file.get_tensor(file_names[name]).to(torch.float32, copy=True) for name in expected}
        predicts = prediction_type_of(names, file.metadata() or {})
    unet.load_state_dict(tensors, assign=True)
    return unet.eval(), predicts


def prediction_type_of(names: set[str], metadata: Mapping[str, str]) -> str | None:
    """What the U-Net of a file predicts, by diffusers' name; None where neither tensors nor metadata say so."""
    recorded = MODELSPEC_PREDICTION_TYPES.get(metadata.get("modelspec.prediction_type", ""))
    return "v_prediction" if V_MARKERS & names else recorded


def scheduler_config_of(path: Path) -> dict[str, Any]:
    """diffusers' configuration of the noise levels of a file that says of itself that they end in pure noise."""
    with opened(path) as file:
        if "ztsnr" not in file.keys():  # noqa: SIM118, a safetensors file is no mapping
            return {}
    return {**NOISE_SCHEDULE, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}


def name_table(path: Path, names: set[str]) -> tuple[dict[str, str], set[str]]:
    """Diffusers' names of the U-Net's tensors → their names in the file, and the U-Net's names that remain.

    UserError if `names`, those of the file's tensors, contain no U-Net.
    """
    prefix = next((prefix for prefix in PREFIXES if any(prefix + first in names for first in FIRST)), "")
    unet_names = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    if not prefix:
        unet_names = {name for name in unet_names - V_MARKERS if not name.startswith("model_ema.")}
    if {"conv_in.weight", "time_embedding.linear_1.weight"} <= unet_names:
        return {name: prefix + name for name in unet_names}, set()
    if "input_blocks.0.0.weight" not in unet_names:
        raise UserError(
            f"{path}: holds no U-Net, but {contents(names)}; one has a tensor {' or '.join(FIRST)}, alone or after "
            f"{', '.join(PREFIXES[:-1])}"
        )
    blocks = {int(match[1]) for name in unet_names if (match := re.match(r"input_blocks\.(\d+)\.", name))}
    halving = {i for i in blocks if f"input_blocks.{i}.0.op.weight" in unet_names}
    config: dict[str, Any] = {"layers_per_block": max(1, min(halving, default=len(blocks)) - 1)}
    config |= {"addition_embed_type": "text_time"} if "label_emb.0.0.weight" in unet_names else {}
    config |= {"num_class_embeds": 1} if "label_emb.weight" in unet_names else {}
    try:  # the conversion moves values from one key to another, so names as values give a table of names
        file_names = convert_ldm_unet_checkpoint({LDM_UNET_KEY + name: prefix + name for name in unet_names}, config)
    except KeyError as error:
        raise UserError(f"{path}: lacks tensor {prefix}{error.args[0]}; is the file whole and unaltered?") from None
    file_names = {name: file_name for name, file_name in file_names.items() if file_name}  # None for a missing bias
    return file_names, {prefix + name for name in unet_names} - set(file_names.values())


def _build_empty(
    path: Path, shapes: Shapes, attention_head_dim: int, norm_num_groups: int, original: bool
) -> UNet2DConditionModel | UNet2DModel:
    """The file's model on the meta device, without memory for weights."""
    config_path = path.with_name("config.json")
    kinds: dict[str, Any] = {kind.__name__: kind for kind in (UNet2DConditionModel, UNet2DModel)}
    try:
        with torch.device("meta"):
            if not original and config_path.exists():
                config = UNet2DConditionModel.load_config(path.parent)
                kind = kinds.get(config.get("_class_name"))
                if not kind:
                    raise UserError(f"{config_path}: is of a {config.get('_class_name')}; known are {', '.join(kinds)}")
                return kind.from_config(config)
            return UNet2DConditionModel(**architecture(path, shapes, attention_head_dim, norm_num_groups, original))
    except UserError:
        raise
    except (OSError, ValueError) as error:  # diffusers' own checks, such as that of groups
        raise UserError(
            f"{path}: can't be built: {first_line(error)}; stage2.norm_num_groups is {norm_num_groups}"
        ) from None


def architecture(
    path: Path, shapes: Shapes, attention_head_dim: int, norm_num_groups: int, original: bool = True
) -> dict[str, Any]:
    """The configuration of the UNet2DConditionModel with tensors of these names, diffusers', and shapes."""
    tensors = _Tensors(path, shapes)
    levels = tensors.count(r"down_blocks\.(\d+)\.")
    widths = tuple(tensors.size(f"down_blocks.{i}.resnets.0.conv1.weight") for i in range(levels))
    depths = [tensors.depth(f"down_blocks.{i}") for i in range(levels)]
    mid_depth = tensors.depth("mid_block")
    to_k = next((name for name in sorted(shapes) if name.endswith(".attn2.to_k.weight")), None)
    if not levels or to_k is None:
        raise UserError(f"{path}: its U-Net reads no text; give the folder that it is in, with its config.json")
    projection = to_k.split(".transformer_blocks.")[0] + ".proj_in.weight"
    linear = tensors.size(projection, 1) > 0 and len(shapes[projection]) == 2  # not a 1×1 convolution
    attending = tuple(width for width, depth in zip(widths, depths, strict=True) if depth)
    heads, default_groups = _attention_heads(path, widths, attending, linear, attention_head_dim, original)
    down = tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths)
    if not depths[-1]:
        depths[-1] = mid_depth  # diffusers builds the middle block with the last depth
    return {
        "in_channels": tensors.size("conv_in.weight", 1),
        "out_channels": tensors.size("conv_out.weight"),
        "block_out_channels": widths,
        "layers_per_block": tensors.count(r"down_blocks\.0\.resnets\.(\d+)\."),
        "down_block_types": down,
        "mid_block_type": "UNetMidBlock2DCrossAttn" if mid_depth else "UNetMidBlock2D",
        "up_block_types": tuple(name.replace("Down", "Up") for name in reversed(down)),
        "transformer_layers_per_block": tuple(depth or 1 for depth in depths),
        "cross_attention_dim": tensors.size(to_k, 1),
        "use_linear_projection": linear,
        "attention_head_dim": heads,  # of this class it is the number of heads
        "norm_num_groups": default_groups or norm_num_groups,
        **_embeddings(tensors, widths[0]),
    }


@dataclass(frozen=True)
class _Tensors:
    """What names and shapes of a U-Net's tensors, in diffusers' names, say of its architecture."""

    path: Path
    shapes: Shapes

    def size(self, name: str, axis: int = 0) -> int:
        if len(self.shapes.get(name, ())) <= axis:
            raise UserError(
                f"{self.path}: tensor {name}, in diffusers' names, is missing or has too few axes; is it whole?"
            )
        return self.shapes[name][axis]

    def count(self, pattern: str) -> int:
        """The number of different values of the pattern's group."""
        return len({match[1] for name in self.shapes if (match := re.match(pattern, name))})

    def depth(self, block: str) -> int:
        """The number of transformer layers in each attention of a block."""
        return self.count(rf"{block}\.attentions\.0\.transformer_blocks\.(\d+)\.")


def _attention_heads(
    path: Path,
    widths: tuple[int, ...],
    attending: tuple[int, ...],
    linear: bool,
    attention_head_dim: int,
    original: bool,
) -> tuple[tuple[int, ...], int | None]:
    """The number of heads of each level, and of normalisation groups if a published model determines it; see `read`.

    `attending` are the widths of levels with attention. UserError if the number of heads can't be known.
    """
    if linear and not any(width % 64 for width in widths):
        return tuple(max(1, width // 64) for width in widths), 32
    if not linear and widths == SD1:
        if not original:
            raise UserError(
                f"{path}: has the shapes of Stable Diffusion 1, and nothing tells how many heads its attention has; "
                "put its config.json beside it, or give the folder"
            )
        return (8,) * len(widths), 32
    for width in attending:
        if width % attention_head_dim:
            raise UserError(
                f"{path}: stage2.attention_head_dim is {attention_head_dim}, which doesn't divide its width {width}; "
                "set its own"
            )
    return tuple(max(1, width // attention_head_dim) for width in widths), None


def _embeddings(tensors: _Tensors, width: int) -> dict[str, Any]:
    """The configuration of the embeddings of time, class, sizes and pooled text; `width` is that of level 0."""
    config: dict[str, Any] = {}
    if tensors.size("down_blocks.0.resnets.0.time_emb_proj.weight") == 2 * width:
        config["resnet_time_scale_shift"] = "scale_shift"
    if "class_embedding.weight" in tensors.shapes:
        config["num_class_embeds"] = tensors.size("class_embedding.weight")
    if "add_embedding.linear_1.weight" in tensors.shapes:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": tensors.size("add_embedding.linear_1.weight", 1),
        }
    if "add_embedding.pool.positional_embedding" in tensors.shapes:
        config |= {"addition_embed_type": "text", "addition_embed_type_num_heads": 8}  # as ldm.models.unet builds it
    return config
