"""Compiled blocks against the same U-Net without compilation; graphs are run as they are, no code is generated."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.fx.experimental._config
from diffusers.models.attention_processor import Attention
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import DistributedDataParallel

from ldm.config.schema import Stage2Config
from ldm.models import attention, compilation, unet
from ldm.models.compilation import compile_blocks
from ldm.models.conditioning import Condition, predict
from ldm.utils.errors import UserError

CPU = torch.device("cpu")
SIDES = (4, 6, 10)
BUCKETS = [(h, w) for h in SIDES for w in SIDES]
TWO_LEVELS = {"channels": (8, 16), "attention": (False, True)}
DIFFERENT = 8  # blocks of a U-Net of two levels with text: seven residual ones and a transformer, which is there thrice
DIFFERENT_SINGLE = 4  # of a single level: three residual ones and the transformer
Inputs = tuple[torch.Tensor, torch.Tensor, Condition]


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """What is set for a process, and what it has compiled, is a test's own."""
    with torch._dynamo.config.patch(), torch.fx.experimental._config.patch(use_duck_shape=True):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()


def network(words: bool = True, backend: str = "sdpa", recomputed: bool = False, **levels: Any) -> unet.UNet:
    """A U-Net of a single level, if `levels` doesn't describe others."""
    torch.manual_seed(0)
    stage = Stage2Config(
        **{"channels": (8,), "attention": (True,), **levels},
        layers=1,
        attention_head_dim=8,
        norm_num_groups=4,
        conditions=("text",) if words else (),
    )
    model = unet.build(stage, 4, 16, 12 if words else 0)
    attention.use_attention(model, backend, CPU)
    if recomputed:
        model.enable_gradient_checkpointing()
    return model.train()


def inputs(h: int, w: int, words: bool = True, n: int = 4) -> Inputs:
    g = torch.Generator().manual_seed(100 * h + w)
    text = torch.randn(n, 5, 12, generator=g) if words else None
    return torch.randn(n, 4, h, w, generator=g), 999 * torch.rand(n, generator=g), Condition(text)


def learned(model: torch.nn.Module, x: Inputs, half: bool = False) -> list[torch.Tensor]:
    """The output and the gradients of a training step; the backward pass is in another thread, as on a GPU."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        output = model(*x) if isinstance(model, DistributedDataParallel) else predict(model, *x)
    thread = threading.Thread(target=output.float().square().sum().backward)
    thread.start()
    thread.join()
    return [output.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("levels", "text", "backend", "recomputed", "half"),
    [
        ({}, True, "eager", False, True),
        pytest.param(TWO_LEVELS, True, "eager", False, True, marks=pytest.mark.drill),
        pytest.param({}, False, "sdpa", True, False, marks=pytest.mark.drill),
        pytest.param(TWO_LEVELS, True, "sdpa", False, True, marks=pytest.mark.drill),
        pytest.param(TWO_LEVELS, True, "eager", True, False, marks=pytest.mark.drill),
        pytest.param({}, False, "sdpa", True, True, marks=pytest.mark.drill),
    ],
)
def test_a_block_is_compiled_once_for_all_buckets_and_learns_the_same(
    levels: dict[str, Any], text: bool, backend: str, recomputed: bool, half: bool
) -> None:
    model, plain = (network(text, backend, recomputed, **levels) for _ in range(2))
    counter = CompileCounter()
    compile_blocks(model, backend=counter)
    counts = []
    for h, w in BUCKETS:
        x = inputs(h, w, text)
        for actual, expected in zip(learned(model, x, half), learned(plain, x, half), strict=True):
            torch.testing.assert_close(actual, expected)
        counts.append(counter.frame_count)
    different = DIFFERENT if levels else DIFFERENT_SINGLE
    assert set(counts) == {different if text else counts[0]}
    assert not torch._dynamo.utils.counters["graph_break"]

    x = inputs(12, 14, text)
    model.eval(), plain.eval()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # as in a validation, in its precision and size
        assert torch.equal(predict(model, *x), predict(plain, *x))
    model.train()
    learned(model, x, half)
    assert counter.frame_count == counts[-1]


@pytest.mark.slow
@pytest.mark.drill
def test_a_compiled_unet_runs_with_substituted_weights() -> None:
    """As an averaged student does in each step of a distillation."""
    model, plain, counter = network(), network(), CompileCounter()
    compile_blocks(model, backend=counter)
    torch.manual_seed(1)
    others = {name: p.detach() + torch.randn_like(p) for name, p in model.named_parameters()}
    for h, w in BUCKETS[:2]:
        x, t, condition = inputs(h, w)
        with torch.no_grad():
            actual, expected = (
                torch.func.functional_call(unet, others, (x, t, condition.text)).sample for unet in (model, plain)
            )
        torch.testing.assert_close(actual, expected)
        learned(model, (x, t, condition))
        assert counter.frame_count == 2 * DIFFERENT_SINGLE


@pytest.mark.drill
def test_without_buckets_blocks_are_compiled_for_a_single_size_and_too_many_compilations_are_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compilation, "RECOMPILE_LIMIT", 1)
    model, plain, counter = network(), network(), CompileCounter()
    compile_blocks(model, dynamic=False, backend=counter)
    for _ in range(2):
        for actual, expected in zip(learned(model, inputs(8, 8)), learned(plain, inputs(8, 8)), strict=True):
            torch.testing.assert_close(actual, expected)
        assert counter.frame_count == DIFFERENT_SINGLE
    with pytest.raises(FailOnRecompileLimitHit):
        for h, w in BUCKETS:
            predict(model, *inputs(h, w))


@pytest.fixture
def process_group() -> Iterator[None]:
    """A group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Predicting(torch.nn.Module):
    def __init__(self, network: unet.UNet):
        super().__init__()
        self.unet = network

    def forward(self, *inputs: torch.Tensor | Condition) -> torch.Tensor:
        return predict(self.unet, *inputs)


@pytest.mark.slow
@pytest.mark.drill
@pytest.mark.parametrize("recomputed", [False, True])
def test_blocks_stay_single_graphs_under_ddp(process_group: None, recomputed: bool) -> None:
    model, plain, counter = network(recomputed=recomputed), network(), CompileCounter()
    compile_blocks(model, backend=counter)
    ddp_model = DistributedDataParallel(Predicting(model), bucket_cap_mb=0.001, gradient_as_bucket_view=True)
    for h, w in BUCKETS[:2]:
        for actual, expected in zip(learned(ddp_model, inputs(h, w)), learned(plain, inputs(h, w)), strict=True):
            torch.testing.assert_close(actual, expected)
    assert counter.frame_count == DIFFERENT_SINGLE


def test_attention_of_xformers_is_not_compiled() -> None:
    model = network()
    next(m for m in model.modules() if isinstance(m, Attention)).set_processor(attention.HalfPrecisionXFormers())
    with pytest.raises(UserError, match=r"stage2\.compile: xformers.* set stage2\.attention_backend=sdpa"):
        compile_blocks(model)
