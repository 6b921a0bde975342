"""The precision in which the frozen weights below an adapter are kept."""

from __future__ import annotations

import importlib.util

import torch
from torch import nn

from ldm.models.adapters.inject import target_layers
from ldm.utils.errors import UserError
from ldm.utils.precision import DTYPES

QUANTISED = ("8bit", "4bit")


def check_base_precision(base_precision: str, on_gpu: bool) -> None:
    """UserError where frozen weights can't be kept so on this machine."""
    if base_precision in QUANTISED and not (on_gpu and importlib.util.find_spec("bitsandbytes")):
        raise UserError(
            f"finetune.base_precision: {base_precision} needs a GPU and pip install 'ldm[8bit]'; use bf16, or no"
        )


def convert_base(network: nn.Module, base_precision: str) -> None:
    """Rounds the weights of a network, which will be frozen, to `no`, `bf16`, `fp16`, `8bit` or `4bit`.

    Of the last two the linear layers of transformers are quantised, by LLM.int8 (arXiv 2208.07339) or to NF4 (QLoRA,
    2305.14314), once they are moved to a GPU; all other weights become bf16.
    """
    nn.Module.to(network, torch.bfloat16 if base_precision in QUANTISED else DTYPES[base_precision])
    if base_precision not in QUANTISED:
        return
    import bitsandbytes as bnb

    for name in target_layers(network, "linear"):
        layer = network.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            continue
        shape = (layer.in_features, layer.out_features, layer.bias is not None)
        if base_precision == "8bit":
            quantised = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False)
            quantised.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
        else:
            quantised = bnb.nn.Linear4bit(*shape, compute_dtype=torch.bfloat16, quant_type="nf4")
            quantised.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        quantised.bias = layer.bias
        parent, _, attribute = name.rpartition(".")
        setattr(network.get_submodule(parent), attribute, quantised)


def base_bytes(network: nn.Module, base_precision: str) -> int:
    """Bytes of a network's weights once `convert_base` has rounded and, on a GPU, quantised them.

    LLM.int8 keeps a byte a weight and a float32 scale a row; NF4 half a byte a weight and a float32 scale for 64.
    """
    size = DTYPES[base_precision].itemsize if base_precision not in QUANTISED else torch.bfloat16.itemsize
    total = size * sum(p.numel() for p in network.parameters())
    if base_precision not in QUANTISED:
        return total
    for name in target_layers(network, "linear"):
        layer = network.get_submodule(name)
        if isinstance(layer, nn.Linear):
            count = layer.weight.numel()
            quantised = count + 4 * layer.out_features if base_precision == "8bit" else count // 2 + 4 * -(-count // 64)
            total += quantised - size * count
    return total
