"""The layout of kohya's scripts and of LyCORIS, which ComfyUI and A1111 read.

    lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight   .lora_up.weight .alpha
    lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.dora_scale                   of SDXL
    lora_te_text_model_encoder_layers_0_self_attn_q_proj.lokr_w1                            of SDXL lora_te1_, lora_te2_

kohya's scripts name the layers of Stable Diffusion 1 and 2 as diffusers does, and those of SDXL as its original U-Net.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.models.adapters.diffusers_layout import Adapter
from ldm.models.adapters.factors import FACTORS, LayerAdapter
from ldm.models.convert import checkpoint, safetensors_file

TO_FILE = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight", "lora_mid": "lora_mid.weight"}
FROM_FILE = {file_name: name for name, file_name in TO_FILE.items()} | {
    name: name for name in FACTORS if name not in TO_FILE
}
UNET = "lora_unet_"
TEXT = {"text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",)}
PREFIXES = (UNET, "lora_te_", "lora_te1_", "lora_te2_", "lycoris_")
VERSIONS: dict[str, str] = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
"""kohya's names of the base models, which A1111 reads."""
BLOCKS = {"DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"}


def write(path: Path, adapter: Adapter, networks: Mapping[str, nn.Module], metadata: Mapping[str, str]) -> None:
    """Writes an adapter of networks, by component, whose layers it names; alphas in float32."""
    tensors = {
        f"{file_name(component, layer, networks)}.{name}": tensor.cpu()
        for component, changes in adapter.items()
        for layer, change in changes.items()
        for name, tensor in tensors_of(change).items()
    }
    safetensors_file.write(path, tensors, metadata)


def tensors_of(change: LayerAdapter) -> dict[str, torch.Tensor]:
    """A layer's tensors by the names of kohya and LyCORIS, whose programs scale by alpha / rank too.

    But not LoKr of two whole matrices, which LyCORIS never scales: there the scale goes into the first.
    """
    change = scaled_as_read(change)
    factors = {TO_FILE.get(name, name): tensor for name, tensor in change.factors.items()}
    return factors | {"alpha": torch.tensor(change.alpha)}


def scaled_as_read(change: LayerAdapter) -> LayerAdapter:
    """The change of a layer as it is read of this layout's files, whose scale is 1 for two whole matrices."""
    if not {"lokr_w1", "lokr_w2"} <= change.factors.keys():
        return change
    return LayerAdapter({**change.factors, "lokr_w1": change.factors["lokr_w1"] * change.scale})


def file_name(component: str, layer: str, networks: Mapping[str, nn.Module]) -> str:
    """A layer's name in a file; of several that are read, the one that kohya's scripts write."""
    sdxl = is_sdxl(networks)
    if component == "unet":
        return UNET + flat(original_name(layer, networks["unet"]) if sdxl else layer)
    prefixes = TEXT[component]
    return prefixes[-1 if sdxl else 0] + flat(full_text_name(layer))


def is_sdxl(networks: Mapping[str, nn.Module]) -> bool:
    """Whether networks are those of SDXL, whose U-Net has names in the original layout."""
    if not (unet := networks.get("unet")):
        return "text_encoder_2" in networks
    config: Any = unet.config
    blocks = {*config.down_block_types, *config.up_block_types}
    return config.get("addition_embed_type") == "text_time" and blocks <= BLOCKS


def original_name(layer: str, unet: Any) -> str:
    return checkpoint.unet_name(f"{layer}.weight", unet.config).removesuffix(".weight")


def full_text_name(layer: str) -> str:
    """The name of a text encoder's layer with `text_model.`, which transformers 5 dropped from CLIP's."""
    return f"text_model.{layer}" if layer.startswith("encoder.") else layer


def flat(name: str) -> str:
    return name.replace(".", "_")


def layer_names(networks: Mapping[str, nn.Module]) -> dict[str, tuple[str, str]]:
    """Component and layer by the names that files have for the layers of networks, from any program."""
    names: dict[str, tuple[str, str]] = {}
    for component, network in networks.items():
        for layer, module in network.named_modules():
            if not isinstance(module, nn.Linear | nn.Conv2d):
                continue
            if component == "unet":
                own = {layer, original_name(layer, network)} if hasattr(network.config, "up_block_types") else {layer}
                flattened = {prefix + flat(name) for name in own for prefix in (UNET, "lycoris_")}
            else:
                own = {layer, full_text_name(layer)}
                flattened = {prefix + flat(name) for name in own for prefix in TEXT[component]}
            names |= dict.fromkeys(flattened, (component, layer))
    return names


def is_kohya(keys: Iterable[str]) -> bool:
    return any(key.startswith(PREFIXES) for key in keys)


def parse(
    tensors: Mapping[str, torch.Tensor], networks: Mapping[str, nn.Module]
) -> tuple[dict[str, dict[str, LayerAdapter]], list[str]]:
    """The layers of a file that networks have, and the keys that match none of theirs."""
    names = layer_names(networks)
    factors_of: dict[str, dict[str, torch.Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        layer, _, factor = key.partition(".")
        if layer in names and (factor in FROM_FILE or factor == "alpha"):
            factors_of.setdefault(layer, {})[FROM_FILE.get(factor, factor)] = tensor
        else:
            unknown.append(key)
    adapter: dict[str, dict[str, LayerAdapter]] = {}
    for file_layer, factors in factors_of.items():
        alpha = factors.pop("alpha", None)
        change = LayerAdapter(factors)
        if not change.complete:
            unknown += [f"{file_layer}.{TO_FILE.get(name, name)}" for name in factors]
            continue
        component, layer = names[file_layer]
        is_unfactored = {"lokr_w1", "lokr_w2"} <= factors.keys()
        scale = 1.0 if alpha is None or is_unfactored else float(alpha) / change.rank
        adapter.setdefault(component, {})[layer] = LayerAdapter(factors, scale)
    return adapter, unknown


def metadata_of(adapter: Adapter, title: str, architecture: str | None, side: int | None = None) -> dict[str, str]:
    """The header: kohya's keys, and those of https://github.com/Stability-AI/ModelSpec.

    `architecture` is `sd1`, `sd2` or `sdxl`; None for another base, of which the header then says nothing. `side` is
    that of the training images, in pixels.
    """
    changes = [change for layers in adapter.values() for change in layers.values()]
    rank = Counter(change.rank for change in changes).most_common(1)[0][0]
    alpha = Counter(change.alpha for change in changes).most_common(1)[0][0]
    kind = changes[0].kind
    header = {"format": "pt", "ss_network_dim": str(rank), "ss_network_alpha": f"{alpha:g}", "ss_output_name": title}
    if kind == "lora":
        header["ss_network_module"] = "networks.lora"
    else:
        arguments = {"algo": "lora", "dora_wd": "True", "wd_on_output": "True"} if kind == "dora" else {"algo": kind}
        header |= {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps(arguments)}
    header |= {"modelspec.sai_model_spec": "1.0.0", "modelspec.title": title}
    if side:
        header["modelspec.resolution"] = f"{side}x{side}"
    if architecture is None:
        return header
    original = "https://github.com/Stability-AI/generative-models"
    return header | {
        "ss_base_model_version": VERSIONS[architecture],
        "ss_v2": str(architecture == "sd2"),
        "modelspec.architecture": f"{checkpoint.ARCHITECTURES[architecture]}/lora",
        "modelspec.implementation": original if architecture == "sdxl" else "diffusers",
    }
