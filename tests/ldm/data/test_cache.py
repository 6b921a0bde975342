"""Latents and embeddings on disk."""

from pathlib import Path

import torch

from ldm import autoencoder, text
from ldm.data.cache import Samples, build
from ldm.data.images import load
from ldm.data.sources import read


def test_a_cache_is_read_again_and_not_for_another_autoencoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    records = read("openmoji-demo", 16, tmp_path)[:9]
    encoder = text.load(text.MINILM, 8)
    first, other = (autoencoder.Autoencoder(autoencoder.build((16, 16), 1, 2, 8, False, 16)) for _ in range(2))
    cache = build(records, 16, first, encoder, tmp_path / "cache")
    written = sorted(path.name for path in (tmp_path / "cache").iterdir())
    again = build(records, 16, first, encoder, tmp_path / "cache")
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == written
    assert torch.equal(cache.latents, again.latents)
    pixels = torch.stack([load(record.path, 16) for record in records])
    assert torch.allclose(cache.latents, first.encode(pixels), atol=1e-5)
    assert not torch.allclose(build(records, 16, other, encoder, tmp_path / "cache").latents, cache.latents)

    samples = Samples(records, cache, seed=0)
    sample = samples[3]
    index = samples.order[3]
    assert torch.equal(sample["latent"], cache.latents[index])
    expected = encoder.encode(list(records[index].captions))
    assert any(torch.allclose(sample["text"], row, atol=1e-5) for row in expected)
    assert torch.allclose(cache.null, encoder.encode([""])[0], atol=1e-5)
