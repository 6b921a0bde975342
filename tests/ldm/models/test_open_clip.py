"""OpenCLIP's text towers converted to transformers' CLIP encoders, against OpenCLIP itself."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from transformers import AutoTokenizer, CLIPTextModel

from ldm.models import text_encoder
from ldm.utils.errors import UserError

open_clip = pytest.importorskip("open_clip")

PROMPTS = [
    "",
    "a photo of a cat",
    "Hello, WORLD!",
    "!",
    "hi!!! ! !?",
    "it's the dog's 123 4.5%",
    "x  y\n\tz",
    "a_b-c/d",
    "naïve café Ünïcödé",
    "e\u0301 A\u030a",
    "日本語 한국어 🎉",
    "½ ² \u200b",
    "<|endoftext|> hi",
    "word, " * 60,
    "cat " * 75,
    "cat " * 76,
]

TOWERS: dict[str, dict[str, Any]] = {
    "CLIP": {},
    "with QuickGELU": {"quick_gelu": True},
    "CustomTextCLIP": {"custom_text": True},
    "with other hyperparameters": {
        "custom_text": True,
        "text_cfg": {
            "context_length": 32,
            "width": 48,
            "heads": 3,
            "layers": 3,
            "mlp_ratio": 3.7362,
            "pool_type": "last",
            "act_kwargs": {"approximate": "tanh"},
            "norm_kwargs": {"eps": 1e-3},
            "proj_bias": True,
        },
    },
}


def tiny(**changes: Any) -> dict[str, Any]:
    vision = {"image_size": 16, "patch_size": 8, "width": 16, "head_width": 8, "layers": 1}
    return {"embed_dim": 16, "vision_cfg": vision, "text_cfg": {"width": 32, "heads": 4, "layers": 2}, **changes}


def save_model(path: Path, config: dict[str, Any]) -> Path:
    """Saves a random model as an OpenCLIP folder."""
    arguments = {key: value for key, value in config.items() if key != "custom_text"}
    torch.manual_seed(0)
    model = (open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP)(**arguments)
    tensors = {name: tensor + 0.2 * torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    save_file(tensors, path / "open_clip_model.safetensors")
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    return path


def open_clip_states(name: str, prompts: list[str], layer: int = -1) -> tuple[torch.Tensor, torch.Tensor]:
    """OpenCLIP's token ids `(N, L)`, and a layer's states `(N, L, C)` after `ln_final`."""
    model = open_clip.create_model(name).eval()
    context = model.context_length
    ids = open_clip.get_tokenizer(name, context_length=context)(prompts)
    with torch.no_grad():
        output = model.forward_intermediates(text=ids, normalize_intermediates=True, text_output_fmt="NLC")
    return ids, output["text_intermediates"][layer]


@pytest.mark.parametrize("changes", TOWERS.values(), ids=TOWERS)
def test_token_ids_and_states_equal_open_clips(changes: dict[str, Any], tmp_path: Path) -> None:
    name = f"local-dir:{save_model(tmp_path, tiny(**changes))}"
    encoder = text_encoder.load(f"open_clip:{name}")
    ids, states = open_clip_states(name, PROMPTS)
    assert torch.equal(encoder.token_ids(PROMPTS)[:, 0, 0], ids)
    torch.testing.assert_close(encoder.encode(PROMPTS), states, rtol=0, atol=1e-5)


def test_a_skipped_layer_equals_open_clips_penultimate_layer(tmp_path: Path) -> None:
    name = f"local-dir:{save_model(tmp_path, tiny())}"
    states = text_encoder.load(f"open_clip:{name}", skip_layers=1).encode(PROMPTS)
    torch.testing.assert_close(states, open_clip_states(name, PROMPTS, layer=-2)[1], rtol=0, atol=1e-5)


def test_a_saved_tower_opens_in_diffusers(tmp_path: Path) -> None:
    name = f"local-dir:{save_model(tmp_path, tiny())}"
    encoder = text_encoder.load(f"open_clip:{name}")
    StableDiffusionPipeline(
        vae=None,
        text_encoder=encoder.model,
        tokenizer=encoder.tokenizer,
        unet=None,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(tmp_path / "saved")
    loaded = StableDiffusionPipeline(
        vae=None,
        text_encoder=CLIPTextModel.from_pretrained(tmp_path / "saved/text_encoder"),
        tokenizer=AutoTokenizer.from_pretrained(tmp_path / "saved/tokenizer"),
        unet=None,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with torch.no_grad():
        states = loaded.encode_prompt(PROMPTS, "cpu", 1, False)[0]
    torch.testing.assert_close(states, encoder.encode(PROMPTS), rtol=0, atol=0)


def test_an_architecture_loads_its_weights_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model(tmp_path, tiny())
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", tiny())
    encoder = text_encoder.load(f"open_clip:tiny:{folder}/open_clip_model.safetensors")
    assert encoder.fingerprint() == text_encoder.load(f"open_clip:local-dir:{folder}").fingerprint()
    torch.save({}, tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"text\.model: .*weights\.pt is no \.safetensors"):
        text_encoder.load(f"open_clip:tiny:{tmp_path}/weights.pt")
    other = tiny(text_cfg={"width": 48, "heads": 4, "layers": 2})
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", other)
    with pytest.raises(UserError, match=r"text\.model: OpenCLIP can't load 'tiny:.*width changed"):
        text_encoder.load(f"open_clip:tiny:{folder}/open_clip_model.safetensors")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("ViT-H-41:laion2b_s32b_b79k", "did you mean 'ViT-H-1"),
        ("ViT-H-14:laion", "is neither a file nor a tag of ViT-H-14; give a .safetensors or one of laion2b_s32b_b79k"),
        ("ViT-H-14", "is neither a file nor a tag of ViT-H-14"),
        ("ViT-B-32:openai", "trained with QuickGELU; take open_clip:ViT-B-32-quickgelu:openai"),
        ("ViT-B-16-SigLIP:webli", "is not CLIP's (hf_tokenizer_name: timm/ViT-B-16-SigLIP"),
        ("roberta-ViT-B-32:laion2b_s12b_b32k", "is not CLIP's (hf_model_name: roberta-base"),
        ("MobileCLIP-S1:datacompdr", "is not CLIP's (no_causal_mask: True)"),
        ("coca_ViT-L-14:laion2b_s13b_b90k", "is not CLIP's (embed_cls: True)"),
        ("local-dir:no/where", "'no/where' holds no .safetensors"),
        ("hf-hub:no/such-model", "OpenCLIP can't load 'hf-hub:no/such-model'"),
    ],
)
def test_a_tower_that_is_not_clips_is_refused_in_one_line(name: str, reason: str) -> None:
    with pytest.raises(UserError) as error:
        text_encoder.load(f"open_clip:{name}")
    message = str(error.value)
    assert message.startswith("text.model: ") and reason in message and "\n" not in message


def test_a_vocabulary_of_another_size_is_refused(tmp_path: Path) -> None:
    changed = tiny(text_cfg={"width": 32, "heads": 4, "layers": 2, "vocab_size": 100})
    with pytest.raises(UserError, match=r"is not CLIP's \(vocab_size: 100\)"):
        text_encoder.load(f"open_clip:local-dir:{save_model(tmp_path, changed)}")


def test_the_error_without_open_clip_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(UserError, match=r"open_clip_torch; install the extra 'open-clip'"):
        text_encoder.load("open_clip:ViT-H-14:laion2b_s32b_b79k")
