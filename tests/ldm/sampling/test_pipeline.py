"""LatentDiffusion with random weights: saving, loading, guidance and every kind of autoencoder."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from ldm.config import loader
from ldm.config.schema import Stage1Config
from ldm.diffusion.process import DiffusionProcess
from ldm.models import autoencoder, text_encoder, text_encoder_files, unet
from ldm.sampling.options import Sampling
from ldm.sampling.pipeline import LatentDiffusion
from ldm.sampling.solvers import scheduler
from ldm.utils.errors import UserError


@pytest.fixture(scope="module")
def model(root: Path) -> LatentDiffusion:
    torch.manual_seed(0)
    settings = loader.load(root / "configs/tiny.yaml")
    encoder = text_encoder.load(settings.text.model, settings.text.max_tokens)
    vae = autoencoder.Autoencoder(
        autoencoder.build(
            Stage1Config(channels=(16, 16), layers=1, latent_channels=4, norm_num_groups=8, mid_attention=False), 32
        )
    )
    network = unet.build(settings.stage2, 4, 16, encoder.width).eval()
    return LatentDiffusion(encoder, network, vae, scheduler(DiffusionProcess("flow"), "dpm++"), steps=3, guidance=2.0)


def test_a_saved_model_loads_unchanged(model: LatentDiffusion, tmp_path: Path) -> None:
    model.save(tmp_path / "pipeline")
    loaded = LatentDiffusion.load(tmp_path / "pipeline")
    for solver in ("dpm++", "euler", "unipc"):
        original, reloaded = (m.latents(["red heart"], [3], Sampling(3, 2.0, solver)) for m in (model, loaded))
        torch.testing.assert_close(original, reloaded)


def test_a_saved_model_keeps_chunks_and_skipped_layers(model: LatentDiffusion, tmp_path: Path) -> None:
    encoder = text_encoder.load(text_encoder_files.MINILM, 8, skip_layers=2, chunks=2)
    replace(model, text=encoder).save(tmp_path / "pipeline")
    loaded = LatentDiffusion.load(tmp_path / "pipeline", "cpu").text
    prompts = ["red heart", "a very long caption of more than eight tokens"]
    torch.testing.assert_close(loaded.encode(prompts), encoder.encode(prompts), rtol=0, atol=0)
    assert loaded.fingerprint() == encoder.fingerprint()


def test_a_folder_that_is_no_pipeline_is_refused(model: LatentDiffusion, tmp_path: Path) -> None:
    model.autoencoder.save(tmp_path / "autoencoder")
    with pytest.raises(UserError, match="--model: can't load a pipeline"):
        LatentDiffusion.load(tmp_path / "autoencoder")


def test_guidance_1_ignores_the_negative_prompt_and_a_higher_scale_does_not(model: LatentDiffusion) -> None:
    def latents(guidance: float, negative: str) -> torch.Tensor:
        return model.latents(["red heart"], [0], Sampling(guidance_scale=guidance, negative_prompt=negative))

    assert torch.equal(latents(1.0, ""), latents(1.0, "blue"))
    assert not torch.equal(latents(2.0, ""), latents(2.0, "blue"))


def test_a_narrow_image_is_the_same_in_bf16_whatever_was_in_memory(model: LatentDiffusion) -> None:
    fast = copy.deepcopy(model).optimize_for_inference("bf16")
    prediction, expected = (
        torch.cat([m.latents(["red heart"], [seed], Sampling(1), size=(2, 92)) for seed in range(4)])
        for m in (_with_used_memory(fast), model)
    )
    torch.testing.assert_close(prediction, expected, atol=0.05, rtol=0.05)


def _with_used_memory(model: LatentDiffusion) -> LatentDiffusion:
    """The model, after memory of many sizes was filled with what is no number, and freed."""
    for size in range(8, 4096, 8):
        torch.full((size,), torch.nan)
    return model


@pytest.mark.parametrize("prompts", ["", " ", [], ["cat", ""]])
def test_an_empty_prompt_is_refused(model: LatentDiffusion, prompts: str | list[str]) -> None:
    with pytest.raises(UserError, match="prompt: an empty prompt"):
        model(prompts)


SHAPES: dict[str, dict[str, object]] = {
    "vq-f4": {"channels": (16, 16), "norm_num_groups": 8, "codes": 32},
    "tiny": {"channels": (16, 16)},
    "dc-f32": {"channels": (32, 32)},
    "identity": {"channels": (3,), "latent_channels": 3},
}


def test_plain_diffusers_draws_the_latents_that_its_dc_autoencoder_decodes_to_the_same_image(
    model: LatentDiffusion, root: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    stage = Stage1Config(model="dc-f4-small", channels=(8, 16), layers=1, latent_channels=4, mid_attention=False)
    vae = autoencoder.Autoencoder(autoencoder.build(stage, 16))
    vae = autoencoder.normalize_latents(vae.vae, *autoencoder.channel_statistics(vae.vae, [torch.rand(4, 3, 16, 16)]))
    network = unet.build(loader.load(root / "configs/tiny.yaml").stage2, 4, 8, model.text.width).eval()
    ours = LatentDiffusion(model.text, network, vae, scheduler(DiffusionProcess("v"), "ddim"), steps=2, guidance=2.0)
    ours.save(tmp_path)
    plain = DiffusionPipeline.from_pretrained(tmp_path)
    options = {"num_inference_steps": 2, "guidance_scale": 2.0}
    torch.manual_seed(0)
    latents = plain("red heart", **options, output_type="latent").images
    with torch.no_grad():
        pixels = plain.vae.decode(latents / plain.vae.config.scaling_factor).sample
    (image,) = plain.image_processor.postprocess(pixels)
    (expected,) = ours("red heart", seed=0, **options)
    assert np.abs(np.asarray(image, int) - np.asarray(expected, int)).max() <= 1


@pytest.mark.parametrize("kind", SHAPES)
def test_a_saved_model_with_any_kind_of_autoencoder_loads_unchanged(
    kind: str, model: LatentDiffusion, root: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    settings = loader.load(root / "configs/tiny.yaml")
    stage = Stage1Config(model=kind, layers=1, **{"latent_channels": 4, **SHAPES[kind]})
    vae = autoencoder.Autoencoder(autoencoder.build(stage, 16))
    network = unet.build(settings.stage2, vae.channels, 16 // vae.factor, model.text.width).eval()
    original = LatentDiffusion(
        model.text, network, vae, scheduler(DiffusionProcess("flow"), "dpm++"), steps=2, guidance=2.0
    )
    original.save(tmp_path / "pipeline")
    loaded = LatentDiffusion.load(tmp_path / "pipeline")
    assert type(loaded.autoencoder.vae) is type(vae.vae)
    images = [
        pipeline("red heart", seed=3, num_inference_steps=2, guidance_scale=2.0)[0] for pipeline in (original, loaded)
    ]
    assert images[0].size == (16, 16)
    assert images[0].tobytes() == images[1].tobytes()
