"""Latents and text embeddings on disk: encoded once, by all processes, and read memory-mapped ever after.

A cache is a folder of safetensors files, each named by the SHA-256 of its content, so a damaged one is known by its
name. An entry is found by the SHA-256 of the picture (or caption) and of everything else that it was made from, so that
of another autoencoder is never read. Files are written whole; which entries share one follows from the data alone, so
an encoding that was killed and taken up again leaves the same bytes as one that was not.

Which files there are, the main process says, and each process what it wrote: machines that share a folder may go on
for a minute with the listing of it that they have.
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
import pyarrow.compute as pc
import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from tqdm import tqdm

from ldm.config.schema import DataConfig
from ldm.data.crops import Augmentation, Crop
from ldm.data.images import Size
from ldm.data.index import Index
from ldm.distributed.consensus import gathered, seen_by_all
from ldm.distributed.launch import on_main
from ldm.models.autoencoder import Autoencoder
from ldm.models.text_encoder import TextEncoder
from ldm.utils.atomic_files import whole_file
from ldm.utils.errors import UserError

PER_FILE = 4096  # entries
BATCH = 32
Variant = tuple[int, bool]  # number of the crop, mirrored or not
KEYS = "keys"  # the tensor of entries' SHA-256, (n, 32) bytes


@dataclass(frozen=True)
class CacheOptions:
    """Where encodings are kept, in which type, and how many loader processes read the images that are encoded."""

    folder: Path
    dtype: str = "float32"
    workers: int = 0

    @classmethod
    def of(cls, data: DataConfig, folder: Path) -> CacheOptions | None:
        """None where `data.cache` is none: everything is then encoded for each batch."""
        return cls(folder, data.cache_dtype, data.workers) if data.cache == "disk" else None


class EncodingStore:
    """One folder of the cache: entries that were made alike, as `about` says, found by their 32-byte keys."""

    def __init__(self, folder: Path, metadata: dict[str, Any]):
        self.metadata = json.dumps(metadata, sort_keys=True)
        self.folder = folder / hashlib.sha256(self.metadata.encode()).hexdigest()[:16]
        self.take([], {})

    def listed(self) -> list[Path]:
        """The files that are there, as far as this machine knows."""
        return sorted(self.folder.glob("*.safetensors"))

    def take(self, files: Iterable[Path], keys_of: Mapping[Path, np.ndarray]) -> None:
        """Takes stock of files, and of no others."""
        self.files = sorted(set(files))
        parts = [keys_of[file] for file in self.files]
        keys = np.concatenate(parts) if parts else np.zeros(0, "S32")
        order = np.argsort(keys, kind="stable")
        self.keys = keys[order]
        numbers = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in parts])
        rows = np.concatenate([np.arange(len(part), dtype=np.int32) for part in parts]) if parts else numbers
        self.places = np.stack([numbers, rows], axis=1)[order]
        self._open: dict[int, dict[str, torch.Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:  # a loader's process maps the files itself
        return {**self.__dict__, "_open": {}}

    def find(self, keys: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Where each key is among `self.keys`, `(N,)`, and whether it is, `(N,)`."""
        sought = np.array(keys, "S32")  # as an array: numpy takes the NULs off the end of a single one
        if not len(self.keys):
            return np.zeros(len(sought), int), np.zeros(len(sought), bool)
        places = np.minimum(np.searchsorted(self.keys, sought), len(self.keys) - 1)
        return places, self.keys[places] == sought

    def __getitem__(self, key: bytes) -> dict[str, torch.Tensor]:
        """The entry's tensors, float32."""
        (place,), (present,) = self.find([key])
        assert present, "what is trained on was encoded before"
        file, row = self.places[place].tolist()
        if file not in self._open:
            self._open[file] = load_file(self.files[file])
        return {name: value[row].float() for name, value in self._open[file].items() if name != KEYS}

    def drop_damaged(self) -> list[Path]:
        """Removes files that aren't what was written, and names them; each process looks at a share of all."""
        state, dropped = PartialState(), []
        for file in self.files[state.process_index :: state.num_processes]:
            if not _sound(file):
                tqdm.write(f"cache: {file.name} is damaged; what it held is encoded again.")
                file.unlink(missing_ok=True)
                dropped.append(file)
        return dropped

    def write(self, tensors: dict[str, torch.Tensor]) -> Path:
        content = save({name: value.contiguous() for name, value in tensors.items()}, {"about": self.metadata})
        file = self.folder / f"{hashlib.sha256(content).hexdigest()[:32]}.safetensors"
        with whole_file(file) as tmp_path:
            tmp_path.write_bytes(content)
        return file

    def explain_misses(self, missing: Sequence[bytes]) -> Counter[str]:
        """What changed since these entries were encoded, where they ever were, with a count each."""
        sought, reasons = np.array(missing, "S32"), Counter[str]()
        left = np.ones(len(sought), bool)
        mine, others = json.loads(self.metadata), []
        for folder in sorted(self.folder.parent.iterdir()) if self.folder.parent.exists() else []:
            file = next(folder.glob("*.safetensors"), None)
            if folder != self.folder and file and (metadata := _metadata(file)):
                others.append(([name for name in mine if metadata.get(name) != mine[name]], folder))
        for changed, folder in sorted(others, key=lambda other: len(other[0])):
            matched = left & np.isin(sought, np.concatenate([_keys(file) for file in folder.glob("*.safetensors")]))
            left &= ~matched
            if matched.any():
                reasons[f"{' and '.join(changed)} changed"] += int(matched.sum())
        if left.any():
            reasons["new or changed"] += int(left.sum())
        return reasons


@dataclass(frozen=True)
class Job:
    """Entries for one shelf: their keys, and what encodes those at some places among them, in batches."""

    store: EncodingStore
    keys: Sequence[bytes]
    encode: Callable[[np.ndarray], Iterator[dict[str, torch.Tensor]]]


def encode_missing(jobs: Sequence[Job], what: str, per_file: int = PER_FILE) -> None:
    """Encodes what is not on the shelves yet, and says how much and why. Each process writes a share of the files.

    UserError, on all processes, where one can't see the files that another sees.
    """
    state, keys_of = PartialState(), dict[Path, np.ndarray]()
    missing = _missing(jobs, what, keys_of)
    chunks = [
        (job, places[start : start + per_file])
        for job, places in zip(jobs, missing, strict=True)
        for start in range(0, len(places), per_file)
    ]
    if not chunks:
        return
    total = sum(map(len, missing))
    if state.is_main_process:
        reasons = Counter[str]()
        for job, places in zip(jobs, missing, strict=True):
            reasons += job.store.explain_misses([job.keys[i] for i in places.tolist()]) if len(places) else Counter()
        explanation = "; ".join(
            f"{count:,} {reason}" if len(reasons) > 1 else reason for reason, count in reasons.items()
        )
        tqdm.write(f"cache: {total:,} of {sum(len(job.keys) for job in jobs):,} {what} to encode: {explanation}.")
    mine, written = chunks[state.process_index :: state.num_processes], []
    with tqdm(total=total, unit=f" {what}", desc="encoding", leave=False, disable=not state.is_main_process) as bar:
        for job, places in mine:
            job.store.folder.mkdir(parents=True, exist_ok=True)
            batches = []
            for batch in job.encode(places):
                batches.append(batch)
                bar.update(len(next(iter(batch.values()))) * min(state.num_processes, len(chunks)))
            tensors = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
            keys = np.frombuffer(b"".join(job.keys[i] for i in places.tolist()), np.uint8).reshape(-1, 32)
            written.append(job.store.write({**tensors, KEYS: torch.from_numpy(keys.copy())}))
    new = [file for share in gathered(written) for file in share]
    stores = [job.store for job in jobs]
    _take(stores, [[*store.files, *(file for file in new if file.parent == store.folder)] for store in stores], keys_of)


def _missing(jobs: Sequence[Job], what: str, keys_of: dict[Path, np.ndarray]) -> list[np.ndarray]:
    """The places of each job's entries that are on no shelf, the same on all processes; drops damaged files."""
    stores = [job.store for job in jobs]
    _take(stores, on_main(lambda: [store.listed() for store in stores]), keys_of)
    dropped = {
        file for share in gathered([file for store in stores for file in store.drop_damaged()]) for file in share
    }
    for file in dropped:
        del keys_of[file]
    if dropped:
        for store in stores:
            store.take(set(store.files) - dropped, keys_of)
    missing = [np.flatnonzero(~job.store.find(job.keys)[1]) for job in jobs]
    seen = [([file.name for file in store.files], len(store.keys)) for store in stores]
    asked = [(len(job.keys), len(places)) for job, places in zip(jobs, missing, strict=True)]
    if len(set(gathered(hashlib.sha256(repr((seen, asked)).encode()).digest()))) > 1:
        raise UserError(
            f"data.cache_dir: the processes find different {what} in it; "
            "give a folder on a file system that all machines share"
        )
    return missing


def _take(stores: Sequence[EncodingStore], files: Sequence[Sequence[Path]], keys_of: dict[Path, np.ndarray]) -> None:
    """Takes stock of these files of each shelf, once all processes see them; those that were removed are left out."""

    def sees(file: Path) -> bool:
        if file not in keys_of:
            try:
                file.open("rb").close()
            except OSError:
                return False
            keys_of[file] = _keys(file)
        return True

    there = set(seen_by_all([file for share in files for file in share], sees))
    for store, share in zip(stores, files, strict=True):
        store.take(there.intersection(share), keys_of)


@dataclass
class Cache:
    """The latents and embeddings of an index."""

    latents: dict[Size, EncodingStore]
    text: EncodingStore | None
    variants: Sequence[Variant]

    def latent(self, crop: Crop, sha256: bytes) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance of a picture's normalised latent, `(C, h, w)` each."""
        entry, variant = self.latents[crop.size][sha256], self.variants.index((crop.number, crop.flip))
        return entry["mean"][variant], entry["logvar"][variant]

    def embedding(self, caption: str) -> torch.Tensor:
        """`(T, D)`."""
        assert self.text, "a cache without captions"
        return self.text[_digest(caption)]["text"]


class CropDataset(torch.utils.data.Dataset[torch.Tensor]):
    """The variants of some pictures of an index, `(V, 3, H, W)` each."""

    def __init__(self, index: Index, entries: np.ndarray, size: Size, variants: Sequence[Variant]):
        self.index, self.entries, self.size, self.variants = index, entries, size, variants

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, i: int) -> torch.Tensor:
        entry = int(self.entries[i])
        picture, sha256 = self.index.picture(entry), self.index[entry].sha256
        return torch.stack([Crop(self.size, *variant).pixels(picture, sha256) for variant in self.variants])


def variants_of(augmentation: Augmentation, index: Index) -> list[Variant]:
    """The variants of each image that the cache holds; mirrored ones where any source mirrors."""
    crops = (-1,) if augmentation.crops is None else range(augmentation.crops)
    mirrors = augmentation.flip or bool(pc.any(index.table["flip"]).as_py())
    return [(crop, flip) for crop in crops for flip in ((False, True) if mirrors else (False,))]


def build(
    index: Index, augmentation: Augmentation, options: CacheOptions, autoencoder: Autoencoder,
    text: TextEncoder | None, per_file: int = PER_FILE,
) -> Cache:  # fmt: skip
    """The cache of an index, encoding what is not there; every process of the run calls it. None: no captions."""
    variants = variants_of(augmentation, index)
    pictures = _pictures(index, options, autoencoder, variants)
    captions = [_captions(index, options, text)] if text else []
    encode_missing(list(pictures.values()), "pictures", max(1, per_file // len(variants)))
    encode_missing(captions, "captions", per_file)
    latents = {size: job.store for size, job in pictures.items()}
    return Cache(latents, captions[0].store if captions else None, variants)


def _pictures(
    index: Index, options: CacheOptions, autoencoder: Autoencoder, variants: Sequence[Variant]
) -> dict[Size, Job]:
    """A job for the pictures of each bucket."""
    dtype, made_by = getattr(torch, options.dtype), autoencoder.encoder_fingerprint()
    sha256 = index.column("sha256").tolist()
    stacked = np.array(sha256, "S32")

    def job(size: Size, entries: np.ndarray) -> Job:
        metadata = {
            "the autoencoder": made_by, "the size": list(size), "data.crop": sorted({crop for crop, _ in variants}),
            "data.flip": any(flip for _, flip in variants), "data.background": index.data.background,
            "data.cache_dtype": options.dtype,
        }  # fmt: skip

        def encode(places: np.ndarray) -> Iterator[dict[str, torch.Tensor]]:
            crops = CropDataset(index, entries[places], size, variants)
            batch = max(1, BATCH // len(variants))
            for pixels in torch.utils.data.DataLoader(crops, batch, num_workers=options.workers):
                moments = autoencoder.moments(pixels.flatten(0, 1))  # (N, V, 3, H, W) → (N·V, 3, H, W)
                mean, logvar = (moment.unflatten(0, pixels.shape[:2]).to("cpu", dtype) for moment in moments)
                yield {"mean": mean, "logvar": logvar}

        return Job(EncodingStore(options.folder / "latents", metadata), [sha256[i] for i in entries], encode)

    jobs = {}
    for size, entries in index.by_size().items():
        entries = entries[np.sort(np.unique(stacked[entries], return_index=True)[1])]  # twins are encoded once
        jobs[size] = job(size, entries)
    return jobs


def _captions(index: Index, options: CacheOptions, text: TextEncoder) -> Job:
    """The job of each distinct caption."""
    captions: dict[bytes, str] = {}
    for several in index.captions():
        captions.update((_digest(caption), caption) for caption in several)
    keys, dtype = list(captions), getattr(torch, options.dtype)

    def encode(places: np.ndarray) -> Iterator[dict[str, torch.Tensor]]:
        for start in range(0, len(places), 2 * BATCH):
            part = [captions[keys[i]] for i in places[start : start + 2 * BATCH]]
            yield {"text": text.encode(part).to("cpu", dtype)}

    metadata = {"the text encoder": text.fingerprint(), "data.cache_dtype": options.dtype}
    return Job(EncodingStore(options.folder / "text", metadata), keys, encode)


def _digest(caption: str) -> bytes:
    return hashlib.sha256(caption.encode()).digest()


def _keys(file: Path) -> np.ndarray:
    """The keys of a file's entries; none of one that is damaged."""
    try:
        with safe_open(file, "np") as opened:
            return np.ascontiguousarray(opened.get_tensor(KEYS)).view("S32").ravel()
    except (OSError, SafetensorError, ValueError):
        return np.zeros(0, "S32")


def _metadata(file: Path) -> dict[str, Any]:
    try:
        with safe_open(file, "np") as opened:
            return dict(json.loads(opened.metadata()["about"]))
    except (OSError, SafetensorError, ValueError, KeyError):
        return {}


def _sound(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest().startswith(file.stem)
    except FileNotFoundError:  # another run found it damaged
        return False
