"""What the data check finds, and when it says that training would stop."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from of_config import indexed
from PIL import Image

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
    """Ten pictures: one twice, one once more at another quality, one small, one with a caption that is too long."""
    rng, folder = np.random.default_rng(0), tmp_path / "pictures"
    folder.mkdir()
    for i in range(7):
        noise = Image.fromarray(rng.integers(0, 255, (6, 6, 3), np.uint8))
        noise.resize((90, 60) if i % 2 else (60, 60), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}")
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
        f"data.source={folder}",
        f"run.dir={folder.parent / 'run'}",
        "data.buckets={step: 8}",
        *more,
    ]


@pytest.fixture
def checked(root: Path, folder: Path) -> Callable[[], dict[str, object]]:
    def facts() -> dict[str, object]:
        given = loader.load(arguments(root, folder)[1], arguments(root, folder)[2:])
        return check.facts(indexed(given), text_encoder.load(text_encoder.MINILM, 16), given.text.model)

    return facts


def test_the_facts_are_those_of_the_pictures(checked: Callable[[], dict[str, object]]) -> None:
    found = checked()
    assert (found["images"], found["bad"], found["upscaled"]) == (10, 0, 1)
    assert found["duplicates"]["exact"] == 1  # type: ignore[index]
    assert found["duplicates"]["near"] == 2  # type: ignore[index]
    assert {tuple(pair) for pair in found["duplicates"]["pairs"]} == {  # type: ignore[index]
        ("copies", "1.png", "copy.png"),
        ("alike", "2.png", "alike.jpg"),
    }
    captions = found["captions"]
    assert (captions["distinct"], captions["truncated"], captions["lost"]) == (8, 1, 30 + 2 - 16)  # type: ignore[index]
    assert sum(count for _, count in found["buckets"]) == 10  # type: ignore[attr-defined]


def test_facts_are_kept_until_something_changes(checked: Callable[[], dict[str, object]], folder: Path) -> None:
    first = json.loads(json.dumps(checked()))
    (kept,) = (folder.parent / "run/cache").glob("check-*.json")
    before = kept.stat().st_mtime_ns
    assert json.loads(json.dumps(checked())) == first
    assert kept.stat().st_mtime_ns == before
    (folder / "copy.png").unlink()
    assert checked()["images"] == 9


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
    assert not (run / "config.yaml").exists()  # a check begins no run


def test_pictures_without_captions_are_checked_without_figures_of_captions(
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


def test_classes_are_checked_with_how_many_pictures_they_have(
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
def test_the_check_ends_with_a_balance_of_all_that_was_seen(
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
def test_near_duplicates_are_those_that_every_pair_compared_would_find(bits: int) -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 400, np.uint64)
    for i in range(0, 100, 2):  # neighbours that differ in some bits
        flips = np.bitwise_or.reduce(
            np.uint64(1) << rng.permutation(64)[: i % 6].astype(np.uint64), initial=np.uint64(0)
        )
        hashes[i + 1] = hashes[i] ^ flips
    apart = np.bitwise_count(hashes[:, None] ^ hashes[None, :])
    expected = [(a, b) for a, b in np.argwhere(apart <= bits) if a < b]
    assert near_duplicates(hashes, bits).tolist() == [list(pair) for pair in expected]
    assert len(expected) >= 8


def test_buckets_have_about_one_area_and_every_picture_the_nearest_shape() -> None:
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


def test_without_upscaling_a_small_picture_gets_a_small_bucket() -> None:
    buckets = Buckets(512, BucketConfig(step=64, upscale=False))
    assert buckets.of(300, 200) == (256, 192)
    assert buckets.of(4000, 3000) == (576, 448)


def test_the_crop_keeps_the_shorter_side_whole() -> None:
    picture = Image.effect_noise((90, 60), 80)
    part, (left, top) = crop_resize(picture, (30, 30))
    assert (part.size, left, top) == ((30, 30), 8, 0)
    left_part, at = crop_resize(picture, (30, 30), u=0.0)
    assert at == (0, 0)
    expected = picture.crop((0, 0, 60, 60)).resize((30, 30), Image.Resampling.LANCZOS)
    inner = (slice(None), slice(0, 26))  # near the cut, the filter sees what lies beyond it
    assert (np.asarray(left_part)[inner] == np.asarray(expected)[inner]).all()
