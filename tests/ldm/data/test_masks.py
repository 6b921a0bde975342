"""Masks of the loss: they follow their images through rotation, crops, flips and the cache; bad ones are named."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from of_config import indexed, spec_of
from PIL import ExifTags, Image
from pydantic import ValidationError

from ldm.config import loader
from ldm.config.schema import Config, SourceConfig, Stage1Config
from ldm.data import check, index_file
from ldm.data.cache import CacheOptions
from ldm.data.dataset import Stage2Dataset, stage2_dataset
from ldm.data.index import Index
from ldm.data.index_file import MASK_COLUMNS
from ldm.data.index_report import stop_reason, write_report
from ldm.data.sources import Sources
from ldm.models.autoencoder import Autoencoder, build
from ldm.utils.errors import UserError

SIZES = [(20, 20), (36, 14), (18, 33)]


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    """A small one, of random weights; its latents have half the side of the images."""
    stage = Stage1Config(channels=(8, 8), layers=1, latent_channels=2, norm_num_groups=8, mid_attention=False)
    return Autoencoder(build(stage, 16))


def noise(name: str, size: tuple[int, int]) -> Image.Image:
    """A grey image of noise, seeded by `name`."""
    rng = np.random.default_rng([*name.encode()])
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0]), np.uint8))


def write(path: Path, image: Image.Image, orientation: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image.save(path, exif=exif.tobytes() if orientation > 1 else b"")


def settings(root: Path, source: dict[str, str], run: Path, *overrides: str) -> Config:
    return loader.load(
        root / "configs/tiny.yaml",
        [
            f"run.dir={run}",
            f"data.source={json.dumps(source)}",
            "data.size=16",
            "stage1.channels=[8, 8]",
            "data.buckets={step: 4}",
            "data.min_side=1",
            "stage2.conditions=[]",
            "stage2.pooled_text=false",
            "stage2.batch=4",
            *overrides,
        ],
    )


def samples_of(config: Config, autoencoder: Autoencoder, index: Index | None = None) -> Stage2Dataset:
    options, device = CacheOptions.of(config.data, config.cache_dir), torch.device("cpu")
    return stage2_dataset(
        index or indexed(config), spec_of(config), options, autoencoder, None, device, with_pixels=True, with_masks=True
    )


def masks_of(samples: Stage2Dataset) -> dict[int, torch.Tensor]:
    """The mask of each image, by its number."""
    plan = samples.dataset.plan  # type: ignore[attr-defined]
    return {plan.order[n]: samples.dataset[n]["mask"] for n in range(36)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Nine grey images of three sizes, some rotated by their EXIF; all but one have themselves as their mask.

    The mask of the first rotated one is as it is shown; that of the second is as it is stored.
    """
    for i in range(9):
        image = noise(str(i), SIZES[i % 3])
        orientation = {1: 6, 4: 8}.get(i, 1)
        write(tmp_path / f"images/{'sub/' * (i % 2)}{i}.png", image, orientation)
        if i == 1:
            image = image.transpose(Image.Transpose.ROTATE_270)
        if i < 8:
            write(tmp_path / f"masks/{'sub/' * (i % 2)}{i}.{'webp' if i == 5 else 'png'}", image.convert("RGB"))
    (tmp_path / "masks/sub/5.webp").unlink()
    noise("5", SIZES[2]).save(tmp_path / "masks/sub/5.webp", lossless=True)
    return tmp_path


@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("store", ["disk", "none"])
def test_a_mask_that_equals_its_image_equals_every_crop_of_it(
    root: Path, folder: Path, autoencoder: Autoencoder, crop: str, store: str
) -> None:
    source = {"path": f"{folder}/images", "mask": f"{folder}/masks"}
    keys = (f"data.crop={crop}", "data.crops=2", "data.flip=true", f"data.cache={store}")
    config = settings(root, source, folder / "run", *keys)
    index = indexed(config)
    assert [entry.mask_sha256 is None for entry in index] == [entry.key == "8.png" for entry in index]
    dataset = samples_of(config, autoencoder, index).dataset
    items = [dataset[n] for n in range(36)]
    for item in items:
        expected = F.avg_pool2d(item["pixels"][:1] / 2 + 0.5, 2) if item["masked"] else torch.ones(1)
        torch.testing.assert_close(item["mask"], expected.expand_as(item["mask"]), atol=1e-5, rtol=0)
        assert item["mask"].shape[1:] == torch.Size(side // 2 for side in item["pixels"].shape[1:])
    assert {bool(item["masked"]) for item in items} == {True, False}
    assert len({item["mask"].shape for item in items}) > 1  # buckets


def test_masks_are_the_same_with_and_without_a_cache(root: Path, folder: Path, autoencoder: Autoencoder) -> None:
    source = {"path": f"{folder}/images", "mask": f"{folder}/masks"}
    configs = [settings(root, source, folder / "run", "data.flip=true", f"data.cache={c}") for c in ("disk", "none")]
    cached, encoded = (samples_of(config, autoencoder).dataset for config in configs)
    for n in range(18):
        assert torch.equal(cached[n]["mask"], encoded[n]["mask"])


def test_a_changed_mask_is_never_used_stale_and_keeps_the_latents(
    root: Path, folder: Path, autoencoder: Autoencoder
) -> None:
    config = settings(root, {"path": f"{folder}/images", "mask": f"{folder}/masks"}, folder / "run")
    plain = settings(root, {"path": f"{folder}/images"}, folder / "run")
    without = samples_of(plain, autoencoder).dataset[0]
    assert not {"mask", "masked"} & without.keys()
    latents = sorted((config.cache_dir / "latents").rglob("*.safetensors"))
    assert not (config.cache_dir / "masks").exists()
    index = indexed(config)
    before = masks_of(samples_of(config, autoencoder, index))
    number = next(i for i, entry in enumerate(index) if entry.key == "0.png")
    write(folder / "masks/0.png", Image.new("L", SIZES[0], 100))
    with pytest.raises(UserError, match=r"^0\.png: its mask was changed since it was indexed"):
        index.load_mask(number)
    changed = indexed(config)
    assert changed.fingerprint() != index.fingerprint() != indexed(plain).fingerprint()
    after = masks_of(samples_of(config, autoencoder, changed))
    assert [i for i in after if not torch.equal(before[i], after[i])] == [number] and len(after) == 9
    assert torch.allclose(after[number], torch.tensor(100 / 255))
    assert sorted((config.cache_dir / "latents").rglob("*.safetensors")) == latents


def test_an_index_from_before_there_were_masks_is_used(
    root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(root, {"path": f"{folder}/images"}, folder / "run")
    fingerprint = indexed(config).fingerprint()
    (path,) = config.cache_dir.glob("index-*.arrow")
    table = pa.ipc.open_stream(path.read_bytes()).read_all().drop_columns([*MASK_COLUMNS, "mask_sha256"])
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    monkeypatch.setattr(index_file, "_read_image", lambda *_: pytest.fail("an image was opened"))
    assert indexed(config).fingerprint() == fingerprint
    assert list(config.cache_dir.glob("index-*.arrow")) == [path]


def test_bad_masks_are_named_and_what_is_left_out_is_counted(root: Path, tmp_path: Path) -> None:
    images, masks = tmp_path / "images", tmp_path / "images/masks"  # inside the source: not read as images
    for name in ("good", "small", "ones", "black", "cut", "twice", "none"):
        write(images / f"{name}.png", noise(name, (20, 16)).convert("RGB"))
    write(masks / "good.png", Image.new("RGB", (20, 16), "red"))  # the brightest channel counts
    write(masks / "small.png", Image.new("L", (10, 16), 255))
    write(masks / "ones.png", Image.fromarray(np.eye(16, 20, dtype=np.uint8)))
    write(masks / "black.png", Image.new("L", (20, 16)))
    (masks / "cut.png").write_bytes((images / "cut.png").read_bytes()[:300])
    for suffix in ("webp", "bmp"):
        write(masks / f"twice.{suffix}", Image.new("L", (20, 16), 255))
    write(masks / "stray.png", Image.new("L", (20, 16), 255))
    (masks / "notes.md").write_text("x")
    config = settings(root, {"path": str(images), "mask": str(masks)}, tmp_path / "run", "data.max_bad=0.9")
    index = indexed(config)
    assert {entry.key: index.load_mask(i) and index.load_mask(i).getextrema() for i, entry in enumerate(index)} == {  # type: ignore[union-attr]
        "good.png": (255, 255),
        "none.png": None,
    }
    bad = {sample.key: str(sample).partition(": ")[2] for sample in index.bad_samples()}
    assert bad.pop("cut.png").startswith("its mask can't be used: its pixels can't be decoded (")
    assert bad == {
        "small.png": "its mask is 10 × 16 px and the image 20 × 16 px; bring both to the same size",
        "ones.png": "the values of its mask are 0 and 1 of 255, all black; multiply them by 255",
        "black.png": "its mask is black, so nothing of it is learned; paint what to learn, or remove it",
        "twice.png": "it has several masks: twice.bmp, twice.webp; keep one of them",
    }
    assert check.balance(index).splitlines()[0] == (
        "masks      1 images have one; 1 have none and are learned whole: none.png"
    )
    assert dict(index.sources.left_out().counts) == {
        "folders of masks": 1,
        "masks without an image": 1,
        "other files in the folder of masks": 1,
    }
    assert stop_reason(index, tmp_path / "report") == ""
    write_report(index, tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["masks"] == {"images": 1, "without": ["none.png"]}


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ("alpha", "has an alpha channel; save them as PNG with one, or leave out the key"),
        ("{}/empty", "has a mask in {}/empty; the one of a/b.jpg is {}/empty/a/b.png, or leave out the key"),
    ],
)
def test_masks_of_no_image_at_all_stop_the_run(root: Path, tmp_path: Path, mask: str, expected: str) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "images/a.png", noise("a", (20, 16)).convert("RGB"))
    config = settings(root, {"path": f"{tmp_path}/images", "mask": mask.format(tmp_path)}, tmp_path / "run")
    expected = expected.format(tmp_path, tmp_path)
    reason = stop_reason(indexed(config), tmp_path / "report")
    assert reason == f"data.source.mask: no image of {tmp_path}/images {expected}"


# ----------------------------------------------------------------------------------------------------- kinds of sources

MASK, SHAPE = np.array([[255, 0], [128, 64]], np.uint8).repeat(10, 0).repeat(10, 1), (20, 20)


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def picture(name: str) -> bytes:
    return encoded(noise(name, SHAPE).convert("RGB"))


def with_alpha(name: str) -> bytes:
    image = noise(name, SHAPE).convert("RGBA")
    image.putalpha(Image.fromarray(MASK))
    return encoded(image)


FILES = {"a.png": picture("a"), "b.png": picture("b"), "m/x.png": encoded(Image.fromarray(MASK))}


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def metadata(folder: Path) -> tuple[str, str]:
    rows = '{"file_name": "a.png", "cut": "m/x.png"}\n{"file_name": "b.png", "cut": null}\n'
    write_files(folder, {**FILES, "metadata.jsonl": rows.encode()})
    return str(folder), "cut"


def parquet(folder: Path) -> tuple[str, str]:
    columns = {"image": [FILES["a.png"], FILES["b.png"]], "cut": [FILES["m/x.png"], None]}
    pq.write_table(pa.table(columns), folder / "set.parquet")
    return str(folder / "set.parquet"), "cut"


def tar(folder: Path) -> tuple[str, str]:
    with tarfile.open(folder / "set.tar", "w") as opened:
        for name, content in (("a.png", "a.png"), ("a.cut.png", "m/x.png"), ("b.png", "b.png")):
            header = tarfile.TarInfo(name)
            header.size = len(FILES[content])
            opened.addfile(header, io.BytesIO(FILES[content]))
    return str(folder / "set.tar"), "cut"


def alpha(folder: Path) -> tuple[str, str]:
    write_files(folder, {"a.png": with_alpha("a"), "b.png": picture("b")})
    return str(folder), "alpha"


def kohya(key: str) -> Callable[[Path], tuple[str, str]]:
    def write_set(folder: Path) -> tuple[str, str]:
        first = with_alpha("a") if key.startswith("alpha") else FILES["a.png"]
        write_files(folder, {"i/a.png": first, "i/b.png": FILES["b.png"], "m/A.png": FILES["m/x.png"]})
        toml = f"[[datasets]]\nresolution = 16\n[[datasets.subsets]]\nimage_dir = 'i'\nclass_tokens = 'x'\n{key}\n"
        (folder / "set.toml").write_text(toml)
        return str(folder / "set.toml"), ""

    return write_set


@pytest.mark.parametrize(
    "write_source",
    [metadata, parquet, tar, alpha, kohya("alpha_mask = true"), kohya("conditioning_data_dir = 'm'")],
    ids=["metadata", "parquet", "tar", "alpha", "kohya's alpha_mask", "kohya's conditioning_data_dir"],
)
def test_every_kind_of_source_has_masks(
    root: Path, tmp_path: Path, write_source: Callable[[Path], tuple[str, str]]
) -> None:
    (tmp_path / "set").mkdir()
    path, mask = write_source(tmp_path / "set")
    index = indexed(settings(root, {"path": path, **({"mask": mask} if mask else {})}, tmp_path / "run"))
    first, second = (index.load_mask(i) for i in range(2))
    assert first is not None and second is None and len(index) == 2
    assert np.array_equal(np.asarray(first), MASK)
    assert index.table.masks_by_source() == {0: (1, 1)} and list(index.table.without_masks()) == [index[1].key]
    assert not index.sources.left_out().counts.keys() - {"folders of masks"}
    assert stop_reason(index, tmp_path / "report") == ""


def test_a_column_is_meant_whatever_folders_the_working_directory_has(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "set").mkdir()
    path, _ = metadata(tmp_path / "set")
    write_files(tmp_path, {"cut/b.png": FILES["m/x.png"]})
    monkeypatch.chdir(tmp_path)
    for mask, masked, origin in (("cut", "a.png", "the column cut"), ("./cut", "b.png", "the folder ./cut")):
        index = indexed(settings(root, {"path": path, "mask": mask}, tmp_path / "run"))
        assert list(index.table.without_masks()) == [{"a.png": "b.png", "b.png": "a.png"}[masked]]
        assert f"masks    from {origin}" in index.sources.describe()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"mask": "m"}, "data.source.mask: no folder m; give {0}/m"),
        ({"mask": "{0}"}, "data.source.mask: {0} holds the images too; put the masks into a folder of their own"),
        ({"path": "{0}/set.toml", "mask": "alpha"}, "write alpha_mask = true, or a conditioning_data_dir, into"),
    ],
)
def test_a_mask_that_has_no_meaning_is_refused(tmp_path: Path, source: dict[str, str], message: str) -> None:
    write_files(tmp_path, FILES)
    values = {"path": str(tmp_path), **{key: value.format(tmp_path) for key, value in source.items()}}
    with pytest.raises(UserError) as caught:
        Sources([SourceConfig(**values)], 16, tmp_path / "cache", ())  # type: ignore[arg-type]
    assert message.format(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["stage2.unmasked_weight=0.1"], "stage2.unmasked_weight: no source has masks"),
        (["data.source={path: a.tar, mask: alpha}", "data.streaming=true", "data.cache=none"], "a stream's masks"),
    ],
)
def test_keys_that_need_each_other(root: Path, tmp_path: Path, keys: list[str], message: str) -> None:
    with pytest.raises((UserError, ValidationError), match=message):
        loader.load(root / "configs/tiny.yaml", [f"run.dir={tmp_path}/run", *keys])
