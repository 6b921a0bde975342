"""What tests train from end to end: configs/tiny.yaml with models of half its width, which learn as well."""

from pathlib import Path

TINY = (
    "--config", str(Path(__file__).parents[1] / "configs/tiny.yaml"),
    "stage1.channels=[8, 16]", "stage1.evaluate_pictures=16", "stage2.channels=[16, 32]",
)  # fmt: skip
