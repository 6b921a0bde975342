"""A model as one file in the layouts of Stable Diffusion 1, 2 and XL: what plain diffusers reads of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors import safe_open
from stable_diffusion import PIPELINES, stable_diffusion
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ldm.cli import export
from ldm.models.convert import autoencoder, checkpoint
from ldm.models.convert import unet as single_file_unet


@pytest.mark.parametrize("layout", PIPELINES)
def test_plain_diffusers_and_our_own_readers_read_every_tensor_and_the_image_is_the_same(
    layout: str, pipeline_dirs: dict[str, Path], call: Callable[..., str], tmp_path: Path
) -> None:
    file = tmp_path / "model.safetensors"
    output = call(export.main, pipeline_dirs[layout], "--to", "single-file", "--out", file)
    assert f"layout   {layout}\n" in output
    difference = re.search(r"image    differs by (\d+) of 255", output)
    assert difference and int(difference[1]) <= 1
    kind = StableDiffusionXLPipeline if layout == "sdxl" else StableDiffusionPipeline
    read = kind.from_single_file(str(file), config=str(pipeline_dirs[layout]), torch_dtype=torch.float32)
    original = kind.from_pretrained(pipeline_dirs[layout])
    for name in ("unet", "vae", "text_encoder", *(["text_encoder_2"] if layout == "sdxl" else [])):
        tensors = getattr(read, name).state_dict()
        for key, tensor in getattr(original, name).state_dict().items():
            assert torch.equal(tensors[key], tensor), key

    unet, predicts = single_file_unet.read(file, 8, 4)  # by our own readers, without the configuration
    vae = autoencoder.read(file)
    assert predicts == "epsilon"
    for part, expected in ((unet, original.unet), (vae, original.vae)):
        tensors = expected.state_dict()
        assert part.state_dict().keys() == tensors.keys()
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in part.state_dict().items())
    for key in ("scaling_factor", "norm_num_groups"):
        assert vae.config[key] == original.vae.config[key]


def test_a_model_that_predicts_v_says_so_in_a_tensor_and_in_the_metadata(
    call: Callable[..., str], tmp_path: Path
) -> None:
    pipe = stable_diffusion(tmp_path, linear=True, prediction_type="v_prediction")
    pipe.save_pretrained(tmp_path / "model")
    file = tmp_path / "v.safetensors"
    call(export.main, tmp_path / "model", "--to", "single-file", "--out", file)
    with safe_open(file, "pt") as opened:
        names, metadata = set(opened.keys()), opened.metadata()
    assert ("v_pred" in names, "ztsnr" in names) == (True, False)
    assert metadata["modelspec.prediction_type"] == "v"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v2"
    assert single_file_unet.read(file, 8, 4)[1] == "v_prediction"


def test_another_scaling_factor_is_folded_into_the_autoencoder(call: Callable[..., str], tmp_path: Path) -> None:
    stable_diffusion(tmp_path, linear=False, scaling_factor=0.5).save_pretrained(tmp_path / "model")
    output = call(export.main, tmp_path / "model", "--to", "single-file", "--out", tmp_path / "model.safetensors")
    difference = re.search(r"image    differs by (\d+) of 255", output)
    assert difference and int(difference[1]) <= 1


@pytest.mark.parametrize(
    ("schedule", "reason"),
    [
        ({"beta_schedule": "linear"}, "its noise schedule is another than Stable Diffusion's"),
        ({"beta_end": 0.02}, "its noise schedule is another than Stable Diffusion's"),
        ({"prediction_type": "sample"}, "it predicts x0; programs know eps and v"),
    ],
)
def test_what_the_layout_can_not_say_is_refused_with_the_reason(
    schedule: dict[str, Any], reason: str, call: Callable[..., str], tmp_path: Path
) -> None:
    stable_diffusion(tmp_path, linear=False, **schedule).save_pretrained(tmp_path / "model")
    file = tmp_path / "a.safetensors"
    output = call(export.main, tmp_path / "model", "--to", "single-file", "--out", file, status=2)
    assert f"error: --to single-file: {reason}" in output
    assert "--to diffusers keeps all of it" in output
    assert not file.exists()
    call(export.main, tmp_path / "model", "--to", "diffusers", "--out", tmp_path / "folder")
    assert StableDiffusionPipeline.from_pretrained(tmp_path / "folder", safety_checker=None)


def test_weights_beyond_fp16_are_refused(call: Callable[..., str], tmp_path: Path) -> None:
    pipe = stable_diffusion(tmp_path, linear=False)
    with torch.no_grad():
        pipe.unet.conv_in.weight[0] = 1e5
    pipe.save_pretrained(tmp_path / "model")
    out = ("--to", "single-file", "--precision", "fp16", "--out", tmp_path / "a.safetensors")
    output = call(export.main, tmp_path / "model", *out, status=2)
    assert "--precision: fp16 is too narrow for weights of the UNet2DConditionModel" in output


@pytest.mark.parametrize(("name", "reason"), [("a.ckpt", "ends in .safetensors"), ("no/a.safetensors", "no folder")])
def test_an_impossible_file_is_refused_before_anything_is_loaded(
    name: str, reason: str, call: Callable[..., str], tmp_path: Path
) -> None:
    output = call(export.main, tmp_path / "none", "--to", "single-file", "--out", tmp_path / name, status=2)
    assert reason in output


FULL: dict[str, tuple[dict[str, Any], int]] = {  # the published U-Nets, and how many tensors their files hold
    "sd1": ({"cross_attention_dim": 768, "attention_head_dim": 8}, 686),
    "sd2": ({"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}, 686),
    "sdxl": (
        {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        1680,
    ),
}
PUBLISHED = {  # some of their tensors
    "sd1": {
        "input_blocks.0.0.weight": (320, 4, 3, 3),
        "input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
        "middle_block.1.transformer_blocks.0.attn2.to_k.weight": (1280, 768),
        "output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
        "out.2.bias": (4,),
    },
    "sd2": {
        "input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
        "output_blocks.11.1.transformer_blocks.0.norm1.bias": (320,),
        "input_blocks.1.1.proj_in.weight": (320, 320),
    },
    "sdxl": {
        "label_emb.0.0.weight": (1280, 2816),
        "input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight": (640, 2048),
        "input_blocks.8.1.transformer_blocks.9.ff.net.2.weight": (1280, 5120),
        "middle_block.1.transformer_blocks.9.attn1.to_q.weight": (1280, 1280),
        "output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.8.0.skip_connection.weight": (320, 640, 1, 1),
    },
}


@pytest.mark.parametrize("layout", FULL)
def test_the_published_unets_have_their_published_names_and_shapes(layout: str) -> None:
    config, count = FULL[layout]
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    shapes = {checkpoint.unet_name(name, unet.config): tuple(t.shape) for name, t in unet.state_dict().items()}
    assert len(shapes) == count
    assert {name: shapes.get(name) for name in PUBLISHED[layout]} == PUBLISHED[layout]
    names, unused = single_file_unet.name_table(Path("a"), {checkpoint.UNET + name for name in shapes})
    assert (set(names), unused) == (set(unet.state_dict()), set())  # by diffusers' own conversion


def test_the_published_text_encoders_have_their_published_names_and_shapes() -> None:
    shape = {"num_hidden_layers": 32, "hidden_size": 1280, "intermediate_size": 5120, "projection_dim": 1280}
    with torch.device("meta"):
        clip = CLIPTextModel(CLIPTextConfig(num_hidden_layers=12, hidden_size=768, intermediate_size=3072))
        big = CLIPTextModelWithProjection(CLIPTextConfig(**shape, num_attention_heads=20))
    names = checkpoint.clip_tensors(clip)
    assert len(names) == 196
    assert names["text_model.embeddings.position_embedding.weight"].shape == (77, 768)
    assert names["text_model.encoder.layers.11.self_attn.q_proj.weight"].shape == (768, 768)
    names = checkpoint.open_clip_tensors(big)
    assert len(names) == 32 * 12 + 5  # and the published file's logit_scale, which nothing reads
    assert names["transformer.resblocks.31.attn.in_proj_weight"].shape == (3840, 1280)
    assert {"token_embedding.weight", "positional_embedding", "ln_final.bias", "text_projection"} <= names.keys()


def test_sd2s_file_has_the_24th_layer_that_programs_build(tmp_path: Path) -> None:
    pipe = stable_diffusion(tmp_path, linear=True, layers=23)
    names = checkpoint.open_clip_tensors(pipe.text_encoder)
    assert torch.equal(
        names["transformer.resblocks.23.mlp.c_fc.weight"], names["transformer.resblocks.22.mlp.c_fc.weight"]
    )
