"""Fine-tuning SDXL: both text encoders' states, the pooled embedding, and sizes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from sdxl import POOLED, WIDTHS, sdxl

from ldm.cli import export
from ldm.config.schema import Stage2Config
from ldm.models import text_encoder
from ldm.models.conditioning import Condition, TextEmbedding
from ldm.models.text_encoder import TextEncoders
from ldm.sampling.loop import initial_noise
from ldm.sampling.pipeline import LatentDiffusion
from stage2_diffusion.denoiser import Denoiser


@pytest.fixture(scope="module")
def sdxl_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdxl")
    pipe = sdxl(folder)
    pipe.vae.register_to_config(force_upcast=False)  # not the default
    pipe.save_pretrained(folder / "base")
    return folder / "base"


def overrides(folder: Path, *more: str) -> list[str]:
    return [
        f"stage1.pretrained={folder}",
        f"stage2.init_from={folder}",
        f"text.model={folder}",
        "text.max_tokens=null",
        "stage1.channels=[8, 8]",
        "data.size=16",
        "stage2.conditions=[text, size]",
        "stage2.prediction_type=eps",
        "stage2.batch=2",
        "stage2.steps=2",
        "sample.prompts=[a fox]",
        "sample.steps=2",
        "run.precision=no",
        "run.tracker=none",
        *more,
    ]


def test_the_encoders_states_are_joined_and_the_empty_prompts_are_zeros(sdxl_dir: Path) -> None:
    encoder = text_encoder.load(str(sdxl_dir))
    assert isinstance(encoder, TextEncoders)
    embedding, pipe = encoder.embed(["red heart", ""]), StableDiffusionXLPipeline.from_pretrained(sdxl_dir)
    states, _, pooled, _ = pipe.encode_prompt("red heart", device="cpu", do_classifier_free_guidance=False)
    assert embedding.pooled is not None
    assert embedding.states.shape == (2, 77, sum(WIDTHS))
    assert embedding.pooled.shape == (2, POOLED)
    torch.testing.assert_close(embedding.states[:1], states, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(embedding.pooled[:1], pooled, rtol=1e-5, atol=1e-6)
    assert not embedding.states[1].any()
    assert not embedding.pooled[1].any()


def test_a_dropped_caption_loses_its_states_and_its_pooled_embedding(sdxl_dir: Path) -> None:
    encoder, unet = text_encoder.load(str(sdxl_dir)), sdxl_unet(sdxl_dir)
    denoiser = Denoiser(unet, Stage2Config(), encoder.embed([""]))
    x, t, sizes = torch.randn(2, 4, 8, 8), torch.tensor([500, 500]), torch.full((2, 6), 16.0)
    captions = Condition(sizes=sizes).with_text(encoder.embed(["red heart", "owl"]))
    null = Condition(sizes=sizes).with_text(TextEmbedding(torch.zeros(2, 77, sum(WIDTHS)), torch.zeros(2, POOLED)))
    with torch.no_grad():
        output = denoiser(x, t, captions, torch.tensor([True, False]))
        torch.testing.assert_close(output[0], denoiser(x, t, null)[0])
        torch.testing.assert_close(output[1], denoiser(x, t, captions)[1])
        assert not torch.allclose(output[0], denoiser(x, t, captions)[0])


def test_trained_encoders_give_the_frozen_ones_embeddings_and_learn_from_both_of_their_outputs(sdxl_dir: Path) -> None:
    encoder, unet = text_encoder.load(str(sdxl_dir)), sdxl_unet(sdxl_dir)
    x, t, sizes = torch.randn(3, 4, 8, 8), torch.tensor([500, 500, 500]), torch.full((3, 6), 16.0)
    captions, dropped = ["red heart", "owl", ""], torch.tensor([True, False, False])
    frozen = Denoiser(unet, Stage2Config(), encoder.embed([""]))
    expected = frozen(x, t, Condition(sizes=sizes).with_text(encoder.embed(captions)), dropped).detach()

    trained = encoder.trainable()
    denoiser = Denoiser(unet, Stage2Config(), encoder=encoder)
    output = denoiser(x, t, Condition(encoder.token_ids(captions), sizes=sizes), dropped)
    assert torch.equal(output, expected)
    output.square().mean().backward()
    names = {id(p): name for name, p in denoiser.named_parameters()}
    assert all(p.grad is not None and names[id(p)].startswith("encoder.") for p in trained)
    # the first encoder's last layer has no influence: its states are those of the layer before, and no one pools it
    untrained = {name for name, p in denoiser.named_parameters() if not p.requires_grad}
    assert {name.split("layers.")[-1].split(".")[0] for name in untrained if "layers." in name} == {"2"}
    assert all(name.startswith("encoder.0.") for name in untrained)
    assert any("text_projection" in names[id(p)] for p in trained)
    assert not any("text_projection" in names[id(p)] for p in encoder.trainable(pooled=False))


def sdxl_unet(folder: Path) -> torch.nn.Module:
    return StableDiffusionXLPipeline.from_pretrained(folder).unet


@pytest.mark.slow
def test_sdxl_is_fine_tuned_without_a_cache_and_the_result_opens_in_diffusers(
    sdxl_dir: Path,
    tmp_path: Path,
    three_shapes: Callable[[list[str]], Path],
    train: Callable[..., str],
    call: Callable[..., str],
) -> None:
    images = three_shapes(["a red heart", "a green square", "a fox", "a crown"])
    output = train(tmp_path / "run", *overrides(sdxl_dir, f"data.source={images}", "data.cache=none"))
    assert "finished" in output
    pipe = StableDiffusionXLPipeline.from_pretrained(tmp_path / "run/pipeline")
    start = sdxl_unet(sdxl_dir).state_dict()
    changed = [name for name, tensor in pipe.unet.state_dict().items() if not torch.equal(tensor, start[name])]
    assert "add_embedding.linear_1.weight" in changed
    assert len(changed) > 0.9 * len(start)

    model = LatentDiffusion.load(tmp_path / "run/pipeline", "cpu")
    options = {"num_inference_steps": 3, "guidance_scale": 3.0}
    image = np.asarray(model("a fox", seed=5, **options)[0]).astype(int)
    noise = initial_noise((4, 8, 8), [5])
    expected = np.asarray(pipe("a fox", **options, width=16, height=16, latents=noise).images[0]).astype(int)
    assert np.abs(image - expected).max() <= 1

    call(export.main, tmp_path / "run", "--to", "diffusers", "--precision", "fp16", "--out", tmp_path / "fp16")
    exported = StableDiffusionXLPipeline.from_pretrained(tmp_path / "fp16", torch_dtype=torch.float16)
    assert exported.vae.dtype == torch.float16
    assert exported.vae.config.force_upcast is pipe.vae.config.force_upcast is False
    # ours computes the autoencoder in float32, whatever type it is stored in
    assert LatentDiffusion.load(tmp_path / "fp16", "cpu").autoencoder.vae.dtype == torch.float32


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("stage2.conditions=[text]",), "stage2.conditions: size or none"),
        (("text.max_tokens=16",), "text.max_tokens: 16, but .* has several text encoders; leave it out"),
        (("text.skip_layers=1",), "text.skip_layers: 1, but .* has several text encoders; leave it out"),
        (("text.width=16",), "text.width: 16, but .* has 40; set it to that"),
    ],
)
def test_what_sdxl_can_not_do_is_refused_before_training(
    keys: tuple[str, ...],
    message: str,
    sdxl_dir: Path,
    tmp_path: Path,
    three_shapes: Callable[[list[str]], Path],
    train: Callable[..., str],
) -> None:
    source = f"data.source={three_shapes(['a red heart', 'a fox'])}"
    output = train(tmp_path / "run", *overrides(sdxl_dir, source, *keys), status=2)
    assert re.search(message, output), output
    assert not (tmp_path / "run/stage2").exists()
