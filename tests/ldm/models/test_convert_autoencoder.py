"""Autoencoders as a single file in the original layout."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ldm.models.convert import autoencoder as single_file
from ldm.utils.errors import UserError

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
Tensors = dict[str, torch.Tensor]


def options(widths: tuple[int, ...], attention: tuple[int, ...] = (), **changes: object) -> dict[str, object]:
    """Settings of an autoencoder with attention at these levels."""
    attn = ["Attn" if i in attention else "" for i in range(len(widths))]
    return {
        "block_out_channels": widths,
        "down_block_types": tuple(f"{a}DownEncoderBlock2D" for a in attn),
        "up_block_types": tuple(f"{a}UpDecoderBlock2D" for a in reversed(attn)),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": 32,
        **changes,
    }


def kl(*args: object, **changes: object) -> AutoencoderKL:
    return perturbed(AutoencoderKL(**options(*args, **{"latent_channels": 4, **changes})))  # type: ignore[arg-type]


def vq(*args: object, **changes: object) -> VQModel:
    config = options(*args, **{"num_vq_embeddings": 16, "scaling_factor": 1.0, **changes})  # type: ignore[arg-type]
    return perturbed(VQModel(**config))


def perturbed(vae: Any) -> Any:
    """Moves every weight from its initial value, so that a weight that isn't copied shows."""
    generator = torch.Generator().manual_seed(0)
    for tensor in vae.parameters():
        tensor.data += 0.05 * torch.randn(tensor.shape, generator=generator)
    return vae.eval()


def latents(vae: AutoencoderKL | VQModel) -> torch.Tensor:
    output = vae.encode(IMAGES)
    return output.latents if isinstance(vae, VQModel) else output.latent_dist.parameters


MODELS: dict[str, Callable[[], AutoencoderKL | VQModel]] = {
    "kl-f2": lambda: kl((8, 16)),
    "kl-f4-unequal": lambda: kl((8, 24, 12), latent_channels=3, scaling_factor=0.5, shift_factor=0.1),
    "kl-f8-two-layers": lambda: kl((8, 8, 16, 16), layers_per_block=2),
    "kl-no-mid-attention": lambda: kl((8, 16), mid_block_add_attention=False),
    "kl-no-quant-convs": lambda: kl((8, 16), use_quant_conv=False, use_post_quant_conv=False, latent_channels=16),
    "kl-one-quant-conv": lambda: kl((8, 16), use_post_quant_conv=False),
    "kl-attention-in-blocks": lambda: kl((8, 8, 16), (1, 2), layers_per_block=2),
    "kl-statistics": lambda: kl((8, 16), latents_mean=[0.0, 1, 2, 3], latents_std=[1.0, 1, 2, 2]),
    "kl-grey": lambda: kl((8,), in_channels=3, out_channels=1, norm_num_groups=2),
    "vq-f4": lambda: vq((8, 16, 16)),
    "vq-attention-narrow-codes": lambda: vq((8, 16), (1,), latent_channels=6, vq_embed_dim=3),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_round_trip_changes_nothing(tmp_path: Path, name: str) -> None:
    vae = MODELS[name]()
    single_file.write(vae, tmp_path / "new" / "vae.safetensors")
    loaded = single_file.read(tmp_path / "new" / "vae.safetensors")
    assert type(loaded) is type(vae) and not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    before, after = vae.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    for key in vae.config:
        if key != "vq_embed_dim" and not key.startswith("_"):
            assert loaded.config[key] == vae.config[key], key
    z = latents(vae)
    assert torch.equal(latents(loaded), z)
    z = z if isinstance(vae, VQModel) else z.chunk(2, 1)[0]
    assert torch.equal(loaded.decode(z).sample, vae.decode(z).sample)


def test_the_file_has_the_names_and_shapes_of_the_original_layout(tmp_path: Path) -> None:
    """The module tree of CompVis with ch_mult (1, 2), num_res_blocks 1, attn_resolutions of the lower level."""

    def tensors_of(*names: str) -> set[str]:
        return {f"{name}.{part}" for name in names for part in ("weight", "bias")}

    block = ("norm1", "conv1", "norm2", "conv2")
    attn = ("norm", "q", "k", "v", "proj_out")
    expected = tensors_of("encoder.conv_in", "encoder.norm_out", "encoder.conv_out", "quant_conv", "post_quant_conv")
    expected |= tensors_of("decoder.conv_in", "decoder.norm_out", "decoder.conv_out")
    expected |= tensors_of(*(f"encoder.down.0.block.0.{part}" for part in block), "encoder.down.0.downsample.conv")
    expected |= tensors_of(*(f"encoder.down.1.block.0.{part}" for part in (*block, "nin_shortcut")))
    expected |= tensors_of(*(f"encoder.down.1.attn.0.{part}" for part in attn))
    for side in ("encoder", "decoder"):
        expected |= tensors_of(*(f"{side}.mid.{i}.{part}" for i in ("block_1", "block_2") for part in block))
        expected |= tensors_of(*(f"{side}.mid.attn_1.{part}" for part in attn))
    expected |= tensors_of(
        *(f"decoder.up.1.block.{i}.{part}" for i in (0, 1) for part in block), "decoder.up.1.upsample.conv"
    )
    expected |= tensors_of(*(f"decoder.up.1.attn.{i}.{part}" for i in (0, 1) for part in attn))
    expected |= tensors_of(
        *(f"decoder.up.0.block.{i}.{part}" for i in (0, 1) for part in block), "decoder.up.0.block.0.nin_shortcut"
    )
    single_file.write(kl((8, 16), (1,), scaling_factor=0.3), tmp_path / "vae.safetensors")
    written = load_file(tmp_path / "vae.safetensors")
    assert set(written) == expected
    assert written["decoder.up.0.block.0.nin_shortcut.weight"].shape == (8, 16, 1, 1)
    assert written["encoder.mid.attn_1.q.weight"].shape == (16, 16, 1, 1)
    with safe_open(tmp_path / "vae.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata == {
        "format": "pt",
        "class": "AutoencoderKL",
        "latents": "4 channels, 1/2 of the image's height and width",
        "scaling_factor": "0.3",
        "norm_num_groups": "4",
        "sample_size": "32",
    }


def original_encoder(w: Tensors, x: torch.Tensor, groups: int) -> torch.Tensor:
    """The encoder of Rombach et al. 2022 as functions of the original's tensors."""

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.group_norm(x, groups, w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)

    def conv(name: str, x: torch.Tensor, **options: int) -> torch.Tensor:
        return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], **options)

    def block(name: str, x: torch.Tensor) -> torch.Tensor:
        h = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", x)), padding=1)
        h = conv(f"{name}.conv2", F.silu(norm(f"{name}.norm2", h)), padding=1)
        return h + (conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in w else x)

    def attention(name: str, x: torch.Tensor) -> torch.Tensor:
        h = norm(f"{name}.norm", x)
        q, k, v = (conv(f"{name}.{part}", h).flatten(2) for part in "qkv")  # (N, C, h·w)
        weights = (q.transpose(1, 2) @ k * x.shape[1] ** -0.5).softmax(-1)
        return x + conv(f"{name}.proj_out", (v @ weights.transpose(1, 2)).view_as(x))

    x = conv("encoder.conv_in", x, padding=1)
    for i in range(9):
        for j in range(9):
            if f"encoder.down.{i}.block.{j}.conv1.weight" in w:
                x = block(f"encoder.down.{i}.block.{j}", x)
            if f"encoder.down.{i}.attn.{j}.q.weight" in w:
                x = attention(f"encoder.down.{i}.attn.{j}", x)
        if f"encoder.down.{i}.downsample.conv.weight" in w:
            x = conv(f"encoder.down.{i}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
    x = block("encoder.mid.block_2", attention("encoder.mid.attn_1", block("encoder.mid.block_1", x)))
    return conv("quant_conv", conv("encoder.conv_out", F.silu(norm("encoder.norm_out", x)), padding=1))


@torch.no_grad()
def test_the_original_encoders_forward_pass_on_the_file_gives_the_same_latents(tmp_path: Path) -> None:
    vae = kl((8, 24, 12), (0, 2), layers_per_block=2)
    single_file.write(vae, tmp_path / "vae.safetensors")
    reference = original_encoder(load_file(tmp_path / "vae.safetensors"), IMAGES, 4)
    torch.testing.assert_close(reference, latents(vae), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_diffusers_single_file_loader_reads_the_file(tmp_path: Path) -> None:
    vae = kl((8, 16, 24), layers_per_block=2)
    vae.save_pretrained(tmp_path / "folder")
    single_file.write(vae, tmp_path / "vae.safetensors")
    reference = AutoencoderKL.from_single_file(
        str(tmp_path / "vae.safetensors"), config=str(tmp_path / "folder"), local_files_only=True
    )
    assert torch.equal(reference(IMAGES).sample, vae(IMAGES).sample)
    converted = convert_ldm_vae_checkpoint(load_file(tmp_path / "vae.safetensors"), vae.config)
    assert converted.keys() == vae.state_dict().keys()


@pytest.fixture
def tensors(tmp_path: Path) -> Tensors:
    """The tensors of a small autoencoder in the original layout."""
    single_file.write(kl((8, 16)), tmp_path / "small.safetensors")
    return load_file(tmp_path / "small.safetensors")


def save(tmp_path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    save_file(tensors, tmp_path / "file.safetensors", metadata)
    return tmp_path / "file.safetensors"


@pytest.mark.parametrize("prefix", ["first_stage_model.", "vae.", ""])
def test_an_autoencoder_is_found_among_other_tensors(tmp_path: Path, tensors: Tensors, prefix: str) -> None:
    others = {"loss.logvar": torch.zeros(1), "model_ema.decay": torch.zeros(1)}
    checkpoint = {f"{prefix}{name}": tensor for name, tensor in (tensors | others).items()}
    if prefix:
        checkpoint |= {"model.diffusion_model.out.2.weight": torch.zeros(4), "model_ema.decay": torch.zeros(1)}
    loaded = single_file.read(save(tmp_path, checkpoint, {"norm_num_groups": "4"}))
    assert torch.equal(loaded.encoder.conv_in.weight, tensors["encoder.conv_in.weight"])
    assert torch.equal(loaded.decoder.conv_out.bias, tensors["decoder.conv_out.bias"])


def test_half_precision_and_linear_attention_weights_load_as_float32(tmp_path: Path, tensors: Tensors) -> None:
    tensors = {name: tensor.half() for name, tensor in tensors.items()}
    tensors["encoder.mid.attn_1.q.weight"] = tensors["encoder.mid.attn_1.q.weight"][:, :, 0, 0].contiguous()
    loaded = single_file.read(save(tmp_path, tensors))
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("names", [("to_q", "to_k", "to_v", "to_out.0"), ("query", "key", "value", "proj_attn")])
@pytest.mark.parametrize("attention", [(), (1,)])
def test_other_names_of_attention_tensors_load(
    tmp_path: Path, names: tuple[str, ...], attention: tuple[int, ...]
) -> None:
    single_file.write(kl((8, 16), attention), tmp_path / "original.safetensors")
    tensors = load_file(tmp_path / "original.safetensors")
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in zip(("q", "k", "v", "proj_out"), names, strict=True):
            name = re.sub(rf"(\.attn(_1|\.\d)\.){old}\.", rf"\g<1>{new}.", name)
        renamed[name] = tensor
    assert renamed.keys() != tensors.keys()
    expected, loaded = (single_file.read(save(tmp_path, t)).state_dict() for t in (tensors, renamed))
    assert all(torch.equal(expected[name], loaded[name]) for name in expected)
    clash = renamed | {"encoder.mid.attn_1.q.weight": torch.zeros(16, 16, 1, 1)}
    with pytest.raises(UserError, match="which are one tensor"):
        single_file.read(save(tmp_path, clash))


def test_scale_and_groups_are_inferred_from_channels_and_marker_tensors(tmp_path: Path, tensors: Tensors) -> None:
    def inferred(extra: Tensors, metadata: dict[str, str] | None = None) -> tuple[object, ...]:
        checkpoint = {f"first_stage_model.{name}": tensor for name, tensor in tensors.items()} | extra
        config = single_file.read(save(tmp_path, checkpoint, metadata)).config
        return config.scaling_factor, config.shift_factor, config.norm_num_groups

    flux = {"model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale": torch.zeros(1)}
    assert inferred({}) == (0.18215, None, 2)  # at most 2 groups leave 4 of a level's 8 channels to a group
    assert inferred({"scale_factor": torch.tensor(0.25)}) == (0.25, None, 2)
    assert inferred(flux) == (0.3611, 0.1159, 2)
    assert inferred(flux, {"scaling_factor": "2", "shift_factor": "-1", "norm_num_groups": "8"}) == (2.0, -1.0, 8)
    single_file.write(kl((32, 64), latent_channels=5, norm_num_groups=32), tmp_path / "other.safetensors")
    other = single_file.read(save(tmp_path, load_file(tmp_path / "other.safetensors"))).config
    assert (other.scaling_factor, other.norm_num_groups) == (1.0, 32)


DAMAGE: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "missing": (lambda t: t.pop("decoder.up.1.block.0.conv1.bias"), r"lacks tensor decoder\.up\.1\.block\.0\.conv1\.b"),
    "level": (lambda t: t.pop("encoder.down.1.block.0.conv2.weight"), r"encoder\.down\.1\.block\.0\.conv2\.weight"),
    "gap": (lambda t: t.update({"encoder.down.9999999999.x": torch.ones(1)}), r"encoder\.down\.2\.block"),
    "extra": (lambda t: t.update({"decoder.time": torch.ones(1)}), r"tensor decoder\.time;"),
    "extras": (lambda t: t.update(a=torch.ones(1), b=torch.ones(1)), r"tensor a and 1 more"),
    "shape": (
        lambda t: t.update({"quant_conv.bias": torch.ones(3)}),
        r"tensor quant_conv\.bias has shape \(3,\); expected",
    ),
    "scalar": (lambda t: t.update({"decoder.conv_in.weight": torch.ones(())}), r"tensor decoder\.conv_in\.weight"),
    "diffusers": (lambda t: (t.clear(), t.update(kl((8, 16)).state_dict())), r"diffusers' layout"),
    "unet": (lambda t: (t.clear(), t.update({"model.out": torch.ones(1)})), r"no autoencoder, but 1 tensor, of model"),
    "gumbel": (lambda t: t.update({"quantize.embed.weight": torch.ones(1)}), r"quantize\.embedding\.weight"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_tensor_that_does_not_fit_is_reported_in_one_line(tmp_path: Path, tensors: Tensors, name: str) -> None:
    damage, message = DAMAGE[name]
    damage(tensors)
    with pytest.raises(UserError, match=message) as error:
        single_file.read(save(tmp_path, tensors))
    assert str(error.value).startswith(f"{tmp_path / 'file.safetensors'}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "metadata", [{"scaling_factor": "much"}, {"scaling_factor": "0"}, {"norm_num_groups": "3"}, {"latents_mean": "["}]
)
def test_invalid_metadata_is_refused_by_key(tmp_path: Path, tensors: Tensors, metadata: dict[str, str]) -> None:
    with pytest.raises(UserError, match=f"metadata {next(iter(metadata))} is"):
        single_file.read(save(tmp_path, tensors, metadata))


def test_unreadable_files_are_refused_by_name(tmp_path: Path, tensors: Tensors) -> None:
    path = save(tmp_path, tensors)
    content = path.read_bytes()
    for damaged in (content[:-100], content[:50], b"", b"\x80\x02}q\x00.", b"{" * 200):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"file\.safetensors: can't be read as safetensors") as error:
            single_file.read(path)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no such file"):
        single_file.read(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="can't be read"):
        single_file.read(tmp_path)


def test_a_model_that_the_layout_cannot_express_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    cases = {
        "AutoencoderTiny": AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4),
        "act_fn relu": kl((8, 16), act_fn="relu"),
        "DownBlock2D": kl((8, 16), down_block_types=("DownBlock2D", "DownEncoderBlock2D")),
        "lookup_from_codebook": vq((8, 16), lookup_from_codebook=True),
    }
    for reason, vae in cases.items():
        with pytest.raises(UserError, match=f"vae.safetensors: can't be written.*{reason}"):
            single_file.write(vae, tmp_path / "vae.safetensors")
    assert not list(tmp_path.iterdir())
