"""Settings that FSDP and DeepSpeed can't shard are refused before training. Sharded runs are in tests/end_to_end."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldm.config import loader
from ldm.distributed import sharding
from ldm.utils.errors import UserError

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}


@pytest.mark.parametrize(
    ("environment", "overrides", "message"),
    [
        ({**FSDP, "FSDP_VERSION": "1"}, (), "fsdp_version: 1 in accelerate's configuration"),
        ({**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, (), "fsdp_offload_params: true"),
        ({**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, (), "stage2.gradient_checkpointing=true"),
        ({**FSDP, "FSDP_STATE_DICT_TYPE": "LOCAL_STATE_DICT"}, (), "fsdp_state_dict_type: LOCAL_STATE_DICT"),
        (FSDP, ("stage2.channels_last=true",), "stage2.channels_last"),
        ({**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, (), "zero_stage: 3 in DeepSpeed's configuration"),
        ({**ZERO, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, (), "offload_optimizer_device: cpu"),
        ({**ZERO, "ACCELERATE_GRADIENT_CLIPPING": "2.0"}, (), "gradient_clipping: 2.0 in DeepSpeed's configuration"),
        (
            {**ZERO, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            ("stage2.device_batch=8",),
            "4 in DeepSpeed's configuration, 2 in the accumulation steps of stage2.device_batch",
        ),
        (ZERO, ("run.precision=fp16",), "run.precision: fp16"),
        (ZERO, ("stage2.uncond_embedding=learned",), "stage2.uncond_embedding: learned"),
    ],
)
def test_settings_that_cannot_be_sharded_are_refused_in_one_line(
    root: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], overrides: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr(sharding, "is_deepspeed_available", lambda: True)
    settings = loader.load(root / "configs/tiny.yaml", list(overrides))
    sharding.check(settings.stage2, settings.run.precision)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message) as error:
        sharding.check(settings.stage2, settings.run.precision)
    assert "\n" not in str(error.value)


def test_an_optimizer_that_cannot_be_sharded_is_refused_where_there_are_processes_to_shard_over(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharding, "is_deepspeed_available", lambda: True)
    for optimizer, environment in (("muon", FSDP), ("adamw8bit", FSDP), ("lion", ZERO)):
        settings = loader.load(root / "configs/tiny.yaml", [f"stage2.optimizer={optimizer}"])
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            sharding.check(settings.stage2, settings.run.precision)
            with pytest.raises(UserError, match=f"stage2.optimizer: {optimizer} can't be sharded"):
                sharding.check(settings.stage2, settings.run.precision, processes=2)


def test_the_error_without_deepspeed_names_the_package_to_install(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "is_deepspeed_available", lambda: False)
    for name, value in ZERO.items():
        monkeypatch.setenv(name, value)
    settings = loader.load(root / "configs/tiny.yaml", [])
    with pytest.raises(UserError, match="pip install deepspeed"):
        sharding.check(settings.stage2, settings.run.precision)


@pytest.mark.parametrize("environment", [FSDP, ZERO])
def test_the_shipped_sd_512_configuration_can_be_sharded(
    root: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    monkeypatch.setattr(sharding, "is_deepspeed_available", lambda: True)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = loader.load(root / "configs/sd-512.yaml", [])
    sharding.check(settings.stage2, settings.run.precision)
