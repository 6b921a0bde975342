"""The U-Net that a configuration describes: attention backends, loading, widening, gradients."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models import attention_processor
from diffusers.models.attention_processor import Attention

from ldm.config import loader
from ldm.diffusion.process import DiffusionProcess
from ldm.models import attention, unet
from ldm.models.conditioning import Condition, predict
from ldm.sampling.solvers import scheduler
from ldm.utils.errors import UserError


def test_attention_backends_agree(root: Path) -> None:
    torch.manual_seed(0)
    stage = loader.load(root / "configs/tiny.yaml").stage2
    model = unet.build(stage, 4, 16, 384).eval()
    x, t, text = torch.randn(2, 4, 16, 16), torch.tensor([3.0, 700.0]), torch.randn(2, 16, 384)
    outputs = []
    for backend in ("eager", "sdpa"):
        attention.use_attention(model, backend, torch.device("cpu"))
        with torch.no_grad():
            outputs.append(model(x, t, text).sample)
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(
    not (torch.cuda.is_available() and importlib.util.find_spec("xformers")), reason="needs a GPU and xformers"
)
def test_xformers_agrees_with_sdpa(root: Path) -> None:
    torch.manual_seed(0)
    device = torch.device("cuda")
    model = unet.build(loader.load(root / "configs/tiny.yaml").stage2, 4, 16, 384).eval().to(device)
    x, t, text = torch.randn(2, 4, 16, 16), torch.tensor([3.0, 700.0]), torch.randn(2, 16, 384)
    outputs = []
    for backend in ("sdpa", "xformers"):
        attention.use_attention(model, backend, device, torch.bfloat16)
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            outputs.append(model(x.to(device), t.to(device), text.to(device)).sample)
    torch.testing.assert_close(*outputs, atol=2e-2, rtol=2e-2)


HALF = [torch.bfloat16, torch.float16]


class Kernels:
    """Stands in for xformers: attention of half-precision tensors `(N·heads, L, C)`, times `factor`."""

    def __init__(self, factor: float = 1.0, refused: tuple[torch.dtype, ...] = (torch.float32,)):
        self.factor, self.refused = factor, refused
        self.seen: list[torch.dtype] = []

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_bias: None, op: None, scale: float
    ) -> torch.Tensor:
        if q.dtype in self.refused:
            raise NotImplementedError("No operator found for `memory_efficient_attention_forward` with inputs:\n…")
        self.seen.append(q.dtype)
        return self.factor * torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        module = SimpleNamespace(ops=SimpleNamespace(memory_efficient_attention=self))
        patch.setattr(attention_processor, "xformers", module)
        patch.setattr(attention, "check_backend", lambda *_: None)  # as on a GPU


def small(root: Path, *conditions: str) -> unet.UNet:
    torch.manual_seed(0)
    overrides = [f"stage2.conditions=[{','.join(conditions)}]", f"stage2.pooled_text={bool(conditions)}"]
    return unet.build(loader.load(root / "configs/tiny.yaml", overrides).stage2, 4, 16, 384 if conditions else 0)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("conditions", [(), ("text",)])
def test_kernels_are_checked_in_the_precision_of_training(
    root: Path, conditions: tuple[str, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = Kernels()
    kernels.install(monkeypatch)
    model = small(root, *conditions)
    attention.use_attention(model, "xformers", torch.device("cpu"), dtype)
    assert kernels.seen == [dtype]
    assert all(p.grad is None for p in model.parameters())
    Kernels(1.1).install(monkeypatch)
    with pytest.raises(
        UserError, match=r"^stage2\.attention_backend: xformers is off by .* in its output .* use sdpa$"
    ):
        attention.use_attention(model, "xformers", torch.device("cpu"), dtype)
    Kernels(refused=(torch.float32, dtype)).install(monkeypatch)
    with pytest.raises(UserError, match=r"can't compute it in b?float16 here: No operator .* with inputs; use sdpa$"):
        attention.use_attention(model, "xformers", torch.device("cpu"), dtype)


def test_a_wrong_gradient_of_kernels_is_detected(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoneForKeys(Kernels):
        def __call__(self, q: torch.Tensor, k: torch.Tensor, *more: torch.Tensor, **options: None) -> torch.Tensor:
            return super().__call__(q, k.detach(), *more, **options)

    NoneForKeys().install(monkeypatch)
    with pytest.raises(UserError, match=r"xformers is off by .* in its gradient"):
        attention.use_attention(small(root, "text"), "xformers", torch.device("cpu"), torch.bfloat16)


def test_xformers_is_used_only_in_half_precision(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels, model, reference = Kernels(), small(root, "text").eval(), small(root, "text").eval()
    kernels.install(monkeypatch)
    attention.use_attention(model, "xformers", torch.device("cpu"), torch.bfloat16)
    attention.use_attention(reference, "sdpa", torch.device("cpu"))
    x, t, condition = torch.randn(2, 4, 16, 16), torch.tensor([3.0, 700.0]), Condition(torch.randn(2, 16, 384))
    kernels.seen.clear()
    with torch.no_grad():
        assert torch.equal(predict(model, x, t, condition), predict(reference, x, t, condition))
        assert not kernels.seen
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(predict(model, x, t, condition), predict(reference, x, t, condition))
        layers = sum(isinstance(m, Attention) for m in model.modules())
        assert kernels.seen == layers * [torch.bfloat16]
        predict(model.half(), x.half(), t, condition.to(torch.float16))
        assert kernels.seen == layers * [torch.bfloat16] + layers * [torch.float16]


def test_a_float32_run_uses_sdpa_instead_of_xformers_and_reports_it_once(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kernels, model = Kernels(), small(root, "text")
    kernels.install(monkeypatch)
    for _ in range(2):  # a student and its teacher
        attention.use_attention(model, "xformers", torch.device("cpu"), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        predict(model, torch.randn(1, 4, 8, 8), torch.zeros(1), Condition(torch.randn(1, 16, 384)))
    assert not kernels.seen
    assert capsys.readouterr().out.count("stage2.attention_backend: xformers computes in half precision") == 1


def test_a_missing_backend_is_an_error(root: Path) -> None:
    model = unet.build(loader.load(root / "configs/tiny.yaml").stage2, 4, 16, 384)
    with pytest.raises(UserError, match="xformers"):
        attention.use_attention(model, "xformers", torch.device("cpu"))


def test_latents_too_small_for_the_levels_are_refused(root: Path) -> None:
    stage = loader.load(root / "configs/openmoji.yaml").stage2
    with pytest.raises(UserError, match=r"stage2\.channels: 3 levels"):
        unet.build(stage, 4, 6, 384)


def test_a_unet_that_does_not_fit_the_latents_is_refused(root: Path, tmp_path: Path) -> None:
    stage = loader.load(root / "configs/tiny.yaml", [f"stage2.init_from={tmp_path}"]).stage2
    unet.build(stage, 4, 16, 384).save_pretrained(tmp_path / "unet")
    loaded = unet.load(stage, 4, 32, 384)
    assert (loaded.config.in_channels, loaded.config.sample_size) == (4, 32)
    with pytest.raises(UserError, match="in_channels 4"):
        unet.load(stage, 3, 16, 384)
    with pytest.raises(UserError, match=r"stage2\.init_from: .* halves the latents \d times, but their side is 15;"):
        unet.load(stage, 4, 15, 384)
    with pytest.raises(UserError, match=r"cross_attention_dim 384, but the text encoder's width are 32|384"):
        unet.load(stage, 4, 16, 32)
    scheduler(DiffusionProcess("eps"), "ddim").save_pretrained(tmp_path / "scheduler")
    with pytest.raises(UserError, match=r"stage2\.prediction_type: 'v', but .* set stage2\.prediction_type=eps"):
        unet.load(stage.model_copy(update={"prediction_type": "v"}), 4, 16, 384)


def test_a_widened_unet_predicts_as_before_until_it_is_trained(root: Path, tmp_path: Path) -> None:
    """A text-to-image model widened for inpainting, super-resolution or classes: the new weights start at 0."""
    torch.manual_seed(0)
    before = loader.load(root / "configs/tiny.yaml").stage2
    old = unet.build(before, 4, 16, 32).eval()
    old.save_pretrained(tmp_path / "unet")
    x, t, text = torch.randn(2, 4, 16, 16), torch.tensor([3, 700]), torch.randn(2, 5, 32)
    expected = predict(old, x, t, Condition(text)).detach()
    for conditions, classes, condition in (
        (("text", "inpaint"), 0, Condition(text, image=torch.randn(2, 5, 16, 16))),
        (("text", "upscale"), 0, Condition(text, torch.tensor([20, 300]), image=torch.randn(2, 3, 16, 16))),
        (("text", "class"), 7, Condition(text, torch.tensor([0, 7]))),
    ):
        stage = before.model_copy(update={"init_from": str(tmp_path), "conditions": conditions})
        new = unet.load(stage, 4, 16, 32, classes).eval()
        torch.testing.assert_close(predict(new, x, t, condition), expected)
        assert new.config.in_channels == unet.input_channels(stage, 4)
        predict(new, x, t, condition).square().sum().backward()
        added = new.conv_in.weight.grad[:, 4:] if condition.image is not None else new.class_embedding.weight.grad
        assert float(added.abs().max()) > 0  # the new weights get gradients
        new.save_pretrained(tmp_path / "new")
        loaded = type(new).from_pretrained(tmp_path / "new")
        torch.testing.assert_close(predict(loaded, x, t, condition), expected)


def test_a_unet_with_a_learned_variance_starts_from_a_unet_without(root: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    before = loader.load(root / "configs/tiny.yaml").stage2
    unet.build(before, 4, 16, 32).save_pretrained(tmp_path / "unet")
    stage = before.model_copy(update={"init_from": str(tmp_path), "variance": "learned"})
    x, t, text = torch.randn(2, 4, 16, 16), torch.tensor([3, 700]), torch.randn(2, 5, 32)
    expected = predict(
        unet.load(before.model_copy(update={"init_from": str(tmp_path)}), 4, 16, 32), x, t, Condition(text)
    )
    prediction = predict(unet.load(stage, 4, 16, 32), x, t, Condition(text))
    torch.testing.assert_close(prediction, torch.cat([expected, torch.zeros_like(expected)], dim=1))


@pytest.mark.parametrize(
    "conditions", [[], ["class"], ["text"], ["text", "class"], ["text", "size"], ["text", "upscale"]]
)
@pytest.mark.parametrize("pooled", [False, True])
def test_every_parameter_of_the_unet_receives_a_gradient(root: Path, conditions: list[str], pooled: bool) -> None:
    torch.manual_seed(0)
    with_text = "text" in conditions
    stage = loader.load(
        root / "configs/tiny.yaml", [f"stage2.conditions={conditions}", f"stage2.pooled_text={pooled and with_text}"]
    ).stage2
    model = unet.build(stage, 4, 8, 32 if with_text else 0, 3)
    label = torch.tensor([0, 3]) if {"class", "upscale"} & set(conditions) else None
    condition = Condition(
        torch.randn(2, 5, 32) if with_text else None,
        label,
        torch.rand(2, 6) * 64 if stage.sizes else None,
        torch.randn(2, 3, 8, 8) if stage.image else None,
    )
    predict(model, torch.randn(2, 4, 8, 8), torch.tensor([1, 900]), condition).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("unet-5m", 5),
        ("unet-34m", 34),
        ("unet-110m", 110),
        ("unet-425m", 425),
        ("unet-860m", 860),
    ],
)
def test_presets_have_the_parameter_count_in_their_name(name: str, millions: int) -> None:
    tree = {"data": {"source": "x", "size": 512}, "stage2": {"model": name}}
    stage, width = loader.parse(tree, "a test").stage2, 384 if name == "unet-5m" else 768
    count = sum(p.numel() for p in unet.build_empty(stage, 4, 64, width).parameters())
    assert count / 1e6 == pytest.approx(millions, rel=0.04)


def test_unet_2_6b_has_sdxls_names_and_shapes() -> None:
    tree = {"data": {"source": "x", "size": 1024}, "stage2": {"model": "unet-2.6b", "conditions": ["text", "size"]}}
    model = unet.build_empty(loader.parse(tree, "a test").stage2, 4, 128, 2048, pooled_width=1280)
    with torch.device("meta"):
        sdxl = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    expected = {name: tensor.shape for name, tensor in sdxl.state_dict().items()}
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == expected
    assert model.config.attention_head_dim == sdxl.config.attention_head_dim
    assert sum(tensor.numel() for tensor in model.parameters()) == 2_567_463_684


def test_dropout_of_a_loaded_unet_is_removed_and_reported(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = loader.load(root / "configs/tiny.yaml", [f"stage2.init_from={tmp_path}"]).stage2
    original = unet.build(stage, 4, 16, 32)
    original.register_to_config(dropout=0.1)
    original.save_pretrained(tmp_path / "unet")
    loaded = unet.load(stage, 4, 16, 32)
    assert "dropout 0.1, which is left out" in capsys.readouterr().out
    assert {layer.p for layer in loaded.modules() if isinstance(layer, torch.nn.Dropout)} == {0.0}
