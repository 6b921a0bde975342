"""The planner's formulas, against numbers computed by hand, published ones, and the files that the project writes."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import plan_at_scale
import pytest
import scale_figures
from of_config import cached
from PIL import Image

from ldm.config import loader
from ldm.data import index
from ldm.data.index import Index
from ldm.models import autoencoder, text_encoder
from ldm.models.autoencoder import Autoencoder
from ldm.training.checkpoint import checkpoints

TINY = ("--config", "configs/tiny.yaml", "--images", "1e3", "--gpus", "2")
RATES = {
    "images-per-second-per-gpu": 50.0,
    "encoded-per-second-per-gpu": 200.0,
    "indexed-per-second-per-core": 25.0,
    "decoded-per-second-per-core": 20.0,
    "cores-per-gpu": 4.0,
    "gpus-per-machine": 8.0,
    "image-kilobytes": 100.0,
    "caption-bytes": 60.0,
    "write-gigabytes-per-second": 2.0,
    "dollars-per-gpu-hour": 3.0,
}


def sd512(root: Path, *overrides: str) -> loader.Config:
    return loader.load(root / "configs/sd-512.yaml", ["stage2.batch=2048", *overrides])


def test_hours_and_price_are_images_over_rates() -> None:
    row = plan_at_scale.time_row(images=720_000, gpus=2, epochs=3, rates=RATES)
    assert row["indexing_hours"] == pytest.approx(1)  # 360,000 images a GPU at 100/s
    assert row["encoding_the_cache_hours"] == pytest.approx(0.5)  # at 200/s
    assert row["training_from_the_cache_hours"] == pytest.approx(6)  # three times, at 50/s
    assert row["training_without_hours"] == pytest.approx(7.5)  # 20 ms and 5 ms: at 40/s
    assert row["price_with_the_cache_dollars"] == pytest.approx(7.5 * 6)
    assert row["price_without_dollars"] == pytest.approx(8.5 * 6)


def test_bandwidth_is_the_rate_times_the_bytes_of_an_image(root: Path) -> None:
    row = plan_at_scale.reading_row(sd512(root), 64, RATES)
    assert row["cache_in_all_bytes_per_second"] == 64 * 50 * (2 * 4 * 64 * 64 + 77 * 768) * 2
    assert row["cache_a_machine_bytes_per_second"] == row["cache_in_all_bytes_per_second"] / 8
    assert row["images_in_all_bytes_per_second"] == pytest.approx(64 * 40 * 100e3)
    assert row["decoding_cores_a_gpu"] == pytest.approx(2)


def test_a_single_machine_reads_all_of_it(root: Path) -> None:
    row = plan_at_scale.reading_row(sd512(root), 2, RATES)
    assert row["images_a_machine_bytes_per_second"] == row["images_in_all_bytes_per_second"]


def test_crops_and_mirrored_images_multiply_the_latents(root: Path) -> None:
    config = sd512(root, "data.flip=true", "data.crop=random", "data.crops=4")
    plain, row = (plan_at_scale.data_row(c, 8192, 2, RATES) for c in (sd512(root), config))
    assert row["latents_bytes"] - 8192 * 32 == 8 * (plain["latents_bytes"] - 8192 * 32)
    assert row["text_embeddings_bytes"] == plain["text_embeddings_bytes"]
    assert (plain["files_of_the_cache"], row["files_of_the_cache"]) == (2 + 2, 16 + 2)
    assert row["steps"] == 8


def test_a_trained_text_encoder_has_no_cached_embeddings(root: Path) -> None:
    row = plan_at_scale.data_row(sd512(root, "text.train=true"), 8192, 1, RATES)
    assert (row["text_embeddings_bytes"], row["files_of_the_cache"]) == (0, 2)


def test_published_rates_at_another_size_are_nearly_met(root: Path) -> None:
    trained = scale_figures.published_rate(sd512(root, "data.size=256"))
    assert trained == pytest.approx(8530 / 64, rel=0.11)  # MosaicML's at 256 px; attention's share is larger at 512
    files = scale_figures.RATES["image-kilobytes"][0]
    assert callable(files)
    assert files(sd512(root, "data.size=1024")) == pytest.approx(50e12 / 170e6 / 1e3, rel=0.01)


@pytest.mark.parametrize("overrides", [(), ("data.flip=true", "data.cache_dtype=float16")])
def test_the_files_of_a_cache_have_the_counted_bytes(
    drawings: Callable[..., tuple[loader.Config, Index]], words: Path, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    keys = (f"text.model={words}", "text.width=null", "stage1.channels=[8, 16]")
    config, images = drawings("data.source.limit=128", f"data.cache_dir={tmp_path / 'cache'}", *keys, *overrides)
    vae = Autoencoder(autoencoder.build(config.stage1, config.data.size))
    cached(images, config, vae, text_encoder.of(config.text))
    captions = {caption for of_entry in images.captions() for caption in of_entry}
    distinct = set(images.column("sha256").tolist())
    expected = {
        "latents": len(distinct) * (scale_figures.latent_bytes(config) * scale_figures.variants(config) + 32),
        "text": len(captions) * (scale_figures.text_bytes(config) + 32),
    }
    for name, counted in expected.items():
        written = sum(file.stat().st_size for file in (tmp_path / "cache" / name).rglob("*.safetensors"))
        assert written == pytest.approx(counted, rel=0.01), name


def test_the_file_of_an_index_has_the_counted_bytes(
    root: Path, tmp_path: Path, write_tar: Callable[[Path, dict[str, bytes]], None]
) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "image.png")
    image, files, count = (tmp_path / "image.png").read_bytes(), dict[str, bytes](), 2 * scale_figures.CHUNK
    for i in range(count):
        files |= {f"{i:06}.png": image, f"{i:06}.txt": f"a caption that is number {i:06}".encode()}
    write_tar(tmp_path / "0.tar", files)
    keys = [f"data.source={tmp_path / '0.tar'}", "data.size=16", f"data.cache_dir={tmp_path / 'cache'}"]
    config = loader.load(root / "configs/tiny.yaml", keys)
    rows = index.build(config.data, config.cache_dir, config.stage2.conditions)
    (written,) = (tmp_path / "cache").glob("index-*.arrow")
    key, file = len(rows[0].key), len(str(tmp_path / "0.tar"))
    counted = count * scale_figures.index_row_bytes(len("a caption that is number 000000"), key, file)
    assert written.stat().st_size == pytest.approx(counted, rel=0.01)


def test_zero2_keeps_8_bytes_a_parameter_and_divides_16(root: Path) -> None:
    config = loader.load(root / "configs/tiny.yaml", ["stage2.optimizer=adamw"])
    row = plan_at_scale.memory_row(config, 8, RATES)
    parameters = row["checkpoint_bytes"] / 16  # weights, an average, two moments
    assert row["ddp_bytes"] - row["zero2_bytes"] == pytest.approx(parameters * (20 - 8 - 16 / 8), rel=0.01)
    assert row["fsdp_bytes"] < row["ddp_bytes"]
    assert row["writing_it_hours"] == row["checkpoint_bytes"] / 2e9 / 3600


def test_what_cannot_be_sharded_has_no_memory(root: Path) -> None:
    config = loader.load(root / "configs/tiny.yaml", ["stage2.optimizer=muon"])
    assert plan_at_scale.memory_row(config, 2, RATES)["fsdp_bytes"] is None
    row = plan_at_scale.memory_row(loader.load(root / "configs/tiny.yaml", []), 1, RATES)
    assert row["zero2_bytes"] is row["fsdp_bytes"] is None


def test_a_checkpoint_has_the_counted_bytes(tiny_run: Path) -> None:
    config = loader.load(tiny_run / "config.yaml", [])
    files = checkpoints(tiny_run / "stage2")[-1].glob("*.safetensors")
    counted = plan_at_scale.memory_row(config, 1, RATES)["checkpoint_bytes"]
    assert sum(file.stat().st_size for file in files) == pytest.approx(counted, rel=0.05)


def test_json_has_the_rates_with_their_sources(call: Callable[..., str], root: Path) -> None:
    config = ("--config", root / "configs/tiny.yaml", *TINY[2:])
    result = json.loads(call(plan_at_scale.main, *config, "--json", "--images-per-second-per-gpu", 85))
    rates = {rate["rate"]: (rate["value"], rate["source"]) for rate in result["rates"]}
    assert rates["images-per-second-per-gpu"] == (85, "the command line")
    assert {source.partition(":")[0] for _, source in rates.values()} == {
        "the command line",
        "published",
        "measured",
        "assumed",
    }
    (row,) = result["time"]
    assert row["training_from_the_cache_hours"] == pytest.approx(1000 / 2 / 85 / 3600)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--images", "0"), "--images: '0'; give a positive number"),
        (("--images", "many"), "--images: 'many'; give a positive number"),
        (("--gpus", "2.5"), "--gpus: '2.5'; give whole numbers"),
        (("--gpus", "7"), "stage2.batch: "),
        (("--size", "0"), "data.size: "),
        (("--epochs", "nan"), "--epochs: 'nan'; give a positive number"),
        (("--dollars-per-gpu-hour", "-1"), "--dollars-per-gpu-hour"),
        (("text.max_tokens=null", "text.model=NONE", "text.width=16"), "text.max_tokens: not set"),
    ],
)
def test_a_mistake_is_one_line(call: Callable[..., str], root: Path, options: tuple[str, ...], message: str) -> None:
    config = ("--config", root / "configs/tiny.yaml", *TINY[2:])
    output = call(plan_at_scale.main, *config, *options, status=2)
    assert message in output and output.startswith("error: ") and output.count("\n") == 1


@pytest.mark.slow
@pytest.mark.drill
def test_the_commands_of_the_guide_print_its_tables(
    call: Callable[..., str], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    page = (root / "docs/guides/at-scale.md").read_text("utf-8")
    blocks = re.findall(r"^```\n(python scripts/plan_at_scale\.py .*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    assert blocks
    printed = [call(plan_at_scale.main, *shlex.split(block.replace("\\\n", " "))[2:]) for block in blocks]
    for table in printed[0].strip().split("\n\n"):
        assert table in page
