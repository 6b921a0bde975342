"""U-Nets loaded from a single file, in the original layout or diffusers'."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from original_layout import PREFIX, in_original_layout
from safetensors.torch import load_file, save_file

from ldm.config import loader
from ldm.config.schema import Stage2Config
from ldm.models import unet
from ldm.models.conditioning import Condition, predict
from ldm.models.convert import unet as single_file_unet
from ldm.utils.errors import UserError

Tensors = dict[str, torch.Tensor]

PLAIN = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
    "attention_head_dim": (4, 8),
    "transformer_layers_per_block": (1, 1),
    "use_linear_projection": False,
}
LINEAR = PLAIN | {
    "block_out_channels": (64, 128),
    "use_linear_projection": True,
    "attention_head_dim": (1, 2),
    "norm_num_groups": 32,
}
SIZES = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 6 * 256 + 24,
}
# Small versions of Stable Diffusion 1, 2, XL, and 1 for inpainting and upscaling, with the stage2 settings of each.
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "1": (PLAIN, {}),
    "1-two-layers": (
        PLAIN
        | {
            "layers_per_block": 2,
            "block_out_channels": (8, 16, 24),
            "attention_head_dim": (1, 2, 3),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 1, 1),
        },
        {},
    ),
    "1-scale-shift": (PLAIN | {"resnet_time_scale_shift": "scale_shift"}, {}),
    "2": (LINEAR, {}),
    "xl": (
        LINEAR
        | SIZES
        | {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2),
        },
        {"conditions": ("text", "size")},
    ),
    "inpainting": (PLAIN | {"in_channels": 9}, {"conditions": ("text", "inpaint")}),
    "upscaling": (PLAIN | {"in_channels": 7, "num_class_embeds": 1000}, {"conditions": ("text", "upscale")}),
}


@functools.cache
def build(name: str) -> UNet2DConditionModel:
    """A model none of whose weights has its initial value, so that a weight that isn't loaded shows."""
    torch.manual_seed(0)
    model = UNet2DConditionModel(**MODELS[name][0])
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    return model.eval()


def stage2_config(root: Path, path: Path, **changes: Any) -> Stage2Config:
    stage = loader.load(root / "configs/tiny.yaml", ["stage2.prediction_type=eps", "stage2.pooled_text=false"]).stage2
    return stage.model_copy(update={"init_from": str(path), **changes})


def save(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata)
    return path


LAYOUTS = ("checkpoint", "unet only", "diffusers", "diffusers with config")
CASES = [  # every model as a checkpoint and in one other layout; the rest of the product is a drill
    pytest.param(name, layout, marks=pytest.mark.drill if j and (i + j) % 3 else (), id=f"{name}-{layout}")
    for i, name in enumerate(MODELS)
    for j, layout in enumerate(LAYOUTS)
]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_a_file_gives_the_weights_and_predictions_of_its_folder(
    root: Path, tmp_path: Path, name: str, layout: str
) -> None:
    model, changes = build(name), MODELS[name][1]
    model.save_pretrained(tmp_path / "folder/unet")
    path = tmp_path / "file.safetensors"
    if layout == "checkpoint":  # with the other tensors of a checkpoint
        others = {key: torch.ones(1) for key in ("first_stage_model.x", "cond_stage_model.x", "alphas_cumprod")}
        save(path, in_original_layout(model) | others | {"model_ema.input_blocks00weight": torch.ones(1)})
    elif layout == "unet only":
        save(path, in_original_layout(model, "") | {"model_ema.decay": torch.ones(1)})
    elif layout == "diffusers":
        save(path, model.state_dict())
    else:
        path = tmp_path / "folder/unet/diffusion_pytorch_model.safetensors"
    expected = unet.load(stage2_config(root, tmp_path / "folder", **changes), 4, 8, 24)
    loaded = unet.load(stage2_config(root, path, **changes), 4, 8, 24)
    weights, expected_weights = loaded.state_dict(), expected.state_dict()
    assert weights.keys() == expected_weights.keys()
    assert all(torch.equal(weights[key], expected_weights[key]) for key in weights)
    for key in MODELS[name][0]:
        assert json.dumps(loaded.config[key]) == json.dumps(expected.config[key]), key  # JSON has lists for tuples
    assert all(parameter.requires_grad and parameter.device.type == "cpu" for parameter in loaded.parameters())
    condition = Condition(
        torch.randn(2, 5, 24),
        torch.tensor([3, 900]) if "upscale" in changes.get("conditions", ()) else None,
        torch.rand(2, 6) * 64 if name == "xl" else None,
    )
    x, t = torch.randn(2, model.config.in_channels, 8, 8), torch.tensor([3, 700])
    with torch.no_grad():
        assert torch.equal(predict(loaded, x, t, condition), predict(expected, x, t, condition))


PUBLISHED = {  # from their config.json; other keys have UNet2DConditionModel's defaults
    "1": {"attention_head_dim": 8, "cross_attention_dim": 768},
    "1-inpainting": {"attention_head_dim": 8, "cross_attention_dim": 768, "in_channels": 9},
    "2": {"attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True},
    "xl": {
        "attention_head_dim": (5, 10, 20),
        "block_out_channels": (320, 640, 1280),
        "cross_attention_dim": 2048,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2, 10),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
KNOWN_NAMES = {  # by which other programs recognize these models
    "1": [
        "input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight",
        "output_blocks.2.1.conv.weight",
        "output_blocks.8.2.conv.weight",
        "input_blocks.9.0.op.bias",
    ],
    "xl": [
        "input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight",
        "label_emb.0.0.weight",
        "input_blocks.7.1.transformer_blocks.9.attn1.to_q.weight",
        "output_blocks.5.2.conv.weight",
    ],
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_architectures_are_recognized_by_names_and_shapes(name: str) -> None:
    with torch.device("meta"):
        model = UNet2DConditionModel(**PUBLISHED[name])
    tensors = in_original_layout(model)
    assert all(PREFIX + key in tensors for key in KNOWN_NAMES.get(name, ()))
    sources, unknown = single_file_unet.name_table(Path("file"), set(tensors))
    assert not unknown and set(sources) == set(model.state_dict())
    shapes = {key: tuple(tensors[source].shape) for key, source in sources.items()}
    config = single_file_unet.architecture(Path("file"), shapes, 7, 7)  # these two defaults aren't used
    for key, value in config.items():
        expected = model.config[key]
        if isinstance(value, tuple) and not isinstance(expected, (tuple, list)):
            assert set(value) == {expected}, key
        else:
            assert value == (tuple(expected) if isinstance(value, tuple) else expected), key
    assert {*PUBLISHED[name]} <= {*config}


def test_stable_diffusion_1_in_diffusers_layout_without_its_config_is_refused() -> None:
    with torch.device("meta"):
        shapes = {key: tuple(t.shape) for key, t in UNet2DConditionModel(**PUBLISHED["1"]).state_dict().items()}
    with pytest.raises(UserError, match=r"how many heads .*put its config\.json beside it"):
        single_file_unet.architecture(Path("file"), shapes, 64, 32, original=False)


def test_heads_and_groups_that_a_file_lacks_come_from_the_configuration(root: Path, tmp_path: Path) -> None:
    path = save(tmp_path / "file.safetensors", in_original_layout(build("1")))
    loaded = unet.load(stage2_config(root, path, attention_head_dim=16, norm_num_groups=4), 4, 8, 24)
    assert tuple(loaded.config.attention_head_dim) == (2, 4) and loaded.config.norm_num_groups == 4
    with pytest.raises(UserError, match=r"stage2\.norm_num_groups is 24"):
        unet.load(stage2_config(root, path, norm_num_groups=24), 4, 8, 24)
    with pytest.raises(UserError, match=r"stage2\.attention_head_dim is 24, which doesn't divide its width 32"):
        unet.load(stage2_config(root, path, attention_head_dim=24), 4, 8, 24)


def test_a_file_of_any_unet_of_this_project_loads_with_its_config(root: Path, tmp_path: Path) -> None:
    stage = loader.load(root / "configs/tiny.yaml").stage2
    for conditions, pooled, width, classes in (((), False, 0, 0), (("class",), False, 0, 3), (("text",), True, 24, 0)):
        changes = {"conditions": conditions, "pooled_text": pooled}
        model = unet.build(stage.model_copy(update=changes), 4, 8, width, classes)
        model.save_pretrained(tmp_path / "unet")
        path = tmp_path / "unet/diffusion_pytorch_model.safetensors"
        loaded = unet.load(stage2_config(root, path, **changes), 4, 8, width, classes)
        assert type(loaded) is (UNet2DConditionModel if width else UNet2DModel)
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    without_config = save(tmp_path / "without-config.safetensors", model.state_dict())
    loaded = unet.load(stage2_config(root, without_config), 4, 8, 24)
    assert torch.equal(loaded.add_embedding.proj.weight, model.add_embedding.proj.weight)  # of the pooled text
    with pytest.raises(UserError, match=r"has a UNet2DConditionModel; stage2\.conditions need UNet2DModel"):
        unet.load(stage2_config(root, path, conditions=()), 4, 8)
    unet.build(stage2_config(root, path, conditions=()), 4, 8).save_pretrained(tmp_path / "unconditional")
    (tmp_path / "unconditional/config.json").unlink()
    with pytest.raises(UserError, match=r"reads no text; give the folder"):
        unet.load(
            stage2_config(root, tmp_path / "unconditional/diffusion_pytorch_model.safetensors", conditions=()), 4, 8
        )


def test_a_single_file_is_widened_for_other_conditions_and_a_learned_variance(root: Path, tmp_path: Path) -> None:
    path = save(tmp_path / "file.safetensors", in_original_layout(build("1")))
    old = unet.load(stage2_config(root, path), 4, 8, 24)
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 24)
    expected = predict(old, x, t, Condition(text))
    for conditions, classes, condition in (
        (("text", "inpaint"), 0, Condition(text, image=torch.randn(2, 5, 8, 8))),
        (("text", "upscale"), 0, Condition(text, torch.tensor([20, 300]), image=torch.randn(2, 3, 8, 8))),
        (("text", "class"), 7, Condition(text, torch.tensor([0, 7]))),
    ):
        new = unet.load(stage2_config(root, path, conditions=conditions), 4, 8, 24, classes)
        torch.testing.assert_close(predict(new, x, t, condition), expected)
    learned = unet.load(stage2_config(root, path, variance="learned"), 4, 8, 24)
    torch.testing.assert_close(
        predict(learned, x, t, Condition(text)), torch.cat([expected, torch.zeros_like(expected)], dim=1)
    )


def test_half_precision_loads_as_float32(root: Path, tmp_path: Path) -> None:
    halves = {name: tensor.half() for name, tensor in in_original_layout(build("1")).items()}
    loaded = unet.load(stage2_config(root, save(tmp_path / "file.safetensors", halves)), 4, 8, 24)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.conv_in.bias, halves[f"{PREFIX}input_blocks.0.0.bias"].float())


@pytest.mark.parametrize("prefix", ["diffusion_model.", "unet."])
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_a_unet_loads_with_other_prefixes(root: Path, tmp_path: Path, prefix: str, layout: str) -> None:
    model = build("1")
    tensors = (
        in_original_layout(model, prefix)
        if layout == "original"
        else {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    )
    path = save(tmp_path / "file.safetensors", tensors | {"first_stage_model.x": torch.ones(1)})
    loaded = unet.load(stage2_config(root, path), 4, 8, 24).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (("lora_unet_down_blocks_0.lora_up.weight",), "a LoRA: 1 tensor, of lora_unet_down_blocks_0 (1)"),
        (("control_model.input_blocks.0.0.weight",), "a ControlNet"),
        (("encoder.down.0.block.0.conv1.weight",), "an autoencoder in the original layout"),
        (("text_model.x.weight", "text_model.y.weight"), "a text encoder: 2 tensors, of text_model (2)"),
        (("a.x", "b.x", "b.y", "c.x", "d.x"), "but 5 tensors, of b (2), a (1), c (1) …"),
    ],
)
def test_a_file_of_another_model_is_refused_with_its_contents(
    root: Path, tmp_path: Path, names: tuple[str, ...], kind: str
) -> None:
    path = save(tmp_path / "file.safetensors", {name: torch.ones(1) for name in names})
    with pytest.raises(UserError) as error:
        unet.load(stage2_config(root, path), 4, 8, 24)
    assert kind in str(error.value) and "conv_in.weight, alone or after model.diffusion_model." in str(error.value)


DAMAGE: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "missing": (lambda t: t.pop(f"{PREFIX}out.2.bias"), r"lacks tensor conv_out\.bias"),
    "missing-label": (
        lambda t: t.update({f"{PREFIX}label_emb.0.0.weight": torch.ones(4, 4)}),
        r"lacks tensor model\.diffusion_model\.label_emb\.0\.0\.bias",
    ),
    "extra": (lambda t: t.update({f"{PREFIX}controls.0": torch.ones(1)}), rf"has, .*tensor {PREFIX}controls\.0;"),
    "extra-in-block": (lambda t: t.update({f"{PREFIX}input_blocks.1.0.new": torch.ones(1)}), r"resnets\.0\.new"),
    "gap": (lambda t: t.update({f"{PREFIX}input_blocks.999.0.x": torch.ones(1)}), r"tensor .*input_blocks\.999\.0\.x"),
    "shape": (
        lambda t: t.update({f"{PREFIX}out.2.bias": torch.ones(3)}),
        r"out\.2\.bias has shape \(3,\); expected \(4,\), by the shapes",
    ),
    "scalar": (lambda t: t.update({f"{PREFIX}out.2.weight": torch.ones(())}), r"conv_out\.weight"),
    "wide": (lambda t: t.update({f"{PREFIX}time_embed.2.weight": torch.ones(128, 9)}), r"has shape \(128, 9\)"),
    "autoencoder": (lambda t: (t.clear(), t.update({"first_stage_model.x": torch.ones(1)})), "holds no U-Net"),
    "transformer": (lambda t: (t.clear(), t.update({f"{PREFIX}joint_blocks.0.x": torch.ones(1)})), "holds no U-Net"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_tensor_that_does_not_fit_is_reported_in_one_line(root: Path, tmp_path: Path, name: str) -> None:
    tensors, (damage, message) = in_original_layout(build("1")), DAMAGE[name]
    damage(tensors)
    path = save(tmp_path / "file.safetensors", tensors)
    with pytest.raises(UserError, match=message) as error:
        unet.load(stage2_config(root, path), 4, 8, 24)
    assert str(error.value).startswith(f"stage2.init_from: {path}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("prefix", [PREFIX, None])
def test_every_missing_tensor_is_refused(tmp_path: Path, prefix: str | None) -> None:
    small = PLAIN | SIZES | {"block_out_channels": (8, 8), "attention_head_dim": (1, 1), "num_class_embeds": 3}
    model = UNet2DConditionModel(**small)
    tensors = model.state_dict() if prefix is None else in_original_layout(model)
    if prefix:
        del tensors[f"{PREFIX}label_emb.weight"]  # the original layout has either label_emb or label_emb.0
    path = save(tmp_path / "file.safetensors", tensors)
    single_file_unet.read(path, 8, 8)
    for name in [*tensors][0 if prefix else 5 :: 10]:
        if name == "class_embedding.weight":  # without it the file is a valid model without classes
            continue
        save(path, {key: tensor for key, tensor in tensors.items() if key != name})
        with pytest.raises(UserError, match=r"file\.safetensors: "):
            single_file_unet.read(path, 8, 8)


def test_unreadable_files_are_refused_by_name(root: Path, tmp_path: Path) -> None:
    path = save(tmp_path / "file.safetensors", in_original_layout(build("1")))
    content = path.read_bytes()
    for damaged in (content[:-100], content[:50], b"", b"\x80\x02}q\x00."):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"stage2\.init_from: .*can't be read as safetensors") as error:
            unet.load(stage2_config(root, path), 4, 8, 24)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"stage2\.init_from: .*no such file"):
        unet.load(stage2_config(root, tmp_path / "none.safetensors"), 4, 8, 24)
    torch.save({"state_dict": {}}, tmp_path / "file.ckpt")
    with pytest.raises(UserError, match=r"file\.ckpt: is a pickle.*save_file") as error:
        unet.load(stage2_config(root, tmp_path / "file.ckpt"), 4, 8, 24)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("markers", "metadata", "target"),
    [
        (["v_pred"], {}, "v"),
        (["v_pred", "ztsnr"], {}, "v"),
        ([], {"modelspec.prediction_type": "v"}, "v"),
        ([], {"modelspec.prediction_type": "epsilon"}, "eps"),
    ],
)
def test_a_prediction_type_that_the_file_contradicts_is_refused(
    root: Path, tmp_path: Path, markers: list[str], metadata: dict[str, str], target: str
) -> None:
    for layout in (in_original_layout(build("1")), in_original_layout(build("1"), ""), build("1").state_dict()):
        path = save(tmp_path / "file.safetensors", layout | {marker: torch.empty(0) for marker in markers}, metadata)
        unet.load(stage2_config(root, path, prediction_type=target), 4, 8, 24)
        with pytest.raises(UserError, match=f"set stage2.prediction_type={target}"):
            unet.load(stage2_config(root, path, prediction_type="x0"), 4, 8, 24)


def test_a_unet_for_two_text_encoders_is_refused_where_the_text_has_one(root: Path, tmp_path: Path) -> None:
    model = UNet2DConditionModel(**MODELS["xl"][0] | {"projection_class_embeddings_input_dim": 6 * 256 + 16})
    path = save(tmp_path / "file.safetensors", in_original_layout(model))
    model.save_pretrained(tmp_path / "folder")
    for start in (path, tmp_path / "folder"):
        with pytest.raises(UserError, match=r"text\.model: has a pooled embedding of 0 channels, but .* with 16"):
            unet.load(stage2_config(root, start, conditions=("text", "size")), 4, 8, 24)


def test_a_folder_of_a_unet_alone_loads_unless_its_weights_differ_from_its_config(root: Path, tmp_path: Path) -> None:
    model = build("1")
    model.save_pretrained(tmp_path)
    loaded = unet.load(stage2_config(root, tmp_path), 4, 8, 24)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save(weights, {name: tensor for name, tensor in tensors.items() if name != "conv_in.bias"})
    with pytest.raises(UserError, match=r"the weights in .* are not its config's: conv_in\.bias"):
        unet.load(stage2_config(root, tmp_path), 4, 8, 24)
    save(weights, tensors)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"cross_attention_dim": 16}))
    with pytest.raises(UserError, match=r"stage2\.init_from: .*attn2"):
        unet.load(stage2_config(root, tmp_path), 4, 8, 24)
