"""Stage one on a handful of pictures."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from ldm.autoencoder import load as load_autoencoder
from ldm.data.index import Index
from ldm.data.samples import whole
from ldm.schema import Config
from stage1_vae.train import train


def test_training_rebuilds_its_pictures_and_normalises_latents(
    tmp_path: Path, drawings: Callable[..., tuple[Config, Index]]
) -> None:
    settings, index = drawings("stage1.steps=150", "stage1.batch=8")
    few = np.concatenate([index.select("train").rows[:8], index.select("combination").rows[:4]])
    index = Index(index.table, index.sources, index.data, few)
    train(settings, index)
    trained = load_autoencoder(tmp_path / "run/autoencoder")
    losses = [json.loads(line).get("l1") for line in (tmp_path / "run/stage1/metrics.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss]  # other lines are of held-out pictures
    assert losses[-1] < 0.5 * losses[0]
    facts = json.loads((tmp_path / "run/autoencoder/latents.json").read_text())
    assert facts["pictures"] == 8  # the held-out ones are not among them
    assert facts["combination"]["psnr"] > 8
    latents = trained.encode(next(whole(index.select("train")))).transpose(0, 1).flatten(1)
    torch.testing.assert_close(latents.mean(1), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(latents.std(1), torch.ones(4), atol=1e-2, rtol=0)
    assert AutoencoderKL.from_pretrained(tmp_path / "run/autoencoder").config.scaling_factor == 1.0
