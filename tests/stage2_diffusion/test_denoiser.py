"""The U-Net with the parameters that are trained along with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from ldm.config.schema import Stage2Config
from ldm.models import text_encoder, unet
from ldm.models.conditioning import Condition, predict
from ldm.training.engine import Engine
from stage2_diffusion.denoiser import Denoiser


def stage(**keys: object) -> Stage2Config:
    shape = {"channels": (8, 8), "attention": (False, True), "layers": 1, "attention_head_dim": 8, "norm_num_groups": 4}
    return Stage2Config(**{"conditions": ("text", "class"), **shape, **keys})


def model(stage: Stage2Config, encoder: text_encoder.TextEncoder, trained: bool = False) -> Denoiser:
    torch.manual_seed(0)
    network = unet.build(stage, 2, 4, encoder.width, 3)
    if trained:
        encoder.trainable()
    return Denoiser(network, stage, None if trained else encoder.embed([""]), encoder if trained else None)


@pytest.fixture
def encoder(words: Path) -> text_encoder.TextEncoder:
    return text_encoder.load(str(words), 8)


@pytest.mark.parametrize("null", ["empty", "learned"])
@pytest.mark.parametrize("trained", [False, True])
def test_a_dropped_sample_is_predicted_from_the_null_embedding_and_the_null_class(
    encoder: text_encoder.TextEncoder, null: str, trained: bool
) -> None:
    denoiser = model(stage(uncond_embedding=null), encoder, trained)
    if denoiser.null is not None:
        torch.nn.init.normal_(denoiser.null)
    captions = ["red heart", "cat", "a green square"]
    text = encoder.token_ids(captions) if trained else encoder.encode(captions)
    x, t, dropped = torch.randn(3, 2, 4, 4), torch.tensor([5, 400, 900]), torch.tensor([True, False, True])
    output = denoiser(x, t, Condition(text, torch.tensor([3, 1, 3])), dropped)
    null_embedding = denoiser.null if null == "learned" else encoder.encode([""])[0]
    states = torch.where(dropped[:, None, None], null_embedding, encoder.encode(captions))
    torch.testing.assert_close(output, predict(denoiser.unet, x, t, Condition(states, torch.tensor([3, 1, 3]))))
    alone = predict(denoiser.unet, x[:1], t[:1], Condition(null_embedding[None], torch.tensor([3])))
    torch.testing.assert_close(output[:1], alone, atol=1e-5, rtol=1e-4)


def test_captions_of_dropped_samples_make_no_difference(encoder: text_encoder.TextEncoder) -> None:
    denoiser = model(stage(), encoder)
    x, t, dropped = torch.randn(2, 2, 4, 4), torch.tensor([5, 400]), torch.tensor([True, False])
    label = torch.tensor([3, 0])
    base, dropped_differs, kept_differs = (
        denoiser(x, t, Condition(encoder.encode(captions), label), dropped)
        for captions in (["cat", "dog"], ["red heart", "dog"], ["cat", "red heart"])
    )
    assert torch.equal(base, dropped_differs)
    assert not torch.allclose(base[1], kept_differs[1])


@pytest.mark.parametrize("trained", [False, True])
def test_a_learned_null_starts_as_the_empty_caption_and_learns_from_dropped_samples(
    encoder: text_encoder.TextEncoder, trained: bool
) -> None:
    denoiser = model(stage(uncond_embedding="learned"), encoder, trained)
    torch.testing.assert_close(denoiser.null.detach(), encoder.encode([""])[0])
    x, t, label = torch.randn(2, 2, 4, 4), torch.tensor([5, 400]), torch.tensor([3, 0])
    captions = ["cat", "dog"]
    text = encoder.token_ids(captions) if trained else encoder.encode(captions)
    for dropped, learns in ((torch.tensor([True, False]), True), (torch.tensor([False, False]), False)):
        denoiser.zero_grad()
        denoiser(x, t, Condition(text, label), dropped).square().sum().backward()
        assert (float(denoiser.null.grad.abs().sum()) > 0) == learns


def test_a_trained_encoder_encodes_the_empty_caption_anew_and_gets_its_gradient(
    encoder: text_encoder.TextEncoder,
) -> None:
    denoiser = model(stage(), encoder, trained=True)
    before = denoiser.uncond_embedding().states.detach()
    torch.testing.assert_close(before, encoder.encode([""]))
    tokens = encoder.token_ids(["cat"])
    condition = Condition(tokens, torch.tensor([3]))
    denoiser(torch.randn(1, 2, 4, 4), torch.tensor([5]), condition, torch.tensor([True])).square().sum().backward()
    with torch.no_grad():
        for parameter in encoder.model.parameters():
            if parameter.grad is not None:
                parameter -= parameter.grad / parameter.grad.norm().clamp(min=1e-6)
    assert not torch.allclose(denoiser.uncond_embedding().states, before)


def test_the_encoders_dropout_is_off_in_train_and_eval_mode(encoder: text_encoder.TextEncoder) -> None:
    denoiser = model(stage(), encoder, trained=True)
    for mode in (True, False, True):
        denoiser.train(mode)
        assert denoiser.unet.training == mode
        assert not any(part.training for part in encoder.model.modules())


def test_the_configuration_decides_which_parameters_are_trained(encoder: text_encoder.TextEncoder) -> None:
    plain = dict(model(stage(), encoder).named_parameters())
    assert all(name.startswith("unet.") for name in plain)
    for keys, added in (
        ({"uncond_embedding": "learned"}, {"null"}),
        ({"loss_weighting": "learned"}, {"uncertainty"}),
        ({"beta_schedule": "learned"}, {"schedule"}),
        ({"timestep_sampling": "loss"}, set()),
    ):
        names = dict(model(stage(**keys), encoder).named_parameters()).keys() - plain.keys()
        assert {name.partition(".")[0] for name in names} == added
    learned = model(stage(), encoder, trained=True)
    frozen = {n.removeprefix("encoder.") for n, p in learned.named_parameters() if not p.requires_grad}
    assert frozen == {"pooler.dense.weight", "pooler.dense.bias"}


@pytest.mark.parametrize("key", ["beta_schedule", "loss_weighting", "uncond_embedding"])
def test_learned_scalars_and_embeddings_are_clipped_separately_and_not_decayed(
    encoder: text_encoder.TextEncoder, key: str
) -> None:
    denoiser = model(
        settings := stage(**{key: "learned", "weight_decay": 0.5, "max_grad_norm": 1.0}), encoder, trained=True
    )
    network = Engine(denoiser, 0.1, settings, Accelerator(cpu=True), "no")
    extra = {name: p for name, p in denoiser.named_parameters() if not name.startswith(("unet.", "encoder."))}
    networks = [p for name, p in denoiser.named_parameters() if name not in extra and p.requires_grad]
    assert len(extra) == {"beta_schedule": 4, "loss_weighting": 2, "uncond_embedding": 1}[key]

    for parameter in networks:
        parameter.grad = torch.full_like(parameter, 1e-3)
    for parameter in extra.values():
        parameter.grad = torch.full_like(parameter, 1e3)
    norm = 1e-3 * sum(p.numel() for p in networks) ** 0.5
    assert float(network.clip_gradients()) == pytest.approx(norm, rel=1e-2)
    assert norm < 1
    assert all(torch.equal(p.grad, torch.full_like(p, 1e-3)) for p in networks)
    assert torch.cat([p.grad.flatten() for p in extra.values()]).norm() == pytest.approx(1, abs=1e-4)

    for parameter in network.parameters:
        parameter.grad = torch.zeros_like(parameter)
    before = [p.detach().clone() for p in network.parameters]
    network.optimizer.step()
    undecayed = {id(p) for p in extra.values()}
    for parameter, old in zip(network.parameters, before, strict=True):
        torch.testing.assert_close(parameter.detach(), old if id(parameter) in undecayed else old * (1 - 0.1 * 0.5))
