"""The Accelerator that a run builds."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from ldm.config.schema import RunConfig, Training
from ldm.distributed import launch
from ldm.utils.errors import UserError

CONFIG = RunConfig(device="cpu", tracker="none")


def is_compiled(accelerator: Accelerator) -> bool:
    return isinstance(accelerator.prepare_model(nn.Linear(2, 2)), torch._dynamo.eval_frame.OptimizedModule)


@pytest.mark.parametrize(
    "environment", [{"BACKEND": "INDUCTOR"}, {"BACKEND": "eager", "USE_REGIONAL_COMPILATION": "true"}, {}]
)
def test_dynamo_settings_of_accelerates_configuration_are_ignored_with_one_line(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launch.say_dynamo_is_ignored.cache_clear()
    for name, value in environment.items():
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", value)
    for _ in range(2):
        assert not is_compiled(launch.accelerator(CONFIG))
    backend = environment.get("BACKEND", "").lower()
    message = f"accelerate's dynamo_backend ({backend}) is ignored; stage2.compile=true compiles the U-Net.\n"
    assert capsys.readouterr().err == (message if environment else "")


@pytest.mark.parametrize(("stage", "key"), [("stage2", "stage2.batch"), ("steps-8", "batch"), ("classifier", "batch")])
def test_a_batch_that_cannot_be_shared_is_named_as_its_command_takes_it(stage: str, key: str) -> None:
    with pytest.raises(UserError, match=rf"^{key}: 63 can't be shared evenly by 2 processes; 64 can"):
        launch.accumulated(stage, Training(batch=63), 2)
