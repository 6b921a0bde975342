"""A module in training: autocast under every strategy of distribution, and the settings of DDP."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn

from ldm.config.schema import RunConfig, Training
from ldm.distributed import launch
from ldm.training.engine import Engine


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Accelerator]:
    """An accelerator that reports a GPU as its device but uses none."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    accelerator.device_placement = False
    monkeypatch.setattr(nn.Module, "to", lambda module, *_: module)
    monkeypatch.setattr(AcceleratorState, "deepspeed_plugin", SimpleNamespace(deepspeed_config={}, enable_msamp=False))
    monkeypatch.setattr(
        accelerator,
        "prepare",
        lambda module, optimizer: (accelerator.prepare_model(module, evaluation_mode=True), optimizer),
    )
    states = accelerator.state.__dict__, PartialState().__dict__  # accelerate reads both
    before = [dict(state) for state in states]
    for state in states:
        state["device"] = torch.device("cuda")
    states[0]["fsdp_plugin"] = SimpleNamespace(fsdp_version=1)
    yield accelerator
    for state, previous in zip(states, before, strict=True):
        state.clear()
        state.update(previous)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "no"])
@pytest.mark.parametrize("strategy", ["NO", "MULTI_GPU", "FSDP", "DEEPSPEED"])
def test_autocast_has_the_configured_dtype_under_every_strategy(
    strategy: str, precision: str, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a dtype, autocast on a GPU is fp16, in which small gradients vanish unless the loss is scaled."""
    seen: list[tuple[str, torch.dtype | None]] = []
    real = torch.autocast

    def autocast(device_type: str, dtype: torch.dtype | None = None, enabled: bool = True, **options: Any) -> Any:
        if enabled:
            seen.append((device_type, dtype))
        return real("cpu", dtype=torch.bfloat16, enabled=enabled)

    monkeypatch.setattr(torch, "autocast", autocast)
    accelerator.state.distributed_type = PartialState().distributed_type = DistributedType[strategy]
    network = Engine(nn.Linear(4, 4), 1e-3, Training(), accelerator, precision)
    output = network.ddp_model(torch.randn(2, 4))
    assert output.dtype == torch.float32
    expected = {"bf16": torch.bfloat16, "fp16": torch.float16}
    assert set(seen) == ({("cuda", expected[precision])} if precision != "no" else set())


def test_a_deep_copy_of_the_ddp_model_uses_its_own_weights(accelerator: Accelerator) -> None:
    module = nn.Linear(4, 4)
    accelerator.state.device = PartialState().device = torch.device("cpu")
    network = Engine(module, 1e-3, Training(), accelerator, "bf16")
    x, copied = torch.randn(2, 4), copy.deepcopy(network.ddp_model)
    nn.init.zeros_(copied.weight)
    nn.init.zeros_(copied.bias)
    assert not copied(x).any()
    assert network.ddp_model(x).any()
    assert network.export_ema({}) is module
    assert torch.equal(module(x), nn.functional.linear(x, module.weight, module.bias))  # in float32, without autocast


def test_ddp_keeps_gradients_in_buckets_and_does_not_broadcast_buffers() -> None:
    ddp = launch.accelerator(RunConfig(device="cpu", tracker="none")).ddp_handler
    assert ddp is not None
    assert ddp.gradient_as_bucket_view
    assert not ddp.broadcast_buffers
