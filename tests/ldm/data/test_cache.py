"""Latents and embeddings on disk."""

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
from forked import Process
from of_config import cached, indexed, spec_of
from PIL import Image

from ldm.config import loader
from ldm.config.schema import Stage1Config
from ldm.data import encoding_store, index_file
from ldm.data.cache import CacheOptions
from ldm.data.crops import Crop, crop_resize
from ldm.data.dataset import Stage2Dataset, stage2_dataset
from ldm.data.images import to_tensor
from ldm.models import autoencoder, text_encoder
from ldm.utils.errors import UserError

Start = Callable[..., Process]
Finish = Callable[[Process], str]


@pytest.fixture
def folder(three_shapes: Callable[[list[str]], Path]) -> Path:
    """Twenty-four pictures in three buckets; two of them share a caption."""
    return three_shapes([f"picture {i // 2}" for i in range(24)])


@pytest.fixture(scope="module")
def encoder() -> text_encoder.TextEncoder:
    return text_encoder.load(text_encoder.MINILM, 8)


def model(seed: int = 0) -> autoencoder.Autoencoder:
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


def dataset_of(given: loader.Config, vae: autoencoder.Autoencoder, encoder: text_encoder.TextEncoder) -> Stage2Dataset:
    options = CacheOptions.of(given.data, given.cache_dir)
    return stage2_dataset(indexed(given), spec_of(given), options, vae, encoder, torch.device("cpu"))


def files(folder: Path) -> dict[str, str]:
    """Every file of a cache, by its place and SHA-256."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for kind in ("latents", "text")
        for path in sorted((folder / kind).rglob("*"))
        if path.is_file()
    }


def test_an_entry_is_what_the_autoencoder_makes_of_the_view(
    root: Path, folder: Path, encoder: text_encoder.TextEncoder
) -> None:
    given = settings(root, folder)
    pictures, vae = indexed(given), model()
    kept = cached(pictures, given, vae, encoder, per_file=5)
    assert len(set(pictures.sizes)) == 3
    for i, (entry, size) in enumerate(zip(pictures, pictures.sizes, strict=True)):
        pixels = to_tensor(crop_resize(pictures.load_image(i), size)[0])
        for flip, expected in ((False, pixels), (True, pixels.flip(2))):
            mean, logvar = vae.moments(expected[None])
            found = kept.latent(Crop(size, flip=flip), entry.sha256)
            torch.testing.assert_close(found[0], mean[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(found[1], logvar[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            kept.embedding(entry.captions[0]), encoder.encode(entry.captions)[0], atol=1e-5, rtol=1e-5
        )
    assert len(kept.text.keys) == 12  # each distinct caption once


def test_random_crops_are_kept_side_by_side(root: Path, folder: Path, encoder: text_encoder.TextEncoder) -> None:
    given = settings(root, folder, "data.crop=random", "data.crops=3", "data.flip=false")
    pictures, vae = indexed(given), model()
    kept = cached(pictures, given, vae, encoder)
    entry, size = pictures[1], pictures.sizes[1]
    for crop in range(3):
        expected = vae.encode(Crop(size, crop).pixels(pictures.load_image(1), entry.sha256)[None])[0]
        torch.testing.assert_close(kept.latent(Crop(size, crop), entry.sha256)[0], expected, atol=1e-5, rtol=1e-5)


def test_a_second_build_encodes_only_what_changed_and_says_why(
    root: Path, folder: Path, encoder: text_encoder.TextEncoder, capsys: pytest.CaptureFixture[str]
) -> None:
    given, vae = settings(root, folder, "data.flip=false"), model()

    def built(vae: autoencoder.Autoencoder, given: loader.Config = given) -> tuple[str, set[str]]:
        before = set(files(given.cache_dir))
        capsys.readouterr()
        cached(indexed(given), given, vae, encoder, per_file=5)
        return "".join(line for line in capsys.readouterr().out.splitlines(True) if "cache:" in line), set(
            files(given.cache_dir)
        ) - before

    said, _ = built(vae)
    assert "24 of 24 images to encode: new or changed." in said
    assert built(vae) == ("", set())
    Image.new("RGB", (20, 20), "red").save(folder / "00.png")
    said, new = built(vae)
    assert said == "cache: 1 of 24 images to encode: new or changed.\n"
    (file,) = new
    assert len(encoding_store._read_keys(given.cache_dir / file)) == 1
    (folder / "01.txt").write_text("something else")
    assert built(vae)[0] == "cache: 1 of 13 captions to encode: new or changed.\n"
    assert built(model(1))[0] == "cache: 24 of 24 images to encode: the autoencoder changed.\n"
    larger = settings(root, folder, "data.flip=false", "data.size=24")
    assert "the size changed" in built(vae, larger)[0]
    assert built(vae) == ("", set())  # what was encoded before is still there


def test_another_autoencoders_latents_are_never_read(
    root: Path, folder: Path, encoder: text_encoder.TextEncoder
) -> None:
    given = settings(root, folder)
    pictures = indexed(given)
    first, second = (cached(pictures, given, model(seed), encoder) for seed in (0, 1))
    view, sha256 = Crop(pictures.sizes[0]), pictures[0].sha256
    assert not torch.allclose(first.latent(view, sha256)[0], second.latent(view, sha256)[0])


def test_a_damaged_file_is_found_and_made_anew(
    root: Path, folder: Path, encoder: text_encoder.TextEncoder, capsys: pytest.CaptureFixture[str]
) -> None:
    given, vae = settings(root, folder), model()
    cached(indexed(given), given, vae, encoder, per_file=5)
    whole = files(given.cache_dir)
    for spoil in (lambda data: data[:-100] + bytes(100), lambda data: data[: len(data) // 2], lambda data: b""):
        path = given.cache_dir / random.Random(0).choice(sorted(whole))
        path.write_bytes(spoil(path.read_bytes()))
        capsys.readouterr()
        cached(indexed(given), given, vae, encoder, per_file=5)
        assert f"{path.name} is damaged" in capsys.readouterr().out
        assert files(given.cache_dir) == whole


BUILD = """
import sys
from ldm.config import loader
from ldm.data import cache, index, index_file
from ldm.data.crops import Augmentation
from ldm.models import autoencoder, text_encoder
from ldm.config.schema import Stage1Config
import torch
torch.manual_seed(0)
shape = Stage1Config(channels=(16, 16), layers=1, latent_channels=2, norm_num_groups=8, mid_attention=False)
vae = autoencoder.Autoencoder(autoencoder.build(shape, 16))
given = loader.load(sys.argv[1], sys.argv[2:])
pictures = index.build(given.data, given.cache_dir, given.stage2.conditions)
options = cache.CacheOptions.of(given.data, given.cache_dir)
encoder = text_encoder.load(text_encoder.MINILM, 8)
cache.build(pictures, Augmentation.of(given.data), options, vae, encoder, per_file=3)
"""


@pytest.mark.slow
def test_a_cache_that_was_killed_and_taken_up_again_has_the_same_bytes(
    root: Path, folder: Path, launch: Start, encoder: text_encoder.TextEncoder
) -> None:
    script = folder.parent / "build.py"
    script.write_text(BUILD)

    def start(cache_dir: Path) -> Process:
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

    given = settings(root, folder, f"data.cache_dir={folder.parent / 'whole'}")
    cached(indexed(given), given, model(), encoder, per_file=3)
    whole = files(given.cache_dir)
    assert len(whole) > 20
    killed, seen = folder.parent / "killed", set()

    def standing() -> int:
        return len([path for path in killed.rglob("*.safetensors") if not path.name.startswith(".")])

    rng = random.Random(1)
    for wanted in sorted(rng.sample(range(1, len(whole)), 3)):
        process = start(killed)  # which is killed when so many files stand
        while process.poll() is None and standing() < wanted:
            time.sleep(0.002)
        process.kill()
        process.communicate()
        seen.add(standing())
    assert len(seen) > 1  # it was killed at several points
    given = settings(root, folder, f"data.cache_dir={killed}")
    cached(indexed(given), given, model(), encoder, per_file=3)
    left = {name: digest for name, digest in files(killed).items() if not Path(name).name.startswith(".")}
    assert left == whole


@pytest.mark.slow
def test_two_processes_fill_the_same_cache_as_one(
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
    two = launch(script, root / "configs/tiny.yaml", *arguments("two"), processes=2)
    given = loader.load(root / "configs/tiny.yaml", arguments("one"))
    cached(indexed(given), given, model(), encoder, per_file=3)
    finish(two)
    assert len(files(tmp_path / "one")) > 8
    assert files(tmp_path / "one") == files(tmp_path / "two")


@pytest.mark.parametrize("latents", ["mean", "sample"])
def test_samples_from_the_cache_are_those_encoded_on_the_fly(
    latents: str, root: Path, folder: Path, encoder: text_encoder.TextEncoder
) -> None:
    vae, batches = model(), {}
    for kind in ("disk", "none"):
        given = settings(root, folder, f"data.cache={kind}", f"data.latents={latents}")
        samples = dataset_of(given, vae, encoder)
        found = []
        for step in range(8):
            items = [samples.dataset[n] for n in range(step * 4, step * 4 + 4)]  # type: ignore[index]
            batch = torch.utils.data.default_collate(items)
            x0, states = samples.encode(batch)
            found.append((x0, states, batch["position"], batch["dropout"], batch["crop"], batch["original_size"]))
        batches[kind] = found
    for kept, live in zip(batches["disk"], batches["none"], strict=True):
        for a, b in zip(kept, live, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_sampled_latents_differ_from_epoch_to_epoch(
    root: Path, folder: Path, encoder: text_encoder.TextEncoder
) -> None:
    given = settings(root, folder, "data.flip=false", "data.buckets=null", "data.latents=sample")
    dataset = dataset_of(given, model(), encoder).dataset
    order = dataset.plan.order  # type: ignore[union-attr]
    again = next(n for n in range(24, 48) if order[n] == order[0])
    first, second = (dataset[n]["latent"] for n in (0, again))  # type: ignore[index]
    assert not torch.equal(first, second)
    assert torch.equal(first, dataset[0]["latent"])  # type: ignore[index]


def test_what_has_not_changed_is_not_opened_again(root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, opened = settings(root, folder), []
    facts = index_file._read_image
    monkeypatch.setattr(index_file, "_read_image", lambda *given: opened.append(given[1].file) or facts(*given))

    def names() -> list[str]:
        opened.clear()
        indexed(given)
        return sorted(Path(name).name for name in opened)

    assert len(names()) == 24
    assert names() == []
    before = (folder / "05.png").stat()
    (folder / "05.png").write_bytes(b"\0" * before.st_size)
    os.utime(folder / "05.png", ns=(before.st_atime_ns, before.st_mtime_ns))  # as large and as old as it was
    assert names() == ["05.png"]
    assert [bad.key for bad in indexed(given).bad_samples()] == ["05.png"]


def test_an_index_that_was_interrupted_goes_on(root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, opened = settings(root, folder), []
    facts = index_file._read_image

    def interrupted(*given: Any) -> dict[str, Any]:
        opened.append(given[1].file)
        if len(opened) == 20:
            raise KeyboardInterrupt
        return facts(*given)

    monkeypatch.setattr(index_file, "CHUNK", 4)
    monkeypatch.setattr(index_file, "_read_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        indexed(given)
    first = len(opened)
    assert len(indexed(given)) == 24
    assert len(opened) - first <= 24 - 12  # what stood in whole chunks is not opened again


def test_an_index_in_use_keeps_its_rows_when_another_is_written(root: Path, folder: Path) -> None:
    given = settings(root, folder)
    first = indexed(given)
    keys = [entry.key for entry in first]
    (folder / "-.png").write_bytes(b"bad")
    (folder / "-.txt").write_text("comes first")
    assert indexed(given).bad_count() == 1
    assert [entry.key for entry in first.select("train")] == keys
    assert [entry.key for entry in pickle.loads(pickle.dumps(first)).first(3)] == keys[:3]


def test_a_picture_that_was_changed_since_is_refused(root: Path, folder: Path) -> None:
    pictures = indexed(settings(root, folder))
    Image.new("RGB", (20, 20), "red").save(folder / "00.png")
    with pytest.raises(UserError, match=r"00\.png: it was changed since it was indexed"):
        pictures.load_image(0)
