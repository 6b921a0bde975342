"""What the cards of adapters and words say on the model below: how it is loaded, in Python and on the command line."""

from __future__ import annotations

import json
import shlex
from pathlib import Path


def diffusers_code(base: str, is_sdxl: bool, config: str = "") -> list[str]:
    """Lines of Python that load a base as `pipe`: a folder, a Hub id, or a single file.

    `config` is the pipeline that a single file's configuration and tokenizers are taken from.
    """
    if Path(base).suffix != ".safetensors":
        return _lines("DiffusionPipeline", f"from_pretrained({_string(base)})")
    more = f", config={_string(config)}" if config else ""
    kind = "StableDiffusionXLPipeline" if is_sdxl else "StableDiffusionPipeline"
    return _lines(kind, f"from_single_file({_string(base)}{more})")


def _lines(kind: str, call: str) -> list[str]:
    return [f"from diffusers import {kind}", "", f"pipe = {kind}.{call}"]


def model_options(base: str, config: str = "") -> str:
    """`--model` of this package's commands, and `--base` of a single file, quoted for a shell."""
    options = ["--model", base, *(["--base", config] if config and Path(base).suffix == ".safetensors" else [])]
    return shlex.join(options)


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
