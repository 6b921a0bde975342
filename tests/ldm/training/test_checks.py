"""Checks before training: configurations, processes and autoencoders that would fail later are refused."""

import importlib.util
from pathlib import Path

import pytest
import torch

from ldm.config import loader
from ldm.config.schema import Stage1Config
from ldm.distributed.launch import accumulated
from ldm.models import autoencoder
from ldm.training import checks, plan
from ldm.utils.errors import UserError


def tiny(root: Path, *overrides: str) -> loader.Config:
    return loader.load(root / "configs/tiny.yaml", overrides)


def test_a_valid_configuration_returns_its_text_encoder(root: Path) -> None:
    encoder = checks.check(tiny(root), processes=2)
    assert (encoder.length, encoder.width) == (16, 384)


def test_attention_that_cannot_be_compiled_is_refused_before_stage_1(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldm.models.attention.check_backend", lambda *_: None)  # as on a GPU with xformers
    keys = "stage2.compile=true", "stage2.attention_backend=xformers"
    with pytest.raises(UserError, match=r"stage2\.compile: xformers.* set stage2\.attention_backend=sdpa"):
        checks.check(tiny(root, *keys, "run.precision=bf16"), processes=1)
    assert checks.check(tiny(root, *keys, "run.precision=no"), processes=1)  # in float32 attention is sdpa's


def test_the_plan_counts_the_tokens_of_all_chunks(root: Path) -> None:
    config = tiny(root, "text.chunks=3", "text.skip_layers=1")
    assert checks.check(config, processes=1).length == 48
    assert "48 tokens × 384" in plan.describe(config)


@pytest.mark.parametrize(
    ("overrides", "processes", "message"),
    [
        (["stage2.batch=16"], 3, r"stage2\.batch: 16 can't be shared evenly by 3 processes; 15 can"),
        (["stage1.batch=30"], 4, r"stage1\.batch: 30 can't be shared evenly by 4 processes; 32 can"),
        (["run.tracker=comet_ml"], 1, r"run\.tracker: comet_ml is not installed; pip install comet_ml"),
        (["text.width=768"], 1, r"text\.width: 768, but .* has 384"),
        (
            ["stage2.channels=[32, 32, 32, 32, 32, 32]", "stage2.attention=[false, false, false, false, false, false]"],
            1,
            r"stage2\.channels: 6 levels",
        ),
    ],
)
def test_errors_of_later_stages_are_reported_before_training(
    root: Path, overrides: list[str], processes: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        checks.check(tiny(root, *overrides), processes)


@pytest.mark.parametrize(("processes", "steps", "images"), [(1, 8, 32), (8, 1, 32), (64, 1, 4)])
def test_the_same_configuration_fits_1_to_64_gpus(root: Path, processes: int, steps: int, images: int) -> None:
    large = loader.load(root / "configs/sd-512.yaml")
    assert accumulated("stage2", large.stage2, processes) == (steps, images)
    line = next(line for line in plan.describe(large, processes).splitlines() if line.startswith("batch"))
    assert line.startswith(f"batch    256 images a step: {processes} process")
    assert line.endswith(
        f" × {steps} accumulation step{'s' if steps > 1 else ''} of {images} image{'s' if images > 1 else ''}"
    )


def test_processes_that_cannot_share_the_batch_get_the_nearest_batch_that_they_can(root: Path) -> None:
    with pytest.raises(UserError, match=r"stage2\.batch: 256 can't be shared evenly by 48 processes; 240 can"):
        plan.describe(loader.load(root / "configs/sd-512.yaml"), 48)


def test_a_batch_without_divisors_gets_a_better_suggestion(root: Path) -> None:
    config = tiny(root, "stage2.batch=134", "stage2.device_batch=32")  # 67 per process, a prime
    text = plan.describe(config, processes=2)
    assert "batch    16 images a step: 2 processes × 1 accumulation step of 8 images\n" in text
    assert "batch    134 images a step: 2 processes × 67 accumulation steps of 1 image\n" in text
    assert "         stage2.batch: 132 would be 3 accumulation steps of 22, nearer to stage2.device_batch, 32\n" in text
    assert accumulated("stage2", tiny(root, "stage2.batch=132", "stage2.device_batch=32").stage2, 2) == (3, 22)
    assert "would be" not in plan.describe(tiny(root, "stage2.batch=128", "stage2.device_batch=32"))
    assert "would be" not in plan.describe(tiny(root, "stage2.batch=16", "stage2.device_batch=64"))


def test_eight_bit_moments_need_bitsandbytes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, find=importlib.util.find_spec: None if name == "bitsandbytes" else find(name),
    )
    with pytest.raises(UserError, match=r"stage1\.optimizer: adamw8bit needs pip install 'ldm\[8bit\]'"):
        checks.check(tiny(root, "stage1.optimizer=adamw8bit"), processes=1)


def test_a_stage_that_is_not_trained_does_not_limit_the_processes(root: Path, tmp_path: Path) -> None:
    autoencoder.build(
        Stage1Config(channels=(16, 32), layers=1, latent_channels=4, norm_num_groups=8, mid_attention=False), 32
    ).save_pretrained(tmp_path)
    checks.check(tiny(root, f"stage1.pretrained={tmp_path}", "stage2.batch=32"), processes=32)


def test_a_loaded_autoencoder_that_differs_from_the_configuration_is_refused(root: Path, tmp_path: Path) -> None:
    autoencoder.build(
        Stage1Config(channels=(16, 16, 16), layers=1, latent_channels=4, norm_num_groups=8, mid_attention=False), 32
    ).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"stage1\.channels \(its factor\): 2, but .* has 4"):
        checks.check(tiny(root, f"stage1.pretrained={tmp_path}"), processes=1)


PIXELS = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def save_autoencoder(folder: Path, output_scale: float = 1.0) -> Path:
    torch.manual_seed(0)
    vae = autoencoder.build(Stage1Config(channels=(16, 32), layers=1, norm_num_groups=8, mid_attention=False), 32)
    vae.decoder.conv_out.weight.data *= output_scale
    vae.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("keys", ["pretrained: {}", "init_from: {}, train: decoder"])
def test_an_autoencoder_with_nonfinite_output_is_refused(root: Path, tmp_path: Path, keys: str) -> None:
    folder = save_autoencoder(tmp_path, float("inf"))
    settings = tiny(root, f"stage1={{{keys.format(folder)}, channels: [16, 32], groups: 8}}")
    with pytest.raises(UserError, match=r"stage1\..*: its weights are broken"):
        checks.check_on_images(settings, PIXELS, torch.device("cpu"))


def test_an_autoencoder_for_values_from_0_to_1_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identity = autoencoder.load("identity")
    monkeypatch.setattr(identity, "decode", lambda z: z.clamp(0, 1))  # as if its last layer were a sigmoid
    monkeypatch.setattr(autoencoder, "load", lambda *_: identity)
    with pytest.raises(UserError, match=r"stage1\.pretrained: .* with pixels in \[0, 1\]"):
        checks.check_on_images(tiny(root, "stage1.pretrained=sigmoid"), PIXELS, torch.device("cpu"))


def test_a_pretrained_autoencoder_with_bad_reconstructions_gives_a_warning(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_autoencoder(tmp_path)
    trained_further = tiny(root, f"stage1.init_from={folder}")
    checks.check_on_images(trained_further, PIXELS, torch.device("cpu"))
    assert not capsys.readouterr().err
    checks.check_on_images(tiny(root, f"stage1.pretrained={folder}"), PIXELS, torch.device("cpu"))
    assert "a single colour would have" in capsys.readouterr().err


def test_an_autoencoder_of_another_architecture_is_refused(root: Path, tmp_path: Path) -> None:
    other = Stage1Config(model="vq-f4", channels=(16, 32), layers=1, norm_num_groups=8, mid_attention=False)
    autoencoder.build(other, 32).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"stage1\.model: AutoencoderKL, but .* has VQModel"):
        checks.check(tiny(root, f"stage1.pretrained={tmp_path}"), processes=1)


def test_missing_weights_of_lpips_are_named_before_training(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"vgg16-397923af\.pth is not in .*put it there"):
        checks.check(tiny(root, "stage1.lpips=1"), processes=1)
