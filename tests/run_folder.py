"""A run's folder as a training and an evaluation leave it, without either: its images are noise."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from ldm.config import loader

FID = {"value": 12.5, "low": 11.25, "high": 13.75, "images": 500, "network": "Inception-v3, 2048"}
STEPS = range(5, 105, 5)


def write_run(root: Path, folder: Path, *, shift: float = 0.0, prompt: str = "red heart", side: int = 64) -> Path:
    """A finished run with everything that a report shows; `shift` is added to its losses and figures."""
    config = loader.load(root / "configs/tiny.yaml", [f"run.dir={folder}", f"sample.prompts=[{json.dumps(prompt)}]"])
    provenance = {"command": f"train_ldm.py run.dir={folder}", "git_commit": "abc", "torch": "2", "python": "3.11"}
    (folder / "stage2/samples").mkdir(parents=True)
    (folder / "evaluation").mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"about": provenance, "configuration": loader.dump(config)}))
    write_metrics(folder / "stage1/metrics.jsonl", [training_line(step, shift) for step in STEPS])
    write_metrics(
        folder / "stage2/metrics.jsonl", [*map(training_line, STEPS), *(validation(s, shift) for s in (50, 100))]
    )
    for step in (50, 100):
        noise(step, side).save(folder / f"stage2/samples/step-{step:06d}.png")
    for i in range(4):
        noise(i, side).save(folder / f"evaluation/{i}.png")
    noise(9, side).save(folder / "evaluation/memorization.png")
    noise(8, side).save(folder / "evaluation/grid.png")
    figure = {**FID, **{name: FID[name] + shift for name in ("value", "low", "high")}}  # type: ignore[operator]
    samples = [
        {"number": i, "prompt": f"{prompt} {i}", "file": f"{i}.png", "score": i / 4 + shift, "group": "held out"}
        for i in range(4)
    ]
    facts: dict[str, Any] = {
        "evaluation.json": {
            "steps": 5,
            "references": {"inception": "of the training images"},
            "figures": {"inception": {"fid": figure, "recall": {"value": 0.5}}},
            "training captions": {"pixels": {"top1": 0.75}},
            "real against real": {"inception": {"fid": {"value": 3.25}}},
            "memorization": {"share": {"value": 0.0125, "low": 0.0, "high": 0.025}, "floor": 0.05, "pairs": []},
            "retrieval": {
                "inception": {"R@1": {"value": 0.625}},
                "inception, prompts shuffled": {"R@1": {"value": 0.03125}},
            },
            "comparison": {
                "with": "other",
                "inception": {"fid": {"difference": 1.5, "low": 1.25, "high": 1.75, "p": 0.001, "verdict": "worse"}},
            },
        },
        "evaluation/samples.json": samples,
        "data-report.json": {"images": 805, "splits": {"train": 732, "combination": 73}, "captions": 1032, "bad": 0},
    }
    for name, value in facts.items():
        (folder / name).write_text(json.dumps(value))
    return folder


def training_line(step: int, shift: float = 0.0) -> dict[str, float]:
    return {
        "step": step,
        "loss": 1 + shift + math.exp(-step / 30),
        "lr": 1e-3,
        "images_per_second": 8.0,
        "waiting": 0.25,
    }


def validation(step: int, shift: float) -> dict[str, float]:
    levels = {f"held_out_loss_at_{level:+d}": 0.1 * level**2 + shift for level in (-3, 1)}
    fid = {f"evaluate/inception/fid{end}": 30 - step / 10 + more for end, more in (("", 0), ("_low", -2), ("_high", 2))}
    return {"step": step, "held_out_loss": 0.5 + shift, "trained_on_loss": 0.4, **levels, **fid}


def write_metrics(path: Path, lines: list[dict[str, float]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def noise(seed: int, side: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, 2 * side, 3), np.uint8))
