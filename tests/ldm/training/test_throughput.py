"""FLOPs against torch's count of the real computation, and the clock against sums by hand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ldm.config.schema import Stage1Config, Stage2Config
from ldm.distributed.sharding import without_weights
from ldm.models import attention, autoencoder, text_encoder, text_encoder_files, unet
from ldm.models.conditioning import Condition, TextEmbedding
from ldm.training.throughput import TRAINING, Clock, forward_flops, matmul_peak
from stage1_vae.model import LatentTransform, Reconstruction
from stage2_diffusion.denoiser import Denoiser

TEXT_WIDTH, TOKENS = 16, 5
SHAPE = {"channels": (8, 8), "attention": (False, True), "layers": 1, "attention_head_dim": 4, "norm_num_groups": 4}
KINDS = [(), ("class",), ("text",), ("text", "class"), ("text", "size"), ("text", "inpaint"), ("text", "upscale")]


def denoiser(conditions: tuple[str, ...], **keys: object) -> Denoiser:
    torch.manual_seed(0)
    stage = Stage2Config(**{**SHAPE, "conditions": conditions, **keys})
    network = unet.build(stage, 4, 8, TEXT_WIDTH if stage.text else 0, 3 if stage.classes else 0)
    return Denoiser(network, stage, TextEmbedding(torch.randn(1, TOKENS, TEXT_WIDTH)) if stage.text else None)


def inputs(
    conditions: tuple[str, ...], n: int = 2
) -> tuple[torch.Tensor, torch.Tensor, Condition, torch.Tensor | None]:
    labels = {"class", "upscale"} & set(conditions)
    image_channels = unet.input_channels(Stage2Config(conditions=conditions), 4) - 4
    condition = Condition(
        text=torch.randn(n, TOKENS, TEXT_WIDTH) if "text" in conditions else None,
        label=torch.zeros(n, dtype=torch.int64) if labels else None,
        sizes=torch.full((n, 6), 8.0) if "size" in conditions else None,
        image=torch.randn(n, image_channels, 8, 8) if image_channels else None,
    )
    dropped = torch.zeros(n, dtype=torch.bool) if "text" in conditions else None
    return torch.randn(n, 4, 8, 8), torch.zeros(n, dtype=torch.int64), condition, dropped


def measured_flops(module: nn.Module, *args: object) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*args)
    return counter.get_total_flops()


def test_a_multiply_add_counts_as_two_flops() -> None:
    assert forward_flops(nn.Linear(3, 5), torch.randn(7, 3)) == 2 * 7 * 3 * 5
    convolution = nn.Conv2d(3, 5, 3, stride=2, padding=1)  # from 8 × 6 to 4 × 3 positions
    assert forward_flops(convolution, torch.randn(2, 3, 8, 6)) == 2 * (2 * 4 * 3) * (3 * 3 * 3) * 5


def test_inputs_that_require_gradients_do_not_change_the_count() -> None:  # as a learned schedule's times do
    network, (x, t, condition, dropped) = denoiser(("text",)), inputs(("text",))
    learned = t.float().requires_grad_() * 1
    assert forward_flops(network, x, learned, condition, dropped) == forward_flops(network, x, t, condition, dropped)


def test_a_copy_without_weights_has_the_same_count() -> None:
    network, args = denoiser(("text", "class")), inputs(("text", "class"))
    assert forward_flops(without_weights(network), *args) == forward_flops(network, *args) > 0


@pytest.mark.parametrize(
    ("conditions", "backend"),
    [
        *(
            # an upscaler has a text, classes and channels of an image
            pytest.param(
                kind, "sdpa", marks=pytest.mark.drill if kind in (("text", "class"), ("text", "inpaint")) else ()
            )
            for kind in KINDS
        ),
        (("text",), "eager"),
    ],
)
def test_the_count_of_a_unet_equals_that_of_the_computation(conditions: tuple[str, ...], backend: str) -> None:
    model, args = denoiser(conditions), inputs(conditions)
    attention.use_attention(model.unet, backend, torch.device("cpu"))
    assert forward_flops(model, *args) == measured_flops(model, *args) > 0


def test_the_count_with_a_trained_text_encoder_equals_that_of_the_computation() -> None:
    encoder = text_encoder.load(text_encoder_files.MINILM, TOKENS)
    stage = Stage2Config(**SHAPE)
    model = Denoiser(unet.build(stage, 4, 8, encoder.width), stage, None, encoder)
    x, t, condition, dropped = inputs(("text",))
    args = x, t, condition._replace(text=encoder.token_ids(["cat", "a red heart"])), dropped
    assert forward_flops(model, *args) == measured_flops(model, *args)


@pytest.mark.parametrize("kind", ["kl", "vq", "tiny"])
@pytest.mark.parametrize("transform", [None, LatentTransform(1, 2, 3)])
def test_the_count_of_an_autoencoder_equals_that_of_the_computation(
    kind: str, transform: LatentTransform | None
) -> None:
    stage = Stage1Config(
        model={"vq": "vq-f8", "kl": "kl", "tiny": "tiny"}[kind], channels=(8, 8), layers=1, norm_num_groups=4
    )
    model = Reconstruction(autoencoder.build(stage, 8), stage)
    x, eps = torch.randn(2, 3, 8, 8), torch.randn(2, stage.latent_channels, 4, 4)
    assert forward_flops(model, x, eps, transform) == measured_flops(model, x, eps, transform) > 0


def test_twice_the_batch_has_twice_the_flops() -> None:
    model = denoiser(("text", "class"))
    assert forward_flops(model, *inputs(("text", "class"), 6)) == 2 * forward_flops(
        model, *inputs(("text", "class"), 3)
    )


def test_mixed_precision_gradient_checkpointing_and_compilation_do_not_change_the_count() -> None:
    model, args = denoiser(("text",), channels=(8, 16), attention_head_dim=8), inputs(("text",))
    expected = measured_flops(model, *args)
    model.unet.enable_gradient_checkpointing()
    model.unet.to(memory_format=torch.channels_last)
    Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    model.unet.compile()
    x, t, condition, dropped = args
    in_half = x.bfloat16(), t, condition._replace(text=condition.text.bfloat16()), dropped
    assert forward_flops(model, *args) == forward_flops(model, *in_half) == expected


def test_counting_does_not_change_the_model() -> None:
    model, args = denoiser(("text",)).train(), inputs(("text",))
    tensors = [*model.parameters(), *model.buffers()]
    before, state = [tensor.clone() for tensor in tensors], torch.get_rng_state()
    forward_flops(model, *args)
    assert all(a is b for a, b in zip([*model.parameters(), *model.buffers()], tensors, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert all(p.device.type == "cpu" and p.requires_grad and p.grad is None for p in model.parameters())
    assert model.training and model.unet.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_larger_than_memory_is_counted() -> None:
    with torch.device("meta"):
        wide, x = nn.Linear(2**22, 2**22, bias=False), torch.empty(1, 2**22)  # 70 TB
    assert forward_flops(wide, x) == 2 * 2**44


def test_a_forward_pass_that_depends_on_values_counts_as_0() -> None:
    class ValueDependent(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if float(x.sum()) > 0 else x

    assert forward_flops(ValueDependent(2, 2), torch.ones(1, 2)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_measured_peak_is_positive_and_leaves_the_random_state(dtype: torch.dtype) -> None:
    state = torch.get_rng_state()
    assert 0 < matmul_peak(torch.device("cpu"), dtype, seconds=0.01) < 1e16
    assert torch.equal(torch.get_rng_state(), state)


class ManualClock:
    """A clock that stands still until `seconds` is changed."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def test_the_clock_reports_rates_and_waiting_since_the_last_reading() -> None:
    time = ManualClock()

    def loader() -> Iterator[int]:
        for seconds in (3.0, 1.0, 2.0):
            time.seconds += seconds
            yield 8

    clock, read = Clock(flops=50.0, peak=1000.0, now=time, power=lambda: 350.0), []
    for images in clock.waiting(loader()):
        time.seconds += 1.0
        clock.count(images)
        read.append(clock.read() if len(read) != 1 else {})
    assert read[0] == {"images_per_second": 8 / 4, "waiting": 3 / 4, "mfu": 2 * 50 / 1000, "watts": 350.0}
    assert read[2] == pytest.approx(
        {"images_per_second": 16 / 5, "waiting": 3 / 5, "mfu": 3.2 * 50 / 1000, "watts": 350.0}
    )


def test_the_clock_reports_no_utilisation_without_flops_or_peak() -> None:
    for known in ({}, {"flops": 1.0}, {"peak": 1.0}):
        time = ManualClock()
        clock = Clock(**known, now=time)
        time.seconds += 2.0
        assert clock.read() == {"images_per_second": 0.0, "waiting": 0.0}


def test_flops_are_not_counted_on_the_forward_of_a_validation() -> None:
    time, model = ManualClock(), nn.Linear(4, 2, bias=False)
    clock = Clock(now=time)
    clock.count_flops(model, model, 8, 1000.0, lambda: True)
    model.eval()(torch.ones(3, 4))
    assert clock.flops == 0
    model.train()(torch.ones(8, 4))
    assert clock.flops == TRAINING * 2 * 4 * 2
