"""A run's report: one HTML file that needs no network, or several runs side by side."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ldm.evaluation.report.collect import Run, collect
from ldm.evaluation.report.comparison import comparison
from ldm.evaluation.report.page import page
from ldm.utils.atomic_files import atomic_file
from ldm.utils.errors import first_line

REPORT = "report.html"


def write_report(run: Path) -> Path | None:
    """Writes `RUN/report.html` at the end of a training or an evaluation.

    What can't be shown, for whatever reason, is one line on stderr and None: a finished run isn't lost for its report.
    """
    try:
        write([run], run / REPORT)
        return run / REPORT
    except Exception as error:  # the run is worth more than its report
        print(f"no report of {run}: {first_line(error)}; make it with scripts/report.py {run}", file=sys.stderr)
        return None


def write(folders: Sequence[Path], out: Path) -> list[Run]:
    """Writes the report on a run, or on several side by side, and says on stderr what is left out.

    Returns the runs. UserError where a folder is no run, or the file can't be written.
    """
    runs = [collect(folder) for folder in folders]
    html = page(runs[0]) if len(runs) == 1 else comparison(runs)
    with atomic_file(out) as tmp_path:
        tmp_path.write_text(html, "utf-8", errors="replace")  # a path may be no text
    for run in runs:
        for note in run.notes:
            print(f"{run.folder}: {note}", file=sys.stderr)
    return runs
