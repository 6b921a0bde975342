"""Adapters at the command line: `--lora`, `ldm-merge`, and `ldm-export --to lora`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from ldm.cli import export, merge, txt2img
from ldm.cli.export_lora import compare_adapters
from ldm.cli.sampling_arguments import lora_argument
from ldm.models.adapters.folder import write_lora_folder
from ldm.models.adapters.inject import AdapterSpec, Kind, adapter_parameters, add_adapter
from ldm.models.adapters.reader import read_adapter
from ldm.sampling.pipeline import LatentDiffusion

Call = Callable[..., str]
Refused = Callable[..., str]
ReadPixels = Callable[[Path], np.ndarray]


def write_run(folder: Path, base: Path, kind: Kind, components: tuple[str, ...] = ("unet",)) -> Path:
    """The folder of a run with a random adapter, alpha half the rank."""
    networks = {name: network for name, network in LatentDiffusion.load(base).networks.items() if name in components}
    spec = AdapterSpec(kind, 2, 1.0)
    generator = torch.Generator().manual_seed(0)
    for network in networks.values():
        add_adapter(network, spec)
        for name, parameter in adapter_parameters(network):
            if "magnitude" not in name:
                parameter.data = torch.randn(parameter.shape, generator=generator)
    write_lora_folder(folder / "lora", networks, spec, "cat", "sd1")
    return folder


@pytest.fixture(scope="module")
def runs(pipeline_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        "lora": write_run(folder / "lora", pipeline_dirs["sd1"], "lora", ("unet", "text_encoder")),
        "dora": write_run(folder / "dora", pipeline_dirs["sd1"], "dora"),
        "lokr": write_run(folder / "lokr", pipeline_dirs["sd1"], "lokr"),
    }


def test_an_image_with_adapters_is_recreated_bit_for_bit_and_only_with_the_same(
    runs: dict[str, Path],
    pipeline_dirs: dict[str, Path],
    call: Call,
    refused: Refused,
    read_pixels: ReadPixels,
    tmp_path: Path,
) -> None:
    model, options = ("--model", pipeline_dirs["sd1"]), ("--prompt", "a cat", "--steps", 2, "--precision", "no")
    kohya = runs["dora"] / "lora" / "kohya.safetensors"
    images = {name: tmp_path / f"{name}.png" for name in ("plain", "both", "again", "moved")}
    call(txt2img.main, *model, *options, "--out", images["plain"])
    call(txt2img.main, *model, *options, "--lora", f"{runs['lora']}:0.5", kohya, "--out", images["both"])
    assert not np.array_equal(read_pixels(images["both"]), read_pixels(images["plain"]))
    call(txt2img.main, "--again", images["both"], "--out", images["again"])
    assert images["again"].read_bytes() == images["both"].read_bytes()
    moved = tmp_path / "style:2.safetensors"
    moved.write_bytes(kohya.read_bytes())
    lora = ("--lora", f"{runs['lora'] / 'lora' / 'kohya.safetensors'}:0.5", "--lora", moved)
    call(txt2img.main, "--again", images["both"], *lora, "--out", images["moved"])
    assert np.array_equal(read_pixels(images["moved"]), read_pixels(images["both"]))
    images["again"].unlink()
    output = refused(txt2img.main, "--again", images["both"], "--lora", kohya, "--out", images["again"])
    assert "other weights than those that made it; name these with --model, --lora" in output


def test_a_scale_follows_the_last_colon_of_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("style:2").touch()
    assert [lora_argument(text) for text in (r"C:\a.safetensors", r"C:\a.safetensors:-.5", "me/style:1.25")] == [
        (r"C:\a.safetensors", 1.0),
        (r"C:\a.safetensors", -0.5),
        ("me/style", 1.25),
    ]
    assert lora_argument("style:2") == ("style:2", 1.0)
    assert lora_argument("style:2:0.5") == ("style:2", 0.5)


def test_a_merged_model_draws_the_image_of_the_adapter_in_plain_diffusers(
    runs: dict[str, Path], pipeline_dirs: dict[str, Path], call: Call, refused: Refused, tmp_path: Path
) -> None:
    base = pipeline_dirs["sd1"]
    output = call(merge.main, base, "--lora", f"{runs['lora']}:0.5", runs["lokr"], "--out", tmp_path / "merged")
    difference = re.search(r"image    differs by (\d+) of 255", output)
    assert difference and int(difference[1]) <= 1
    merged = StableDiffusionPipeline.from_pretrained(tmp_path / "merged", safety_checker=None)
    expected = LatentDiffusion.load(base).add_loras((runs["lora"], 0.5), (runs["lokr"], 1.0))
    for name, tensor in expected.unet.state_dict().items():
        assert torch.equal(merged.unet.state_dict()[name], tensor), name
    output = call(
        merge.main, base, "--lora", runs["dora"], "--to", "single-file", "--out", tmp_path / "merged.safetensors"
    )
    assert "layout   sd1\n" in output
    assert "--lora: none given" in refused(merge.main, base, "--out", tmp_path / "none")


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr"])
def test_an_adapter_converted_to_the_other_layout_and_back_is_the_same(
    kind: str, runs: dict[str, Path], pipeline_dirs: dict[str, Path], call: Call, tmp_path: Path
) -> None:
    to, base = ("--to", "lora"), ("--base", pipeline_dirs["sd1"])
    kohya, back = tmp_path / "kohya.safetensors", tmp_path / "back.safetensors"
    output = call(export.main, runs[kind], *to, *base, "--layout", "kohya", "--out", kohya)
    written, expected = load_file(kohya), load_file(runs[kind] / "lora" / "kohya.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in written.items())
    if kind == "lora":
        assert re.search(r"image    differs by [01] of 255", output)
    else:
        names = {"dora": "DoRA", "lokr": "LoKr"}
        assert f"image    not compared: diffusers doesn't load {names[kind]} in kohya's layout" in output
    output = call(export.main, kohya, *to, *base, "--layout", "diffusers", "--out", back)
    assert re.search(r"image    differs by [01] of 255", output)
    original = runs[kind] / "lora" / "pytorch_lora_weights.safetensors"
    assert load_file(back).keys() == load_file(original).keys()
    networks = LatentDiffusion.load(pipeline_dirs["sd1"]).networks
    assert compare_adapters(read_adapter(original, networks), read_adapter(back, networks)) > 0


def test_half_precision_and_what_is_missing(
    runs: dict[str, Path], pipeline_dirs: dict[str, Path], call: Call, refused: Refused, tmp_path: Path
) -> None:
    file, to = tmp_path / "half.safetensors", ("--to", "lora", "--layout", "kohya")
    base = ("--base", pipeline_dirs["sd1"])
    call(export.main, runs["lora"] / "lora", *to, *base, "--precision", "fp16", "--out", file)
    dtypes = {name.endswith("alpha"): tensor.dtype for name, tensor in load_file(file).items()}
    assert dtypes == {True: torch.float32, False: torch.float16}
    out = ("--out", tmp_path / "a.safetensors")
    assert "--base: --to lora needs the model" in refused(export.main, runs["lora"], *to, *out)
    assert "--layout: --to lora needs one" in refused(export.main, runs["lora"], "--to", "lora", *base, *out)
    tensors = load_file(file)
    large = {name: tensor.float() * (1e6 if "lora_up" in name else 1) for name, tensor in tensors.items()}
    save_file(large, tmp_path / "large.safetensors")
    fp16 = (*to, *base, "--precision", "fp16", *out)
    assert "fp16 is too narrow for factors of text_encoder." in refused(
        export.main, tmp_path / "large.safetensors", *fp16
    )
    wrong = refused(txt2img.main, "--model", pipeline_dirs["sdxl"], "--prompt", "a", "--lora", runs["lora"])
    assert re.search(r"error: --lora: .* changes a weight of \d+ × \d+, the model's is \d+ × \d+", wrong)
    missing = refused(
        txt2img.main, "--model", pipeline_dirs["sd1"], "--prompt", "a", "--lora", tmp_path / "no.safetensors"
    )
    assert "--lora: " in missing and "no such file" in missing
