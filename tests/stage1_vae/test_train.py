"""Stage one on a handful of pictures."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from ldm import config
from ldm.autoencoder import load as load_autoencoder
from ldm.data.images import load
from ldm.data.sources import read
from stage1_vae.train import train


def test_training_rebuilds_its_pictures_and_normalises_latents(root: Path, tmp_path: Path) -> None:
    settings = config.load(
        root / "configs/tiny.yaml",
        [f"run.dir={tmp_path / 'run'}", "run.tracker=none", "data.size=16", "stage1.steps=150", "stage1.batch=8"],
    )
    records = [r for r in read("openmoji-demo", 16, tmp_path) if r.split == "train"][:8]
    held = [r for r in read("openmoji-demo", 16, tmp_path) if r.split == "combination"][:4]
    train(settings, [*records, *held])
    trained = load_autoencoder(tmp_path / "run/autoencoder")
    losses = [json.loads(line)["l1"] for line in (tmp_path / "run/stage1/metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.5 * losses[0]
    facts = json.loads((tmp_path / "run/autoencoder/latents.json").read_text())
    assert facts["pictures"] == 8  # the held-out ones are not among them
    assert facts["combination"]["psnr"] > 8
    latents = trained.encode(torch.stack([load(r.path, 16) for r in records])).transpose(0, 1).flatten(1)
    torch.testing.assert_close(latents.mean(1), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(latents.std(1), torch.ones(4), atol=1e-2, rtol=0)
    assert AutoencoderKL.from_pretrained(tmp_path / "run/autoencoder").config.scaling_factor == 1.0
