"""One step of every objective that can be configured."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from accelerate import Accelerator
from cases import for_each
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ldm.config.schema import Stage2Config
from ldm.data.draws import draw_batch
from ldm.models import unet
from ldm.models.conditioning import Condition
from stage2_diffusion.denoiser import Denoiser
from stage2_diffusion.draws import NoiseDraws
from stage2_diffusion.objective import Objective

TINY = {
    "conditions": (),
    "channels": (8,),
    "attention": (False,),
    "layers": 1,
    "mid_attention": False,
    "norm_num_groups": 4,
    "batch": 4,
}
KEYS = ("beta_schedule", "prediction_type", "loss", "loss_weighting", "timestep_sampling", "variance")
CHOICES = {key: get_args(Stage2Config.model_fields[key].annotation) for key in KEYS}
DRAWS = {
    **{key: st.sampled_from(values) for key, values in CHOICES.items()},
    "stratified": st.booleans(),
    "zero_snr": st.booleans(),
    "timesteps": st.one_of(st.integers(1, 4), st.sampled_from([10, 100, 1000, 4000])),
    "shift": st.sampled_from([1.0, 0.01, 0.5, 3.0, 100.0]),
    "noise_offset": st.sampled_from([0.0, 0.1, 1.0]),
    "input_perturbation": st.sampled_from([0.0, 0.1, 1.0]),
    "weight_gamma": st.sampled_from([None, 0.5, 20.0]),
    "logit_mean": st.sampled_from([0.0, -10.0, 10.0]),
    "logit_std": st.sampled_from([1.0, 0.1, 10.0]),
}


def take_a_step(stage: Stage2Config) -> None:
    """Takes two optimizer steps as in training: at drawn timesteps, and at the first and last possible ones."""
    torch.manual_seed(0)
    model = Denoiser(unet.build(stage, 2, 4), stage)
    objective, draws = Objective(stage, model), NoiseDraws(0, 2, 1, True, True, 4 if stage.stratified else None)
    adamw = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    ends = torch.tensor([0.0, 1 - 2**-24, 0.5, 1 - 2**-10])
    for step, n in enumerate((torch.arange(4), torch.arange(4, 8))):
        x0 = torch.randn(4, 2, 4, 4)
        batch = draw_batch({"position": n, "latent": x0}, draws)
        eps, added = objective.noise(batch)
        t, importance = objective.timesteps(batch["u"]) if step == 0 else (objective.noising.time(ends), 1.0)
        x_t = objective.noising.add_noise(x0, added, t)
        output = model(x_t, objective.noising.model_time(t), Condition())
        losses = objective.losses(output, x0, x_t, eps, t)
        (importance * losses).mean().backward()
        objective.record_losses(n, t.detach(), losses, Accelerator(cpu=True))
        assert losses.shape == (4,)
        assert bool(losses.isfinite().all()), (step, losses)
        gradients = [parameter.grad for parameter in model.parameters()]
        assert all(gradient is not None for gradient in gradients)
        assert bool(torch.nn.utils.clip_grad_norm_(model.parameters(), stage.max_grad_norm).isfinite()), step
        adamw.step()
        adamw.zero_grad()
    assert all(bool(state["exp_avg_sq"].isfinite().all()) for state in adamw.state.values())


def refusal(error: ValidationError) -> str:
    """The key that a validation error names."""
    (problem,) = error.errors()
    key, colon, reason = problem["msg"].removeprefix("Value error, ").partition(": ")
    assert colon and reason and "\n" not in problem["msg"], problem["msg"]
    return key


@pytest.mark.parametrize("examples", [100, pytest.param(1000, marks=pytest.mark.drill)])
def test_every_configuration_takes_a_finite_step_or_is_refused_by_a_key(examples: int) -> None:
    outcomes = dict.fromkeys(("trained", "refused"), 0)

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.fixed_dictionaries({}, optional=DRAWS))
    def objective(keys: dict[str, Any]) -> None:
        try:
            stage = Stage2Config(**TINY, **keys)
        except ValidationError as error:
            assert refusal(error) in keys
            outcomes["refused"] += 1
            return
        take_a_step(stage)
        outcomes["trained"] += 1

    objective()
    assert min(outcomes.values()) >= 0.4 * examples, outcomes


@for_each("target", CHOICES["prediction_type"])
@for_each("weight", CHOICES["loss_weighting"])
def test_every_prediction_type_trains_under_every_schedule_and_weighting(target: str, weight: str) -> None:
    for schedule in CHOICES["beta_schedule"]:
        if schedule != "learned" or (target, weight) == ("eps", "uniform"):
            take_a_step(Stage2Config(**TINY, beta_schedule=schedule, prediction_type=target, loss_weighting=weight))
        else:
            with pytest.raises(ValidationError) as refused:
                Stage2Config(**TINY, beta_schedule=schedule, prediction_type=target, loss_weighting=weight)
            assert refusal(refused.value) == "beta_schedule"


@for_each("weight", CHOICES["loss_weighting"])
@for_each("keys", [{"shift": 100.0, "timestep_sampling": "uniform"}, {"logit_mean": -10.0}, {"logit_std": 10.0}])
def test_a_flows_loss_is_finite_for_timesteps_concentrated_at_one_end(weight: str, keys: dict[str, Any]) -> None:
    take_a_step(Stage2Config(**TINY, prediction_type="flow", loss_weighting=weight, **keys))
