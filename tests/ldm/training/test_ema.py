"""Averages of weights, and those that are put together afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from diffusers.training_utils import EMAModel
from ema_pytorch.post_hoc_ema import sigma_rel_to_gamma, solve_weights
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.profiler import ProfilerActivity, profile

from ldm.config.schema import WIDEST, Training
from ldm.training.ema import EMA, Averages, PowerEMA, coefficients, exponent, fit, read_snapshots, weighted_sum
from ldm.utils.errors import UserError


def walk(steps: int, size: int = 8) -> torch.Tensor:
    """Weights `(steps, size)` that walk at random."""
    return torch.randn(steps, size, generator=torch.Generator().manual_seed(0)).cumsum(0)


def follow(history: torch.Tensor, folder: Path, widths: tuple[float, ...], every: int = 100) -> Averages:
    """Averages of a parameter that has gone through a history `(steps, size)`, with snapshots."""
    parameter = nn.Parameter(torch.zeros_like(history[0]))
    training = Training(steps=len(history), ema_widths=widths, ema_snapshot_every=every)
    averages = Averages([("layer.weight", parameter)], training)
    for step, weights in enumerate(history, start=1):
        parameter.data.copy_(weights)
        averages.step()
        if averages.due(step):
            averages.snapshot(folder, step)
    return averages


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.2, 0.288])
def test_the_exponent_gives_the_width_that_was_asked_for(width: float) -> None:
    gamma = exponent(width)
    assert ((gamma + 1) / (gamma + 2) ** 2 / (gamma + 3)) ** 0.5 == pytest.approx(width, rel=1e-9)
    assert gamma == pytest.approx(sigma_rel_to_gamma(width), rel=1e-12)
    assert gamma > 0
    assert exponent(WIDEST) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("width", [0.05, 0.1, 0.25])
def test_each_step_weighs_as_the_integral_of_its_power_profile(width: float) -> None:
    t, gamma = 500, exponent(width)
    parameter = nn.Parameter(torch.zeros(t, dtype=torch.float64))
    average = PowerEMA([parameter], width)
    for step in range(t):
        parameter.data = nn.functional.one_hot(torch.tensor(step), t).double()
        average.step([parameter])
    s = np.arange(1, t + 1)
    expected = (s / t) ** (gamma + 1) - ((s - 1) / t) ** (gamma + 1)  # of (γ + 1) τ^γ / t^(γ+1), from s − 1 to s
    np.testing.assert_allclose(average.shadow_params[0].numpy(), expected, rtol=1e-9, atol=1e-15)
    spread = np.sqrt(np.cov(s, aweights=expected, ddof=0)) / t
    assert spread == pytest.approx(width, rel=1e-3)


def test_without_widths_it_is_diffusers_average_with_its_warm_up(tmp_path: Path) -> None:
    history = walk(50)
    averages = follow(history, tmp_path, ())
    expected = history[0]
    for n, weights in enumerate(history[1:], start=1):
        decay = min(0.999, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weights
    torch.testing.assert_close(averages.main.shadow_params, [expected])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_it_equals_diffusers_average_of_the_same_weights(decay: float) -> None:
    parameter = nn.Parameter(torch.zeros(8))
    ours, theirs = EMA([parameter], decay), EMAModel([parameter], decay=decay)
    for weights in walk(60):
        parameter.data.copy_(weights)
        ours.step([parameter])
        theirs.step([parameter])
        torch.testing.assert_close(ours.shadow_params, theirs.shadow_params, rtol=1e-6, atol=1e-6)


def test_an_update_takes_no_memory_and_a_swap_that_of_one_tensor() -> None:
    parameters: list[torch.Tensor] = [nn.Parameter(torch.randn(256, 256)) for _ in range(16)]
    average = EMA(parameters, 0.9)

    def peak(action: Callable[[list[torch.Tensor]], None]) -> int:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            action(parameters)
        held = most = 0
        for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
            if event.name() == "[memory]":
                held += event.nbytes()
                most = max(most, held)
        return most

    average.step(parameters)
    assert peak(average.step) < 4096
    assert peak(average.swap) <= 256 * 256 * 4 + 4096


def test_swapped_twice_all_is_as_it_was() -> None:
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


def test_swapped_averages_go_by_the_same_names() -> None:
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


def test_snapshots_say_what_they_are_and_hold_the_averages_by_name(tmp_path: Path) -> None:
    averages = follow(walk(250), tmp_path, (0.1, 0.05))
    found = read_snapshots(tmp_path)
    assert [each[1:] for each in found] == [(step, step, width) for step in (100, 200, 250) for width in (0.05, 0.1)]
    assert {path.name for path in tmp_path.iterdir()} >= {"step-000100-0.05.safetensors", "step-000250-0.1.safetensors"}
    for each, model in zip(found[-2:], reversed(averages.models), strict=True):
        assert torch.equal(load_file(each.path)["layer.weight"], model.shadow_params[0])


def test_a_file_that_is_no_snapshot_is_named(tmp_path: Path) -> None:
    (tmp_path / "step-000001-0.1.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"step-000001-0\.1\.safetensors: not a sound snapshot"):
        read_snapshots(tmp_path)


def test_the_average_that_was_kept_comes_back(tmp_path: Path) -> None:
    follow(walk(1000), tmp_path, (0.05, 0.1))
    found = read_snapshots(tmp_path)
    for last in (found[3], found[-2], found[-1]):
        kept = [each for each in found if each.step <= last.step]
        shares, off = fit(kept, last.width)
        assert off < 1e-6
        torch.testing.assert_close(weighted_sum([each.path for each in kept], shares), load_file(last.path))


@pytest.mark.parametrize(("width", "least"), [(0.04, 4e-2), (0.075, 3e-3), (0.15, 8e-3), (0.2, 2e-2)])
def test_another_width_is_as_near_to_the_tracked_one_as_its_profile(tmp_path: Path, width: float, least: float) -> None:
    history = walk(2000)
    follow(history, tmp_path, (0.05, 0.1))
    found = read_snapshots(tmp_path)
    shares, off = fit(found, width)
    made = weighted_sum([each.path for each in found], shares)["layer.weight"]
    tracked = follow(history.double(), tmp_path / "tracked", (width,)).main.shadow_params[0]
    assert shares.sum() == pytest.approx(1)
    assert off < least
    # Cauchy-Schwarz: |∫ (Σ share·p − p_r)(θ − c) dτ| ≤ ‖Σ share·p − p_r‖ ‖θ − c‖ for any c, since shares add up to 1
    gamma = exponent(width)
    norm = (gamma + 1) / (2 * gamma + 1) ** 0.5 / 2000**0.5
    bound = off * norm * (history.double() - history.double().mean(0)).norm(dim=0)
    assert ((made - tracked).abs() <= bound + 1e-4).all()


def test_the_shares_are_those_of_another_implementation() -> None:
    t = np.repeat(np.arange(100.0, 3300.0, 100.0), 2)
    gamma = np.tile([exponent(0.05), exponent(0.1)], 32)
    for t_r, width in ((3200.0, 0.075), (3200.0, 0.2), (1600.0, 0.12)):
        wanted = torch.tensor([t_r], dtype=torch.float64), torch.tensor([exponent(width)], dtype=torch.float64)
        theirs = solve_weights(torch.tensor(t), torch.tensor(gamma), *wanted)
        np.testing.assert_allclose(coefficients(t, gamma, t_r, exponent(width)), theirs[:, 0].numpy(), atol=1e-8)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_sharded_weights_are_averaged_and_kept_as_whole_ones_are(one_process: None, tmp_path: Path) -> None:
    mesh = init_device_mesh("cpu", (1,))
    history = walk(20)
    whole, sharded = (
        nn.Parameter(make(history[0])) for make in (torch.clone, lambda x: distribute_tensor(x, mesh, [Shard(0)]))
    )
    training = Training(steps=20, ema_widths=(0.1, 0.2))
    both = [Averages([("weight", p)], training) for p in (whole, sharded)]
    for weights in history:
        whole.data.copy_(weights)
        sharded.data.copy_(distribute_tensor(weights, mesh, [Shard(0)]))
        for averages in both:
            averages.step()
    for averages, folder in zip(both, (tmp_path / "whole", tmp_path / "sharded"), strict=True):
        averages.snapshot(folder, 20)
        averages.swap()
    assert isinstance(sharded.data, DTensor)
    assert torch.equal(sharded.full_tensor(), whole)
    for averages in both:
        averages.swap()
    assert torch.equal(sharded.full_tensor(), history[-1])
    for a, b in zip(read_snapshots(tmp_path / "whole"), read_snapshots(tmp_path / "sharded"), strict=True):
        assert a.path.read_bytes() == b.path.read_bytes()
