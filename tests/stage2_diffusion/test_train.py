"""Stage two on a handful of pictures."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ldm import autoencoder, text
from ldm.data.index import Index
from ldm.pipeline import LatentDiffusion
from ldm.schema import Config, Stage1Config
from stage2_diffusion.train import train

PREDICTION = {"eps": "epsilon", "v": "v_prediction", "x0": "sample", "flow": "flow_prediction"}


@pytest.mark.parametrize("target", PREDICTION)
def test_every_target_is_learned_and_named_in_the_export(
    tmp_path: Path, target: str, drawings: Callable[..., tuple[Config, Index]]
) -> None:
    settings, index = drawings(
        f"stage2.target={target}", "stage2.steps=60", "stage2.channels=[16, 32]", "stage2.schedule=cosine",
        "sample.prompts=[]",
    )  # fmt: skip
    pictures = index.select("train").first(8)
    torch.manual_seed(0)
    vae = autoencoder.Autoencoder(
        autoencoder.build(
            Stage1Config(channels=(16, 16), layers=1, latent_channels=4, groups=8, mid_attention=False), 16
        )
    )
    train(settings, pictures, vae, text.load(settings.text.model, settings.text.max_tokens))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/stage2/metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.9 * losses[0]
    model = LatentDiffusion.load(tmp_path / "run/pipeline")
    assert model.scheduler.config.prediction_type == PREDICTION[target]
    assert model(pictures[0].captions[0], steps=4, guidance=2.0)[0].size == (16, 16)
