"""Which weight files of a diffusers or transformers folder are read, and what a file of other weights holds."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

Model = TypeVar("Model")

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
STEMS = ("diffusion_pytorch_model", "model")
VARIANTS = ("fp32", "bf16", "fp16")  # in order of preference
KINDS = {  # part of a tensor's name → what a file with it holds
    ".lora_": "a LoRA",
    "lora_unet_": "a LoRA",
    "control_model.": "a ControlNet",
    "controlnet_cond_embedding.": "a ControlNet",
    "double_blocks.": "a transformer (FLUX)",
    "joint_blocks.": "a transformer (SD 3)",
    "transformer_blocks.0.attn.add_q_proj.": "a transformer (SD 3 or FLUX)",
    "input_blocks.0.0.": "a U-Net in the original layout",
    "down_blocks.0.resnets.0.time_emb_proj.": "a U-Net in diffusers' layout",
    "encoder.down.0.": "an autoencoder in the original layout",
    "encoder.down_blocks.": "an autoencoder in diffusers' layout",
    "text_model.": "a text encoder",
    "emb_params": "a textual inversion",
    "string_to_param": "a textual inversion",
}


def variant_of(folder: Path) -> str | None:
    """The variant whose `.safetensors` a folder has alone, such as `fp16`; None where it has weights without one."""
    names = [path.name for path in folder.glob("*.safetensors*")]
    stem = f"(?:{'|'.join(STEMS)})"
    if any(re.fullmatch(rf"{stem}\.safetensors(\.index\.json)?", name) for name in names):
        return None
    patterns = (rf"{stem}\.(\w+)\.safetensors", rf"{stem}\.safetensors\.index\.(\w+)\.json")
    variants = {match[1] for name in names for pattern in patterns if (match := re.fullmatch(pattern, name))}
    return next((variant for variant in (*VARIANTS, *sorted(variants)) if variant in variants), None)


def load_variant(load: Callable[..., Model], name: str, subfolder: str | None = None, **options: Any) -> Model:
    """Calls `load`, a `from_pretrained`, for the safetensors that a folder or Hub id has: full precision, or fp16.

    ValueError where a folder has pickles instead.
    """
    options |= {"use_safetensors": True, **({"subfolder": subfolder} if subfolder else {})}
    if Path(name).is_dir():
        folder = Path(name) / (subfolder or "")
        pickles = sorted(path for path in folder.glob("*") if path.suffix in PICKLES)
        if pickles and not any(folder.glob("*.safetensors")):
            raise ValueError(pickle_error(pickles[0]))
        return load(name, variant=variant_of(folder), **options)
    try:
        return load(name, **options)
    except (OSError, ValueError):
        try:
            return load(name, variant="fp16", **options)
        except (OSError, ValueError):
            pass
        raise


def pickle_error(path: Path) -> str:
    """The line of an error for such a file."""
    return (
        f"{path}: is a pickle, which can run anything when it is opened, and is not read; make a .safetensors of it: "
        "torch.load(…, weights_only=True), then safetensors.torch.save_file (docs/guides/fine-tuning.md shows it)"
    )


def contents(names: Iterable[str]) -> str:
    """What a file with tensors of these names holds, in a few words: for an error about a wrong file."""
    names = sorted(names)
    if not names:
        return "no tensors"
    kind = next((kind for part, kind in KINDS.items() if any(part in name for name in names)), "")
    prefixes = Counter(name.partition(".")[0] for name in names).most_common(3)
    listed = ", ".join(f"{prefix} ({count})" for prefix, count in prefixes)
    count = f"{len(names)} tensor{'s' if len(names) > 1 else ''}"
    return f"{kind + ': ' if kind else ''}{count}, of {listed}{' …' if len(prefixes) == 3 else ''}"
