"""Adapter files of any program, read for the layers of a model."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from torch import nn

from ldm.models.adapters import diffusers_layout, kohya_layout
from ldm.models.adapters.diffusers_layout import FILE
from ldm.models.adapters.factors import LayerAdapter
from ldm.models.adapters.merge import weight_of
from ldm.models.convert.safetensors_file import opened
from ldm.models.finite import describe_weights
from ldm.models.weight_files import PICKLES, contents
from ldm.utils.errors import UserError, first_line

Tensors = dict[str, torch.Tensor]


def locate(name: str, option: str = "--lora") -> Path:
    """The file of an adapter: itself, or `pytorch_lora_weights.safetensors` of a folder, a run, or an id of the Hub.

    UserError, naming `option`, if there is none.
    """
    path = Path(name)
    if path.is_file() or path.suffix in (".safetensors", *PICKLES):
        return path
    if path.is_dir():
        folders = (path, path / "lora")
        if file := next((folder / FILE for folder in folders if (folder / FILE).is_file()), None):
            return file
        raise UserError(f"{option}: {name} has no {FILE}; name the file itself")
    try:
        return Path(hf_hub_download(name, FILE))
    except Exception as error:  # of the Hub, its cache and the network: many kinds
        raise UserError(
            f"{option}: {name} is no file or folder, and the Hub gave no {FILE} ({first_line(error)}); check the name"
        ) from None


def read_file(path: Path, option: str = "--lora") -> tuple[Tensors, dict[str, str]]:
    """The tensors and the header of a file; UserError, naming `option`, if it can't be read or is not finite."""
    try:
        with opened(path) as file:
            tensors, header = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    except UserError as error:
        raise UserError(f"{option}: {error}") from None
    if broken := describe_weights(tensors):
        raise UserError(f"{option}: {path}: {broken}; take an earlier file")
    return tensors, header or {}


def read_adapter(path: Path, networks: Mapping[str, nn.Module], option: str = "--lora") -> diffusers_layout.Adapter:
    """The adapter in a file of diffusers' or kohya's layout, by the names of the networks' layers.

    `networks` are those of a model by component: `unet`, `text_encoder`, `text_encoder_2`. Keys that match none of
    their layers are counted in a line on standard error. UserError, naming `option`, if none matches, or shapes differ,
    as those of an adapter of another base do.
    """
    tensors, header = read_file(path, option)
    if kohya_layout.is_kohya(tensors):
        adapter, unknown = kohya_layout.parse(tensors, networks)
    else:
        parsed, unknown = diffusers_layout.parse(tensors, header)
        adapter, unmatched = match_layers(parsed, networks)
        unknown += unmatched
    if not adapter:
        first = f" (the first: {min(unknown)})" if unknown else ""
        raise UserError(
            f"{option}: {path}: no tensor belongs to a layer of the model{first}; it holds {contents(tensors)}"
        )
    check_shapes(path, adapter, networks, option)
    if unknown:
        print(
            f"{path}: {len(unknown)} of {len(tensors)} tensors belong to no layer of the model and are left out "
            f"(the first: {min(unknown)})",
            file=sys.stderr,
        )
    return adapter


def match_layers(
    parsed: Mapping[str, Mapping[str, LayerAdapter]], networks: Mapping[str, nn.Module]
) -> tuple[dict[str, dict[str, LayerAdapter]], list[str]]:
    """The layers that networks have, by their names there, and the tensors of others."""
    names = {
        component: {name.removeprefix("text_model."): name for name in weighted_layers(network)}
        for component, network in networks.items()
    }
    adapter: dict[str, dict[str, LayerAdapter]] = {}
    unmatched = []
    for prefix, changes in parsed.items():
        for name, change in changes.items():
            components: Iterable[str] = [prefix] if prefix else networks
            component = next((c for c in components if name in names.get(c, ())), None)
            if component is None:
                unmatched += [f"{prefix}.{name}".strip(".") + f".{factor}" for factor in change.factors]
            else:
                adapter.setdefault(component, {})[names[component][name]] = change
    return adapter, unmatched


def weighted_layers(network: Any) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def check_shapes(
    path: Path, adapter: diffusers_layout.Adapter, networks: Mapping[str, nn.Module], option: str = "--lora"
) -> None:
    """UserError for a change of another shape than its layer's weight."""
    for component, changes in adapter.items():
        for layer, change in changes.items():
            weight = weight_of(networks[component], layer)
            expected = (weight.shape[0], weight[0].numel())
            try:
                shape = change.shape()
            except RuntimeError as error:
                raise UserError(f"{option}: {path}: {component}.{layer}: {first_line(error)}; fetch it anew") from None
            if shape != expected:
                raise UserError(
                    f"{option}: {path}: {component}.{layer} changes a weight of {shape[0]} × {shape[1]}, the model's "
                    f"is {expected[0]} × {expected[1]}: it is of another base; give one of this model's family"
                )
            if (axes := magnitude_shape(change)) and axes not in magnitude_shapes(weight):
                raise UserError(f"{option}: {path}: {component}.{layer} has magnitudes {axes}; fetch it anew")


def magnitude_shape(change: LayerAdapter) -> tuple[int, ...]:
    return tuple(change.factors["dora_scale"].shape) if "dora_scale" in change.factors else ()


def magnitude_shapes(weight: torch.Tensor) -> list[tuple[int, ...]]:
    """The shapes that magnitudes of a weight may have, one for each output or input."""
    outputs, inputs, *kernel = weight.shape
    return [(outputs, 1, *[1] * len(kernel)), (1, inputs, *[1] * len(kernel))]
