"""Adapters in training: what is frozen keeps its bytes, checkpoints hold the adapter, resumed runs its bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from of_config import indexed
from PIL import Image
from stable_diffusion import PIPELINES

from ldm.config.schema import Config
from ldm.data.index import Index
from ldm.models import autoencoder, text_encoder
from ldm.models.adapters.inject import AdapterSpec, adapter_parameters, add_adapter
from ldm.sampling.pipeline import LatentDiffusion
from ldm.training import checks
from ldm.training.checkpoint import checkpoints, read_checkpoint
from ldm.utils.errors import UserError
from stage2_diffusion import train as training
from stage2_diffusion.finetune.deliver import deliver

pytestmark = pytest.mark.usefixtures("two_noise_levels")
Few = Callable[..., tuple[Config, Index]]
ADAPTERS = {
    "lora": ("finetune.dropout=0.2", "finetune.text_encoder=true", "finetune.alpha=2"),
    "dora": ("finetune.base_precision=bf16",),
    "lokr": ("finetune.targets=all",),
    "loha": ("finetune.targets=linear", "finetune.rank_pattern={attn2: 3}"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "sd1"
    PIPELINES["sd1"](folder.parent).save_pretrained(folder)
    return folder


@pytest.fixture
def settings(few: Few, base: Path) -> Few:
    parts = [f"{key}={base}" for key in ("stage1.pretrained", "stage2.init_from", "text.model")]
    sizes = ["stage1.channels=[8, 8]", "text.max_tokens=null", "stage2.prediction_type=eps", "stage2.batch=2"]
    common = ["finetune.rank=2", "stage2.checkpoint_every=2"]

    def load(kind: str, *overrides: str) -> tuple[Config, Index]:
        return few(*parts, *sizes, *common, f"finetune.kind={kind}", *ADAPTERS.get(kind, ()), *overrides)

    return load


def run(settings: tuple[Config, Index]) -> dict[str, torch.nn.Module]:
    """Trains; returns the networks as they are then."""
    config, data = settings
    text = text_encoder.of(config.text)
    vae = autoencoder.load(str(config.stage1.pretrained), "stage1.pretrained")
    with pytest.MonkeyPatch.context() as patch:
        models: list[LatentDiffusion] = []
        patch.setattr(training, "deliver", lambda *args: (models.append(args[1]), deliver(*args)))
        training.train(config, data, vae, text)
    return {"vae": vae.vae, "text_encoder": text.models[0], "unet": models[0].unet}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", *(pytest.param(k, marks=pytest.mark.drill) for k in list(ADAPTERS)[1:])])
def test_the_base_keeps_its_bytes_and_a_resumed_run_ends_with_the_same_adapter(
    kind: str, settings: Few, base: Path, tmp_path: Path
) -> None:
    trained, before = run(settings(kind, "stage2.steps=4")), LatentDiffusion.load(base, "cpu")
    for name, network in {"vae": before.autoencoder.vae, **before.networks}.items():
        state = {key.replace(".base_layer.", "."): tensor for key, tensor in trained[name].state_dict().items()}
        rounded = torch.bfloat16 if (kind, name) == ("dora", "unet") else torch.float32
        for key, tensor in network.state_dict().items():
            assert torch.equal(state[key], tensor.to(rounded) if tensor.is_floating_point() else tensor), (name, key)

    parts, _ = read_checkpoint(checkpoints(tmp_path / "run/stage2")[-1])
    assert parts["model"].keys() == parts["ema"].keys()
    assert all(".default" in name for name in parts["model"])
    assert any(name.startswith("encoder.") for name in parts["model"]) == (kind == "lora")
    assert all(tensor.dtype == torch.float32 for tensor in parts["model"].values())
    expected = files_of(tmp_path / "run/lora")
    assert expected.keys() == {"README.md", "pytorch_lora_weights.safetensors", "kohya.safetensors"}
    assert not (tmp_path / "run/pipeline").exists()

    other = f"run.dir={tmp_path / 'other/run'}"  # of the same name, which files have in their headers
    for steps in (2, 4):
        run(settings(kind, f"stage2.steps={steps}", other))
    assert files_of(tmp_path / "other/run/lora") == expected


@pytest.mark.slow
def test_the_merged_pipeline_draws_what_the_base_with_the_adapter_draws(
    settings: Few, base: Path, tmp_path: Path
) -> None:
    run(settings("lora", "finetune.merge=true", "stage2.lr=0.1"))
    options = {
        "num_inference_steps": 2,
        "guidance_scale": 2.0,
        "solver": "ddim",
        "timestep_spacing": "trailing",
    }
    images = [
        model("a", seed=1, **options)[0]
        for model in (
            LatentDiffusion.load(tmp_path / "run/pipeline", "cpu"),
            LatentDiffusion.load(base, "cpu").add_loras((tmp_path / "run/lora", 1.0)),
            LatentDiffusion.load(base, "cpu"),
        )
    ]
    pixels = [torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).int() for image in images]
    assert (pixels[0] - pixels[1]).abs().max() <= 1 < (pixels[0] - pixels[2]).abs().max()


@pytest.mark.slow
@pytest.mark.drill
def test_masks_act_on_the_training_of_an_adapter(settings: Few, tmp_path: Path) -> None:
    rng, half = np.random.default_rng(0), Image.fromarray(np.tril(np.full((16, 16), 255, np.uint8)))
    (tmp_path / "images").mkdir()
    for i in range(4):
        image = Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8))
        if i:
            image.putalpha(half)
        image.save(tmp_path / f"images/{i}.png")

    def train(name: str, mask: str, *more: str) -> list[dict[str, float]]:
        source = f"data.source={{path: {tmp_path / 'images'}, caption: a, {mask}}}"
        folder = f"run.dir={tmp_path / name / 'run'}"  # files have its name in their headers
        config, _ = settings("lora", source, folder, "stage2.steps=2", "stage2.batch=4", "data.latents=mean", *more)
        run((config, indexed(config)))
        lines = map(json.loads, (tmp_path / name / "run/stage2/metrics.jsonl").read_text().splitlines())
        return [line for line in lines if "loss" in line]

    plain, masked = train("plain", ""), train("masked", "mask: alpha")
    weighted = train("weighted", "mask: alpha", "stage2.unmasked_weight=1.0")
    assert [line["masked"] for line in masked] == [0.75, 0.75]
    assert masked[0]["loss"] < 0.8 * plain[0]["loss"]
    assert [line["loss"] for line in weighted] == [line["loss"] for line in plain]  # the same bits
    adapters = {name: files_of(tmp_path / name / "run/lora") for name in ("plain", "masked", "weighted")}
    assert adapters["weighted"] == adapters["plain"] != adapters["masked"]


def test_a_changed_base_is_refused(settings: Few, base: Path, tmp_path: Path) -> None:
    run(settings("lora", "stage2.steps=2"))
    model = LatentDiffusion.load(base, "cpu")
    with torch.no_grad():
        model.unet.conv_in.weight.mul_(2)
    model.save(tmp_path / "changed")
    config, data = settings("lora", "stage2.steps=4")
    stage2 = config.stage2.model_copy(update={"init_from": str(tmp_path / "changed")})
    with pytest.raises(UserError, match="base"):
        run((config.model_copy(update={"stage2": stage2}), data))


def test_adapters_start_without_effect_and_are_all_that_is_trained(base: Path) -> None:
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([10.0])
    for kind in ADAPTERS:
        unet = LatentDiffusion.load(base, "cpu").unet
        width = unet.config.cross_attention_dim
        states = torch.randn(1, 3, width)
        expected = unet(x, t, states).sample
        layers = add_adapter(unet, AdapterSpec(kind, 2, targets="all"))
        torch.testing.assert_close(unet(x, t, states).sample, expected, atol=1e-5, rtol=1e-4)
        trained = {name for name, parameter in unet.named_parameters() if parameter.requires_grad}
        assert trained == {name for name, _ in adapter_parameters(unet)}
        assert len(layers) == len({name.split(".default")[0].rpartition(".")[0] for name in trained})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["finetune.rank=0"], r"finetune\.rank: .*greater than 0"),
        (["finetune.rank_pattern={nowhere: 4}"], r"finetune\.rank_pattern: 'nowhere' matches no layer; one is down"),
        (["finetune.base_precision=4bit"], r"finetune\.base_precision: 4bit needs a GPU and pip install"),
        (["finetune.base_precision=fp16", "run.precision=bf16"], r"base_precision: fp16, but run\.precision is bf16"),
        (["finetune.kind=full"], r"finetune\.rank: is of lora, dora, lokr and loha, and kind is full"),
        (["stage2.init_from=null"], r"stage2\.init_from: finetune\.kind lora changes a model; name it"),
        (["text.train=true"], r"text\.train: trains all of the text encoder, and finetune\.kind is lora"),
        (["stage2.uncond_embedding=learned"], r"stage2\.uncond_embedding: 'learned' can't be trained with finetune"),
    ],
)
def test_a_mistake_is_one_line(keys: list[str], message: str, settings: Few) -> None:
    with pytest.raises(UserError, match=message):
        config, _ = settings("lora", *keys)
        checks.check(config, 1)
