"""The optimizer's state as named tensors, and the learning rate schedule."""

import pytest
import torch

from ldm.config.schema import ClassifierConfig, RunConfig, Training
from ldm.distributed.launch import accelerator
from ldm.training.optimizer import flatten_optimizer, lr_factor, make_optimizer, unflatten_optimizer
from ldm.utils.errors import UserError


def test_an_optimizers_state_survives_the_round_trip_through_named_tensors() -> None:
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    before = optimizer.state_dict()
    after = unflatten_optimizer(*flatten_optimizer(before))
    assert after["param_groups"] == before["param_groups"]
    for i, entry in before["state"].items():
        assert all(torch.equal(entry[name], after["state"][i][name]) for name in entry)


def test_the_learning_rate_warms_up_and_decays() -> None:
    training = Training(steps=110, lr_warmup_steps=10, lr_scheduler="cosine")
    rates = [lr_factor(step, training) for step in range(111)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10 + 50] == pytest.approx(0.5)
    assert rates[110] == pytest.approx(0, abs=1e-9)
    assert lr_factor(1000, Training()) == 1.0
    linear = Training(steps=110, lr_warmup_steps=10, lr_scheduler="linear")
    assert [lr_factor(step, linear) for step in (9, 10, 35, 60, 110)] == pytest.approx([1, 1, 0.75, 0.5, 0])


def test_a_missing_library_of_the_8_bit_optimizer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    parameters = [{"params": list(torch.nn.Linear(2, 2).parameters())}]
    training = ClassifierConfig(optimizer="adamw8bit")
    with pytest.raises(UserError, match=r"^optimizer: adamw8bit needs pip install 'ldm\[8bit\]'; or use adamw"):
        make_optimizer(training, parameters, 1e-3, accelerator(RunConfig(device="cpu", tracker="none")))
