"""U-Nets of diffusers with CompVis' tensor names, for tests of reading such files."""

import re

import torch
from diffusers import UNet2DConditionModel

PREFIX = "model.diffusion_model."


def original(name: str, levels: tuple[str, ...], layers: int) -> str:
    """CompVis' name of a tensor of a diffusers U-Net, whose down blocks are of the types `levels`."""
    fixed = {
        "conv_in.": "input_blocks.0.0.",
        "conv_norm_out.": "out.0.",
        "conv_out.": "out.2.",
        "time_embedding.linear_1.": "time_embed.0.",
        "time_embedding.linear_2.": "time_embed.2.",
        "add_embedding.linear_1.": "label_emb.0.0.",
        "add_embedding.linear_2.": "label_emb.0.2.",
        "class_embedding.": "label_emb.",
        "mid_block.resnets.0.": "middle_block.0.",
        "mid_block.attentions.0.": "middle_block.1.",
        "mid_block.resnets.1.": "middle_block.2.",
    }
    for diffusers_name, compvis_name in fixed.items():
        name = compvis_name + name.removeprefix(diffusers_name) if name.startswith(diffusers_name) else name
    if match := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name):
        direction, block, kind, i, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        first = block * (layers + 1)
        if direction == "down":
            number = 1 + first + (layers if kind == "downsamplers" else i)
            part = {"resnets": "0.", "attentions": "1.", "downsamplers": "0.op."}[kind]
            name = f"input_blocks.{number}.{part}{rest.removeprefix('conv.') if kind == 'downsamplers' else rest}"
        else:
            last = "2." if "Cross" in levels[-1 - block] else "1."
            number = first + (layers if kind == "upsamplers" else i)
            name = f"output_blocks.{number}.{ {'resnets': '0.', 'attentions': '1.', 'upsamplers': last}[kind] }{rest}"
    if "transformer_blocks" not in name:
        for diffusers_name, compvis_name in (
            (".norm1.", ".in_layers.0."),
            (".conv1.", ".in_layers.2."),
            (".time_emb_proj.", ".emb_layers.1."),
            (".norm2.", ".out_layers.0."),
            (".conv2.", ".out_layers.3."),
            (".conv_shortcut.", ".skip_connection."),
        ):
            name = name.replace(diffusers_name, compvis_name)
    return name


def in_original_layout(model: UNet2DConditionModel, prefix: str = PREFIX) -> dict[str, torch.Tensor]:
    levels, layers = model.config.down_block_types, model.config.layers_per_block
    return {prefix + original(name, levels, layers): tensor.clone() for name, tensor in model.state_dict().items()}
