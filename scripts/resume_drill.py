"""Trains a small model three times, one of them killed and continued, and compares what was exported.

    python scripts/resume_drill.py FOLDER --config configs/tiny.yaml

Runs `a` and `a2` are alike; `b` is killed by SIGKILL once stage two has a checkpoint, and the same command continues
it. On a CPU all three must have the same weights. On a GPU, whose sums have no fixed order, two runs differ by chance:
then b may differ from a by at most twice as much as a2 does. All three run at the same time.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import benchmark_results as results
import numpy as np
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[1]
MAX_RATIO = 2.0
"""Of the difference between a and b over that between a and a2."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="resume_drill.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="created; it gets the runs")
    parser.add_argument("--config", type=Path, required=True, help="a YAML file, for example configs/tiny.yaml")
    parser.add_argument("--json", type=Path, metavar="FILE", help="appends the result to it, as a line of JSON")
    parser.add_argument("--label", default="", help="the step in this line")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for example stage2.steps=60")
    args = parser.parse_intermixed_args()
    if args.folder.exists():
        print(f"error: {args.folder} exists; give a new folder", file=sys.stderr)
        return 2
    args.folder.mkdir(parents=True)
    names = ("a", "a2", "b")
    started = {name: start(args, name) for name in names}
    try:
        kill_at_checkpoint(started["b"], args.folder / "b")
        started["b"] = start(args, "b")
        if failed := [name for name in names if started[name].wait()]:
            last = (args.folder / f"{failed[0]}.log").read_text("utf-8").strip().splitlines()[-1:]
            print(f"error: run {failed[0]} has failed: {''.join(last)}", file=sys.stderr)
            return 1
    finally:
        for process in started.values():
            process.kill()
    by_chance, continued = (largest_difference(args.folder / "a", args.folder / name) for name in ("a2", "b"))
    print(f"weights  {continued:.3g} between a run and a killed and continued one, {by_chance:.3g} between two runs")
    if args.json:
        line = {
            "step": results.parse_value(args.label),
            "what": "resumed",
            "row": "killed and continued",
            "value": continued,
            "unit": "largest difference of weights",
            "baseline_row": "two whole runs",
            "baseline": by_chance,
            "ratio": continued / by_chance if by_chance else None,
            "allocated": None,
            "reserved": None,
            **results.machine(),
        }
        results.append(args.json, line)
    if continued <= MAX_RATIO * by_chance:
        return 0
    print(
        f"error: a run that was killed and continued is {continued:.3g} off, two complete runs {by_chance:.3g}; "
        "the checkpoint lacks some of the state",
        file=sys.stderr,
    )
    return 1


def start(args: argparse.Namespace, name: str) -> subprocess.Popen[bytes]:
    """Starts run `name`; started again, it continues."""
    command = [
        sys.executable,
        ROOT / "train_ldm.py",
        "--config",
        args.config,
        *args.overrides,
        f"run.dir={args.folder / name}",
        "run.tracker=none",
        "run.preflight=false",
    ]
    with (args.folder / f"{name}.log").open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)


def kill_at_checkpoint(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Sends SIGKILL as soon as stage two has a checkpoint; exits with an error if the run has ended before."""
    while not any((folder / "stage2/checkpoints").glob("step-*")) and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    process.wait()
    if (folder / "pipeline").exists():
        raise SystemExit(f"error: {folder.name} ended before it was killed; give it more steps")


def largest_difference(run_a: Path, run_b: Path) -> float:
    """The largest difference between weights of two runs' pipelines."""
    largest = 0.0
    for file in sorted((run_a / "pipeline").rglob("*.safetensors")):
        tensors_b = load_file(run_b / file.relative_to(run_a))
        for name, tensor in load_file(file).items():
            largest = max(largest, float(np.abs(tensor - tensors_b[name]).max()))
    return largest


if __name__ == "__main__":
    sys.exit(main())
