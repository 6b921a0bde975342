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
            base.weight.copy_(changes[name].changed(base.weight))
            network.set_submodule(name, base)
    if hasattr(network, "peft_config"):
        del network.peft_config


@torch.no_grad()
def add_to_weights(networks: Mapping[str, nn.Module], adapters: Sequence[tuple[Adapter, float]]) -> None:
    """Adds adapters, each with its strength, to the weights of networks, by component, in place and in float32.

    Several have the effect that they have in diffusers unmerged.
    """
    changed: dict[tuple[str, str], torch.Tensor] = {}
    for adapter, strength in adapters:
        for component, changes in adapter.items():
            for layer, change in changes.items():
                weight, key = weight_of(networks[component], layer), (component, layer)
                changed[key] = change.changed(weight, strength, changed.get(key))
    for (component, layer), new_weight in changed.items():
        weight_of(networks[component], layer).copy_(new_weight)


def weight_of(network: nn.Module, layer: str) -> torch.Tensor:
    return network.get_parameter(f"{layer}.weight")
