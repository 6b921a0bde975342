"""A finished run's pipeline with another EMA of its weights, reconstructed from the run's snapshots.

    ldm-ema runs/openmoji --width 0.075 --out averaged

Post-hoc EMA, Karras et al., arXiv 2312.02696, section 3. The run must have snapshots (`stage2.ema_widths`).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from ldm.config.schema import WIDEST
from ldm.training.ema import fit, read_snapshots, weighted_sum
from ldm.utils.atomic_files import Tensors, atomic_folder
from ldm.utils.errors import Parser, UserError, command

MAX_ERROR = 0.1  # of the reconstructed profile, as a share of its norm


@command
def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("--width", type=float, required=True, help="σ_rel: the average's width over the run's length")
    parser.add_argument("--step", type=int, help="the average ends at this step's snapshot; default: the last")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    args = parser.parse_args(arguments)
    if not 0 < args.width < WIDEST:
        raise UserError(f"--width: {args.width}; give more than 0 and less than {WIDEST:.4f}")
    if args.out.exists():
        raise UserError(f"--out: {args.out} exists already; give a new folder")
    if not args.out.parent.is_dir():
        raise UserError(f"--out: no folder {args.out.parent}; create it first")
    folder = args.run / "stage2" / "ema"
    available = read_snapshots(folder)
    if not available:
        raise UserError(f"{args.run}: no snapshots in {folder}; train with stage2.ema_widths=[0.05, 0.1]")
    if (args.run / "lora").is_dir() or (args.run / "embeddings").is_dir():
        raise UserError(
            f"{args.run}: averages of other widths are made of models that were trained in full; give such a run"
        )
    if not (args.run / "pipeline").is_dir():
        raise UserError(f"{args.run}: no finished run (it has no pipeline); run train_ldm.py first")
    step = available[-1].step if args.step is None else args.step
    if step not in (steps := {snapshot.step for snapshot in available}):
        nearest = min(steps, key=lambda candidate: abs(candidate - step))
        raise UserError(f"--step: {step} has no snapshot in {folder}; the nearest is {nearest}")
    chosen = [snapshot for snapshot in available if snapshot.step <= step]
    shares, error = fit(chosen, args.width)
    if error > MAX_ERROR:
        widths = ", ".join(f"{width:g}" for width in sorted({snapshot.width for snapshot in chosen}))
        raise UserError(
            f"--width: {args.width} can't be made of {len(chosen)} snapshots of widths {widths} up to step {step}: the "
            f"profile would be off by {error:.0%}; give one nearer to these, or train with a smaller "
            "stage2.ema_snapshot_every"
        )
    paths = tqdm([snapshot.path for snapshot in chosen], desc="averaging", unit=" snapshot", leave=False, disable=None)
    _write(args.out, args.run / "pipeline", weighted_sum(paths, shares.tolist()))
    print(
        f"wrote {args.out}: width {args.width:g} at step {step}, of {len(chosen)} snapshots; "
        f"its profile is off by {error:.2%}"
    )


def _write(out: Path, pipeline: Path, tensors: Tensors) -> None:
    """Copies the pipeline and replaces its weights by `tensors`, which have the names of stage two's `Denoiser`."""
    parts = {"unet": "unet.", "text_encoder": "encoder.", "": ""}  # the last has a trained null embedding
    if (pipeline / "text_encoder_2").is_dir():
        parts |= {"text_encoder": "encoder.0.", "text_encoder_2": "encoder.1."}
    left = {name for name in tensors if name.startswith("unet.")}
    with atomic_folder(out) as tmp_path:
        shutil.copytree(pipeline, tmp_path, dirs_exist_ok=True)
        for part, prefix in parts.items():
            for path in (pipeline / part).glob("*.safetensors"):
                with safe_open(path, "pt") as file:
                    metadata = file.metadata()
                    weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                for name, old in weights.items():
                    weights[name] = tensors.get(prefix + name, old).to(old.dtype)
                    left.discard(prefix + name)
                save_file(weights, tmp_path / part / path.name, metadata)
        assert not left, f"{pipeline / 'unet'} has no {min(left)}"
