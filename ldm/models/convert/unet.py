"""A U-Net that reads text, from one `.safetensors`: in the layout of CompVis and Stability AI, or in diffusers' own.

The names of the original are turned into diffusers' by diffusers' own conversion.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.loaders.single_file_utils import LDM_UNET_KEY, convert_ldm_unet_checkpoint

from ldm.models.convert.autoencoder import Shapes, opened, same_names
from ldm.utils.errors import UserError

SD1 = (320, 640, 1280, 1280)  # widths of Stable Diffusion 1 and 2
V_MARKS = {"v_pred", "ztsnr"}  # empty tensors that mark SDXL models that predict v
SAID = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}  # of `modelspec.prediction_type`


def read(path: Path, head_size: int, groups: int) -> tuple[UNet2DConditionModel | UNet2DModel, str | None]:
    """The U-Net of a file, alone or inside a whole checkpoint: float32, on the CPU. What it predicts, if that is said.

    A file in diffusers' layout with its `config.json` beside it is what that says. Otherwise the tensors' names and
    shapes tell the architecture, but for the heads of attention and the groups of the normalisation. These are
      - 64 channels a head, 32 groups where projections are linear and 64 divides the widths: Stable Diffusion 2 and XL;
      - 8 heads a level, 32 groups at the widths of Stable Diffusion 1 in the original layout;
      - `head_size` channels a head, and `groups`, for any other.
    Averaged weights beside the others (`model_ema.*`) are left alone, as by diffusers' `extract_ema=False`.

    Raises UserError if the file is missing, damaged, or no such U-Net, or a tensor is missing, left over or misshapen.
    """
    with opened(path) as file:
        names = set(file.keys())
        places, left = table(path, names)
        shapes = {name: tuple(file.get_slice(place).get_shape()) for name, place in places.items()}
        original = any(name != place for name, place in places.items())
        unet = _empty(path, shapes, head_size, groups, original)
        expected = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
        same_names(path, set(expected), {*shapes, *left}, type(unet).__name__)
        for name, shape in expected.items():
            if shapes[name] != shape:
                raise UserError(
                    f"{path}: tensor {places[name]} has shape {shapes[name]}; beside the others it would be {shape}, "
                    f"with stage2.attention_head_dim={head_size} and stage2.norm_num_groups={groups} where it does not "
                    "tell them"
                )
        # copies: else they are the file, which may be replaced
        tensors = {name: file.get_tensor(places[name]).to(torch.float32, copy=True) for name in expected}
        said = SAID.get((file.metadata() or {}).get("modelspec.prediction_type", ""))
    unet.load_state_dict(tensors, assign=True)
    return unet.eval(), "v_prediction" if V_MARKS & names else said


def table(path: Path, names: set[str]) -> tuple[dict[str, str], set[str]]:
    """Diffusers' name of each tensor → its name in a file of these names, and the U-Net's names that are left over.

    UserError where there is no U-Net.
    """
    inside = any(name.startswith(LDM_UNET_KEY) for name in names)
    mine = {name.removeprefix(LDM_UNET_KEY) for name in names if not inside or name.startswith(LDM_UNET_KEY)}
    if not inside:
        mine = {name for name in mine - V_MARKS if not name.startswith("model_ema.")}
    if not inside and {"conv_in.weight", "time_embedding.linear_1.weight"} <= mine:
        return {name: name for name in mine}, set()
    if "input_blocks.0.0.weight" not in mine:
        raise UserError(
            f"{path}: holds no U-Net: no tensor input_blocks.0.0.weight, alone or after {LDM_UNET_KEY}, and none of "
            "diffusers' layout; transformers, as of SD 3 and FLUX, are not known"
        )
    blocks = {int(match[1]) for name in mine if (match := re.match(r"input_blocks\.(\d+)\.", name))}
    halving = {i for i in blocks if f"input_blocks.{i}.0.op.weight" in mine}
    config: dict[str, Any] = {"layers_per_block": max(1, min(halving, default=len(blocks)) - 1)}
    config |= {"addition_embed_type": "text_time"} if "label_emb.0.0.weight" in mine else {}
    config |= {"num_class_embeds": 1} if "label_emb.weight" in mine else {}
    before = LDM_UNET_KEY if inside else ""
    try:  # the conversion only moves what it is given: of names it makes a table
        places = convert_ldm_unet_checkpoint({LDM_UNET_KEY + name: before + name for name in mine}, config)
    except KeyError as error:
        raise UserError(f"{path}: lacks tensor {before}{error.args[0]}; is the file whole and unaltered?") from None
    places = {name: place for name, place in places.items() if place}  # None for a bias that the file lacks
    return places, {before + name for name in mine} - set(places.values())


def _empty(
    path: Path, shapes: Shapes, head_size: int, groups: int, original: bool
) -> UNet2DConditionModel | UNet2DModel:
    """The model that the file is of, without memory for weights."""
    beside = path.with_name("config.json")
    kinds: dict[str, Any] = {kind.__name__: kind for kind in (UNet2DConditionModel, UNet2DModel)}
    try:
        with torch.device("meta"):
            if not original and beside.exists():
                config = UNet2DConditionModel.load_config(path.parent)
                kind = kinds.get(config.get("_class_name"))
                if not kind:
                    raise UserError(f"{beside}: is of a {config.get('_class_name')}; known are {', '.join(kinds)}")
                return kind.from_config(config)
            return UNet2DConditionModel(**architecture(path, shapes, head_size, groups, original))
    except UserError:
        raise
    except (OSError, ValueError) as error:  # diffusers' own checks, of groups for one
        raise UserError(
            f"{path}: can't be built: {str(error).splitlines()[0]}; stage2.norm_num_groups is {groups}"
        ) from None


def architecture(path: Path, shapes: Shapes, head_size: int, groups: int, original: bool = True) -> dict[str, Any]:
    """The configuration that names and shapes, as diffusers has them, tell of a UNet2DConditionModel."""

    def size(name: str, axis: int = 0) -> int:
        if len(shapes.get(name, ())) <= axis:
            raise UserError(f"{path}: tensor {name}, in diffusers' names, is missing or has too few axes; is it whole?")
        return shapes[name][axis]

    def count(pattern: str) -> int:
        return len({match[1] for name in shapes if (match := re.match(pattern, name))})

    def depth(block: str) -> int:
        return count(rf"{block}\.attentions\.0\.transformer_blocks\.(\d+)\.")

    levels = count(r"down_blocks\.(\d+)\.")
    widths = tuple(size(f"down_blocks.{i}.resnets.0.conv1.weight") for i in range(levels))
    depths = [depth(f"down_blocks.{i}") for i in range(levels)]
    mid = depth("mid_block")
    states = next((name for name in sorted(shapes) if name.endswith(".attn2.to_k.weight")), None)
    if not levels or states is None:
        raise UserError(f"{path}: its U-Net reads no text; give the folder that it is in, with its config.json")
    projection = states.split(".transformer_blocks.")[0] + ".proj_in.weight"
    linear = size(projection, 1) and len(shapes[projection]) == 2  # not a 1×1 convolution
    wide, eight = linear and not any(width % 64 for width in widths), not linear and widths == SD1
    if eight and not original:
        raise UserError(
            f"{path}: has the shapes of Stable Diffusion 1, and nothing tells how many heads its attention has; "
            "put its config.json beside it, or give the folder"
        )
    odd = [width for width, each in zip(widths, depths, strict=True) if each and width % head_size]
    if odd and not wide and not eight:
        raise UserError(
            f"{path}: stage2.attention_head_dim is {head_size}, which doesn't divide its width {odd[0]}; set its own"
        )
    down = tuple("CrossAttnDownBlock2D" if each else "DownBlock2D" for each in depths)
    if not depths[-1]:
        depths[-1] = mid  # what diffusers builds the middle block with
    config: dict[str, Any] = {
        "in_channels": size("conv_in.weight", 1),
        "out_channels": size("conv_out.weight"),
        "block_out_channels": widths,
        "layers_per_block": count(r"down_blocks\.0\.resnets\.(\d+)\."),
        "down_block_types": down,
        "mid_block_type": "UNetMidBlock2DCrossAttn" if mid else "UNetMidBlock2D",
        "up_block_types": tuple(name.replace("Down", "Up") for name in reversed(down)),
        "transformer_layers_per_block": tuple(each or 1 for each in depths),
        "cross_attention_dim": size(states, 1),
        "use_linear_projection": linear,
        # diffusers' `attention_head_dim` of this class is the number of heads
        "attention_head_dim": tuple(8 if eight else max(1, width // (64 if wide else head_size)) for width in widths),
        "norm_num_groups": 32 if wide or eight else groups,
    }
    if size("down_blocks.0.resnets.0.time_emb_proj.weight") == 2 * widths[0]:
        config["resnet_time_scale_shift"] = "scale_shift"
    if "class_embedding.weight" in shapes:
        config["num_class_embeds"] = size("class_embedding.weight")
    if "add_embedding.linear_1.weight" in shapes:
        config |= {
            "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": size("add_embedding.linear_1.weight", 1),
        }  # fmt: skip
    if "add_embedding.pool.positional_embedding" in shapes:
        config |= {"addition_embed_type": "text", "addition_embed_type_num_heads": 8}  # as ldm.models.unet builds it
    return config
