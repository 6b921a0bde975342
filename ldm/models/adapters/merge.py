"""Adapters baked into the weights of their networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ldm.models.adapters.diffusers_layout import Adapter
from ldm.models.adapters.factors import layer_adapters
from ldm.utils.errors import UserError


@torch.no_grad()
def merge_adapters(network: nn.Module) -> None:
    """Bakes the adapter of `add_adapter` into a network's weights and removes peft's layers, in place.

    The network has the names of one without an adapter. Sums are in float32, weights keep their type. UserError where
    they are quantized.
    """
    changes = layer_adapters(network)
    for name, layer in list(network.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            base = layer.get_base_layer()
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
                weight = networks[component].get_submodule(layer).weight
                sums[component, layer] = sums.get((component, layer), 0) + change.change(weight, strength)
    for (component, layer), change in sums.items():
        weight = networks[component].get_submodule(layer).weight
        weight.copy_(weight.float() + change)
