"""What an index was made from, so that a start lists nothing where nothing can have changed."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import PIL
import pyarrow as pa
import pyarrow.compute as pc

from ldm.data.check_record import size_and_time
from ldm.data.formats import FORMATS
from ldm.data.records import LeftOutCounts
from ldm.data.sources import Sources
from ldm.distributed.consensus import gather_objects, on_all
from ldm.distributed.launch import on_main
from ldm.utils.atomic_files import atomic_file

VERSION = 1  # of how tars are read; where it changes, they are listed again


class ListingRecord:
    """A file next to an index of tars: which ones it was made from, by size and times, and what was left out of them.

    Of other sources only a listing tells whether a file changed; they have none. Every process of the run makes it.
    """

    def __init__(self, index: Path, sources: Sources):
        self.index, self.sources = index, sources
        self.path = index.with_name(f"tars-{index.stem.removeprefix('index-')}.json")
        self._tars = on_all(sources.tars)
        settings = [source.model_dump() for source in sources.configs], sources.conditions
        readers = VERSION, PIL.__version__, sorted(FORMATS)
        self._origin = hashlib.sha256(repr((settings, readers, self._tars)).encode()).hexdigest()

    def unchanged(self) -> str:
        """The SHA-256 of the index that is there, if a listing would make the same; else empty.

        Every process has to see tars of the same names; their times may differ on machines that have copies.
        """
        names = gather_objects([name for name, _ in self._tars])
        known = on_main(self._read) if self._tars and all(own == names[0] for own in names) else {}
        if known:
            left_out = LeftOutCounts()
            left_out.counts.update(known["left_out"])
            left_out.examples.update(known["examples"])
            self.sources.set_left_out(left_out)
        return str(known.get("sha256", ""))

    def _read(self) -> dict[str, Any]:
        known: dict[str, Any] = {}
        with suppress(FileNotFoundError, ValueError):  # of a damaged record nothing is known
            known = dict(json.loads(self.path.read_text("utf-8")))
        return known if known.get("index") == size_and_time(self.index) and known["origin"] == self._origin else {}

    def write(self, table: pa.Table, sha256: str) -> None:
        """Records the index that was just written, on the main process."""
        if not self._tars or _may_be_temporary(table):
            self.path.unlink(missing_ok=True)
            return
        left_out = self.sources.left_out()
        known = {
            "index": size_and_time(self.index),
            "sha256": sha256,
            "origin": self._origin,
            "left_out": left_out.counts,
            "examples": left_out.examples,
        }
        with atomic_file(self.path) as tmp_path:
            tmp_path.write_text(json.dumps(known), "utf-8")


def _may_be_temporary(table: pa.Table) -> bool:
    """Whether any sample is bad because something couldn't be read, which the next start tries again."""
    reasons = table["reason"]
    return reasons.null_count < len(reasons) and bool(pc.any(pc.match_substring(reasons, "can't be read")).as_py())
