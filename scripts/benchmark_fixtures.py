"""Creates what benchmarks need without a network: models with random weights, and random images, from a seed.

    python scripts/benchmark_fixtures.py FOLDER

`text` a text encoder of CLIP-L's width, `vae` a KL autoencoder of factor 8, `images` 256 JPEGs of 512 pixels with
captions, `pipeline` a text-to-image pipeline of Stable Diffusion's size and 10 steps; and configurations:
`stage2.yaml`, which is configs/sd-512.yaml on these, `stage1.yaml`, a kl-f8 at 256 pixels, and `tiny.yaml`, which is
configs/tiny.yaml on these images. 4 GB; with `--smoke` everything is tiny. A complete folder is left alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ldm.utils.openmp  # noqa: F401  # before torch

import numpy as np
import torch
import yaml
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm.config import loader
from ldm.config.schema import Config
from ldm.diffusion.process import DiffusionProcess
from ldm.models import autoencoder, text_encoder, unet
from ldm.models.autoencoder import Autoencoder
from ldm.sampling.pipeline import LatentDiffusion
from ldm.sampling.solvers import scheduler
from ldm.utils.errors import Parser, command

ROOT = Path(__file__).resolve().parents[1]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
LARGE: dict[str, Any] = {
    "images": 256,
    "side": 512,
    "steps": 10,
    "text": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "stage2": ["stage2.batch=32", "stage2.device_batch=32", "data.workers=8"],
    "stage1": ["data.size=256", "stage1.batch=16", "data.workers=8"],
    "tiny": [],
}
TINY: dict[str, Any] = {
    "images": 16,
    "side": 32,
    "steps": 2,
    "text": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    "stage2": [
        "data.size=32",
        "text.width=32",
        "stage1.channels=[8, 8, 8, 8]",
        "stage1.norm_num_groups=4",
        "stage1.layers=1",
        "stage2.channels=[8, 8]",
        "stage2.attention=[true, false]",
        "stage2.attention_head_dim=8",
        "stage2.layers=1",
        "stage2.norm_num_groups=4",
        "stage2.batch=8",
        "stage2.device_batch=8",
        "data.workers=0",
    ],
    "stage1": [
        "data.size=32",
        "stage1.channels=[8, 8]",
        "stage1.norm_num_groups=4",
        "stage1.batch=8",
        "data.workers=0",
    ],
    "tiny": ["data.size=16", "stage1.steps=10", "stage2.steps=20"],
}


@command
def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(prog="benchmark_fixtures.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="created; it gets the files")
    parser.add_argument("--smoke", action="store_true", help="tiny models and images, to try the commands with")
    args = parser.parse_args(arguments)
    create_fixtures(args.folder.resolve(), TINY if args.smoke else LARGE)


def create_fixtures(folder: Path, sizes: dict[str, Any]) -> None:
    """Writes all fixtures; the configurations come last, so that their presence marks a complete folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "tiny.yaml").exists():
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # drawing 10^9 numbers is fast on a GPU
    save_images(folder / "images", sizes["images"], sizes["side"])
    save_text_encoder(folder / "text", sizes["text"], device)
    shared = [f"data.source={folder}/images", f"text.model={folder}/text", "run.tracker=none", "sample.prompts=[]"]
    cached = [f"stage1.pretrained={folder}/vae", f"data.cache_dir={folder}/cache", "data.buckets=null"]
    settings = loader.load(ROOT / "configs/sd-512.yaml", [*shared, *cached, *sizes["stage2"]])
    torch.manual_seed(0)
    with device:
        vae = Autoencoder(autoencoder.build(settings.stage1, settings.data.size))
    vae.save(folder / "vae")
    random_pipeline(settings, vae, device, sizes["steps"]).save(folder / "pipeline")
    kl = ["stage1.model=kl-f8", "stage1.pretrained=null", "data.buckets=null"]
    configs = {
        "stage1": loader.load(ROOT / "configs/sd-512.yaml", [*shared, *kl, *sizes["stage1"]]),
        "stage2": settings,
        "tiny": loader.load(ROOT / "configs/tiny.yaml", [*shared, *sizes["tiny"]]),
    }
    for name, config in configs.items():
        tree = config.model_dump(mode="json", exclude_none=True)  # overrides can't set keys of a section that is null
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree, allow_unicode=True), "utf-8")


def save_images(folder: Path, count: int, side: int) -> None:
    """JPEGs of coarse noise, whose files are as large as photographs', and a caption file for each."""
    folder.mkdir(exist_ok=True)
    for i in range(count):
        rng = np.random.default_rng(i)
        coarse = rng.integers(0, 256, (side // 4, side // 4, 3), np.uint8)
        Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{i:03}.jpg", quality=90)
        words = ("".join(rng.choice(list(LETTERS), rng.integers(2, 9))) for _ in range(8))
        (folder / f"{i:03}.txt").write_text(" ".join(words))


def save_text_encoder(folder: Path, sizes: dict[str, int], device: torch.device) -> None:
    """A CLIP text encoder with random weights, whose tokens are letters and digits."""
    folder.mkdir(exist_ok=True)
    names = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    files = {"vocab": str(folder / "vocab.json"), "merges": str(folder / "merges.txt")}
    CLIPTokenizer(**files, model_max_length=77).save_pretrained(folder)
    ends = {"bos_token_id": len(names) - 2, "eos_token_id": len(names) - 1}
    torch.manual_seed(0)
    with device:
        CLIPTextModel(CLIPTextConfig(vocab_size=len(names), **sizes, **ends)).save_pretrained(folder)


def random_pipeline(settings: Config, vae: Autoencoder, device: torch.device, steps: int) -> LatentDiffusion:
    """A pipeline of stage two's U-Net with random weights, which predicts eps."""
    encoder, side = text_encoder.of(settings.text), settings.data.size // vae.factor
    torch.manual_seed(0)
    with device:
        network = unet.build(settings.stage2, vae.channels, side, encoder.width)
    return LatentDiffusion(encoder, network.eval(), vae, scheduler(DiffusionProcess("eps"), "dpm++"), steps=steps)


if __name__ == "__main__":
    sys.exit(main())
