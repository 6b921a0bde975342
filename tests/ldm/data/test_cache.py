"""Cached latents and text embeddings."""

import hashlib
import os
import pickle
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Forked
from of_config import cached, indexed, spec_of
from PIL import Image

from ldm.config import loader
from ldm.config.schema import Stage1Config
from ldm.data import cache, encoding_store, index_file
from ldm.data.cache import CacheOptions
from ldm.data.crops import Crop, crop_resize
from ldm.data.dataset import Stage2Dataset, stage2_dataset
from ldm.data.earlier_indices import EarlierIndices
from ldm.data.images import to_tensor
from ldm.models import autoencoder, text_encoder, text_encoder_files
from ldm.utils.errors import UserError

Start = Callable[..., Forked]
Finish = Callable[[Forked], str]


@pytest.fixture
def folder(three_shapes: Callable[[list[str]], Path]) -> Path:
    """Twenty-four images in three buckets; every caption belongs to two of them."""
    return three_shapes([f"image {i // 2}" for i in range(24)])


@pytest.fixture(scope="module")
def encoder() -> text_encoder.TextEncoder:
    return text_encoder.load(text_encoder_files.MINILM, 8)


def random_vae(seed: int = 0) -> autoencoder.Autoencoder:
    torch.manual_seed(seed)
    return autoencoder.Autoencoder(
        autoencoder.build(
            Stage1Config(channels=(16, 16), layers=1, latent_channels=2, norm_num_groups=8, mid_attention=False), 16
        )
    )


def settings(root: Path, folder: Path, *overrides: str) -> loader.Config:
    return loader.load(
        root / "configs/tiny.yaml",
        [
            f"run.dir={folder.parent / 'run'}",
            f"data.source={folder}",
            "data.size=16",
            "stage1.channels=[16, 16]",
            "data.buckets={step: 8}",
            "data.flip=true",
            "stage2.batch=4",
            *overrides,
        ],
    )


def dataset_of(config: loader.Config, vae: autoencoder.Autoencoder, encoder: text_encoder.TextEncoder) -> Stage2Dataset:
    options = CacheOptions.of(config.data, config.cache_dir)
    return stage2_dataset(indexed(config), spec_of(config), options, vae, encoder, torch.device("cpu"))


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a cache, by relative path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for kind in ("latents", "text")
        for path in sorted((folder / kind).rglob("*"))
        if path.is_file()
    }


def test_an_entry_equals_the_encoded_crop(root: Path, folder: Path, encoder: text_encoder.TextEncoder) -> None:
    config = settings(root, folder)
    index, vae = indexed(config), random_vae()
    store = cached(index, config, vae, encoder, per_file=5)
    captions = list(dict.fromkeys(caption for of_image in index.captions() for caption in of_image))
    files = (captions[i : i + 5] for i in range(0, len(captions), 5))  # bits depend on a batch
    states = dict(zip(captions, torch.cat([encoder.encode(file) for file in files]), strict=True))
    assert len(set(index.sizes)) == 3
    for i, (entry, size) in enumerate(zip(index, index.sizes, strict=True)):
        pixels = to_tensor(crop_resize(index.load_image(i), size)[0])
        for flip, expected in ((False, pixels), (True, pixels.flip(2))):
            mean, logvar = vae.moments(expected[None])
            latent = store.latent(Crop(size, flip=flip), entry.sha256)
            torch.testing.assert_close(latent[0], mean[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(latent[1], logvar[0], atol=1e-5, rtol=1e-5)
        assert torch.equal(store.embedding(entry.captions[0])["text"], states[entry.captions[0]])
    assert len(store.text.keys) == 12  # each distinct caption once


def test_every_random_crop_is_stored(root: Path, folder: Path, encoder: text_encoder.TextEncoder) -> None:
    config = settings(root, folder, "data.crop=random", "data.crops=3", "data.flip=false")
    index, vae = indexed(config), random_vae()
    store = cached(index, config, vae, encoder)
    entry, size = index[1], index.sizes[1]
    for crop in range(3):
        expected = vae.encode(Crop(size, crop).pixels(index.load_image(1), entry.sha256)[None])[0]
        torch.testing.assert_close(store.latent(Crop(size, crop), entry.sha256)[0], expected, atol=1e-5, rtol=1e-5)


def test_a_second_build_encodes_only_what_changed_and_says_why(
    root: Path, folder: Path, encoder: text_encoder.TextEncoder, capsys: pytest.CaptureFixture[str]
) -> None:
    config, vae = settings(root, folder, "data.flip=false"), random_vae()

    def rebuild(vae: autoencoder.Autoencoder, config: loader.Config = config) -> tuple[str, set[str]]:
        before = set(file_hashes(config.cache_dir))
        capsys.readouterr()
        cached(indexed(config), config, vae, encoder, per_file=5)
        return "".join(line for line in capsys.readouterr().out.splitlines(True) if "cache:" in line), set(
            file_hashes(config.cache_dir)
        ) - before

    output, _ = rebuild(vae)
    assert "24 of 24 images to encode: new or changed." in output
    assert rebuild(vae) == ("", set())
    Image.new("RGB", (20, 20), "red").save(folder / "00.png")
    output, new = rebuild(vae)
    assert output == "cache: 1 of 24 images to encode: new or changed.\n"
    (file,) = new
    assert len(encoding_store._read_keys(config.cache_dir / file)) == 1
    (folder / "01.txt").write_text("something else")
    assert rebuild(vae)[0] == "cache: 1 of 13 captions to encode: new or changed.\n"
    assert rebuild(random_vae(1))[0] == "cache: 24 of 24 images to encode: the autoencoder changed.\n"
    larger = settings(root, folder, "data.flip=false", "data.size=24")
    assert "the size changed" in rebuild(vae, larger)[0]
    assert rebuild(vae) == ("", set())  # earlier encodings are still there


def test_another_autoencoders_latents_are_never_read(
    root: Path, folder: Path, encoder: text_encoder.TextEncoder
) -> None:
    config = settings(root, folder)
    index = indexed(config)
    first, second = (cached(index, config, random_vae(seed), encoder) for seed in (0, 1))
    crop, sha256 = Crop(index.sizes[0]), index[0].sha256
    assert not torch.allclose(first.latent(crop, sha256)[0], second.latent(crop, sha256)[0])


def test_a_damaged_file_is_detected_and_rewritten(
    root: Path, folder: Path, encoder: text_encoder.TextEncoder, capsys: pytest.CaptureFixture[str]
) -> None:
    config, vae = settings(root, folder), random_vae()
    cached(indexed(config), config, vae, encoder, per_file=5)
    hashes = file_hashes(config.cache_dir)
    for damage in (lambda data: data[:-100] + bytes(100), lambda data: data[: len(data) // 2], lambda data: b""):
        path = config.cache_dir / random.Random(0).choice(sorted(hashes))
        path.write_bytes(damage(path.read_bytes()))
        capsys.readouterr()
        cached(indexed(config), config, vae, encoder, per_file=5)
        assert f"{path.name} is damaged" in capsys.readouterr().out
        assert file_hashes(config.cache_dir) == hashes


def test_a_complete_cache_is_neither_hashed_nor_searched_at_the_next_start(
    root: Path, folder: Path, encoder: text_encoder.TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, vae, hashed = settings(root, folder), random_vae(), []
    cached(indexed(config), config, vae, encoder, per_file=5)
    is_intact = encoding_store._is_intact
    monkeypatch.setattr(encoding_store, "_is_intact", lambda file: hashed.append(file) or is_intact(file))
    monkeypatch.setattr(encoding_store, "_read_keys", lambda file: pytest.fail("keys were read"))
    monkeypatch.setattr(cache.DistinctCaptions, "__getitem__", lambda *_: pytest.fail("captions were read"))
    index = indexed(config)
    store = cached(index, config, vae, encoder, per_file=5)
    assert not hashed
    entry = index[3]
    assert store.latent(Crop(index.sizes[3]), entry.sha256)[0].shape == (2, *reversed([s // 2 for s in index.sizes[3]]))
    assert store.embedding(entry.captions[0])["text"].shape[0] == 8
    file = next((config.cache_dir / "text").rglob("*.safetensors"))
    os.utime(file, ns=(1, 1))  # as if it had been copied
    monkeypatch.setattr(cache.DistinctCaptions, "__getitem__", DISTINCT)
    cached(indexed(config), config, vae, encoder, per_file=5)
    assert hashed == [file]


DISTINCT = cache.DistinctCaptions.__getitem__
BUILD = """
import sys
from ldm.config import loader
from ldm.data import cache, index, index_file
from ldm.data.crops import Augmentation
from ldm.models import autoencoder, text_encoder, text_encoder_files
from ldm.config.schema import Stage1Config
import torch
torch.manual_seed(0)
shape = Stage1Config(channels=(16, 16), layers=1, latent_channels=2, norm_num_groups=8, mid_attention=False)
vae = autoencoder.Autoencoder(autoencoder.build(shape, 16))
config = loader.load(sys.argv[1], sys.argv[2:])
entries = index.build(config.data, config.cache_dir, config.stage2.conditions)
options = cache.CacheOptions.of(config.data, config.cache_dir)
encoder = text_encoder.load(text_encoder_files.MINILM, 8)
cache.build(entries, Augmentation.of(config.data), options, vae, encoder, per_file=3)
"""


@pytest.mark.slow
def test_a_cache_killed_and_resumed_has_the_same_bytes_as_an_uninterrupted_one(
    root: Path, folder: Path, launch: Start, encoder: text_encoder.TextEncoder
) -> None:
    script = folder.parent / "build.py"
    script.write_text(BUILD)

    def start(cache_dir: Path) -> Forked:
        overrides = [
            f"run.dir={folder.parent / 'run'}",
            f"data.source={folder}",
            "data.size=16",
            "stage1.channels=[16, 16]",
            "data.buckets={step: 8}",
            "data.flip=true",
            f"data.cache_dir={cache_dir}",
        ]
        return launch(script, root / "configs/tiny.yaml", *overrides)

    config = settings(root, folder, f"data.cache_dir={folder.parent / 'uninterrupted'}")
    cached(indexed(config), config, random_vae(), encoder, per_file=3)
    uninterrupted = file_hashes(config.cache_dir)
    assert len(uninterrupted) > 20
    killed, counts = folder.parent / "killed", set()

    def count_files() -> int:
        return len([path for path in killed.rglob("*.safetensors") if not path.name.startswith(".")])

    rng = random.Random(1)
    for target in sorted(rng.sample(range(1, len(uninterrupted)), 3)):
        process = start(killed)  # killed once so many files are written
        while process.poll() is None and count_files() < target:
            time.sleep(0.002)
        process.kill()
        process.communicate()
        counts.add(count_files())
    assert len(counts) > 1  # it was killed at several points
    config = settings(root, folder, f"data.cache_dir={killed}")
    cached(indexed(config), config, random_vae(), encoder, per_file=3)
    finished = {name: digest for name, digest in file_hashes(killed).items() if not Path(name).name.startswith(".")}
    assert finished == uninterrupted


@pytest.mark.slow
def test_two_processes_write_the_same_cache_as_one(
    root: Path, folder: Path, launch: Start, finish: Finish, encoder: text_encoder.TextEncoder, tmp_path: Path
) -> None:
    def arguments(name: str) -> list[str]:
        return [
            f"run.dir={tmp_path / 'run'}",
            f"data.source={folder}",
            "data.size=16",
            f"data.cache_dir={tmp_path / name}",
        ]

    script = tmp_path / "build.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(root)!r})\n"
        "from accelerate import PartialState\nstate = PartialState(cpu=True)\n"
        + BUILD
        + "assert state.num_processes == 2\n"
    )
    processes = launch(script, root / "configs/tiny.yaml", *arguments("two-processes"), processes=2)
    config = loader.load(root / "configs/tiny.yaml", arguments("one-process"))
    cached(indexed(config), config, random_vae(), encoder, per_file=3)
    finish(processes)
    assert len(file_hashes(tmp_path / "one-process")) > 8
    assert file_hashes(tmp_path / "one-process") == file_hashes(tmp_path / "two-processes")


@pytest.mark.parametrize("latents", ["mean", "sample"])
def test_cached_samples_equal_those_encoded_on_the_fly(
    latents: str, root: Path, folder: Path, encoder: text_encoder.TextEncoder
) -> None:
    vae, batches_by_kind = random_vae(), {}
    for kind in ("disk", "none"):
        config = settings(root, folder, f"data.cache={kind}", f"data.latents={latents}")
        samples = dataset_of(config, vae, encoder)
        batches = []
        for step in range(8):
            items = [samples.dataset[n] for n in range(step * 4, step * 4 + 4)]  # type: ignore[index]
            batch = torch.utils.data.default_collate(items)
            x0, text = samples.encode(batch)
            batches.append(
                (x0, text.states, batch["position"], batch["dropout"], batch["crop"], batch["original_size"])
            )
        batches_by_kind[kind] = batches
    for cached_values, encoded_values in zip(batches_by_kind["disk"], batches_by_kind["none"], strict=True):
        for a, b in zip(cached_values, encoded_values, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_sampled_latents_differ_from_epoch_to_epoch(
    root: Path, folder: Path, encoder: text_encoder.TextEncoder
) -> None:
    config = settings(root, folder, "data.flip=false", "data.buckets=null", "data.latents=sample")
    dataset = dataset_of(config, random_vae(), encoder).dataset
    order = dataset.plan.order  # type: ignore[union-attr]
    again = next(n for n in range(24, 48) if order[n] == order[0])
    first, second = (dataset[n]["latent"] for n in (0, again))  # type: ignore[index]
    assert not torch.equal(first, second)
    assert torch.equal(first, dataset[0]["latent"])  # type: ignore[index]


def test_unchanged_images_are_not_opened_again(root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, opened = settings(root, folder), []
    read_image = index_file._read_image
    monkeypatch.setattr(
        index_file, "_read_image", lambda *args: opened.append(args[1].location.file) or read_image(*args)
    )

    def names() -> list[str]:
        opened.clear()
        indexed(config)
        return sorted(Path(name).name for name in opened)

    assert len(names()) == 24
    assert names() == []
    before = (folder / "05.png").stat()
    (folder / "05.png").write_bytes(b"\0" * before.st_size)
    os.utime(folder / "05.png", ns=(before.st_atime_ns, before.st_mtime_ns))  # the same size and modification time
    assert names() == ["05.png"]
    assert [bad.key for bad in indexed(config).bad_samples()] == ["05.png"]


def test_images_in_other_rows_than_before_are_not_opened_again(
    root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, opened = settings(root, folder), []
    before = indexed(config)
    with monkeypatch.context() as patches:  # unchanged ones are where they were
        patches.setattr(EarlierIndices, "_sorted", property(lambda _: pytest.fail("stamps were sorted")))
        assert indexed(config).fingerprint() == before.fingerprint()
    read_image = index_file._read_image
    monkeypatch.setattr(
        index_file, "_read_image", lambda *args: opened.append(args[1].location.file) or read_image(*args)
    )
    for name in ("-", "11a"):
        (folder / f"{name}.png").write_bytes((folder / "03.png").read_bytes())
        (folder / f"{name}.txt").write_text("it comes before others")
    (folder / "07.png").unlink()
    after = {entry.key: entry for entry in indexed(config)}
    assert sorted(Path(name).name for name in opened) == ["-.png", "11a.png"]
    for entry in before:
        assert entry.key == "07.png" or after[entry.key] == entry


def test_an_interrupted_index_is_continued(root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, opened = settings(root, folder), []
    read_image = index_file._read_image

    def interrupted(*args: Any) -> dict[str, Any]:
        opened.append(args[1].location.file)
        if len(opened) == 20:
            raise KeyboardInterrupt
        return read_image(*args)

    monkeypatch.setattr(index_file, "CHUNK", 4)
    monkeypatch.setattr(index_file, "_read_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        indexed(config)
    first = len(opened)
    assert len(indexed(config)) == 24
    assert len(opened) - first <= 24 - 12  # images of complete chunks are not opened again


def test_an_index_in_use_keeps_its_rows_when_a_new_one_is_written(root: Path, folder: Path) -> None:
    config = settings(root, folder)
    first = indexed(config)
    keys = [entry.key for entry in first]
    (folder / "-.png").write_bytes(b"bad")
    (folder / "-.txt").write_text("comes first")
    assert indexed(config).bad_count() == 1
    assert [entry.key for entry in first.select("train")] == keys
    assert [entry.key for entry in pickle.loads(pickle.dumps(first)).first(3)] == keys[:3]


def test_an_image_that_changed_since_indexing_is_refused(root: Path, folder: Path) -> None:
    index = indexed(settings(root, folder))
    Image.new("RGB", (20, 20), "red").save(folder / "00.png")
    with pytest.raises(UserError, match=r"00\.png: it was changed since it was indexed"):
        index.load_image(0)
