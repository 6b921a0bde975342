"""Adapters baked into the weights of their networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ldm.models.adapters.diffusers_layout import Adapter
from ldm.models.adapters.factors import layer_adapters
from ldm.utils.errors import UserError


@torch.no_grad()
def merge_adapters(network: Any) -> None:
    """Bakes the adapter of `add_adapter` into a network's weights and removes peft's layers, in place.

    The network has the names of one without an adapter. Sums are in float32, weights keep their type. UserError where
    they are quantized.
    """
    changes = layer_adapters(network)
    for name, layer in list(network.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            base: Any = layer.get_base_layer()
            if not base.weight.is_floating_point():
                raise UserError(f"{name}: weights of 8 or 4 bits can't take an adapter; load the base in full")
            base.weight.copy_(base.weight.float() + changes[name].change(base.weight))
            network.set_submodule(name, base)
    if hasattr(network, "peft_config"):
        del network.peft_config


@torch.no_grad()
def add_to_weights(networks: Mapping[str, nn.Module], adapters: Sequence[tuple[Adapter, float]]) -> None:
    """Adds adapters, each with its strength, to the weights of networks, by component, in place and in float32.

    As in diffusers, every one of several changes the weights that the network had before.
    """
    sums: dict[tuple[str, str], torch.Tensor] = {}
    for adapter, strength in adapters:
        for component, changes in adapter.items():
            for layer, change in changes.items():
                added = change.change(weight_of(networks[component], layer), strength)
                sums[component, layer] = sums[component, layer] + added if (component, layer) in sums else added
    for (component, layer), total in sums.items():
        weight = weight_of(networks[component], layer)
        weight.copy_(weight.float() + total)


def weight_of(network: nn.Module, layer: str) -> torch.Tensor:
    return network.get_parameter(f"{layer}.weight")
