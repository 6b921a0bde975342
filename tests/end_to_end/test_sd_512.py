"""configs/sd-512.yaml at its full size on a CPU: 20 GB of memory and some minutes, so only where LDM_LARGE is set."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm.config import loader
from ldm.models import autoencoder
from ldm.sampling.pipeline import LatentDiffusion

pytestmark = pytest.mark.skipif(not os.environ.get("LDM_LARGE"), reason="20 GB and minutes; LDM_LARGE=1 runs it")


@pytest.mark.timeout(3000)
def test_the_published_size_trains_a_step_at_512_px_and_samples_in_two(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = loader.load(root / "configs/sd-512.yaml")
    autoencoder.Autoencoder(autoencoder.build(settings.stage1, 512)).save(tmp_path / "vae")
    clip_of_768_channels(tmp_path / "text")
    (tmp_path / "images").mkdir()
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 255, (512, 512, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"images/{i}.png")
        (tmp_path / f"images/{i}.txt").write_text("abc")
    began = time.monotonic()
    command = [
        sys.executable,
        "train_ldm.py",
        "--config",
        "configs/sd-512.yaml",
        f"run.dir={tmp_path / 'run'}",
        f"data.source={tmp_path / 'images'}",
        f"stage1.pretrained={tmp_path / 'vae'}",
        f"text.model={tmp_path / 'text'}",
        "data.workers=0",
        "run.tracker=none",
        "run.precision=no",
        "sample.prompts=[]",
        "stage2.steps=1",
        "stage2.batch=1",
        "stage2.device_batch=1",
        "stage2.gradient_checkpointing=true",
    ]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    trained = time.monotonic() - began
    line = json.loads((tmp_path / "run/stage2/metrics.jsonl").read_text().splitlines()[0])
    assert np.isfinite(line["loss"]) and line["gradient_norm"] > 0
    model = LatentDiffusion.load(tmp_path / "run/pipeline")
    assert sum(p.numel() for p in model.unet.parameters()) == 859_520_964
    began = time.monotonic()
    (image,) = model("abc", num_inference_steps=2, guidance_scale=7.5)
    assert image.size == (512, 512)
    with capsys.disabled():
        print(
            f"\nthe command with one training step: {trained:.0f} s, {peak:.1f} GB; "
            f"two steps of sampling with guidance: {time.monotonic() - began:.0f} s, {torch.get_num_threads()} threads"
        )


def clip_of_768_channels(folder: Path) -> None:
    """A text encoder of CLIP-L's size with random weights, which knows the alphabet."""
    folder.mkdir()
    letters = [chr(c) for c in range(97, 123)]
    names = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    files = {"vocab": str(folder / "vocab.json"), "merges": str(folder / "merges.txt")}
    CLIPTokenizer(**files, model_max_length=77).save_pretrained(folder)
    shape = CLIPTextConfig(
        vocab_size=len(names),
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        bos_token_id=len(names) - 2,
        eos_token_id=len(names) - 1,
    )
    CLIPTextModel(shape).save_pretrained(folder)
