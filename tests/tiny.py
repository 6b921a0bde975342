"""The configuration of end-to-end tests: configs/tiny.yaml with half its widths and batches."""

from pathlib import Path

TINY = (
    "--config",
    str(Path(__file__).parents[1] / "configs/tiny.yaml"),
    "stage1.channels=[8, 16]",
    "stage1.batch=8",
    "stage1.evaluate_images=16",
    "stage2.channels=[16, 32]",
    "stage2.batch=8",
)
