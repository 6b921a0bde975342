"""The optimizer's state as named tensors, and the learning rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from forked import ScriptProcess, of_accelerate
from torch import nn

from ldm.config.schema import ClassifierConfig, RunConfig, Training
from ldm.distributed.launch import accelerator
from ldm.training.checkpoint import checkpoints, read_checkpoint
from ldm.training.engine import Engine
from ldm.training.optimizer import (
    check_optimizer,
    flatten_optimizer,
    hidden_matrices,
    lr_factor,
    make_optimizer,
    unflatten_optimizer,
)
from ldm.utils.errors import UserError

STEPS, LR, DECAY, BETAS = 8, 0.02, 0.1, (0.9, 0.99)
UNSHARDED: Any = SimpleNamespace(distributed_type=DistributedType.NO, mixed_precision="no")


def made(name: str, module: nn.Module, lr: float = LR, steps: int = 1000) -> torch.optim.Optimizer:
    """An optimizer of all weights of a module, as `Engine` makes it."""
    training = Training(optimizer=name, lr=lr, weight_decay=DECAY, betas=BETAS, steps=steps)
    return make_optimizer(training, module, [{"params": list(module.parameters())}], lr, UNSHARDED)


def gradients(shape: torch.Size) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(STEPS)]


def trajectory(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, factor: float = 1.0) -> list[torch.Tensor]:
    """A parameter after each step; a first one of `factor` times the learning rate, like a warm-up's."""
    lr, values = optimizer.param_groups[0]["lr"], []
    for i, gradient in enumerate(gradients(parameter.shape)):
        for group in optimizer.param_groups:
            group["lr"] = lr if i else lr * factor
        parameter.grad = gradient.to(parameter.dtype).clone()
        optimizer.step()
        values.append(parameter.detach().clone())
    return values


def weight(*shape: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.ParameterList([nn.Parameter(torch.randn(*shape, dtype=torch.float64) / 10)])


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
    for name, extra in (("adamw8bit", "8bit"), ("lion", "optimizers")):
        training = ClassifierConfig(optimizer=name)
        with pytest.raises(UserError, match=rf"^optimizer: {name} needs pip install 'ldm\[{extra}\]'; or use adamw"):
            make_optimizer(
                training, nn.Module(), parameters, 1e-3, accelerator(RunConfig(device="cpu", tracker="none"))
            )


def test_what_needs_whole_tensors_or_all_of_them_is_not_sharded() -> None:
    for kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        by_element = () if kind == DistributedType.FSDP else ("schedulefree", "lion")
        for name in ("adamw8bit", "prodigy", "muon", "adafactor", *by_element):
            training = Training(optimizer=name, lr=1)
            with pytest.raises(UserError, match=f"optimizer: {name} can't be sharded"):
                make_optimizer(training, nn.Module(), [], 1.0, SimpleNamespace(distributed_type=kind))


@pytest.mark.slow
@pytest.mark.drill
@pytest.mark.parametrize("optimizer", ["lion", "schedulefree"])
def test_what_treats_each_element_alike_can_be_sharded(
    launch: Callable[..., ScriptProcess],
    finish: Callable[[ScriptProcess], str],
    root: Path,
    tmp_path: Path,
    optimizer: str,
) -> None:
    """Two processes under FSDP train as one does, and either continues what the other began."""
    fsdp = {"processes": 2, "more": of_accelerate(root / "configs/accelerate/fsdp.yaml")}

    def train(folder: str, steps: int, **how: Any) -> dict[str, dict[str, torch.Tensor]]:
        finish(launch("tests/ldm/training/fsdp_optimizer.py", tmp_path / folder, optimizer, steps, **how))
        return read_checkpoint(checkpoints(tmp_path / folder / "stage2")[-1])[0]

    expected = train("single", 6)
    moments = {"lion": {"exp_avg"}, "schedulefree": {"z", "exp_avg_sq"}}[optimizer]
    assert {name.partition(".")[2] for name in expected["optimizer"]} == moments
    train("mixed", 3, **fsdp)
    train("mixed too", 3)
    for parts in (train("sharded", 6, **fsdp), train("mixed", 6), train("mixed too", 6, **fsdp)):
        assert parts.keys() == expected.keys()
        for part, tensors in expected.items():
            torch.testing.assert_close(parts[part], tensors, rtol=1e-4, atol=1e-5)


def test_keys_without_effect_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    check_optimizer(Training(optimizer="schedulefree", ema_decay=0.5), "stage2")
    check_optimizer(Training(optimizer="adafactor", betas=(0.8, 0.9)), "")
    for optimizer in ("adafactor", "schedulefree", "lion"):
        check_optimizer(Training(optimizer=optimizer), "stage1")
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("stage2.ema_decay: has no effect")
    assert second.startswith("betas: the first has no effect")


def test_lion_is_its_papers() -> None:
    """Chen et al., arXiv 2302.06675, Algorithm 2."""
    module = weight(4, 3)
    x, m = module[0].detach().clone(), torch.zeros(4, 3)
    optimizer = made("lion", module)
    for value, g in zip(trajectory(optimizer, module[0]), gradients(x.shape), strict=True):
        update = (BETAS[0] * m + (1 - BETAS[0]) * g).sign()
        m = BETAS[1] * m + (1 - BETAS[1]) * g
        x = x - LR * (update + DECAY * x)
        torch.testing.assert_close(value, x)


def test_schedule_free_is_its_papers() -> None:
    """Defazio et al., arXiv 2405.15682, Algorithm 1, with a warm-up by the learning rate of its first step."""
    module = weight(4, 3)
    z = x = y = module[0].detach().clone()
    v, total = torch.zeros_like(z), 0.0
    values = trajectory(made("schedulefree", module), module[0], factor=0.25)
    for t, (value, g) in enumerate(zip(values, gradients(z.shape), strict=True), start=1):
        lr = LR if t > 1 else LR / 4
        v = BETAS[1] * v + (1 - BETAS[1]) * g**2
        z = z - lr * (g / ((v / (1 - BETAS[1] ** t)).sqrt() + 1e-8) + DECAY * y)
        total += lr**2
        x = x + lr**2 / total * (z - x)
        y = (1 - BETAS[0]) * z + BETAS[0] * x
        torch.testing.assert_close(value, y)


def test_prodigy_is_its_papers() -> None:
    """Mishchenko and Defazio, arXiv 2306.06101, Algorithm 4, with Adam's bias correction.

    As in their code, d changes before the step, which is still of the d before, and a small learning rate (γ) counts in
    the numerator only.
    """
    module = weight(4, 3)
    x0 = x = module[0].detach().clone()
    m, v, s, d, d0, r = torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(4, 3), 1e-6, 1e-6, 0.0
    optimizer, beta3 = made("prodigy", module, lr=1.0), math.sqrt(BETAS[1])
    seen = []
    values = trajectory(optimizer, module[0], factor=0.25)
    for t, (value, g) in enumerate(zip(values, gradients(x.shape), strict=True), start=1):
        lr = (1.0 if t > 1 else 0.25) * d * math.sqrt(1 - BETAS[1] ** t) / (1 - BETAS[0] ** t)
        r = beta3 * r + lr * d / d0 * float((g * (x0 - x)).sum())
        s = beta3 * s + d**2 / d0 * g
        m = BETAS[0] * m + (1 - BETAS[0]) * d * g
        v = BETAS[1] * v + (1 - BETAS[1]) * d**2 * g**2
        d = max(d, r / float(s.abs().sum()))
        x = x - lr * (m / (v.sqrt() + d * 1e-8) + DECAY * x)
        torch.testing.assert_close(value, x, rtol=1e-5, atol=1e-9)  # r is float32 there
        seen.append(d)
    assert optimizer.param_groups[0]["d"] == pytest.approx(seen[-1], rel=1e-4)


def test_prodigy_finds_the_same_step_size_after_a_warm_up() -> None:
    """The step size that it finds, and the error in the end, hardly depend on the warm-up that `set_lr` gives it."""

    def train(warmup: int) -> tuple[float, float]:
        torch.manual_seed(0)
        module, training = nn.Linear(8, 8), Training(steps=200, lr_warmup_steps=warmup, lr_scheduler="cosine")
        optimizer = make_optimizer(
            Training(optimizer="prodigy", lr=1.0), module, [{"params": list(module.parameters())}], 1.0, UNSHARDED
        )
        inputs = torch.randn(64, 8)
        for step in range(200):
            for group in optimizer.param_groups:
                group["lr"] = lr_factor(step, training)
            loss = (module(inputs) - inputs.flip(1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return optimizer.param_groups[0]["d"], float(loss.detach())

    (plain, error), (warmed, error_after) = train(0), train(50)
    assert 1 / 3 < warmed / plain < 3
    assert max(error, error_after) < 0.01


def test_adafactor_is_torchs_with_our_learning_rate() -> None:
    """torch scales it by the weights' size, or by eps2 where they are smaller: here 1."""
    for shape in ((4, 3), (5,), (4, 3, 3, 3)):
        ours, theirs = weight(*shape), weight(*shape)
        reference = torch.optim.Adafactor(theirs.parameters(), lr=LR, eps=(1e-15, 1.0), weight_decay=DECAY)
        values = zip(trajectory(made("adafactor", ours), ours[0]), trajectory(reference, theirs[0]), strict=True)
        for value, expected in values:
            torch.testing.assert_close(value, expected)


class Blocks(nn.Module):
    """A network of every kind of weight that Muon treats in its own way."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(3, 6)
        self.conv_in = nn.Conv2d(3, 6, 3)
        self.norm = nn.GroupNorm(2, 6)
        self.conv = nn.Conv2d(6, 8, 3)
        self.linear = nn.Linear(8, 5)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.conv_out = nn.Conv2d(5, 3, 3)
        self.head = nn.Linear(3, 2)


@pytest.mark.parametrize("muon_lr", [None, 3 * LR])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_muon_trains_hidden_matrices_as_torchs_and_adamw_the_others(precision: str, muon_lr: float | None) -> None:
    """Convolutions as matrices (outputs, inputs · height · width); the update's size is AdamW's."""
    module, reference = Blocks(), Blocks()
    hidden = hidden_matrices(module)
    assert {name for name, p in module.named_parameters() if id(p) in hidden} == {"conv.weight", "linear.weight"}
    optimizer = make_optimizer(
        Training(optimizer="muon", lr=LR, muon_lr=muon_lr, weight_decay=DECAY, betas=BETAS),
        module,
        [{"params": [p for p in module.parameters() if p.requires_grad]}],
        LR,
        SimpleNamespace(distributed_type=DistributedType.NO, mixed_precision=precision),
    )
    pairs = [p for p in zip(module.parameters(), reference.parameters(), strict=True) if p[0].requires_grad]
    matrices = [nn.Parameter(theirs.detach().flatten(1)) for ours, theirs in pairs if id(ours) in hidden]
    others = [theirs for ours, theirs in pairs if id(ours) not in hidden]
    scale = "original" if muon_lr else "match_rms_adamw"
    muon = torch.optim.Muon(matrices, lr=muon_lr or LR, weight_decay=DECAY, momentum=BETAS[0], adjust_lr_fn=scale)
    adamw = torch.optim.AdamW(others, lr=LR, weight_decay=DECAY, betas=BETAS)
    for _ in range(3):
        waiting = iter(matrices)
        for ours, theirs in pairs:
            ours.grad = torch.randn_like(ours)
            target = next(waiting) if id(ours) in hidden else theirs
            target.grad = ours.grad.clone().reshape(target.shape)
        for each in (optimizer, muon, adamw):
            each.step()
    waiting = iter(matrices)
    for ours, theirs in pairs:
        if id(ours) in hidden:
            step = muon_lr or 0.2 * math.sqrt(8) * LR  # the largest singular value of an update of (5, 8)
            torch.testing.assert_close(ours.flatten(1), next(waiting), rtol=0, atol=step / 11)  # bf16 inside
        else:
            torch.testing.assert_close(ours, theirs)


def test_muons_rate_follows_the_schedule_in_its_ratio_to_lr() -> None:
    module = Blocks()
    training = Training(optimizer="muon", lr=LR, muon_lr=3 * LR)
    engine = Engine(module, LR, training, accelerator(RunConfig(precision="no")), "no")
    engine.set_lr(LR / 2)
    rates = {group["use_muon"]: group["lr"] for group in engine.optimizer.param_groups}
    assert rates == {True: 1.5 * LR, False: 0.5 * LR}


def test_a_rate_of_muon_for_another_optimizer_is_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    check_optimizer(Training(muon_lr=0.02), "stage2")
    assert capsys.readouterr().err == "stage2.muon_lr: has no effect: it is for muon\n"


def test_muon_without_hidden_matrices_is_refused() -> None:
    layer = nn.Linear(3, 3)
    with pytest.raises(UserError, match="muon trains hidden matrices, and none are"):
        made("muon", layer)
