"""Encodings on disk: safetensors files of tensors, each entry found by a 32-byte key.

A file is named by the SHA-256 of its content, so a damaged one is recognised. Files are written atomically, and which
entries share a file follows from the data alone: an encoding that was killed and continued leaves the same bytes as an
uninterrupted one.

The main process lists the files, and each process reports what it wrote, because machines that share a folder may see
an outdated listing of it for a minute.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from tqdm import tqdm

from ldm.data.arrow_columns import BLOCK
from ldm.data.check_record import CheckRecord
from ldm.data.column_store import ColumnStore
from ldm.data.key_lookup import KeyLookup
from ldm.data.read_ahead import waiting_for_storage
from ldm.distributed.consensus import gather_objects, wait_until_visible
from ldm.distributed.launch import on_main
from ldm.utils.atomic_files import atomic_file
from ldm.utils.errors import UserError, first_line

KEYS = "keys"  # the tensor of a file that holds its entries' keys, (N, 32) bytes
MAX_OPEN = 16_384  # files that a process maps: a system allows it 65,530 maps
MAX_CHECKED = 16  # files of a store that each process opens at its start, to see that it can


class EncodingStore:
    """The entries of one folder, which were all encoded with the same settings, `metadata`.

    `lookups`, next to the folders of its kind, has what was made from the files: their keys, sorted; which are sound.
    """

    def __init__(self, folder: Path, metadata: dict[str, Any]):
        self.metadata = json.dumps(metadata, sort_keys=True)
        self.folder = folder / hashlib.sha256(self.metadata.encode()).hexdigest()[:16]
        self._lookups = folder.parent / "lookups"
        self.record = CheckRecord(self._lookups / f"{folder.name}-{self.folder.name}.json")
        self.files: list[Path] = []

    def list_files(self) -> list[Path]:
        """The files in the folder, as this machine sees it."""
        return sorted(self.folder.glob("*.safetensors"))

    def open(self, files: Iterable[Path]) -> None:
        """Serves the entries of these files only."""
        self.files = sorted(set(files))
        names = repr([file.name for file in self.files])
        name = f"{self.record.path.stem}-{hashlib.sha256(names.encode()).hexdigest()[:16]}"
        self.columns = ColumnStore(self._lookups / name)
        self.lookup = KeyLookup(self.columns, (), self.files, _read_keys)
        self._open: dict[int, dict[str, torch.Tensor]] = {}

    @property
    def keys(self) -> np.ndarray:
        """The keys of all entries, sorted, `(N,)`."""
        return self.lookup.keys

    def __getstate__(self) -> dict[str, Any]:  # a loader process maps the files itself
        return {**self.__dict__, "_open": {}}

    def __getitem__(self, key: bytes) -> dict[str, torch.Tensor]:
        """The entry's tensors, float32; threads may ask at once."""
        number, row = self.lookup.place(key)
        with waiting_for_storage():
            return self._read(number, row)

    def _read(self, number: int, row: int) -> dict[str, torch.Tensor]:
        """The tensors in a row of a file, copied, as a map is only read when it is used."""
        tensors = self._open.get(number) or self._map(number)
        return {name: tensor[row].to(torch.float32, copy=True) for name, tensor in tensors.items() if name != KEYS}

    def _map(self, number: int) -> dict[str, torch.Tensor]:
        """The tensors of a file, memory-mapped; UserError where it was damaged since it was opened at the start."""
        file = self.files[number]
        try:
            tensors = self._open[number] = load_file(file)
        except (OSError, SafetensorError) as error:
            reason = f"data.cache_dir: can't read {file} ({first_line(error)})"
            raise UserError(f"{reason}; start the same command again, which encodes what is damaged") from None
        for oldest in list(self._open)[: max(0, len(self._open) - MAX_OPEN)]:
            self._open.pop(oldest, None)
        return tensors

    def write(self, tensors: dict[str, torch.Tensor]) -> Path:
        content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"about": self.metadata})
        file = self.folder / f"{hashlib.sha256(content).hexdigest()[:32]}.safetensors"
        with atomic_file(file) as tmp_path:
            tmp_path.write_bytes(content)
        return file

    def explain_misses(self, missing: np.ndarray) -> Counter[str]:
        """How many entries are missing for which reason: the settings that changed since they were encoded, or new."""
        reasons, unexplained = Counter[str](), np.ones(len(missing), bool)
        own, others = json.loads(self.metadata), []
        for folder in sorted(self.folder.parent.iterdir()) if self.folder.parent.exists() else []:
            file = next(folder.glob("*.safetensors"), None)
            if folder != self.folder and file and (metadata := _read_metadata(file)):
                others.append(([name for name in own if metadata.get(name) != own[name]], folder))
        for changed, folder in sorted(others, key=lambda other: len(other[0])):
            keys = np.concatenate([_read_keys(file) for file in folder.glob("*.safetensors")])
            matched = unexplained & np.isin(missing, keys)
            unexplained &= ~matched
            if matched.any():
                reasons[f"{' and '.join(changed)} changed"] += int(matched.sum())
        if unexplained.any():
            reasons["new or changed"] += int(unexplained.sum())
        return reasons


class Keys(Protocol):
    """Keys that may be too many for memory."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        """The keys at some indices, `(N,)` of 32 bytes."""
        ...


@dataclass(frozen=True)
class EncodingJob:
    """The entries that a store should have: their keys, and `encode`, which yields those at some indices in batches.

    `name` says which entries these are, so that a store can record that it has them; empty where nothing says that.
    """

    store: EncodingStore
    name: str
    read_keys: Callable[[], Keys]
    encode: Callable[[np.ndarray], Iterator[dict[str, torch.Tensor]]]

    @cached_property
    def keys(self) -> Keys:
        return self.read_keys()

    def missing(self) -> np.ndarray:
        """The indices of the entries that the store lacks."""
        if self.name in self.store.record.complete:
            return np.zeros(0, int)
        parts = [np.zeros(0, int)]
        for start in range(0, len(self.keys), BLOCK):
            indices = np.arange(start, min(start + BLOCK, len(self.keys)))
            parts.append(indices[~self.store.lookup.find(self.keys[indices])[1]])
        return np.concatenate(parts)


def encode_missing(jobs: Sequence[EncodingJob], noun: str, per_file: int) -> None:
    """Encodes the entries that the stores lack, and prints how many and why. Each process writes a share of the files.

    `noun` is what messages call the entries. UserError, on all processes, where one can't see files of another.
    """
    state = PartialState()
    stores = [job.store for job in jobs]
    _open_sound_files(stores)
    missing = on_main(lambda: [job.missing() for job in jobs])
    chunks = [
        (job, indices[start : start + per_file])
        for job, indices in zip(jobs, missing, strict=True)
        for start in range(0, len(indices), per_file)
    ]
    if chunks and state.is_main_process:
        _print_reasons(jobs, missing, noun)
    total, written = sum(map(len, missing)), []
    hidden = not chunks or not state.is_main_process
    with tqdm(total=total, unit=f" {noun}", desc="encoding", leave=False, disable=hidden) as bar:
        for job, indices in chunks[state.process_index :: state.num_processes]:
            job.store.folder.mkdir(parents=True, exist_ok=True)
            batches = []
            for batch in job.encode(indices):
                batches.append(batch)
                bar.update(len(next(iter(batch.values()))) * min(state.num_processes, len(chunks)))
            tensors = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
            keys = np.frombuffer(job.keys[indices].tobytes(), np.uint8).reshape(-1, 32)
            written.append(job.store.write({**tensors, KEYS: torch.from_numpy(keys.copy())}))
    new = [file for share in gather_objects(written) for file in share]
    if new:
        _open_files(
            stores, [[*store.files, *(file for file in new if file.parent == store.folder)] for store in stores]
        )
    on_main(lambda: _record(jobs))


def _print_reasons(jobs: Sequence[EncodingJob], missing: Sequence[np.ndarray], noun: str) -> None:
    reasons = Counter[str]()
    for job, indices in zip(jobs, missing, strict=True):
        if len(indices):
            reasons += job.store.explain_misses(job.keys[indices])
    explanation = "; ".join(f"{count:,} {reason}" if len(reasons) > 1 else reason for reason, count in reasons.items())
    total, entries = sum(map(len, missing)), sum(len(job.keys) for job in jobs)
    tqdm.write(f"cache: {total:,} of {entries:,} {noun} to encode: {explanation}.")


def _open_sound_files(stores: Sequence[EncodingStore]) -> None:
    """Opens the files of each store. Files that are not as recorded are hashed, and removed where they are damaged."""
    state = PartialState()
    listed = on_main(lambda: [(files := store.list_files(), store.record.changed(files)) for store in stores])
    changed = [file for _, part in listed for file in part]
    removed = set[Path]()
    if changed:
        own = []
        for file in changed[state.process_index :: state.num_processes]:
            if not _is_intact(file):
                tqdm.write(f"cache: {file.name} is damaged; what it held is encoded again.")
                file.unlink(missing_ok=True)
                own.append(file)
        removed = {file for share in gather_objects(own) for file in share}
    _open_files(stores, [[file for file in files if file not in removed] for files, _ in listed])


def _open_files(stores: Sequence[EncodingStore], files: Sequence[Sequence[Path]]) -> None:
    """Opens the files of each store, once all processes see them; files that were removed meanwhile are left out.

    The main process makes the lookups. Each process tries to open a file that it doesn't see listed, and a few others.
    """
    listed = {file for store in stores for file in store.list_files()}

    def is_visible(file: Path) -> bool:
        if file in checked or file not in listed:
            try:
                file.open("rb").close()
            except OSError:
                return False
        return True

    checked = {file for part in files for file in part[:: 1 + len(part) // MAX_CHECKED]}
    visible = set(wait_until_visible([file for part in files for file in part], is_visible))
    share = [sorted(visible.intersection(part)) for part in files]

    def open_all() -> list[Path]:
        for store, part in zip(stores, share, strict=True):
            store.open(part)
            store.columns.remove_older(store.record.path.stem)
        return [file for store in stores for file in store.columns.files()]

    wait_until_visible(on_main(open_all), Path.exists)
    if not PartialState().is_main_process:
        open_all()


def _record(jobs: Sequence[EncodingJob]) -> None:
    """Records that the files of the jobs' stores are sound, and have all entries of the jobs."""
    for job in jobs:
        job.store.record.write(job.store.files, job.name)


def _read_keys(file: Path) -> np.ndarray:
    """The keys of a file's entries, `(N,)`; none for a damaged one."""
    try:
        with safe_open(file, "np") as opened:
            return np.ascontiguousarray(opened.get_tensor(KEYS)).view("S32").ravel()
    except (OSError, SafetensorError, ValueError):
        return np.zeros(0, "S32")


def _read_metadata(file: Path) -> dict[str, Any]:
    try:
        with safe_open(file, "np") as opened:
            return dict(json.loads(opened.metadata()["about"]))
    except (OSError, SafetensorError, ValueError, KeyError):
        return {}


def _is_intact(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest().startswith(file.stem)
    except FileNotFoundError:  # another run removed it as damaged
        return False
