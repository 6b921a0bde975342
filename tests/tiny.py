"""The configuration of end-to-end tests: configs/tiny.yaml with half its widths and batches, a small text encoder."""

from pathlib import Path

WORDS = "LDM_TESTS_TEXT_ENCODER"  # the environment variable with its folder, which a fixture sets
TINY = (
    "--config",
    str(Path(__file__).parents[1] / "configs/tiny.yaml"),
    f"text.model=${WORDS}",
    "stage1.channels=[8, 16]",
    "stage1.batch=8",
    "stage1.evaluate_images=16",
    "stage2.channels=[16, 32]",
    "stage2.batch=8",
)
