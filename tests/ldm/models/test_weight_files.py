"""Folders whose weights have only a variant such as fp16, in a single file or in shards."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from ldm.config import loader
from ldm.models import autoencoder, unet
from ldm.models.weight_files import variant_of

BLOCKS = {"block_out_channels": (8, 8), "norm_num_groups": 4}


def small_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    return AutoencoderKL(down_block_types=down, up_block_types=up, **BLOCKS).half()


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_an_autoencoder_with_only_a_variant_loads_as_float32(tmp_path: Path, variant: str, shard_size: str) -> None:
    vae = small_vae()
    vae.save_pretrained(tmp_path / "vae", variant=variant, max_shard_size=shard_size)
    assert (len([*(tmp_path / "vae").glob("*.safetensors")]) > 1) == (shard_size == "20KB")
    for folder in (tmp_path, tmp_path / "vae"):
        loaded = autoencoder.load(folder).vae.state_dict()
        assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in vae.state_dict().items())


@pytest.mark.parametrize("shard_size", ["1GB", "200KB"])
def test_a_unet_with_only_a_variant_loads_as_float32(root: Path, tmp_path: Path, shard_size: str) -> None:
    config = {"cross_attention_dim": 16, "attention_head_dim": 4, "layers_per_block": 1, "sample_size": 8}
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    torch.manual_seed(0)
    network = UNet2DConditionModel(down_block_types=down, up_block_types=up, **config, **BLOCKS).half()
    network.save_pretrained(tmp_path / "unet", variant="fp16", max_shard_size=shard_size)
    stage = loader.load(root / "configs/tiny.yaml", ["stage2.prediction_type=eps", "stage2.pooled_text=false"]).stage2
    loaded = unet.load(stage.model_copy(update={"init_from": str(tmp_path)}), 4, 8, 16).state_dict()
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(
    ("names", "variant"),
    [
        (("model.safetensors", "model.fp16.safetensors"), None),
        (("model.fp16.safetensors", "model.non_ema.safetensors"), "fp16"),
        (("diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.fp16.safetensors"), None),
        (("diffusion_pytorch_model-00001-of-00002.fp16.safetensors", "model.safetensors.index.fp16.json"), "fp16"),
        (("other.fp16.safetensors",), None),
    ],
)
def test_weights_without_a_variant_are_preferred(tmp_path: Path, names: tuple[str, ...], variant: str | None) -> None:
    for name in names:
        (tmp_path / name).touch()
    assert variant_of(tmp_path) == variant
