"""The timesteps that a run trains on: stratified, or by the second moment of their loss."""

import pytest
import torch

from ldm.diffusion.timestep_sampling import LossSecondMoment, stratified


def test_stratified_timesteps_fall_into_every_stratum_at_every_step() -> None:
    for step in range(5):
        u = stratified(3, "time", range(step * 16, step * 16 + 16), 16)
        assert sorted((u * 16).long().tolist()) == list(range(16))


def test_stratified_timesteps_are_the_same_for_any_number_of_processes() -> None:
    single_process = stratified(3, "time", range(64), 16)
    shares = [stratified(3, "time", range(start, start + 4), 16) for start in range(0, 64, 4)]
    assert torch.equal(torch.cat(shares), single_process)
    scattered = [63, 0, 17, 16]
    assert torch.equal(stratified(3, "time", scattered, 16), single_process[scattered])
    assert not torch.equal(stratified(4, "time", range(64), 16), single_process)


def test_stratified_timesteps_are_uniform_with_a_less_variable_mean() -> None:
    u = stratified(0, "time", range(200 * 32), 32).reshape(200, 32)
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    assert float(u[:, 0].mean()) == pytest.approx(0.5, abs=0.06)  # the first position isn't tied to the first stratum
    assert float(u[:, 0].var()) == pytest.approx(1 / 12, rel=0.25)
    independent = (1 / 12 / 32) ** 0.5
    assert float(u.mean(1).std()) < 0.1 * independent


def test_a_batch_of_a_single_sample_is_uniform() -> None:
    u = stratified(0, "time", range(2000), 1)
    assert float(u.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(u.var()) == pytest.approx(1 / 12, rel=0.1)


def sampler_of(moments: list[float]) -> LossSecondMoment:
    sampler = LossSecondMoment(len(moments), history=2, uniform_share=0.1)
    for _ in range(2):
        sampler.update(torch.arange(len(moments)), torch.tensor(moments))
    return sampler


def test_timesteps_are_uniform_until_all_have_a_full_history() -> None:
    sampler = LossSecondMoment(4, history=2)
    sampler.update(torch.tensor([0, 0, 1, 1, 2, 2, 3]), torch.full((7,), 5.0))
    assert sampler.probabilities().tolist() == [0.25] * 4
    t, weight = sampler.draw(torch.tensor([0.0, 0.3, 0.6, 1 - 2**-24]))
    assert t.tolist() == [0, 1, 2, 3]
    assert weight.tolist() == [1.0] * 4
    sampler.update(torch.tensor([3]), torch.tensor([0.0]))
    assert sampler.probabilities().tolist() != [0.25] * 4


def test_probabilities_follow_the_root_of_the_second_moment_of_the_loss() -> None:
    """Improved DDPM, eq. 18, computed by its definition."""
    sampler = LossSecondMoment(3, history=4, uniform_share=0.1)
    losses = torch.rand(9, 3, generator=torch.Generator().manual_seed(0))
    for row in losses:
        sampler.update(torch.arange(3), row)
    moments = [(sum(float(x) ** 2 for x in losses[-4:, i]) / 4) ** 0.5 for i in range(3)]
    expected = [0.9 * moment / sum(moments) + 0.1 / 3 for moment in moments]
    assert sampler.probabilities().tolist() == pytest.approx(expected, rel=1e-6)


def test_weights_keep_the_mean_loss_and_draws_follow_the_probabilities() -> None:
    sampler = sampler_of([1.0, 2.0, 7.0])
    u = (torch.arange(10000) + 0.5) / 10000
    t, weight = sampler.draw(u)
    counts = torch.bincount(t, minlength=3) / 10000
    assert counts.tolist() == pytest.approx(sampler.probabilities().tolist(), abs=1e-3)
    loss = torch.tensor([3.0, 1.0, 5.0])
    assert float((weight * loss[t]).mean()) == pytest.approx(3.0, rel=1e-2)


def test_losses_of_0_leave_timesteps_uniform() -> None:
    assert sampler_of([0.0, 0.0]).probabilities().tolist() == [0.5, 0.5]


def test_a_saved_history_continues_exactly() -> None:
    sampler = sampler_of([1.0, 2.0, 7.0])
    resumed = LossSecondMoment(3, history=2, uniform_share=0.1)
    resumed.load_state_dict(sampler.state_dict())
    assert all(isinstance(value, torch.Tensor) for value in sampler.state_dict().values())
    for moments in (sampler, resumed):
        moments.update(torch.tensor([0]), torch.tensor([9.0]))
    assert torch.equal(sampler.probabilities(), resumed.probabilities())
