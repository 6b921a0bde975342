"""NaN and infinite values are refused in weights and in the outputs of networks."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from ldm.models.autoencoder import Autoencoder
from ldm.models.convert import autoencoder as single_file
from ldm.models.finite import nonfinite_names
from ldm.sampling.pipeline import LatentDiffusion
from ldm.utils.errors import UserError

RandomModel = Callable[..., LatentDiffusion]
BLOCKS = {"block_out_channels": (8, 8), "norm_num_groups": 4}


def small_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    return AutoencoderKL(down_block_types=down, up_block_types=up, **BLOCKS).eval()


def test_nonfinite_names_lists_the_tensors_with_nan_or_infinity() -> None:
    tensors = {"a": torch.tensor([1.0, float("nan")]), "b": torch.ones(2), "c": torch.tensor(float("-inf"))}
    assert nonfinite_names({**tensors, "ids": torch.arange(3), "empty": torch.empty(0)}) == ["a", "c"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("component", ["U-Net", "autoencoder", "text encoder"])
def test_sampling_names_the_network_whose_output_is_not_finite(
    random_model: RandomModel, component: str, value: float
) -> None:
    model = random_model("text")
    weights = {
        "U-Net": lambda: model.unet.conv_out.bias,
        "autoencoder": lambda: model.autoencoder.vae.decoder.conv_out.bias,
        "text encoder": lambda: next(p for n, p in model.text.model.named_parameters() if n.endswith("LayerNorm.bias")),
    }[component]()
    before = weights.detach().clone()
    try:
        weights.data[0] = value
        with pytest.raises(
            UserError, match=rf"the {component}'s output is .* for 2 of 2 images: 1 of \d+ tensors hold"
        ):
            model(["a", "b"], num_inference_steps=2)
    finally:
        weights.data.copy_(before)


def test_an_overflow_of_finite_weights_names_a_remedy(random_model: RandomModel) -> None:
    model = random_model("text")
    weight = model.unet.conv_out.weight
    before = weight.detach().clone()
    try:
        weight.data.fill_(3e38)
        with pytest.raises(UserError, match="the U-Net's output is NaN or infinite for 1 of 1 images: lower guidance"):
            model("a", num_inference_steps=2)
    finally:
        weight.data.copy_(before)


def test_a_nonfinite_encoder_output_is_refused(random_model: RandomModel) -> None:
    model = random_model("text")
    bias = model.autoencoder.vae.encoder.conv_out.bias
    before = bias.detach().clone()
    try:
        bias.data[0] = float("nan")
        with pytest.raises(UserError, match="the autoencoder's output"):
            model("a", image=Image.new("RGB", (16, 16)), num_inference_steps=2)
    finally:
        bias.data.copy_(before)


@pytest.mark.parametrize("layer", ["decoder", "encoder"])
def test_an_autoencoder_too_wide_for_fp16_continues_in_float32(layer: str, capsys: pytest.CaptureFixture[str]) -> None:
    vae = small_vae()
    getattr(vae, layer).conv_in.weight.data *= 1e5  # the following norms undo it
    half, full = Autoencoder(small_vae().half()), Autoencoder(vae)
    half.vae.load_state_dict({name: tensor.half() for name, tensor in vae.state_dict().items()})
    full.vae.load_state_dict({name: tensor.float() for name, tensor in half.vae.state_dict().items()})
    fingerprint = half.encoder_fingerprint()
    source = torch.randn(1, 4, 8, 8) * 20 if layer == "decoder" else torch.rand(1, 3, 16, 16) * 2 - 1
    outputs = [ae.decode(source) if layer == "decoder" else ae.encode(source) for ae in (full, half)]
    torch.testing.assert_close(*outputs)
    assert half.vae.dtype == torch.float32 and half.encoder_fingerprint() == fingerprint
    half.decode(torch.zeros(1, 4, 8, 8))
    assert capsys.readouterr().err == "the autoencoder overflows in fp16; it computes in float32 from now on\n"


def test_nonfinite_weights_are_not_written(random_model: RandomModel, tmp_path: Path) -> None:
    model = random_model("text")
    model.save(tmp_path / "pipeline")
    files = {path: path.read_bytes() for path in (tmp_path / "pipeline").rglob("*") if path.is_file()}
    before = {name: tensor.clone() for name, tensor in model.unet.state_dict().items()}
    try:
        for parameter in model.unet.parameters():
            parameter.data.fill_(float("nan"))
        count = len(before)
        with pytest.raises(UserError, match=f"pipeline: not written: U-Net: {count} of {count} tensors hold NaN"):
            model.save(tmp_path / "pipeline")
    finally:
        model.unet.load_state_dict(before)
    assert files == {path: path.read_bytes() for path in (tmp_path / "pipeline").rglob("*") if path.is_file()}

    vae = small_vae()
    vae.decoder.conv_in.bias.data[1] = float("inf")
    vae.encoder.conv_in.bias.data[1] = float("nan")
    for write in (Autoencoder(vae).save, lambda path: single_file.write(vae, path)):
        with pytest.raises(UserError, match=r"not written: autoencoder: 2 of \d+ tensors"):
            write(tmp_path / "new")
    assert not (tmp_path / "new").exists()
