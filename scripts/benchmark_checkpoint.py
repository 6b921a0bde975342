"""Seconds in which a training waits for a checkpoint: `scripts/benchmark.py checkpoint`."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState
from benchmark_rows import Report, peak, reset_peak, timed
from safetensors.torch import save_file

from ldm.training.checkpoint import write_checkpoint
from ldm.training.checkpoint_writer import CheckpointWriter, Parts
from ldm.utils.atomic_files import atomic_folder, file_sha256

ELEMENTS = 4 << 20  # of a tensor at most
UNITS = {"K": 1e3, "M": 1e6, "B": 1e9}
SIDE, PRODUCTS = 1024, 8  # of the matrices, and how many products make a step


def number_of_parameters(text: str) -> int:
    """The number that `300M` means."""
    try:
        return int(float(text.rstrip("KMB")) * UNITS.get(text[-1:], 1))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; give a number such as 300M") from None


def compare_checkpoints(args: argparse.Namespace) -> None:
    """Prints a line per row: GB of checkpoint for each second of waiting, and the steps meanwhile."""
    device = PartialState().device
    parts = _state(args.parameters, device)
    size = sum(tensor.nbytes for tensors in parts.values() for tensor in tensors.values()) / 1e9
    matrix = torch.rand(SIDE, SIDE, device=device)
    writer, report = CheckpointWriter(), Report.of("checkpoint", "GB/s", args)
    alone = min(timed(lambda: _step(matrix)) for _ in range(5))
    print(f"machine  {device}; {args.parameters / 1e6:,.0f} M parameters, {size:.1f} GB; a step takes {alone:.3f} s")

    def save_ours(folder: Path) -> None:
        writer.start(parts, lambda copies: write_checkpoint(folder, copies, {}))

    rows: list[tuple[str, Callable[[Path], None]]] = [("reference", lambda folder: _save_at_once(folder, parts))]
    rows += [("ours, first", save_ours), ("ours, next", save_ours)]
    with tempfile.TemporaryDirectory(dir=args.out) as parent:
        for name, save in rows:
            reset_peak()
            start = time.perf_counter()
            waited = timed(lambda save=save: save(Path(parent, "checkpoint")))  # type: ignore[misc]
            steps = []
            while writer.writing:
                steps.append(timed(lambda: _step(matrix)))
            writer.wait()
            written = time.perf_counter() - start
            text = f"{waited:7.2f} s of waiting, written after {written:.2f} s"
            text += f", meanwhile {len(steps)} steps of {sum(steps) / len(steps):.3f} s" if steps else ""
            report.row(name, size / waited, text, peak(), waited=waited, written=written, steps=len(steps))
            shutil.rmtree(Path(parent, "checkpoint"))


def _state(parameters: int, device: torch.device) -> Parts:
    """What AdamW and an average keep of so many parameters: 16 bytes each."""
    sizes = [ELEMENTS] * (parameters // ELEMENTS) + [parameters % ELEMENTS] * bool(parameters % ELEMENTS)

    def tensors(*names: str) -> dict[str, torch.Tensor]:
        return {f"{i}.{name}": torch.ones(size, device=device) for name in names for i, size in enumerate(sizes)}

    return {"model": tensors("weight"), "ema": tensors("weight"), "optimizer": tensors("exp_avg", "exp_avg_sq")}


def _step(matrix: torch.Tensor) -> None:
    for _ in range(PRODUCTS):
        matrix @ matrix


def _save_at_once(folder: Path, parts: Parts) -> None:
    """The reference: the training waits until all is written, and read again for its SHA-256."""
    with atomic_folder(folder) as tmp_path:
        for name, tensors in parts.items():
            save_file(tensors, tmp_path / f"{name}.safetensors")
        sums = {path.name: file_sha256(path) for path in sorted(tmp_path.iterdir())}
        (tmp_path / "state.json").write_text(json.dumps({"sha256": sums}))
