"""`RUN/lora/`: an adapter in diffusers' and in kohya's layout, with a card that says how programs load it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from ldm.models.adapters import diffusers_layout, kohya_layout
from ldm.models.adapters.base_usage import diffusers_code, model_options
from ldm.models.adapters.diffusers_layout import Adapter
from ldm.models.adapters.factors import layer_adapters
from ldm.models.adapters.inject import AdapterSpec
from ldm.models.finite import check_weights
from ldm.utils.atomic_files import atomic_folder

KOHYA_FILE = "kohya.safetensors"
CARD = "README.md"
NAMES = {"lora": "LoRA", "dora": "DoRA", "lokr": "LoKr", "loha": "LoHa"}
BASES = {"sd1": "Stable Diffusion 1", "sd2": "Stable Diffusion 2", "sdxl": "SDXL"}
DORA = (
    "- DoRA: diffusers reads its magnitudes in `pytorch_lora_weights.safetensors` alone. ComfyUI divides by the norm "
    "of the base's weights instead of the changed ones', and A1111 knows magnitudes of the inputs only, so their "
    "images differ; a merged model is exact everywhere."
)
PARTS = {"unet": "U-Net", "text_encoder": "text encoder", "text_encoder_2": "second text encoder"}


def write_lora_folder(
    folder: Path,
    networks: Mapping[str, nn.Module],
    spec: AdapterSpec,
    title: str,
    architecture: str | None = None,
    *,
    base: str = "",
    base_config: str = "",
    prompt: str = "",
    side: int | None = None,
) -> None:
    """Writes the adapters of `add_adapter` in `networks`, atomically: both files and a card.

    `networks` by component: `unet`, `text_encoder`, `text_encoder_2`; those without an adapter are left out.
    `architecture` is `sd1`, `sd2` or `sdxl`; None for another base. `base` is the base model's name, `base_config`
    the pipeline that configures it where it is a single file, `prompt` an example with the words that were trained,
    `side` that of the training images in pixels. UserError where weights are not finite.
    """
    adapter = {name: changes for name, network in networks.items() if (changes := layer_adapters(network))}
    for component, changes in adapter.items():
        factors = {f"{layer}.{n}": t for layer, change in changes.items() for n, t in change.factors.items()}
        check_weights({f"adapter of the {PARTS[component]}, {name}": t for name, t in factors.items()}, folder)
    with atomic_folder(folder) as tmp_path:
        diffusers_layout.write(tmp_path / diffusers_layout.FILE, adapter)
        metadata = kohya_layout.metadata_of(adapter, title, architecture, side)
        kohya_layout.write(tmp_path / KOHYA_FILE, adapter, networks, metadata)
        (tmp_path / CARD).write_text(card(adapter, spec, title, architecture, base, base_config, prompt), "utf-8")


def card(
    adapter: Adapter,
    spec: AdapterSpec,
    title: str,
    architecture: str | None,
    base: str,
    base_config: str,
    prompt: str,
) -> str:
    """The text of `README.md`."""
    name = NAMES[spec.kind]
    base = base or (BASES[architecture] if architecture else "BASE")
    parts = " and ".join(PARTS[component] for component in adapter)
    scale = (spec.alpha or spec.rank) / spec.rank
    example = json.dumps(prompt or "…", ensure_ascii=False)
    load = {
        "lora": 'pipe.load_lora_weights("FOLDER", weight_name="pytorch_lora_weights.safetensors")',
        "dora": 'pipe.load_lora_weights("FOLDER", weight_name="pytorch_lora_weights.safetensors")',
        "lokr": 'pipe.unet.load_lora_adapter("FOLDER/pytorch_lora_weights.safetensors", prefix="unet")',
    }.get(spec.kind)
    plain = [
        "```python",
        *diffusers_code(base, architecture == "sdxl", base_config),
        load or "",
        f"image = pipe({example}).images[0]",
        "```",
        *(["diffusers loads LoKr into the U-Net alone."] if spec.kind == "lokr" and len(adapter) > 1 else []),
    ]
    lines = [
        f"# {title}",
        "",
        f"A {name} of the {parts} of `{base}`: rank {spec.rank}, scale {scale:g}, targets {spec.targets}.",
        "",
        *([f"Prompt: {prompt}", ""] if prompt else []),
        "`FOLDER` is the folder of this file.",
        "",
        "- diffusers: `pytorch_lora_weights.safetensors`"
        + ("" if load else f"; it doesn't load {name}: merge it first"),
        *(["", *plain, ""] if load else []),
        "- ComfyUI: copy `kohya.safetensors` into `ComfyUI/models/loras`; the node Load LoRA lists it.",
        f"- A1111, Forge: copy it into `models/Lora` as `{title}.safetensors`; write `<lora:{title}:1>` in the prompt.",
        *([DORA] if spec.kind == "dora" else []),
        f"- This package: `ldm-txt2img {model_options(base, base_config)} --lora FOLDER --prompt "
        f"{shlex.quote(prompt or '…')}`; `ldm-merge` bakes it in.",
        "",
    ]
    return "\n".join(lines)
