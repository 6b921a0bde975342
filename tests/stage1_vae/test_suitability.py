"""The suitability report of autoencoders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from forked import ScriptProcess
from of_config import indexed
from PIL import Image

from ldm.config import loader
from ldm.data.dataset import iter_images
from ldm.evaluation.reconstruction import ReconstructionMetrics, reconstruction
from ldm.models import autoencoder
from ldm.utils.errors import UserError
from stage1_vae import suitability
from stage1_vae.suitability_report import Subject

Report = Callable[..., tuple[int, str, str]]


def save_vae(folder: Path, levels: int, scale: float = 1.0) -> Path:
    """Saves an AutoencoderKL of random weights that downsamples by 2^(levels − 1)."""
    torch.manual_seed(levels)
    vae = AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        layers_per_block=1,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=4,
        mid_block_add_attention=False,
        scaling_factor=scale,
    )
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two untrained autoencoders, and a cache for the index of openmoji-demo, which has held-out splits."""
    folder = tmp_path_factory.mktemp("shared")
    save_vae(folder / "run/autoencoder", 2)
    save_vae(folder / "coarse", 3)
    (folder / "run/config.yaml").write_text("")
    return folder


@pytest.fixture
def report(
    root: Path, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Report:
    """Calls the command, offline and without weights of LPIPS and FID; returns its status, stdout and stderr."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: True)
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        defaults = ["--config", str(root / "configs/tiny.yaml"), "data.size=24", f"data.cache_dir={shared / 'cache'}"]
        defaults += ["--lpips-net", "vgg"]  # whose weights are missing
        status = suitability.main([*defaults, *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def read_report(folder: Path) -> dict[str, object]:
    """The report; strict JSON, without NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads((folder / "report.json").read_text("utf-8"), parse_constant=refuse)


def test_several_autoencoders_share_one_table_and_missing_metric_weights_are_notes(
    report: Report, shared: Path, tmp_path: Path
) -> None:
    fine, coarse = shared / "run/autoencoder", shared / "coarse"
    arguments = ("--model", fine, "--model", coarse, "--count", 12, "--worst", 3, "--out", tmp_path / "out")
    status, out, _ = report(*arguments, "--lpips-net", "auto")
    assert status == 0
    lines = out.splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("model "))
    assert lines[header].split()[:5] == ["model", "factor", "channels", "PSNR", "dB"]
    assert [line.split()[0] for line in lines[header + 1 : header + 5]] == [
        str(fine),
        str(coarse),
        "bicubic",
        "bicubic",
    ]
    assert lines[header + 2].split()[1:3] == ["4", "4"]
    assert "12 images (of 73 in reconstruction, combination) of openmoji-demo at 24 px" in out
    assert "note: MS-SSIM has 2 of its 5 scales: there are sides of 24 px" in out
    assert "note: LPIPS: vgg16-397923af.pth is not in" in out
    assert "; LPIPS by st-vgg\n" in out and "ST-LPIPS" in lines[header]
    assert "note: rFID: weights-inception-2015-12-05-6726825d.pth is not in" in out
    assert f"{fine}: retrain" in out
    facts = read_report(tmp_path / "out")
    assert (facts["images"], facts["lpips_net"]) == (12, "st-vgg")
    assert [row["model"] for row in facts["models"]][:2] == [str(fine), str(coarse)]  # type: ignore[attr-defined]
    for name in ("reconstructions.png", "worst.png"):
        with Image.open(tmp_path / "out" / name) as grid:
            assert grid.width > 5 * 128  # the original, and two columns for each model


def test_figures_are_of_the_held_out_images_and_the_worst_have_the_lowest_psnr(
    report: Report, shared: Path, tmp_path: Path, root: Path
) -> None:
    model = shared / "run/autoencoder"
    assert report("--model", model, "--worst", 2)[0] == 0
    facts = read_report(shared / "run/evaluation")  # next to the autoencoder, in its run
    overrides = ["data.size=24", f"data.cache_dir={shared / 'cache'}"]
    held_out = indexed(loader.load(root / "configs/tiny.yaml", overrides)).select("reconstruction", "combination")
    loaded = autoencoder.load(model)
    expected = reconstruction((x, loaded.decode(loaded.encode(x))) for x in iter_images(held_out))
    figures = facts["models"][0]["figures"]  # type: ignore[index]
    assert (figures["psnr"], figures["ssim"]) == pytest.approx((expected["psnr"], expected["ssim"]), rel=1e-4)
    assert {name for name, _ in facts["names"]} == {entry.key for entry in held_out}  # type: ignore[attr-defined]

    subject = Subject("model", loaded, ReconstructionMetrics())
    x = next(iter_images(held_out, 8))
    names = [(f"image {i}", "") for i in range(8)]
    parts = [(x[:3], names[:3]), (x[3:], names[3:])]
    measured, samples, worst = suitability.measure(parts, [subject], 3)
    psnr = subject.metrics.per_image["psnr"]
    assert [row.number for row in worst] == psnr.argsort()[:3].tolist()
    assert measured == names
    assert len(samples) == 8
    for row in worst:
        torch.testing.assert_close(row.images[0], x[row.number])
        assert reconstruction([(row.images[:1], row.images[1:])])["psnr"] == pytest.approx(float(psnr[row.number]))


def test_the_report_recommends_keeping_the_identity(report: Report, tmp_path: Path) -> None:
    status, out, _ = report("--model", "identity", "--count", 4)
    assert status == 0
    assert "identity: keep" in out
    assert "inf" in out
    assert (tmp_path / "evaluation/worst.png").exists()  # it came from no run
    assert read_report(tmp_path / "evaluation")["models"][0]["figures"]["psnr"] is None  # type: ignore[index]


def test_nonfinite_reconstructions_are_reported(report: Report, shared: Path, tmp_path: Path) -> None:
    vae = AutoencoderKL.from_pretrained(shared / "run/autoencoder")
    with torch.no_grad():
        vae.decoder.conv_out.bias[0] = torch.inf
    vae.save_pretrained(tmp_path / "broken")
    status, out, _ = report("--model", tmp_path / "broken", "--count", 5, "--out", tmp_path / "out")
    assert status == 0
    assert "broken: retrain" in out
    assert "5 reconstructions have values that are not finite" in out
    assert read_report(tmp_path / "out")["models"][0]["broken"] == 5  # type: ignore[index]


def test_badly_scaled_latents_are_reported(report: Report, tmp_path: Path) -> None:
    status, out, _ = report("--model", save_vae(tmp_path / "small", 2, scale=1e-3), "--count", 5)
    assert status == 0
    assert "std of latent channel 0 " in out


def test_buckets_and_a_data_set_without_held_out_images(
    report: Report, shared: Path, tmp_path: Path, three_shapes: Callable[[list[str]], Path]
) -> None:
    folder = three_shapes([f"image: {i}" for i in range(7)])
    status, out, _ = report(
        "--model", shared / "coarse", f"data.source={folder}", "data.buckets={step: 4, smallest: 16}", "--worst", 1
    )
    assert status == 0
    assert "7 images (train)" in out
    assert "note: the data has no held-out images" in out
    facts = read_report(tmp_path / "evaluation")
    assert sorted(facts["names"]) == [[f"{i:02}.png", f"image: {i}"] for i in range(7)]  # type: ignore[call-overload]


def test_a_stream_is_measured_from_its_first_images(
    report: Report, shared: Path, tmp_path: Path, shard: Callable[[Path, int, str], None]
) -> None:
    shard(tmp_path / "a.tar", 6, "thing ")
    arguments = [f"data.source={tmp_path / 'a.tar'}", "data.streaming=true", "data.cache=none", "--count", 4]
    status, out, _ = report("--model", shared / "coarse", *arguments)
    assert status == 0
    assert "4 images (the first)" in out
    assert report("--model", shared / "coarse", *arguments, "--split", "train")[0] == 2


def test_rfid_of_few_images_comes_with_a_warning(report: Report, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Distance(torch.nn.Module):
        """Replaces Inception by two features, so that no file is needed."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.float().mean((2, 3))[:, :2]

    from torchmetrics.image import FrechetInceptionDistance

    monkeypatch.setattr(suitability.feature_networks, "fid", lambda _: FrechetInceptionDistance(Distance()))
    _, out, _ = report("--model", shared / "coarse", "--count", 4, "--out", shared / "rfid")
    assert "rFID of 4 images is mostly noise" in out
    assert "rFID" in next(line for line in out.splitlines() if line.startswith("model "))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/nowhere"], "--model: "),
        (["--model", "COARSE", "data.size=26"], "data.size: 26 is not a multiple of 4, the factor of"),
        (
            ["--model", "COARSE", "data.size=8", "data.source=IMAGES"],
            "data.size: sides of 8 px are less than SSIM's window of 11",
        ),
        (["--model", "COARSE", "data.buckets={step: 6, smallest: 12}"], "data.buckets.step: 6 is not a multiple of 4"),
        (["--model", "COARSE", "--count", "0"], "--count: 0"),
        (["--model", "COARSE", "--worst", "0"], "--worst: 0"),
        (["--model", "COARSE", "--split", "test"], "invalid choice: 'test'"),
        (["--model", "COARSE", "--lpips-net", "resnet"], "invalid choice: 'resnet'"),
        (["--model", "COARSE", "--out", "/dev/null/out"], "--out: can't write to /dev/null/out"),
        (["--model", "COARSE", "data.source=openmoji-dmeo"], "did you mean 'openmoji-demo'"),
        ([], "--model"),
    ],
)
def test_a_mistake_is_one_line(
    report: Report, shared: Path, three_shapes: Callable[[list[str]], Path], arguments: list[str], message: str
) -> None:
    coarse, images = str(shared / "coarse"), str(three_shapes(["cat", "dog", "heart"]))
    status, _, stderr = report(*[word.replace("COARSE", coarse).replace("IMAGES", images) for word in arguments])
    stderr = stderr.rpartition("\r")[2]  # after the progress bar of checking images
    assert status == 2
    assert message in stderr
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1, stderr


def test_a_missing_split_is_named(shared: Path, root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(folder / "a.png")
    (folder / "a.txt").write_text("black")
    settings = loader.load(root / "configs/tiny.yaml", [f"data.source={folder}", f"data.cache_dir={tmp_path}"])
    with pytest.raises(UserError, match="--split: no image in combination; the data has train"):
        suitability.choose_images(settings, ["combination"], 5)


@pytest.mark.slow
def test_the_script_runs_as_a_file(
    launch: Callable[..., ScriptProcess], finish: Callable[[ScriptProcess], str]
) -> None:
    assert "--lpips-net" in finish(launch("stage1_vae/suitability.py", "--help"))


def test_a_tilde_in_the_path_of_a_model_expands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    models = suitability._parse(["--config", "a.yaml", "--model", "~/run/autoencoder", "--model", "stabilityai/sd-vae"])
    assert models.model == [f"{tmp_path}/run/autoencoder", "stabilityai/sd-vae"]
