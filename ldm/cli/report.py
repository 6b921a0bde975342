"""A run's report as one HTML file: settings, curves, samples over time, figures with error bars.

    ldm-report runs/openmoji

    ldm-report runs/a runs/b runs/c --out report.html

Of several runs it is about what differs, which is better as far as can be told, and has their curves in one chart. The
file contains its images and loads nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ldm.evaluation.report import REPORT, write
from ldm.evaluation.report.comparison import values
from ldm.utils.errors import Parser, UserError, command


@command
def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the folder of a run; several are compared")
    parser.add_argument(
        "--out", type=Path, help=f"the file to write; default: {REPORT} in the run's folder, of several in this one"
    )
    parser.add_argument("--json", action="store_true", help="print the figures, scores and speeds of the runs as JSON")
    args = parser.parse_args(arguments)
    folders = list(dict.fromkeys(args.runs))
    if len(folders) < len(args.runs):
        raise UserError("RUN: the same folder twice; give each run once")
    out = args.out or (folders[0] / REPORT if len(folders) == 1 else Path(REPORT))
    if out.is_dir():
        raise UserError(f"--out: {out} is a folder; give a file, such as {out / REPORT}")
    if not out.parent.is_dir() and args.out:
        raise UserError(f"--out: no folder {out.parent}; create it first")
    runs = write(folders, out)
    print(json.dumps({"report": str(out), "runs": [values(run) for run in runs]}) if args.json else f"wrote {out}")
