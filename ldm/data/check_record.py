"""What is known of a store's files, so that a start neither hashes them all nor looks for each entry."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ldm.utils.atomic_files import atomic_file


class CheckRecord:
    """Which files of a store were sound, by size and modification time, and which jobs' entries they all have."""

    def __init__(self, path: Path):
        self.path = path
        self.stats: dict[str, list[int]] = {}
        self.complete: list[str] = []

    def changed(self, files: Sequence[Path]) -> list[Path]:
        """Reads the record; returns the files that are not as recorded. Without one of them, no job is complete.

        Of a damaged record nothing is known.
        """
        with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            content = json.loads(self.path.read_text("utf-8"))
            self.stats, self.complete = content["files"], content["complete"]
        changed = [file for file in files if self.stats.get(file.name) != size_and_time(file)]
        if changed or self.stats.keys() - {file.name for file in files}:
            self.complete = []
        return changed

    def write(self, files: Sequence[Path], job: str) -> None:
        """Records that these files are sound, and have all entries of a job."""
        stats = {file.name: size_and_time(file) for file in files}
        complete = sorted({*self.complete, *filter(None, [job])})
        if (stats, complete) != (self.stats, self.complete):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(self.path) as tmp_path:
                tmp_path.write_text(json.dumps({"files": stats, "complete": complete}), "utf-8")
        self.stats, self.complete = stats, complete


def size_and_time(file: Path) -> list[int]:
    """Those of a file, which tell whether it was written since; none where it is missing."""
    try:
        stat = file.stat()
    except FileNotFoundError:
        return []
    return [stat.st_size, stat.st_mtime_ns]
