"""Conditions, processes, solvers and autoencoders together: trained, shown, exported, and used as the card says."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from ldm.config import loader
from ldm.config.schema import Config, Stage2Config
from ldm.data.images import grid
from ldm.data.index import Index
from ldm.models import text_encoder
from ldm.models.attention import use_attention
from ldm.models.autoencoder import Autoencoder, build
from ldm.sampling.pipeline import LatentDiffusion
from ldm.training.evaluation_sizes import SHEET_UNCONDITIONAL
from ldm.training.model_card import write_card
from stage2_diffusion.train import train

Few = Callable[..., tuple[Config, Index]]
pytestmark = pytest.mark.usefixtures("two_noise_levels")
DDIM, DDPM = "sample.solver=ddim stage2.prediction_type=eps", "sample.solver=ddpm stage2.prediction_type=v"
EULER, EULER_FLOW = "sample.solver=euler stage2.prediction_type=eps", "sample.solver=euler stage2.prediction_type=flow"
DPM, DPM_FLOW = "sample.solver=dpm++ stage2.prediction_type=v", "sample.solver=dpm++ stage2.prediction_type=flow"
UNIPC, UNIPC_FLOW = "sample.solver=unipc stage2.prediction_type=eps", "sample.solver=unipc stage2.prediction_type=flow"
LEARNED = "sample.solver=ddpm stage2.prediction_type=eps stage2.variance=learned"
ZERO_SNR = "stage2.process=zero-snr"
STAGES = {
    "kl": "{channels: [16, 16], layers: 1, groups: 8, mid_attention: false}",
    "vq": "{model: vq-f4-small, channels: [16, 16], latent_channels: 4, groups: 8, codes: 16}",
    "tiny": "{model: tiny, channels: [8, 8], layers: 1}",
    "dc": "{model: dc-f32, channels: [32, 32], layers: 1, latent_channels: 4}",
    "identity": "{model: identity}",
}
COMBINATIONS = [  # what comes first is not slow: each condition, autoencoder and solver once
    ("text", "kl", DDPM),
    ("text", "identity", UNIPC),
    ("class", "kl", EULER),
    ("", "kl", LEARNED),
    ("", "identity", DPM_FLOW),
    ("text,class", "kl", UNIPC),
    ("text,size", "kl", EULER),
    ("text,inpaint", "kl", DDIM),
    ("text,upscale", "kl", EULER_FLOW),
    ("text,class,inpaint", "identity", DPM),
    # These, with the ones above, hold every pair of condition, autoencoder and extra that works.
    ("text", "kl", LEARNED),
    ("text", "kl", f"{DPM} {ZERO_SNR}"),
    ("text", "kl", f"sample.solver=ddim {ZERO_SNR}"),
    ("text", "kl", f"{DPM} stage2.uncond_embedding=learned"),
    ("class", "identity", DPM),
    ("class", "identity", LEARNED),
    ("text,class", "identity", DDIM),
    ("text,size", "identity", UNIPC_FLOW),
    ("text,inpaint", "kl", LEARNED),
    ("text,inpaint", "identity", EULER_FLOW),
    ("text,upscale", "kl", LEARNED),
    ("text,upscale", "kl", f"{DPM} stage2.uncond_embedding=learned"),
    ("text", "vq", DPM),
    ("text", "tiny", DDIM),
    ("text", "dc", DPM),
    ("", "vq", DDIM),
    ("", "dc", DPM),
    ("text,inpaint", "tiny", DPM),
    ("text,inpaint", "dc", DPM),
]
PAIRS_WITH_SOLVERS = [  # with the ones above, every pair of a condition with a solver and prediction
    ("text", "kl", EULER_FLOW),
    ("text", "kl", DPM_FLOW),
    ("class", "kl", UNIPC_FLOW),
    ("", "kl", EULER),
    ("", "kl", UNIPC_FLOW),
    ("text,inpaint", "kl", UNIPC_FLOW),
    ("text,upscale", "kl", DDIM),
    ("text,upscale", "kl", UNIPC),
    ("text,class,inpaint", "kl", DDPM),
]
CASES = [
    pytest.param(*names, marks=marks, id=" ".join(names).replace("sample.solver=", ""))
    for group, marks in (
        (COMBINATIONS[:10], ()),
        (COMBINATIONS[10:], pytest.mark.slow),
        (PAIRS_WITH_SOLVERS, (pytest.mark.slow, pytest.mark.drill)),
    )
    for names in group
]


def noise(*shape: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, shape, np.uint8))


def expected_sheet(model: LatentDiffusion, stage: Stage2Config) -> Image.Image:
    """With the kernels of training: a network that has learned nothing may blow rounding up."""
    use_attention(model.unet, stage.attention_backend, torch.device("cpu"), torch.float32)
    prompts = ['red "heart"'] if stage.text else list(model.classes) if stage.classes else [""] * SHEET_UNCONDITIONAL
    conditions: dict[str, Any] = {"prompts": prompts} if stage.text else {}
    conditions |= {"labels": list(model.classes[: len(prompts)])} if stage.classes else {}
    images = model(
        **conditions, count=1 if conditions else SHEET_UNCONDITIONAL, seed=list(range(len(prompts))), batch=2
    )
    return grid(images, prompts, columns=8, marked=[])


@pytest.mark.parametrize(("conditions", "autoencoder", "process"), CASES)
def test_what_is_trained_is_shown_exported_and_used_as_its_card_says(
    conditions: str, autoencoder: str, process: str, few: Few
) -> None:
    pixels = autoencoder == "identity"
    settings, index = few(
        f"stage2.conditions=[{conditions}]",
        *process.split(),
        "stage2.steps=1",
        "stage2.batch=2",
        "stage2.evaluate_images=2",
        "sample.prompts=['red \"heart\"']",
        "data.cache=none",
        "stage2.channels=[8]",
        "stage2.attention=[true]",
        "stage2.attention_head_dim=4",
        f"stage1={STAGES[autoencoder]}",
    )
    assert loader.parse(loader.dump(settings), "again") == settings

    stage, folder = settings.stage2, settings.run.dir
    torch.manual_seed(0)
    encoder = text_encoder.of(settings.text) if stage.text else None
    train(settings, index, Autoencoder(build(settings.stage1, 16)), encoder)
    write_card(settings)

    images = {"image": noise(16, 16, 3), "mask": noise(16, 16), "small": noise(8, 8, 3)}
    arguments: dict[str, Any] = {"prompts": 'red "heart"'} if stage.text else {}
    arguments |= {"labels": 0} if stage.classes else {}
    arguments |= {"image": images["small" if "upscale" in conditions else "image"]} if stage.image else {}
    arguments |= {"mask": images["mask"]} if "inpaint" in conditions else {}
    model = LatentDiffusion.load(folder / "pipeline", "cpu")
    samples = model(**arguments)
    assert [sample.size for sample in samples] == [(16, 16)]
    sheet = np.asarray(Image.open(folder / "stage2/samples/step-000001.png"), int)
    if stage.image:
        assert sheet.std() > 0
    else:  # the trained model sampled on it what the exported one samples
        assert np.abs(sheet - np.asarray(expected_sheet(model, stage), int)).max() <= 1

    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    *before, call = code.splitlines()
    scope: dict[str, Any] = dict(images)
    exec("\n".join(before), scope)
    torch.manual_seed(0)
    image = eval(call, scope)
    assert image.size == (16, 16)
    decoded = not stage.text or autoencoder in ("kl", "tiny")
    needs_ldm = not decoded or stage.classes or stage.sizes or "uncond_embedding=learned" in process
    assert ("LatentDiffusion" in code) == needs_ldm
    if needs_ldm:
        none = {"vae": None} if pixels and stage.text else {}
        assert isinstance(DiffusionPipeline.from_pretrained(folder / "pipeline", **none).unet, torch.nn.Module)
    elif not stage.image:  # with an image, diffusers draws more random numbers, or in another order
        assert np.abs(np.asarray(image, int) - np.asarray(samples[0], int)).max() <= 1
