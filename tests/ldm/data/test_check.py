"""The data check: its facts, its report, and when it says that training would stop."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from of_config import indexed
from PIL import Image
from tiny import WORDS

from ldm.config import loader
from ldm.config.schema import BucketConfig
from ldm.data import check
from ldm.data.buckets import Buckets
from ldm.data.check import near_duplicates
from ldm.data.crops import crop_resize
from ldm.models import text_encoder
from scripts import check_data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten images: seven of noise, an exact copy, a JPEG copy and a small one. One caption is too long."""
    rng, folder = np.random.default_rng(0), tmp_path / "images"
    folder.mkdir()
    for i in range(7):
        noise = Image.fromarray(rng.integers(0, 255, (6, 6, 3), np.uint8))
        noise.resize((90, 60) if i % 2 else (60, 60), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"image {i}")
    (folder / "copy.png").write_bytes((folder / "1.png").read_bytes())
    Image.open(folder / "2.png").save(folder / "alike.jpg", quality=80)
    Image.new("RGB", (12, 20), "red").save(folder / "small.png")
    for name in ("copy", "alike", "small"):
        (folder / f"{name}.txt").write_text("the same")
    (folder / "0.txt").write_text("word " * 30)
    return folder


def arguments(root: Path, folder: Path, *more: str) -> list[str]:
    return [
        "--config",
        str(root / "configs/tiny.yaml"),
        f"text.model=${WORDS}",
        f"data.source={folder}",
        f"run.dir={folder.parent / 'run'}",
        "data.buckets={step: 8}",
        *more,
    ]


@pytest.fixture
def compute_facts(root: Path, folder: Path) -> Callable[[], dict[str, object]]:
    def compute() -> dict[str, object]:
        config = loader.load(arguments(root, folder)[1], arguments(root, folder)[2:])
        return check.facts(indexed(config), text_encoder.load(config.text.model, 16), config.text.model)

    return compute


def test_the_facts_count_images_duplicates_and_truncated_captions(
    compute_facts: Callable[[], dict[str, object]],
) -> None:
    facts = compute_facts()
    assert (facts["images"], facts["bad"], facts["upscaled"]) == (10, 0, 1)
    assert facts["duplicates"]["exact"] == 1  # type: ignore[index]
    assert facts["duplicates"]["near"] == 2  # type: ignore[index]
    assert {tuple(pair) for pair in facts["duplicates"]["pairs"]} == {  # type: ignore[index]
        ("copies", "1.png", "copy.png"),
        ("alike", "2.png", "alike.jpg"),
    }
    captions = facts["captions"]
    assert (captions["distinct"], captions["truncated"], captions["lost"]) == (8, 1, 30 + 2 - 16)  # type: ignore[index]
    assert sum(count for _, count in facts["buckets"]) == 10  # type: ignore[attr-defined]


def test_facts_are_cached_until_an_image_changes(compute_facts: Callable[[], dict[str, object]], folder: Path) -> None:
    first = json.loads(json.dumps(compute_facts()))
    (stored,) = (folder.parent / "run/cache").glob("check-*.json")
    before = stored.stat().st_mtime_ns
    assert json.loads(json.dumps(compute_facts())) == first
    assert stored.stat().st_mtime_ns == before
    (folder / "copy.png").unlink()
    assert compute_facts()["images"] == 9


def test_the_check_ends_with_status_1_where_training_would_stop(
    root: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "broken.png").write_bytes(b"\x89PNG")
    (folder / "broken.txt").write_text("broken")
    run = folder.parent / "run"
    assert check_data.main(arguments(root, folder)) == 1  # one of eleven is more than 5 %
    out = capsys.readouterr().out
    assert "broken.png: it is none of JPEG" in out
    assert "training would stop: 1 of 11 images are bad, and data.max_bad is 0.05" in out
    assert [bad["key"] for bad in json.loads((run / "data-report.json").read_text())["list"]] == ["broken.png"]
    assert check_data.main(arguments(root, folder, "data.max_bad=0.1")) == 0
    assert "training can begin" in capsys.readouterr().out
    assert check_data.main(arguments(root, folder, "data.max_bad=0.1", "data.on_error=stop")) == 1
    assert Image.open(run / "data-sheet.png").width > 800
    assert not (run / "config.yaml").exists()  # a check starts no run


def test_images_without_captions_are_checked_without_caption_statistics(
    root: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for caption in folder.glob("*.txt"):
        caption.unlink()
    assert check_data.main(arguments(root, folder)) == 2
    assert "put a metadata.jsonl there, or a .txt beside each image" in capsys.readouterr().err
    assert check_data.main(arguments(root, folder, "stage2.conditions=[]", "stage2.pooled_text=false")) == 0
    out = capsys.readouterr().out
    assert f"{folder}: a folder of images\n" in out
    assert "images     10 good, 0 bad" in out
    assert "duplicates 1 are exact copies" in out
    assert "\ncaptions " not in out
    assert Image.open(folder.parent / "run/data-sheet.png").width > 800


def test_classes_are_reported_with_their_image_counts(
    root: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"file_name": f"{i}.png", "label": int(i > 0)} for i in range(7)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert check_data.main(arguments(root, folder, "stage2.conditions=[class]", "stage2.pooled_text=false")) == 0
    assert "classes    2 of 1 1 4 6 6 images (percentiles)\n" in capsys.readouterr().out
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png"}')
    assert check_data.main(arguments(root, folder, "stage2.conditions=[class]", "stage2.pooled_text=false")) == 1
    out = capsys.readouterr().out
    assert "bad        0.png: it has no class; write it into the column 'label', or put it in a class folder" in out


@pytest.mark.parametrize("status", [0, 1])
def test_the_check_ends_with_a_balance_of_good_bad_and_left_out_files(
    status: int, root: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "broken.png").write_bytes(b"")
    (folder / "broken.txt").write_text("broken")
    for name in ("._0.png", ".DS_Store", "lost.txt", "captions.json", "Thumbs.db"):
        (folder / name).write_bytes(b"")
    assert check_data.main(arguments(root, folder, f"data.max_bad={1 - status}")) == status
    lines = capsys.readouterr().out.splitlines()
    balance = lines.index("balance    10 good, 1 bad, 5 left out = 16 seen")
    assert balance == len(lines) - 2  # the last says whether training can begin
    assert sorted(line for line in lines if line.startswith("left out")) == [
        "left out   1 caption files without an image: lost.txt",
        "left out   1 other files: Thumbs.db",
        "left out   1 tables that are not read: captions.json",
        "left out   2 hidden files: .DS_Store, ._0.png",
    ]
    report = json.loads((folder.parent / "run/data-report.json").read_text())
    assert (report["images"], report["bad"], sum(report["left_out"].values())) == (10, 1, 5)
    files = [path for path in folder.iterdir() if path.suffix != ".txt" or path.name == "lost.txt"]
    assert len(files) == 16  # a caption file is counted with its image


@pytest.mark.parametrize("bits", [0, 1, 2, 3])
def test_near_duplicates_equal_those_of_a_comparison_of_every_pair(bits: int) -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 400, np.uint64)
    for i in range(0, 100, 2):  # pairs that differ in 0, 2 or 4 bits
        flips = np.bitwise_or.reduce(
            np.uint64(1) << rng.permutation(64)[: i % 6].astype(np.uint64), initial=np.uint64(0)
        )
        hashes[i + 1] = hashes[i] ^ flips
    distances = np.bitwise_count(hashes[:, None] ^ hashes[None, :])
    expected = [(a, b) for a, b in np.argwhere(distances <= bits) if a < b]
    assert near_duplicates(hashes, bits).tolist() == [list(pair) for pair in expected]
    assert len(expected) >= 8


def test_buckets_have_nearly_equal_areas_and_every_image_gets_the_nearest_shape() -> None:
    buckets = Buckets(512, BucketConfig(step=64))
    assert (512, 512) in buckets.sizes
    for width, height in buckets.sizes:
        assert width % 64 == height % 64 == 0
        assert min(width, height) >= 256
        assert max(width, height) <= 1024
        assert 0.75 * 512**2 < width * height <= 512**2
    assert buckets.of(3000, 3000) == (512, 512)
    assert buckets.of(4000, 3000) == (576, 448)
    assert buckets.of(100, 5000) == (256, 1024)
    assert Buckets(64).of(4000, 3000) == (64, 64)


def test_without_upscaling_a_small_image_gets_a_small_bucket() -> None:
    buckets = Buckets(512, BucketConfig(step=64, upscale=False))
    assert buckets.of(300, 200) == (256, 192)
    assert buckets.of(4000, 3000) == (576, 448)


def test_a_crop_keeps_the_full_shorter_side() -> None:
    image = Image.effect_noise((90, 60), 80)
    cropped, (left, top) = crop_resize(image, (30, 30))
    assert (cropped.size, left, top) == ((30, 30), 8, 0)
    left_crop, offset = crop_resize(image, (30, 30), u=0.0)
    assert offset == (0, 0)
    expected = image.crop((0, 0, 60, 60)).resize((30, 30), Image.Resampling.LANCZOS)
    inner = (slice(None), slice(0, 26))  # near the edge of the crop, the filter also reads pixels beyond it
    assert (np.asarray(left_crop)[inner] == np.asarray(expected)[inner]).all()


def test_a_run_folder_that_cannot_be_written_is_one_line(
    root: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert check_data.main(arguments(root, folder, f"run.dir={tmp_path / 'file/run'}")) == 2
    assert capsys.readouterr().err.startswith(f"error: run.dir: can't write {tmp_path / 'file/run'}: ")
