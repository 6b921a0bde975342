"""CLIP (arXiv 2103.00020) and DINOv2 (arXiv 2304.07193): networks by name, from a local folder, the Hub or OpenCLIP."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ldm.models import open_clip
from ldm.models.feature_networks.preprocessing import IMAGENET_MEAN, IMAGENET_STD, fingerprint, normalized
from ldm.models.features import Features
from ldm.models.text_encoder import OPEN_CLIP
from ldm.models.weight_files import load_variant
from ldm.utils.errors import UserError, first_line

CLIP_WEIGHTS = "openai/clip-vit-large-patch14-336"  # as CMMD has it, arXiv 2401.09603
DINOV2_WEIGHTS = "facebook/dinov2-large"  # as arXiv 2306.04675 has it
DINOV2_SIDE = 224


class CLIP:
    """Features: pooled `(N, D)`, the image's projected embedding, whose length is not 1.

    `weights` is a folder or Hub id of transformers' CLIP, or a name of OpenCLIP's, `open_clip:ARCH:WEIGHTS`, as for
    text encoders. UserError if it can't be loaded.
    """

    name = "clip"

    def __init__(self, device: torch.device | str = "cpu", weights: str | Path | None = None):
        weights = str(weights or CLIP_WEIGHTS)
        tower = _OpenCLIP if weights.startswith(OPEN_CLIP) else _TransformersCLIP
        with _loading(self.name, "CLIPModel", weights):
            self.tower: _OpenCLIP | _TransformersCLIP = tower(weights)
            self.tower.model.to(device).eval().requires_grad_(False)
            self.device = device
            self.label = f"CLIP {_short(weights)}, {self.text(['']).shape[1]}"
        settings = {"side": self.tower.side, "mean": self.tower.mean, "std": self.tower.std}
        self.fingerprint = fingerprint(self.tower.model.state_dict(), self.tower.config, settings)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> Features:
        pixels = normalized(images.to(self.device), self.tower.side, self.tower.mean, self.tower.std)
        return Features(self.tower.image(pixels).float().cpu())

    @torch.no_grad()
    def text(self, captions: Sequence[str]) -> torch.Tensor:
        """The projected embeddings of N captions, `(N, D)` float32 on the CPU; words beyond 77 tokens are cut off."""
        return self.tower.text(list(captions), self.device).float().cpu()


class _TransformersCLIP:
    """transformers' CLIPModel, as `CLIP` uses it."""

    def __init__(self, weights: str):
        from transformers import AutoTokenizer, CLIPModel
        from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

        self.model: Any = _pretrained("clip", CLIPModel, weights)
        self.config = self.model.config.to_dict()
        if not (_file(weights, "tokenizer.json") or _file(weights, "vocab.json")):  # else transformers makes one up
            raise UserError(f"clip: {weights} has no tokenizer.json; add the tokenizer's files of the same CLIP")
        self.tokenizer = AutoTokenizer.from_pretrained(weights)
        self.side: int = self.model.config.vision_config.image_size
        self.mean, self.std = _image_statistics("clip", weights, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)

    def image(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)

    def text(self, captions: list[str], device: torch.device | str) -> torch.Tensor:
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(captions, padding=True, truncation=True, max_length=length, return_tensors="pt")
        states = self.model.text_model(tokens.input_ids.to(device), attention_mask=tokens.attention_mask.to(device))
        return self.model.text_projection(states.pooler_output)


class _OpenCLIP:
    """OpenCLIP's model, as `CLIP` uses it."""

    def __init__(self, weights: str):
        self.model, self.tokenizer, preprocessing = open_clip.load_whole(weights.removeprefix(OPEN_CLIP), "clip")
        self.config = {"model": str(self.model)}  # OpenCLIP's models keep none; its layers have most of it
        self.mean, self.std = preprocessing["mean"], preprocessing["std"]
        size = preprocessing["size"]
        self.side: int = size if isinstance(size, int) else size[0]

    def image(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.encode_image(pixels)

    def text(self, captions: list[str], device: torch.device | str) -> torch.Tensor:
        return self.model.encode_text(self.tokenizer(captions).to(device))


class DINOv2:
    """Features: pooled `(N, D)`, the class token after the last norm.

    `weights` is a folder or Hub id of transformers' DINOv2. UserError if it can't be loaded.
    """

    name = "dinov2"

    def __init__(self, device: torch.device | str = "cpu", weights: str | Path | None = None):
        from transformers import Dinov2Model

        weights = str(weights or DINOV2_WEIGHTS)
        with _loading(self.name, "Dinov2Model", weights):
            model: Any = _pretrained("dinov2", Dinov2Model, weights)
            self.model = model.to(device).eval().requires_grad_(False)
            self.mean, self.std = _image_statistics("dinov2", weights, IMAGENET_MEAN, IMAGENET_STD)
        self.device = device
        settings = {"side": DINOV2_SIDE, "mean": self.mean, "std": self.std}
        self.fingerprint = fingerprint(self.model.state_dict(), self.model.config.to_dict(), settings)
        self.label = f"DINOv2 {_short(weights)}, {self.model.config.hidden_size}"

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> Features:
        pixels = normalized(images.to(self.device), DINOV2_SIDE, self.mean, self.std)
        return Features(self.model(pixel_values=pixels).pooler_output.float().cpu())


@contextmanager
def _loading(network: str, kind: str, weights: str) -> Iterator[None]:
    """Gives what loading raises in one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # transformers, tokenizers, huggingface_hub and safetensors raise all kinds
        raise UserError(
            f"{network}: {weights!r} can't be loaded ({first_line(error)}); give a local folder of transformers' "
            f"{kind} as its weights, or its Hub id where the Hub can be reached"
        ) from None


def _pretrained(network: str, kind: Any, weights: str) -> Any:
    model, report = load_variant(kind.from_pretrained, weights, dtype=torch.float32, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{network}: {weights!r} is no {kind.__name__}: it has no {missing[0]}; give one that is")
    return model


def _image_statistics(
    network: str, weights: str, mean: Sequence[float], std: Sequence[float]
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel that the folder's image processor records, else those given."""
    file = _file(weights, "preprocessor_config.json")
    recorded = json.loads(file.read_text("utf-8")) if file else {}
    mean, std = (
        [float(x) for x in recorded.get(key, usual)] for key, usual in (("image_mean", mean), ("image_std", std))
    )
    if len(mean) != 3 or len(std) != 3 or not all(x > 0 for x in std):
        raise UserError(f"{network}: {file}: image_mean and image_std have a number for each of 3 colours, std above 0")
    return mean, std


def _file(weights: str, name: str) -> Path | None:
    """A file of a local folder or Hub id, if it is there."""
    from transformers.utils import cached_file

    path = cached_file(
        weights, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    return Path(path) if path else None


def _short(weights: str) -> str:
    """A name for labels: the last part of a path or Hub id."""
    return Path(weights.removeprefix(OPEN_CLIP)).name
