"""Randomness by position."""

import pickle
from collections import Counter

import torch

from ldm.data.order import Order, Positions, normal, uniform


def test_an_epoch_of_equal_weights_shows_every_sample_once() -> None:
    order = Order([1.0] * 103, seed=3)
    for epoch in range(3):
        assert sorted(order[epoch * 103 + n] for n in range(103)) == list(range(103))


def test_epochs_differ_and_the_order_is_a_pure_function_of_seed_and_position() -> None:
    order = Order([1.0] * 50, seed=3)
    first, second = ([order[n] for n in range(a, a + 50)] for a in (0, 50))
    assert first != second
    assert [Order([1.0] * 50, seed=3)[n] for n in range(50, 100)] == second
    assert [Order([1.0] * 50, seed=4)[n] for n in range(50)] != first


def test_an_order_travels_to_loader_processes() -> None:
    order = Order([1.0] * 50, seed=3)
    assert [pickle.loads(pickle.dumps(order))[n] for n in range(100)] == [order[n] for n in range(100)]


def test_samples_come_as_often_as_their_weights_say() -> None:
    weights = [1.0] * 20 + [0.5] * 40
    order = Order(weights, seed=0)
    seen = Counter(order[n] for n in range(60 * 50))
    for i, weight in enumerate(weights):
        assert abs(seen[i] - 50 * weight * 60 / 40) <= 50
    full = sum(seen[i] for i in range(20))
    assert abs(full - 1500) < 60


def test_the_global_batch_is_the_same_for_any_number_of_processes_and_micro_batches() -> None:
    def step_sets(processes: int, micro: int) -> list[list[int]]:
        shares = [list(Positions(2, 5, 24, micro, rank, processes)) for rank in range(processes)]
        return [sorted(n for s in shares for part in s[i * micro : (i + 1) * micro] for n in part) for i in range(3)]

    assert step_sets(1, 1) == step_sets(2, 1) == step_sets(2, 3) == step_sets(4, 2)


def test_noise_belongs_to_the_position_not_to_the_batch() -> None:
    together = normal(7, "noise", torch.tensor([4, 5, 6]), (2, 3))
    alone = normal(7, "noise", torch.tensor([5]), (2, 3))
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(normal(7, "other", torch.tensor([5]), (2, 3)), alone)
    assert not torch.equal(normal(8, "noise", torch.tensor([5]), (2, 3)), alone)


def test_noise_is_standard_normal_and_uniform_is_uniform() -> None:
    positions = torch.arange(400)
    noise = normal(0, "noise", positions, (64,))
    assert abs(float(noise.mean())) < 0.03
    assert abs(float(noise.std()) - 1) < 0.02
    u = uniform(0, "time", positions)
    assert abs(float(u.mean()) - 0.5) < 0.05
    assert 0 <= float(u.min()) < float(u.max()) < 1
