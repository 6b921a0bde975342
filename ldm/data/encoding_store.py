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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from tqdm import tqdm

from ldm.distributed.consensus import gather_objects, wait_until_visible
from ldm.distributed.launch import on_main
from ldm.utils.atomic_files import atomic_file
from ldm.utils.errors import UserError

KEYS = "keys"  # the tensor of a file that holds its entries' keys, (N, 32) bytes


class EncodingStore:
    """The entries of one folder, which were all encoded with the same settings, `metadata`."""

    def __init__(self, folder: Path, metadata: dict[str, Any]):
        self.metadata = json.dumps(metadata, sort_keys=True)
        self.folder = folder / hashlib.sha256(self.metadata.encode()).hexdigest()[:16]
        self.set_files([], {})

    def list_files(self) -> list[Path]:
        """The files in the folder, as this machine sees it."""
        return sorted(self.folder.glob("*.safetensors"))

    def set_files(self, files: Iterable[Path], keys_of: Mapping[Path, np.ndarray]) -> None:
        """Serves the entries of these files only; `keys_of` has the keys of each file, `(N,)`."""
        self.files = sorted(set(files))
        parts = [keys_of[file] for file in self.files]
        keys = np.concatenate(parts) if parts else np.zeros(0, "S32")
        order = np.argsort(keys, kind="stable")
        self.keys = keys[order]
        numbers = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in parts])
        rows = np.concatenate([np.arange(len(part), dtype=np.int32) for part in parts]) if parts else numbers
        self.positions = np.stack([numbers, rows], axis=1)[order]  # the file's number and the row of each key
        self._open: dict[int, dict[str, torch.Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:  # a loader process maps the files itself
        return {**self.__dict__, "_open": {}}

    def find(self, keys: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """The index of each key in `self.keys`, `(N,)`, and whether the key is there, `(N,)`."""
        requested = np.array(keys, "S32")  # an array: numpy strips NULs from the end of a scalar
        if not len(self.keys):
            return np.zeros(len(requested), int), np.zeros(len(requested), bool)
        indices = np.minimum(np.searchsorted(self.keys, requested), len(self.keys) - 1)
        return indices, self.keys[indices] == requested

    def __getitem__(self, key: bytes) -> dict[str, torch.Tensor]:
        """The entry's tensors, float32."""
        (index,), (present,) = self.find([key])
        assert present, "the training data was encoded before"
        file, row = self.positions[index].tolist()
        if file not in self._open:
            self._open[file] = load_file(self.files[file])
        return {name: tensor[row].float() for name, tensor in self._open[file].items() if name != KEYS}

    def remove_damaged(self) -> list[Path]:
        """Deletes and returns the damaged files; each process checks a share of the files."""
        state, removed = PartialState(), []
        for file in self.files[state.process_index :: state.num_processes]:
            if not _is_intact(file):
                tqdm.write(f"cache: {file.name} is damaged; what it held is encoded again.")
                file.unlink(missing_ok=True)
                removed.append(file)
        return removed

    def write(self, tensors: dict[str, torch.Tensor]) -> Path:
        content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"about": self.metadata})
        file = self.folder / f"{hashlib.sha256(content).hexdigest()[:32]}.safetensors"
        with atomic_file(file) as tmp_path:
            tmp_path.write_bytes(content)
        return file

    def explain_misses(self, missing: Sequence[bytes]) -> Counter[str]:
        """How many entries are missing for which reason: the settings that changed since they were encoded, or new."""
        requested, reasons = np.array(missing, "S32"), Counter[str]()
        unexplained = np.ones(len(requested), bool)
        own, others = json.loads(self.metadata), []
        for folder in sorted(self.folder.parent.iterdir()) if self.folder.parent.exists() else []:
            file = next(folder.glob("*.safetensors"), None)
            if folder != self.folder and file and (metadata := _read_metadata(file)):
                others.append(([name for name in own if metadata.get(name) != own[name]], folder))
        for changed, folder in sorted(others, key=lambda other: len(other[0])):
            keys = np.concatenate([_read_keys(file) for file in folder.glob("*.safetensors")])
            matched = unexplained & np.isin(requested, keys)
            unexplained &= ~matched
            if matched.any():
                reasons[f"{' and '.join(changed)} changed"] += int(matched.sum())
        if unexplained.any():
            reasons["new or changed"] += int(unexplained.sum())
        return reasons


@dataclass(frozen=True)
class EncodingJob:
    """The entries that a store should have: their keys, and `encode`, which yields those at some indices in batches."""

    store: EncodingStore
    keys: Sequence[bytes]
    encode: Callable[[np.ndarray], Iterator[dict[str, torch.Tensor]]]


def encode_missing(jobs: Sequence[EncodingJob], noun: str, per_file: int) -> None:
    """Encodes the entries that the stores lack, and prints how many and why. Each process writes a share of the files.

    `noun` is what messages call the entries. UserError, on all processes, where one can't see files of another.
    """
    state, keys_of = PartialState(), dict[Path, np.ndarray]()
    missing = _find_missing(jobs, noun, keys_of)
    chunks = [
        (job, indices[start : start + per_file])
        for job, indices in zip(jobs, missing, strict=True)
        for start in range(0, len(indices), per_file)
    ]
    if not chunks:
        return
    if state.is_main_process:
        _print_reasons(jobs, missing, noun)
    total, written = sum(map(len, missing)), []
    with tqdm(total=total, unit=f" {noun}", desc="encoding", leave=False, disable=not state.is_main_process) as bar:
        for job, indices in chunks[state.process_index :: state.num_processes]:
            job.store.folder.mkdir(parents=True, exist_ok=True)
            batches = []
            for batch in job.encode(indices):
                batches.append(batch)
                bar.update(len(next(iter(batch.values()))) * min(state.num_processes, len(chunks)))
            tensors = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
            keys = np.frombuffer(b"".join(job.keys[i] for i in indices.tolist()), np.uint8).reshape(-1, 32)
            written.append(job.store.write({**tensors, KEYS: torch.from_numpy(keys.copy())}))
    new = [file for share in gather_objects(written) for file in share]
    stores = [job.store for job in jobs]
    files = [[*store.files, *(file for file in new if file.parent == store.folder)] for store in stores]
    _set_visible_files(stores, files, keys_of)


def _print_reasons(jobs: Sequence[EncodingJob], missing: Sequence[np.ndarray], noun: str) -> None:
    reasons = Counter[str]()
    for job, indices in zip(jobs, missing, strict=True):
        if len(indices):
            reasons += job.store.explain_misses([job.keys[i] for i in indices.tolist()])
    explanation = "; ".join(f"{count:,} {reason}" if len(reasons) > 1 else reason for reason, count in reasons.items())
    total, entries = sum(map(len, missing)), sum(len(job.keys) for job in jobs)
    tqdm.write(f"cache: {total:,} of {entries:,} {noun} to encode: {explanation}.")


def _find_missing(jobs: Sequence[EncodingJob], noun: str, keys_of: dict[Path, np.ndarray]) -> list[np.ndarray]:
    """The indices of each job's missing entries, the same on all processes. Removes damaged files."""
    stores = [job.store for job in jobs]
    _set_visible_files(stores, on_main(lambda: [store.list_files() for store in stores]), keys_of)
    own = [file for store in stores for file in store.remove_damaged()]
    removed = {file for share in gather_objects(own) for file in share}
    for file in removed:
        del keys_of[file]
    if removed:
        for store in stores:
            store.set_files(set(store.files) - removed, keys_of)
    missing = [np.flatnonzero(~job.store.find(job.keys)[1]) for job in jobs]
    present = [([file.name for file in store.files], len(store.keys)) for store in stores]
    requested = [(len(job.keys), len(indices)) for job, indices in zip(jobs, missing, strict=True)]
    if len(set(gather_objects(hashlib.sha256(repr((present, requested)).encode()).digest()))) > 1:
        raise UserError(
            f"data.cache_dir: the processes find different {noun} in it; "
            "give a folder on a file system that all machines share"
        )
    return missing


def _set_visible_files(
    stores: Sequence[EncodingStore], files: Sequence[Sequence[Path]], keys_of: dict[Path, np.ndarray]
) -> None:
    """Sets the files of each store, once all processes see them; files that were removed meanwhile are left out."""

    def is_visible(file: Path) -> bool:
        if file not in keys_of:
            try:
                file.open("rb").close()
            except OSError:
                return False
            keys_of[file] = _read_keys(file)
        return True

    visible = set(wait_until_visible([file for share in files for file in share], is_visible))
    for store, share in zip(stores, files, strict=True):
        store.set_files(visible.intersection(share), keys_of)


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
