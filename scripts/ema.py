"""A finished run's model with another average of its weights, put together from the run's snapshots.

    python scripts/ema.py runs/openmoji --width 0.075 --out averaged

The run must have kept snapshots (`stage2.ema_widths`). Written is a pipeline, like the run's own but for the average.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from ldm.config.schema import WIDEST
from ldm.training.ema import fit, read_snapshots, weighted_sum
from ldm.utils.atomic_files import Tensors, whole_folder
from ldm.utils.errors import Parser, UserError, command

MOST = 0.1  # of a profile's norm, that the snapshots' sum may be off


@command
def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(prog="ema.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("--width", type=float, required=True, help="σ_rel: the average's width over the run's length")
    parser.add_argument("--step", type=int, help="of a snapshot, at which the average ends; default: the last")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    args = parser.parse_args(arguments)
    if not 0 < args.width < WIDEST:
        raise UserError(f"--width: {args.width}; give more than 0 and less than {WIDEST:.4f}")
    if args.out.exists():
        raise UserError(f"--out: {args.out} exists already; give a new folder")
    if not args.out.parent.is_dir():
        raise UserError(f"--out: no folder {args.out.parent}; make it first")
    folder = args.run / "stage2" / "ema"
    kept = read_snapshots(folder)
    if not kept:
        raise UserError(f"{args.run}: no snapshots in {folder}; a run with stage2.ema_widths=[0.05, 0.1] keeps some")
    if not (args.run / "pipeline").is_dir():
        raise UserError(f"{args.run}: no finished run (it has no pipeline); run train_ldm.py first")
    step = kept[-1].step if args.step is None else args.step
    if step not in (steps := {each.step for each in kept}):
        nearest = min(steps, key=lambda each: abs(each - step))
        raise UserError(f"--step: {step} has no snapshot in {folder}; the nearest that has is {nearest}")
    kept = [each for each in kept if each.step <= step]
    shares, off = fit(kept, args.width)
    widths = ", ".join(f"{width:g}" for width in sorted({each.width for each in kept}))
    if off > MOST:
        raise UserError(
            f"--width: {args.width} can't be made of {len(kept)} snapshots of widths {widths} up to step {step}: the "
            f"profile would be off by {off:.0%}; give one nearer to these, or train with a smaller "
            "stage2.ema_snapshot_every"
        )
    paths = tqdm([each.path for each in kept], desc="averaging", unit=" snapshot", leave=False, disable=None)
    _write(args.out, args.run / "pipeline", weighted_sum(paths, shares.tolist()))
    print(
        f"wrote {args.out}: width {args.width:g} at step {step}, of {len(kept)} snapshots; "
        f"its profile is missed by {off:.2%}"
    )


def _write(out: Path, pipeline: Path, tensors: Tensors) -> None:
    """A copy of the pipeline, but for the weights of stage two's `Denoiser` that are among the tensors."""
    parts = {"unet": "unet.", "text_encoder": "encoder.", "": ""}  # the last is of a trained null embedding
    left = {name for name in tensors if name.startswith("unet.")}
    with whole_folder(out) as tmp_path:
        shutil.copytree(pipeline, tmp_path, dirs_exist_ok=True)
        for part, prefix in parts.items():
            for path in (pipeline / part).glob("*.safetensors"):
                with safe_open(path, "pt") as file:
                    about, weights = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                for name, old in weights.items():
                    weights[name] = tensors.get(prefix + name, old).to(old.dtype)
                    left.discard(prefix + name)
                save_file(weights, tmp_path / part / path.name, about)
        assert not left, f"{pipeline / 'unet'} has no {min(left)}"


if __name__ == "__main__":
    sys.exit(main())
