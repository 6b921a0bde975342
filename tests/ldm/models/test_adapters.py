"""Adapter files: what diffusers and LyCORIS make of those written here, and what is read of theirs."""

from __future__ import annotations

import copy
import json
import shlex
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_kohya
from lycoris import LycorisNetwork, create_lycoris, create_lycoris_from_weights
from peft import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stable_diffusion import PIPELINES
from torch import nn

from ldm.cli import export
from ldm.models.adapters import diffusers_layout
from ldm.models.adapters.base_usage import diffusers_code, model_options
from ldm.models.adapters.folder import CARD, KOHYA_FILE, write_lora_folder
from ldm.models.adapters.inject import AdapterSpec, adapter_parameters, add_adapter
from ldm.models.adapters.merge import add_to_weights, merge_adapters
from ldm.models.adapters.reader import read_adapter
from ldm.utils.errors import UserError

SIDE = 16


def randomize(parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Magnitudes grow by up to 30%, so that they still are norms; all other factors are drawn from a Gaussian."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in parameters:
        if "magnitude" in name or "dora" in name:
            parameter.data *= 1 + 0.3 * torch.rand(parameter.shape, generator=generator)
        else:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)


def networks_of(pipeline: Any) -> dict[str, nn.Module]:
    names = ("unet", "text_encoder", "text_encoder_2")
    return {name: network for name in names if (network := getattr(pipeline, name, None))}


def adapted(pipeline: Any, spec: AdapterSpec, encoders: bool = True) -> Any:
    """The pipeline, whose networks now have random adapters: another rank for some layers, and alpha half the rank."""
    for name, network in networks_of(pipeline).items():
        if name == "unet" or encoders:
            add_adapter(network, spec if name == "unet" else AdapterSpec(spec.kind, 4, 2.0, rank_pattern={"q_proj": 2}))
            randomize(adapter_parameters(network))
    return pipeline


def draw(pipeline: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "width": SIDE, "height": SIDE}
    return np.asarray(pipeline("a cat", latents=noise, **options).images[0]).astype(int)


def difference(first: np.ndarray, second: np.ndarray) -> int:
    return int(np.abs(first - second).max())


def output(unet: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x, states = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 7, 16, generator=generator)
    with torch.no_grad():
        return unet(x, torch.tensor([500]), states).sample


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {name: PIPELINES[name](tmp_path_factory.mktemp(name)) for name in ("sd1", "sdxl")}


@pytest.fixture
def pipeline(pipelines: dict[str, Any]) -> Callable[[str], Any]:
    return lambda name: copy.deepcopy(pipelines[name])


@pytest.fixture
def unet(pipelines: dict[str, Any]) -> Callable[[], Any]:
    """Copies the U-Net of Stable Diffusion 1."""
    return lambda: copy.deepcopy(pipelines["sd1"].unet)


SPECS = {
    "lora": AdapterSpec("lora", 4, 2.0, targets="all", rank_pattern={"attn2": 3}),
    "dora": AdapterSpec("dora", 4, 2.0, targets="all", rank_pattern={"attn2": 3}),
    "lokr": AdapterSpec("lokr", 2, 1.0, targets="all", rank_pattern={"attn2": 3}),
    "loha": AdapterSpec("loha", 4, 2.0, targets="all", rank_pattern={"attn2": 3}),
}


@pytest.mark.parametrize(
    ("layout", "kind"),
    [("sd1", "lora"), ("sd1", "dora"), ("sdxl", "lora"), pytest.param("sdxl", "dora", marks=pytest.mark.drill)],
)
def test_plain_diffusers_draws_the_trained_image_from_our_file(
    layout: str, kind: str, pipeline: Callable[[str], Any], pipelines: dict[str, Any], tmp_path: Path
) -> None:
    convolutions = (layout, kind) in (("sd1", "dora"), ("sdxl", "lora"))
    spec = SPECS[kind] if convolutions else replace(SPECS[kind], targets="attention")
    trained = adapted(pipeline(layout), spec)
    write_lora_folder(tmp_path / "lora", networks_of(trained), spec, "cat", layout)
    expected, without = draw(trained), draw(pipelines[layout])
    assert difference(expected, without) > 10

    def loaded(name: str) -> np.ndarray:
        plain = pipeline(layout)
        plain.load_lora_weights(str(tmp_path / "lora"), weight_name=name)
        return draw(plain)

    assert difference(loaded(diffusers_layout.FILE), expected) <= 1
    if kind == "lora":
        assert difference(loaded(KOHYA_FILE), expected) <= 1
    else:  # diffusers' `lora_state_dict` drops the magnitudes, of both models
        assert difference(loaded(KOHYA_FILE), expected) > 1
        tensors, _ = StableDiffusionXLPipeline.lora_state_dict(str(tmp_path / "lora"), weight_name=KOHYA_FILE)
        assert not [name for name in tensors if "dora_scale" in name or "magnitude" in name]
    for name in (diffusers_layout.FILE, KOHYA_FILE):
        merged = pipeline(layout)
        networks = networks_of(merged)
        add_to_weights(networks, [(read_adapter(tmp_path / "lora" / name, networks), 1.0)])
        assert difference(draw(merged), expected) <= 1
    for network in networks_of(trained).values():
        merge_adapters(network)
    assert trained.unet.state_dict().keys() == pipelines[layout].unet.state_dict().keys()
    assert difference(draw(trained), expected) <= 1


def test_scales_of_several_adapters_are_those_of_diffusers(pipeline: Callable[[str], Any], tmp_path: Path) -> None:
    for kind in ("lora", "dora"):
        trained = adapted(pipeline("sd1"), AdapterSpec(kind, 4), encoders=kind == "lora")
        networks = networks_of(trained) if kind == "lora" else {"unet": trained.unet}
        write_lora_folder(tmp_path / kind, networks, AdapterSpec(kind, 4), "cat", "sd1")
    plain, ours = pipeline("sd1"), pipeline("sd1")
    files = {kind: tmp_path / kind / diffusers_layout.FILE for kind in ("lora", "dora")}
    for kind, file in files.items():
        plain.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=kind)
    plain.set_adapters(list(files), [0.5, 0.8])
    networks = networks_of(ours)
    add_to_weights(networks, [(read_adapter(files[kind], networks), s) for kind, s in (("lora", 0.5), ("dora", 0.8))])
    assert difference(draw(ours), draw(plain)) <= 1


def test_the_files_have_the_names_and_the_header_that_diffusers_and_kohya_write(
    pipeline: Callable[[str], Any], tmp_path: Path
) -> None:
    spec = AdapterSpec("lora", 4)
    for layout in ("sd1", "sdxl"):
        trained = pipeline(layout)
        networks = networks_of(trained)
        for network in networks.values():
            add_adapter(network, spec)
        folder = tmp_path / layout
        write_lora_folder(folder, networks, spec, "cat", layout, base="the/base", prompt="a sks cat", side=512)
        states = {name: get_peft_model_state_dict(network) for name, network in networks.items()}
        StableDiffusionXLPipeline.save_lora_weights(
            tmp_path / "diffusers",
            **{f"{name}_lora_layers": state for name, state in states.items()},
            **{f"{name}_lora_adapter_metadata": n.peft_config["default"].to_dict() for name, n in networks.items()},
        )
        with safe_open(tmp_path / "diffusers" / diffusers_layout.FILE, "pt") as file:
            metadata = json.loads(file.metadata()["lora_adapter_metadata"])
        theirs = load_file(tmp_path / "diffusers" / diffusers_layout.FILE)
        theirs = {key.replace("r.encoder", "r.text_model.encoder"): tensor for key, tensor in theirs.items()}
        ours = load_file(folder / diffusers_layout.FILE)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
        with safe_open(folder / diffusers_layout.FILE, "pt") as file:
            written = json.loads(file.metadata()["lora_adapter_metadata"])
        assert written.keys() == metadata.keys()
        assert all(written[f"{name}.{key}"] == 4 for name in networks for key in ("r", "lora_alpha"))
        kohya = load_file(folder / KOHYA_FILE)
        if layout == "sd1":
            expected = convert_state_dict_to_kohya({f"unet.{key}": t for key, t in states["unet"].items()})
            unet = {key: tensor for key, tensor in kohya.items() if key.startswith("lora_unet_")}
            assert unet.keys() == expected.keys()
            assert all(torch.equal(tensor.float(), expected[key].float()) for key, tensor in unet.items())
        with safe_open(folder / KOHYA_FILE, "pt") as file:
            header = file.metadata()
        assert (
            header["modelspec.architecture"]
            == {
                "sd1": "stable-diffusion-v1/lora",
                "sdxl": "stable-diffusion-xl-v1-base/lora",
            }[layout]
        )
        assert (header["ss_network_module"], header["ss_network_dim"]) == ("networks.lora", "4")
        card = (folder / CARD).read_text()
        assert "`the/base`" in card and "a sks cat" in card
    assert "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q.lora_down.weight" in kohya
    assert "lora_te2_text_model_encoder_layers_0_self_attn_q_proj.alpha" in kohya


def test_the_lines_of_a_card_load_a_base_that_is_a_single_file_in_a_path_with_spaces(
    pipeline: Callable[[str], Any], tmp_path: Path
) -> None:
    folder, file = tmp_path / "its folder", tmp_path / "a base.safetensors"
    original = pipeline("sd1")
    original.save_pretrained(folder)
    assert export.main([str(folder), "--to", "single-file", "--out", str(file)]) == 0
    scope: dict[str, Any] = {}
    exec("\n".join(diffusers_code(str(file), is_sdxl=False, config=str(folder))), scope)
    loaded = scope["pipe"].unet.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in original.unet.state_dict().items())
    assert shlex.split(model_options(str(file), str(folder))) == ["--model", str(file), "--base", str(folder)]
    assert diffusers_code("the/base", is_sdxl=True)[-1] == 'pipe = DiffusionPipeline.from_pretrained("the/base")'


@pytest.mark.parametrize("kind", SPECS)
def test_lycoris_computes_what_was_trained_from_our_file(
    kind: str, pipeline: Callable[[str], Any], unet: Callable[[], Any], tmp_path: Path
) -> None:
    trained = adapted(pipeline("sd1"), SPECS[kind], encoders=False)
    write_lora_folder(tmp_path / "lora", {"unet": trained.unet}, SPECS[kind], "cat", "sd1")
    expected, plain = output(trained.unet), unet()
    assert not torch.allclose(output(plain), expected, atol=1e-2)
    tensors = load_file(tmp_path / "lora" / KOHYA_FILE)
    tensors = {key.replace("lora_unet_", "lycoris_"): tensor for key, tensor in tensors.items()}
    with torch.no_grad():
        network, _ = create_lycoris_from_weights(1.0, "", plain, tensors)
    network.apply_to()
    network.eval()
    torch.testing.assert_close(output(plain), expected, atol=1e-4, rtol=1e-4)
    for name in (diffusers_layout.FILE, KOHYA_FILE):
        ours = unet()
        add_to_weights({"unet": ours}, [(read_adapter(tmp_path / "lora" / name, {"unet": ours}), 1.0)])
        torch.testing.assert_close(output(ours), expected, atol=1e-4, rtol=1e-4)


LYCORIS: list[Any] = [
    {"algo": "lora", "use_tucker": True},
    {"algo": "lora", "dora_wd": True},
    {"algo": "lora", "dora_wd": True, "wd_on_output": False},
    {"algo": "lokr", "factor": 4, "decompose_both": True},
    {"algo": "lokr", "use_tucker": True},
    {"algo": "lokr", "full_matrix": True},
    {"algo": "loha", "use_tucker": True},
    pytest.param({"algo": "loha", "dora_wd": True}, marks=pytest.mark.drill),  # each of the two is above
]


@pytest.mark.parametrize("options", LYCORIS, ids=lambda options: " ".join(map(str, options.values())))
def test_a_file_of_lycoris_changes_the_weights_as_lycoris_does(
    options: dict[str, Any], unet: Callable[[], Any], tmp_path: Path
) -> None:
    theirs, ours = unet(), unet()
    modules = ["Transformer2DModel", "ResnetBlock2D"]
    LycorisNetwork.apply_preset({"enable_conv": True, "target_module": modules, "target_name": []})
    network = create_lycoris(theirs, 1.0, 2, 1.0, conv_dim=2, conv_alpha=0.5, **options)
    network.apply_to()
    randomize(network.named_parameters())
    network.eval()
    network.save_weights(str(tmp_path / "a.safetensors"), None, {})
    before = output(ours)
    add_to_weights({"unet": ours}, [(read_adapter(tmp_path / "a.safetensors", {"unet": ours}), 1.0)])
    assert not torch.allclose(output(ours), before, atol=1e-2)
    torch.testing.assert_close(output(ours), output(theirs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", ["sd1", pytest.param("sdxl", marks=pytest.mark.drill)])
def test_diffusers_loads_lokr_into_the_unet(layout: str, pipeline: Callable[[str], Any], tmp_path: Path) -> None:
    trained, plain = adapted(pipeline(layout), SPECS["lokr"], encoders=False), pipeline(layout)
    write_lora_folder(tmp_path / "lora", {"unet": trained.unet}, SPECS["lokr"], "cat", layout)
    without = draw(plain)
    plain.unet.load_lora_adapter(str(tmp_path / "lora"), weight_name=diffusers_layout.FILE, prefix="unet")
    assert difference(draw(plain), without) > 10
    assert difference(draw(plain), draw(trained)) <= 1


def test_names_of_older_versions_of_diffusers_and_of_peft_are_read(
    pipeline: Callable[[str], Any], tmp_path: Path
) -> None:
    networks = networks_of(pipeline("sd1"))
    down, up = torch.randn(2, 16), torch.randn(16, 2)
    unet = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    encoder = "text_model.encoder.layers.0.self_attn"
    small_down, small_up = torch.randn(2, 8), torch.randn(8, 2)
    files = {
        "attention processors": {
            f"unet.{unet}.processor.to_out_lora.down.weight": small_down,
            f"unet.{unet}.processor.to_out_lora.up.weight": small_up,
            f"text_encoder.{encoder}.to_out_lora.down.weight": down,
            f"text_encoder.{encoder}.to_out_lora.up.weight": up,
        },
        "layers": {
            f"unet.{unet}.to_out.0.lora.down.weight": small_down,
            f"unet.{unet}.to_out.0.lora.up.weight": small_up,
            f"text_encoder.{encoder}.out_proj.lora_linear_layer.down.weight": down,
            f"text_encoder.{encoder}.out_proj.lora_linear_layer.up.weight": up,
        },
        "peft": {
            f"base_model.model.{unet}.to_out.0.lora_A.default.weight": small_down,
            f"base_model.model.{unet}.to_out.0.lora_B.default.weight": small_up,
            f"base_model.model.{encoder}.out_proj.lora_A.weight": down,
            f"base_model.model.{encoder}.out_proj.lora_B.weight": up,
        },
    }
    for name, tensors in files.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        adapter = read_adapter(tmp_path / f"{name}.safetensors", networks)
        found = {part: {layer: (c.rank, c.scale) for layer, c in layers.items()} for part, layers in adapter.items()}
        assert found == {
            "unet": {f"{unet}.to_out.0": (2, 1.0)},
            "text_encoder": {"encoder.layers.0.self_attn.out_proj": (2, 1.0)},
        }, name


def test_what_does_not_fit_is_named(
    pipeline: Callable[[str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = adapted(pipeline("sd1"), AdapterSpec("lora", 2))
    write_lora_folder(tmp_path / "lora", networks_of(trained), AdapterSpec("lora", 2), "cat", "sd1")
    for name in (diffusers_layout.FILE, KOHYA_FILE):
        file, networks = tmp_path / "lora" / name, networks_of(pipeline("sd1"))
        read_adapter(file, {"unet": networks["unet"]})
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and "tensors belong to no layer of the model and are left out (the first: " in line
        with pytest.raises(UserError, match=r"^--lora: .*: no tensor belongs to a layer of the model \(the first: "):
            read_adapter(file, {})
    wider = networks_of(pipeline("sdxl"))
    with pytest.raises(UserError, match=r"^--lora: .* changes a weight of 16 × 16, the model's is \d+ × \d+: it is of"):
        read_adapter(tmp_path / "lora" / KOHYA_FILE, {"unet": wider["unet"], "text_encoder": wider["text_encoder_2"]})
    capsys.readouterr()
    tensors = load_file(tmp_path / "lora" / KOHYA_FILE)
    tensors[min(key for key in tensors if "lora_up" in key)][0, 0] = torch.nan
    save_file(tensors, tmp_path / "nan.safetensors")
    with pytest.raises(UserError, match="1 of 168 tensors hold NaN"):
        read_adapter(tmp_path / "nan.safetensors", wider)
