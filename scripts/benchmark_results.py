"""The file of measurements, a line of JSON each; needs nothing but Python.

    python scripts/benchmark_results.py FILE step=3 what=step status=failed "error=out of memory"
    python scripts/benchmark_results.py FILE

The first appends a line, the second prints the file as a table.
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def append(file: Path, line: Line) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(line, ensure_ascii=False) + "\n")


def read(file: Path) -> list[Line]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []


def machine() -> Line:
    """The device and the versions that every figure depends on."""
    import torch  # here, because the command line works without it

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"gpu": gpu, "torch": torch.__version__, "python": platform.python_version()}


def newest(file: Path, what: str, row: str) -> float | None:
    """The value of the last such line that was measured on the same kind of machine."""
    here = machine()
    values = [
        line["value"]
        for line in read(file)
        if (line.get("what"), line.get("row")) == (what, row) and {key: line.get(key) for key in here} == here
    ]
    return values[-1] if values else None


def table(lines: list[Line]) -> str:
    """A row per measurement and per step's status; sorted by step, the newest last."""
    rows = [("step", "what", "row", "value", "", "ratio", "MB allocated", "reserved")]
    for line in sorted(lines, key=lambda line: str(line.get("step", "")).zfill(2)):
        if "status" in line:
            status = f"{line['status']} in {line.get('seconds', 0):.0f} s"
            if reason := line.get("error") or line.get("why"):
                status += f": {reason}"
            rows.append((str(line["step"]), line["name"], status, "", "", "", "", ""))
        else:
            value, ratio = _format(line["value"], ",.4g"), _format(line.get("ratio"), ".2f")
            memory = [_format(line.get(key), ",.0f") for key in ("allocated", "reserved")]
            rows.append((str(line.get("step", "")), line["what"], line["row"], value, line["unit"], ratio, *memory))
    measured = [row for row in rows if row[3]]
    widths = [max(len(row[i]) for row in measured) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _format(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def parse_value(text: str) -> Any:
    """A number if the text is one, else the text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def main(file: str, *pairs: str) -> None:
    if pairs:
        append(Path(file), {key: parse_value(value) for key, _, value in (pair.partition("=") for pair in pairs)})
    else:
        print(table(read(Path(file))))


if __name__ == "__main__":
    main(*sys.argv[1:])
