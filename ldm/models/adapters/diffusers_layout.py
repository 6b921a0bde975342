"""`pytorch_lora_weights.safetensors`, as diffusers' `save_lora_weights` writes it: peft's names and configuration.

    unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight
    text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_magnitude_vector
    unet.mid_block.attentions.0.proj_in.lokr_w2_a

The header's `lora_adapter_metadata` holds ranks and alphas; a file without it scales by 1.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig
from peft.tuners.lokr.layer import factorization
from peft.utils.other import get_pattern_key

from ldm.models.adapters.factors import LOHA, LOKR, MAGNITUDE, LayerAdapter
from ldm.models.convert import safetensors_file
from ldm.utils.errors import UserError

FILE = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"  # key in the header
Adapter = Mapping[str, Mapping[str, LayerAdapter]]
"""Changes by component (`unet`, `text_encoder`, `text_encoder_2`) and the name of their layer in it."""
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")

OLD_NAMES = (
    (r"\.processor\.", "."),
    (r"\.(?:lora|lora_linear_layer)\.down\.weight$", ".lora_A.weight"),
    (r"\.(?:lora|lora_linear_layer)\.up\.weight$", ".lora_B.weight"),
    (r"(self_attn\.)to_(q|k|v|out)_lora\.", r"\1\2_proj_lora."),
    (r"to_out_lora\.", "to_out.0_lora."),
    (r"_lora\.down\.weight$", ".lora_A.weight"),
    (r"_lora\.up\.weight$", ".lora_B.weight"),
)
"""What older versions of diffusers wrote, and peft's names for it."""
KEY = re.compile(
    rf"(.+)\.(?:(lora_A|lora_B)(?:\.\w+)?\.weight|(lora_magnitude_vector)(?:\.\w+)*|({'|'.join((*LOKR, *LOHA))})"
    r"(?:\.\w+)?|(alpha))"
)
"""A layer's name and that of a factor, after which an adapter's name may stand."""


def write(path: Path, adapter: Adapter) -> None:
    """Writes an adapter; UserError for changes that peft has no layer for."""
    layers: dict[str, Any] = {}
    for component, changes in adapter.items():
        layers[f"{component}_lora_layers"] = tensors_of(component, changes)
        config = config_of(component, changes).to_dict()
        config["target_modules"] = sorted(config["target_modules"])  # peft has a set, whose order is of chance
        layers[f"{component}_lora_adapter_metadata"] = config
    StableDiffusionXLPipeline.save_lora_weights(path.parent, weight_name=path.name, **layers)
    safetensors_file.sort_metadata(path)


def tensors_of(component: str, changes: Mapping[str, LayerAdapter]) -> dict[str, torch.Tensor]:
    """The tensors of a component's layers by peft's names."""
    tensors = {}
    for layer, change in changes.items():
        for name, tensor in change.factors.items():
            if name == MAGNITUDE:  # peft has one for each output; of a convolution on the axis of its channels
                convolution = change.factors["lora_A"].dim() == 4
                name, tensor = "lora_magnitude_vector", tensor.flatten()
                tensor = tensor[None, :, None, None] if convolution else tensor
            # transformers 5 finds a text encoder's magnitudes by this ending alone, diffusers the U-Net's without it
            weight = name in ("lora_A", "lora_B") or (name == "lora_magnitude_vector" and component != "unet")
            suffix = ".weight" if weight else ""
            tensors[f"{_file_name(component, layer)}.{name}{suffix}"] = tensor.cpu().contiguous()
    return tensors


def _file_name(component: str, layer: str) -> str:
    """transformers 5 dropped `text_model.` from CLIP's names, but files keep it: other programs look for it."""
    prefix = "text_model." if component != "unet" and layer.startswith("encoder.layers.") else ""
    return prefix + layer


def config_of(component: str, changes: Mapping[str, LayerAdapter]) -> PeftConfig:
    """peft's configuration of a component's layers; UserError where it has none for them."""
    kinds = {change.kind for change in changes.values()}
    factors = {name for change in changes.values() for name in change.factors}
    kind = min(kinds)
    reason = ""
    if len(kinds) > 1:
        reason = f"its layers are of several kinds, {', '.join(sorted(kinds))}"
    elif "lora_mid" in factors or (MAGNITUDE in factors and kind != "dora"):
        reason = f"it has {'lora_mid' if 'lora_mid' in factors else MAGNITUDE} factors of a {kind}"
    elif any(change.factors[MAGNITUDE].shape[0] == 1 for change in changes.values() if kind == "dora"):
        reason = "its magnitudes are of the inputs"
    if reason:
        raise UserError(f"{component}: diffusers' layout can't hold the adapter: {reason}; kohya's can")
    options = _ranks({_module(component, layer): change for layer, change in changes.items()})
    if component == "unet":  # the name is whole; that of a text encoder may stand after `text_model.`
        options |= {key: {f"^{name}": value for name, value in options[key].items()} for key in PATTERNS}
    if kind in ("lora", "dora"):
        return LoraConfig(lora_alpha=options.pop("alpha"), use_dora=kind == "dora", **options)
    options["use_effective_conv2d"] = bool(factors & {"hada_t1", "lokr_t2"})
    if kind == "loha":
        return LoHaConfig(**options)
    factor = _lokr_factor(component, changes)
    return LoKrConfig(decompose_both="lokr_w1_a" in factors, decompose_factor=factor, **options)


PATTERNS = ("rank_pattern", "alpha_pattern")


def _module(component: str, layer: str) -> str:
    return layer if component == "unet" else layer.removeprefix("text_model.")


def _ranks(changes: Mapping[str, LayerAdapter]) -> dict[str, Any]:
    """Ranks and alphas: the most frequent ones, and those of other layers."""
    ranks = {name: change.rank for name, change in changes.items()}
    alphas = {name: int(a) if (a := change.alpha).is_integer() else a for name, change in changes.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": rank,
        "alpha": alpha,
        "target_modules": list(changes),
        "rank_pattern": {re.escape(name): value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {re.escape(name): value for name, value in alphas.items() if value != alpha},
    }


def _lokr_factor(component: str, changes: Mapping[str, LayerAdapter]) -> int:
    """The `decompose_factor` with which peft divides the sides of all layers as these are; UserError without one."""
    outputs, inputs = set(), set()  # sides of the first and the second matrix
    for change in changes.values():
        f = change.factors
        first = f["lokr_w1"].shape if "lokr_w1" in f else (f["lokr_w1_a"].shape[0], f["lokr_w1_b"].shape[1])
        rows, columns = change.shape()
        outputs.add((first[0], rows // first[0]))
        inputs.add((first[1], columns // first[1]))

    def divides(factor: int, first: int, second: int, kernels: tuple[int, ...]) -> bool:
        return any(factorization(first * second // k, factor) == (first, second / k) for k in kernels)

    for factor in (-1, *sorted(first for first, _ in outputs | inputs)):
        if all(divides(factor, *sides, (1,)) for sides in outputs) and all(
            divides(factor, *sides, (1, 9))
            for sides in inputs  # columns are those of a kernel's positions too
        ):
            return factor
    raise UserError(
        f"{component}: diffusers' layout can't hold the adapter: peft divides its layers' sides otherwise; kohya's can"
    )


def parse(tensors: Mapping[str, torch.Tensor], header: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """The layers of a file, `{component: {layer: LayerAdapter}}`, and keys that are none of a layer's factors.

    Names of text encoders are without `text_model.`. Names without a component are those of the component "".
    """
    factors_of: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        if not (match := KEY.fullmatch(peft_name(key))):
            unknown.append(key)
            continue
        component, layer = split(match[1])
        name = next(group for group in match.groups()[1:] if group)
        if name == "lora_magnitude_vector":
            name, tensor = MAGNITUDE, tensor.flatten()
        factors_of.setdefault((component, layer), {})[name] = tensor
    metadata = json.loads(header.get(METADATA, "{}"))
    adapter: dict[str, dict[str, LayerAdapter]] = {}
    for (component, layer), factors in factors_of.items():
        alpha = factors.pop("alpha", None)
        change = LayerAdapter(with_axes(factors))
        if change.complete:
            scale = float(alpha) / change.rank if alpha is not None else scale_of(component, layer, change, metadata)
            adapter.setdefault(component, {})[layer] = LayerAdapter(change.factors, scale)
        else:
            unknown += [f"{component}.{layer}".strip(".") + "." + name for name in factors]
    return adapter, unknown


def with_axes(factors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The factors with a magnitude of as many axes as the weight."""
    if MAGNITUDE not in factors or "lora_A" not in factors:
        return dict(factors)
    return {**factors, MAGNITUDE: factors[MAGNITUDE].reshape(-1, *[1] * (factors["lora_A"].dim() - 1))}


def peft_name(key: str) -> str:
    """peft's name of a tensor that an older version named otherwise."""
    for old, new in OLD_NAMES:
        key = re.sub(old, new, key)
    return key.removeprefix("base_model.model.").replace(".to_out.lora_magnitude", ".to_out.0.lora_magnitude")


def split(name: str) -> tuple[str, str]:
    """Component and layer; the component is empty where the name has none."""
    component, _, layer = name.partition(".")
    if component not in COMPONENTS:
        return "", name.removeprefix("text_model.")
    return component, layer.removeprefix("text_model.")


def scale_of(component: str, layer: str, change: LayerAdapter, metadata: Mapping[str, Any]) -> float:
    """Alpha / rank by peft's configuration in the header; 1 without one."""
    prefix = f"{component}." if component else ""
    alpha = metadata.get(f"{prefix}lora_alpha", metadata.get(f"{prefix}alpha"))
    if alpha is None:
        return 1.0
    values = {}
    for key, default in (("alpha_pattern", alpha), ("rank_pattern", metadata.get(f"{prefix}r", change.rank))):
        pattern = metadata.get(f"{prefix}{key}") or {}
        values[key] = pattern.get(get_pattern_key(list(pattern), layer), default)
    rank = values["rank_pattern"]
    return float(values["alpha_pattern"] / (math.sqrt(rank) if metadata.get(f"{prefix}use_rslora") else rank))
