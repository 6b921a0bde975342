"""Runs as the app finds them: what they handed over, and a configuration of few keys."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any


def write_adapter_run(pipeline: Path, adapter: Path, name: str) -> Path:
    """A finished run, next to the pipeline's, which trained the adapter on it."""
    run = write_configuration(pipeline.parents[1] / name, "lora", pipeline, "dog")
    (run / "lora").mkdir()
    shutil.copy(adapter, run / "lora")
    return run


def write_configuration(run: Path, kind: str, init_from: Path, prompt: str, **sections: Any) -> Path:
    """The configuration of a fine-tuning."""
    run.mkdir(parents=True)
    values = {"finetune": {"kind": kind}, "stage2": {"init_from": str(init_from)}, "sample": {"prompts": [prompt, "x"]}}
    (run / "config.yaml").write_text(json.dumps({"about": {}, "configuration": values | sections}))  # also YAML
    return run
