"""Averages of weights while training, and post-hoc averages from snapshots."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from cases import for_each
from diffusers.training_utils import EMAModel
from ema_pytorch.post_hoc_ema import sigma_rel_to_gamma, solve_weights
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.profiler import ProfilerActivity, profile

from ldm.config.schema import WIDEST, Training
from ldm.training.checkpoint_writer import CheckpointWriter
from ldm.training.ema import EMA, Averages, PowerEMA, coefficients, exponent, fit, read_snapshots, weighted_sum
from ldm.utils.errors import UserError


def walk(steps: int, size: int = 8) -> torch.Tensor:
    """A random walk of weights, `(steps, size)`."""
    return torch.randn(steps, size, generator=torch.Generator().manual_seed(0)).cumsum(0)


def averages_of(history: torch.Tensor, folder: Path, widths: tuple[float, ...], every: int = 100) -> Averages:
    """The averages of a parameter whose values over training are `history`, `(steps, size)`; writes their snapshots."""
    parameter = nn.Parameter(torch.zeros_like(history[0]))
    training = Training(steps=len(history), ema_widths=widths, ema_snapshot_every=every)
    averages = Averages([("layer.weight", parameter)], training)
    for step, weights in enumerate(history, start=1):
        parameter.data.copy_(weights)
        averages.step()
        if averages.due(step):
            averages.snapshot_writer(folder, step)(averages.state())
    return averages


@for_each("width", [0.01, 0.05, 0.1, 0.2, 0.288])
def test_the_exponent_gives_the_configured_width(width: float) -> None:
    gamma = exponent(width)
    assert ((gamma + 1) / (gamma + 2) ** 2 / (gamma + 3)) ** 0.5 == pytest.approx(width, rel=1e-9)
    assert gamma == pytest.approx(sigma_rel_to_gamma(width), rel=1e-12)
    assert gamma > 0
    assert exponent(WIDEST) == pytest.approx(0, abs=1e-9)


@for_each("width", [0.05, 0.1, 0.25])
def test_a_steps_weight_is_the_integral_of_the_power_profile(width: float) -> None:
    t, gamma = 500, exponent(width)
    parameter = nn.Parameter(torch.zeros(t, dtype=torch.float64))
    average = PowerEMA([parameter], width)
    for step in range(t):
        parameter.data = nn.functional.one_hot(torch.tensor(step), t).double()
        average.step([parameter])
    s = np.arange(1, t + 1)
    expected = (s / t) ** (gamma + 1) - ((s - 1) / t) ** (gamma + 1)  # of (γ + 1) τ^γ / t^(γ+1), from s − 1 to s
    np.testing.assert_allclose(average.shadow_params[0].numpy(), expected, rtol=1e-9, atol=1e-15)
    std = np.sqrt(np.cov(s, aweights=expected, ddof=0)) / t
    assert std == pytest.approx(width, rel=1e-3)


def test_without_widths_the_average_equals_diffusers_with_warm_up(tmp_path: Path) -> None:
    history = walk(50)
    averages = averages_of(history, tmp_path, ())
    expected = history[0]
    for n, weights in enumerate(history[1:], start=1):
        decay = min(0.999, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weights
    torch.testing.assert_close(averages.main.shadow_params, [expected])
    assert not list(tmp_path.iterdir())


@for_each("decay", [0.5, 0.999])
def test_the_average_equals_diffusers_ema_model(decay: float) -> None:
    parameter = nn.Parameter(torch.zeros(8))
    average, reference = EMA([parameter], decay), EMAModel([parameter], decay=decay)
    for weights in walk(60):
        parameter.data.copy_(weights)
        average.step([parameter])
        reference.step([parameter])
        torch.testing.assert_close(average.shadow_params, reference.shadow_params, rtol=1e-6, atol=1e-6)


def test_an_update_allocates_nothing_and_a_swap_a_single_tensor() -> None:
    parameters: list[torch.Tensor] = [nn.Parameter(torch.randn(256, 256)) for _ in range(16)]
    average = EMA(parameters, 0.9)

    def peak(action: Callable[[list[torch.Tensor]], None]) -> int:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            action(parameters)
        allocated = maximum = 0
        for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
            if event.name() == "[memory]":
                allocated += event.nbytes()
                maximum = max(maximum, allocated)
        return maximum

    average.step(parameters)
    assert peak(average.step) < 4096
    assert peak(average.swap) <= 256 * 256 * 4 + 4096


def test_two_swaps_restore_weights_and_averages() -> None:
    parameters = [nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(7))]
    average = EMA(parameters, 0.9)
    for p in parameters:
        p.data.add_(1)
    average.step(parameters)
    before = [p.detach().clone() for p in parameters], [s.clone() for s in average.shadow_params]
    average.swap(parameters)
    assert all(map(torch.equal, parameters, before[1]))
    average.swap(parameters)
    assert all(map(torch.equal, parameters, before[0]))
    assert all(map(torch.equal, average.shadow_params, before[1]))


def test_swapped_averages_keep_their_names() -> None:
    parameter = nn.Parameter(torch.zeros(8))
    averages = Averages([("weight", parameter)], Training(ema_decay=0.5))
    for weights in walk(5):
        parameter.data.copy_(weights)
        averages.step()
    before = averages.tensors(averages.main)["weight"].clone()
    averages.swap()
    assert torch.equal(averages.tensors(averages.main)["weight"], before)
    averages.swap()
    assert torch.equal(parameter, weights)


def test_snapshots_have_step_and_width_in_their_name_and_the_averages_inside(tmp_path: Path) -> None:
    averages = averages_of(walk(250), tmp_path, (0.1, 0.05))
    snapshots = read_snapshots(tmp_path)
    assert [snapshot[1:] for snapshot in snapshots] == [
        (step, step, width) for step in (100, 200, 250) for width in (0.05, 0.1)
    ]
    assert {path.name for path in tmp_path.iterdir()} >= {"step-000100-0.05.safetensors", "step-000250-0.1.safetensors"}
    for snapshot, model in zip(snapshots[-2:], reversed(averages.models), strict=True):
        assert torch.equal(load_file(snapshot.path)["layer.weight"], model.shadow_params[0])


def test_a_file_that_is_no_snapshot_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "step-000001-0.1.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"step-000001-0\.1\.safetensors: not a sound snapshot"):
        read_snapshots(tmp_path)


def test_post_hoc_averages_reproduce_the_snapshots(tmp_path: Path) -> None:
    averages_of(walk(1000), tmp_path, (0.05, 0.1))
    snapshots = read_snapshots(tmp_path)
    for last in (snapshots[3], snapshots[-2], snapshots[-1]):
        earlier = [snapshot for snapshot in snapshots if snapshot.step <= last.step]
        shares, error = fit(earlier, last.width)
        assert error < 1e-6
        torch.testing.assert_close(weighted_sum([snapshot.path for snapshot in earlier], shares), load_file(last.path))


@pytest.mark.parametrize(("width", "max_error"), [(0.04, 4e-2), (0.075, 3e-3), (0.15, 8e-3), (0.2, 2e-2)])
def test_a_post_hoc_width_is_as_close_to_the_tracked_average_as_its_profile(
    tmp_path: Path, width: float, max_error: float
) -> None:
    history = walk(2000)
    averages_of(history, tmp_path, (0.05, 0.1))
    snapshots = read_snapshots(tmp_path)
    shares, error = fit(snapshots, width)
    post_hoc = weighted_sum([snapshot.path for snapshot in snapshots], shares)["layer.weight"]
    tracked = averages_of(history.double(), tmp_path / "tracked", (width,)).main.shadow_params[0]
    assert shares.sum() == pytest.approx(1)
    assert error < max_error
    # Cauchy-Schwarz: |∫ (Σ share·p − p_r)(θ − c) dτ| ≤ ‖Σ share·p − p_r‖ ‖θ − c‖ for any c, since shares add up to 1
    gamma = exponent(width)
    norm = (gamma + 1) / (2 * gamma + 1) ** 0.5 / 2000**0.5
    bound = error * norm * (history.double() - history.double().mean(0)).norm(dim=0)
    assert ((post_hoc - tracked).abs() <= bound + 1e-4).all()


def test_the_coefficients_equal_ema_pytorchs() -> None:
    t = np.repeat(np.arange(100.0, 3300.0, 100.0), 2)
    gamma = np.tile([exponent(0.05), exponent(0.1)], 32)
    for t_r, width in ((3200.0, 0.075), (3200.0, 0.2), (1600.0, 0.12)):
        target = torch.tensor([t_r], dtype=torch.float64), torch.tensor([exponent(width)], dtype=torch.float64)
        expected = solve_weights(torch.tensor(t), torch.tensor(gamma), *target)
        np.testing.assert_allclose(coefficients(t, gamma, t_r, exponent(width)), expected[:, 0].numpy(), atol=1e-8)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_sharded_weights_have_the_same_averages_and_snapshots_as_full_ones(process_group: None, tmp_path: Path) -> None:
    mesh = init_device_mesh("cpu", (1,))
    history = walk(20)
    full = nn.Parameter(history[0].clone())
    sharded = nn.Parameter(distribute_tensor(history[0], mesh, [Shard(0)]))
    training = Training(steps=20, ema_widths=(0.1, 0.2))
    both = [Averages([("weight", p)], training) for p in (full, sharded)]
    for weights in history:
        full.data.copy_(weights)
        sharded.data.copy_(distribute_tensor(weights, mesh, [Shard(0)]))
        for averages in both:
            averages.step()
    for averages, folder in zip(both, (tmp_path / "full", tmp_path / "sharded"), strict=True):
        writer = CheckpointWriter()
        writer.start(averages.state(), averages.snapshot_writer(folder, 20))
        writer.wait()
        averages.swap()
    assert isinstance(sharded.data, DTensor)
    assert torch.equal(sharded.full_tensor(), full)
    for averages in both:
        averages.swap()
    assert torch.equal(sharded.full_tensor(), history[-1])
    for a, b in zip(read_snapshots(tmp_path / "full"), read_snapshots(tmp_path / "sharded"), strict=True):
        assert a.path.read_bytes() == b.path.read_bytes()


def test_a_replaced_weight_replaces_its_schedule_free_average() -> None:
    """`of` has all that a weight's average follows from, as `stage1.revive` needs."""
    parameter, z = nn.Parameter(torch.tensor([1.0, 2.0])), torch.tensor([3.0, 4.0])
    training = Training(optimizer="schedulefree")
    averages = Averages([("weight", parameter)], training, lambda p, name: z if p is parameter else None)
    averages.step()
    torch.testing.assert_close(0.1 * z + 0.9 * averages.main.shadow_params[0], parameter.detach())
    for tensor in (parameter.detach(), *averages.of(parameter)):
        tensor[0] = 7.0
    averages.step()
    assert float(averages.main.shadow_params[0][0]) == 7
