"""Memory as it is counted without values against what real tensors, a real optimizer and torch's allocator take."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forked import ScriptProcess, of_accelerate
from tiny import WORDS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from transformers import CLIPTextConfig, CLIPTextModel

import train_ldm
from ldm.config import loader
from ldm.config.presets import AUTOENCODERS
from ldm.config.schema import Stage2Config
from ldm.distributed.launch import accelerator
from ldm.models import attention, autoencoder, text_encoder, unet
from ldm.models.autoencoder import Autoencoder
from ldm.models.conditioning import Condition, TextEmbedding, predict
from ldm.training import memory_estimate, memory_tracker, plan
from ldm.training.engine import Engine
from ldm.training.memory_estimate import (
    estimate_memory,
    fsdp_memory,
    moments_memory,
    shapes_moments_memory,
    shard_size,
    unet_memory,
)
from ldm.training.memory_tracker import AsOnGPU, MemoryTracker
from ldm.training.optimizer import flatten_optimizer, hidden_matrices
from ldm.training.trainer import Trainer
from stage2_diffusion.denoiser import Denoiser

SHAPE: dict[str, Any] = {
    "channels": (32, 64),
    "attention": (True, True),
    "layers": 1,
    "attention_head_dim": 8,
    "norm_num_groups": 4,
}
SMALL = ("stage2.channels=[8]", "stage2.attention=[true]", "stage2.norm_num_groups=4", "stage2.attention_head_dim=4")
TINY = ("tiny", *SMALL, f"text.model=${WORDS}")
Inputs = tuple[torch.Tensor, torch.Tensor, Condition]


def settings(root: Path, name: str = "tiny", *overrides: str) -> loader.Config:
    return loader.load(root / f"configs/{name}.yaml", overrides)


def inputs(device: str, stage: Stage2Config) -> Inputs:
    zeros = partial(torch.zeros, device=device)
    numbers = zeros(2, dtype=torch.int64)
    condition = Condition(
        text=zeros(2, 5, 16) if stage.text else None,
        label=numbers if stage.classes else None,
        sizes=zeros(2, 6) if stage.sizes else None,
    )
    return zeros(2, 4, 16, 16), numbers, condition


def network(device: str, stage: Stage2Config, checkpointed: bool = False) -> Any:
    """A U-Net with gradients, ready to be trained."""
    with torch.device(device):
        net = unet.build(stage, 4, 16, 16 if stage.text else 0, 3).train()
    attention.use_attention(net, "sdpa", torch.device("cpu"))
    if checkpointed:
        net.enable_gradient_checkpointing()
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return net


def weights_and_gradients(net: torch.nn.Module) -> list[torch.Tensor]:
    return [tensor for p in net.parameters() for tensor in (p, p.grad) if tensor is not None]


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
def test_what_is_counted_after_a_forward_is_what_autograd_really_saves(checkpointed: bool) -> None:
    stage, saved = Stage2Config(**SHAPE), dict[int, int]()
    net = network("cpu", stage, checkpointed)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x, t, condition = inputs("cpu", stage)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = predict(net, x, t, condition)
    for tensor in (output, x, t, condition.text):
        pack(tensor)
    for tensor in weights_and_gradients(net):
        saved.pop(tensor.untyped_storage().data_ptr(), None)

    without = network("meta", stage, checkpointed)
    with MemoryTracker(weights_and_gradients(without)) as living, AsOnGPU("no"):
        x, t, condition = inputs("meta", stage)
        output = predict(without, x, t, condition)
    assert living.now == [0, sum(saved.values())]


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
def test_a_step_is_counted_to_take_what_the_allocator_gives_it(checkpointed: bool) -> None:
    stage = Stage2Config(**SHAPE)
    net = network("cpu", stage, checkpointed)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        predict(net, *inputs("cpu", stage)).float().square().mean().backward()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        now += change.nbytes()
        most = max(most, now)
    counted = unet_memory(network("meta", stage), partial(inputs, "meta", stage), "no", checkpointed)
    assert counted.copies == 0
    assert counted.others == pytest.approx(most, rel=0.03)


class Attention(TorchFunctionMode):
    """For GPUs that are not here."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return memory_tracker._FusedAttention.apply(*args[:3])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("precision", "keys"),
    [
        pytest.param("bf16", {"conditions": ()}, marks=pytest.mark.drill),
        ("fp16", {"conditions": ("class",)}),
        ("bf16", {}),
        pytest.param("fp16", {}, marks=pytest.mark.drill),
        pytest.param("bf16", {"pooled_text": True}, marks=pytest.mark.drill),
        ("fp16", {"conditions": ("text", "size")}),
    ],
    ids=["none", "class", "text-bf16", "text-fp16", "pooled", "size"],
)
def test_types_are_those_of_autocast_on_a_gpu(precision: str, keys: dict[str, Any]) -> None:
    stage = Stage2Config(**{**SHAPE, "attention": (False, True)}, **keys)
    net = network("meta", stage)
    with MemoryTracker(weights_and_gradients(net)) as counted, AsOnGPU(precision):
        x = inputs("meta", stage)
        output = predict(net, *x)
        during = list(counted.now)
    with FakeTensorMode(allow_non_fake_inputs=True):
        cuda = {id(p): torch.nn.Parameter(torch.empty_like(p, device="cuda")) for p in net.parameters()}
        net = copy.deepcopy(net, cuda)
        torch.set_autocast_enabled("cuda", True)  # `torch.autocast` refuses where there is no GPU
        torch.set_autocast_dtype("cuda", memory_tracker.DTYPES[precision])
        torch.autocast_increment_nesting()
        try:
            with MemoryTracker(net.parameters()) as autocast, Attention():
                y = inputs("cuda", stage)
                expected = predict(net, *y)
                cached = list(autocast.now)
        finally:
            torch.autocast_decrement_nesting()
            torch.clear_autocast_cache()
            torch.set_autocast_enabled("cuda", False)
    assert during == cached  # with copies of all weights
    assert counted.now == autocast.now  # with those that the backward pass needs
    assert during[0] > counted.now[0] > 0
    assert output.dtype == expected.dtype
    del x, y


def test_weights_gradients_moments_and_averages_are_those_of_a_run(root: Path, tmp_path: Path) -> None:
    config = settings(
        root,
        "tiny",
        f"run.dir={tmp_path}",
        "run.tracker=none",
        "run.device=cpu",
        "stage2.ema_widths=[0.05, 0.1]",
        "stage2.channels=[8, 16]",
        "stage2.attention=[false, true]",
        "stage2.norm_num_groups=4",
        "stage2.attention_head_dim=4",
    )
    shape = config.stage1.latent_channels, config.data.size // config.stage1.factor, 384
    run = Trainer(
        config.run,
        config.stage2,
        "stage2",
        Denoiser(unet.build(config.stage2, *shape), config.stage2, TextEmbedding(torch.zeros(1, 16, 384))),
    )
    for parameter in run.parameters:
        parameter.grad = torch.zeros_like(parameter)
    run._engine.optimizer.step()

    def num_bytes(tensors: Any) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    rows = {item.name: item.step for item in estimate_memory(config).rows}
    assert rows["weights, float32"] == num_bytes(run.parameters)
    assert rows["gradients, float32"] == num_bytes(p.grad for p in run.parameters)
    states = run._engine.optimizer.optimizer.state.values()
    assert rows["moments of adamw"] == num_bytes(tensor for state in states for tensor in state.values())
    assert rows["2 averages of the weights"] == num_bytes(p for model in run.ema.models for p in model.shadow_params)
    vae, encoder = plan.networks(config)[0], text_encoder.of(config.text)
    assert rows["autoencoder"] == num_bytes(vae.parameters())
    assert rows["text encoder"] == num_bytes(encoder.model.parameters())


NARROW = ("stage2.norm_num_groups=4", "stage2.attention_head_dim=4", "run.device=cpu", "run.tracker=none")


@pytest.mark.slow
@pytest.mark.drill
def test_fsdp_is_counted_to_hold_what_two_processes_hold(
    launch: Callable[..., ScriptProcess], finish: Callable[[ScriptProcess], str], root: Path, tmp_path: Path
) -> None:
    keys = [
        f"run.dir={tmp_path}",
        "run.tracker=none",
        "run.device=cpu",
        "text.model=none",  # which needs not be loaded
        "text.width=384",
        "stage1.latent_channels=3",  # uneven shards
        "stage2.batch=4",
        "stage2.device_batch=1",
        "stage2.ema_widths=[0.05, 0.1]",
    ]
    process = launch(
        "tests/ldm/training/fsdp_memory.py",
        tmp_path,
        *keys,
        processes=2,
        more=of_accelerate(root / "configs/accelerate/fsdp.yaml"),
    )
    output = finish(process)
    first, last = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    config = settings(root, "tiny", *keys)
    estimate = estimate_memory(config, 2, sharded=True)
    rows = {item.name: item.step for item in estimate.rows}
    assert rows["weights, float32, 1/2"] == first["weights"] == last["weights"]  # padded to the same size
    assert rows["moments of adamw, 1/2"] == first["moments"] > last["moments"]
    assert rows["2 averages of the weights, 1/2"] == first["averages"] > last["averages"]
    network = plan.networks(config)[1]
    for process_memory in (first, last):
        assert process_memory["gradients"] == [[rows["gradients, float32"], 0], [0, first["weights"]]]
        assert process_memory["gradients between steps"] == 0
        outside, *blocks = process_memory["gathered"]
        assert fsdp_memory(network, 2, accumulation_steps=2) == outside + 3 * max(blocks)
        assert fsdp_memory(network, 2, accumulation_steps=1) == 2 * outside + 4 * max(blocks)
    assert str(estimate) in output  # of the dry run


def test_a_shard_has_the_rows_of_its_process() -> None:
    assert [shard_size(torch.Size([10, 3, 3]), processes) for processes in (1, 2, 4, 16)] == [90, 45, 27, 9]


@pytest.mark.parametrize("optimizer", ["prodigy", "schedulefree", "muon", "adafactor", "lion"])
def test_what_an_optimizer_keeps_is_counted(root: Path, optimizer: str) -> None:
    config = settings(root, "tiny", "stage2.channels=[8, 16]", "stage2.attention=[false, true]", *NARROW)
    module = unet.build(config.stage2, 4, 8, 16)
    stage = Stage2Config(optimizer=optimizer, lr=1)
    engine = Engine(module, 1.0, stage, accelerator(config.run), "no")
    for parameter in engine.parameters:
        parameter.grad = torch.ones_like(parameter)
    engine.optimizer.step()
    tensors = flatten_optimizer(engine.optimizer.state_dict())[0]
    kept = sum(t.numel() * t.element_size() for name, t in tensors.items() if t.ndim and not name.startswith("groups"))
    hidden = hidden_matrices(module)
    parameters = list(module.parameters())
    counted = shapes_moments_memory([p.shape for p in parameters], [id(p) in hidden for p in parameters], stage)
    assert counted == kept


def test_small_moments_stay_in_32_bits_and_others_have_a_scale_for_256() -> None:
    stage = Stage2Config(optimizer="adamw8bit")
    assert moments_memory([4095], stage) == 2 * 4 * 4095
    assert moments_memory([4096, 4097], stage) == 2 * (4096 + 4 * 16) + 2 * (4097 + 4 * 17)


def test_a_text_encoder_that_is_trained_has_gradients_but_for_what_no_state_depends_on(root: Path, words: Path) -> None:
    frozen, trained = (
        estimate_memory(settings(root, *TINY, "text.max_tokens=8", f"text.train={train}"))
        for train in ("false", "true")
    )
    encoder = text_encoder.load(str(words), 8)
    pooler = sum(p.numel() for p in encoder.model.pooler.parameters())
    total = sum(p.numel() for p in encoder.model.parameters())
    frozen_rows, trained_rows = ({item.name: item.step for item in estimate.rows} for estimate in (frozen, trained))
    assert (frozen_rows["text encoder"], trained_rows["text encoder"]) == (4 * total, 4 * pooler)
    assert trained_rows["gradients, float32"] - frozen_rows["gradients, float32"] == 4 * (total - pooler)
    assert any("activations of the text encoder" in note for note in trained.notes)


def test_the_text_encoder_of_stable_diffusion_is_known_where_it_is_not() -> None:
    shape = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, vocab_size=49408
    )
    with torch.device("meta"):
        model = CLIPTextModel(shape)
    assert sum(p.numel() for p in model.parameters()) == plan.CLIP["openai/clip-vit-large-patch14"]


@pytest.mark.parametrize(
    "shape",
    [
        "{channels: [16, 16], layers: 1, norm_num_groups: 8, mid_attention: false}",
        "{model: dc-f4-small, channels: [8, 16], decoder_channels: [16, 16], latent_channels: 4}",
        "{model: dc-f32, channels: [32, 32], layers: 1, latent_channels: 4}",
    ],
)
def test_encoding_and_decoding_take_what_they_really_do(root: Path, shape: str) -> None:
    tiny = settings(root, "tiny", "data.size=16", f"stage1={shape}")
    vae = Autoencoder(autoencoder.build(tiny.stage1, 16))
    peaks = []
    for function, shape in ((vae.moments, (3, 3, 16, 16)), (vae.decode, (2, 4, 8, 8))):
        with MemoryTracker(vae.vae.parameters()) as real:
            function(torch.zeros(shape))
        peaks.append(sum(real.peak))
    with torch.device("meta"):
        empty = autoencoder.build(tiny.stage1, 16)
    assert memory_estimate.autoencoder_memory(empty, tiny, 3, 2) == tuple(peaks)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(
            model,
            marks=()
            if model in ("kl-f16", "vq-f4", "tiny", "dc-f32", "dc-f8-small", "identity")
            else pytest.mark.drill,
        )
        for model in AUTOENCODERS  # the others are of the same kinds, with other widths
    ],
)
def test_every_autoencoder_can_be_counted(root: Path, model: str) -> None:
    config = loader.parse({"data": {"source": "x", "size": 64}, "stage1": {"model": model}}, "a test")
    with torch.device("meta"):
        vae = autoencoder.build(config.stage1, 64)
    assert (min(memory_estimate.autoencoder_memory(vae, config, 1, 1)) > 0) == (model != "identity")


@pytest.mark.parametrize("conditions", ["[]", "[class]", "[text, class]", "[text, size]", "[text, inpaint]"])
def test_a_model_of_any_conditions_can_be_counted(root: Path, conditions: str) -> None:
    keys = f"stage2.conditions={conditions}", "stage2.pooled_text=false"
    estimate = estimate_memory(settings(root, *TINY, *keys))
    assert estimate.step > 0 and estimate.between > 0


@pytest.mark.parametrize(
    ("conditions", "processes", "images"),
    [("[class]", 8, 8), ("[]", 8, 2), ("[text, inpaint]", 8, 1), ("[text, inpaint]", 1, 8), ("[text]", 8, 1)],
)
def test_as_many_images_are_counted_as_a_sheet_has(root: Path, conditions: str, processes: int, images: int) -> None:
    keys = f"stage2.conditions={conditions}", "stage2.pooled_text=false", "sample.prompts=[a, b, c]"
    assert memory_estimate._batch_sizes(settings(root, "tiny", *keys), processes, images=16)[2] == images


def test_gradients_stay_between_steps_under_ddp_only(root: Path) -> None:
    config = settings(root, *TINY)
    single, ddp, fsdp = (estimate_memory(config, *options) for options in ((1, True), (2, False), (2, True)))
    assert {row.name.removesuffix(", 1/2") for row in fsdp.rows} > {row.name for row in ddp.rows}
    kept = [row.between for estimate in (single, ddp, fsdp) for row in estimate.rows if "gradients, f" in row.name]
    assert kept == [0, ddp.rows[0].step, 0]
    assert not any("1/1" in row.name or "gathered" in row.name for row in single.rows)  # nothing to shard


def test_a_unet_that_is_loaded_is_counted_as_it_is(root: Path, tmp_path: Path) -> None:
    keys = ["stage2.conditions=[]", "stage2.pooled_text=false"]
    small = settings(root, "tiny", *keys, *SMALL)
    shape = small.stage1.latent_channels, small.data.size // small.stage1.factor
    unet.build(small.stage2, *shape).save_pretrained(tmp_path)
    loaded = settings(root, "tiny", *keys, f"stage2.init_from={tmp_path}")
    assert estimate_memory(loaded).rows == estimate_memory(small).rows


def test_without_a_cache_images_are_encoded_in_a_step(root: Path) -> None:
    keys = "stage1.channels=[64, 64]", "stage1.norm_num_groups=8", "stage2.batch=2"
    cached, uncached = (
        estimate_memory(settings(root, *TINY, *keys, f"data.cache={kind}")) for kind in ("disk", "none")
    )
    assert uncached.step > cached.step
    assert uncached.between == cached.between


def test_the_configuration_for_24_gb_takes_less_than_22(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    estimate = estimate_memory(settings(root, "sd-512-24gb"))
    with capsys.disabled():
        print(f"\n{estimate}")
    assert max(estimate.step, estimate.between) < 22e9  # bytes; the card has 24 · 2^30, 25.8e9
    header = re.search(r"# +together +([\d.]+) +([\d.]+)\n", (root / "configs/sd-512-24gb.yaml").read_text("utf-8"))
    assert header and header.groups() == (f"{estimate.step / 1e9:.2f}", f"{estimate.between / 1e9:.2f}")


def test_a_dry_run_says_what_a_gpu_must_hold_where_nothing_is_here_yet(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        train_ldm.main(
            [
                "--config",
                str(root / "configs/sd-512.yaml"),
                "--dry-run",
                f"run.dir={tmp_path / 'run'}",
                f"data.source={tmp_path / 'none'}",
                *SMALL,
            ]
        )
        == 0
    )
    output = capsys.readouterr().out
    assert "U-Net," in output and "autoencoder," in output
    assert "batch    256 images a step: 1 process × 8 accumulation steps of 32 images" in output
    assert "activations of 32 images" in output and "together" in output and "not measured: " in output
    assert not (tmp_path / "run").exists()
