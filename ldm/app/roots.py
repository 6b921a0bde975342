"""The folders that the app may read, and the models and runs in them."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from ldm.utils.errors import UserError
from ldm.utils.paths import expand

ROOTS = "LDM_APP_ROOTS"
"""The environment variable with the roots, set by `ldm-app`."""
MAX_FOUND = 200
DIFFUSERS_LORA = "pytorch_lora_weights.safetensors"
INDEX = "model_index.json"
"""The file by which a pipeline's folder is known."""


def roots() -> list[Path]:
    """The folders that may be read, resolved; `runs` where none was chosen."""
    return [Path(root).resolve() for root in os.environ.get(ROOTS, "runs").split(os.pathsep)]


def inside(path: Path) -> bool:
    """Whether a resolved path lies in one of the roots."""
    return any(path.is_relative_to(root) for root in roots())


def allowed(text: str) -> Path:
    """The folder or file that someone typed; UserError if it is outside the roots, links followed, or missing.

    A relative path starts at the current folder, at a root, or as menus show it, with the root's name.
    """
    try:
        typed = Path(expand(text.strip()))
        starts = [Path(), *(start for root in roots() for start in (root, root.parent))]
        paths = [path for start in starts if (path := (start / typed).resolve()).exists()]
        refused = "" if not paths or any(map(inside, paths)) else outside(paths[0])
    except (OSError, ValueError) as error:
        raise UserError(f"folder: {text!r} can't be read ({error}); give another") from None
    if refused:
        raise UserError(f"folder: {refused}")
    if not paths:
        where = ", ".join(map(str, roots()))
        raise UserError(f"folder: there is no {typed}; give a folder or file in {where}")
    return next(filter(inside, paths))


def outside(path: Path) -> str:
    """That a resolved path is outside of the roots, and what to do about it; OSError where it can't be looked at."""
    where = ", ".join(map(str, roots()))
    if not path.exists():
        return f"{path} is outside of {where}, and there is no such path; give one inside"
    folders = [*filter(Path.is_dir, roots()), path if path.is_dir() else path.parent]
    flags = shlex.join(flag for folder in folders for flag in ("--root", str(folder)))
    return f"{path} is outside of {where}; start the app with {flags}"


def _found(*patterns: str) -> list[Path]:
    """The files of these patterns in all roots, links followed, those outside left out; at most `MAX_FOUND`."""
    folders: dict[Path, None] = {}
    for root in roots():
        for pattern in patterns:
            for path in sorted(root.glob(pattern)):
                if inside(path.resolve()):
                    folders[path] = None
    return list(folders)[:MAX_FOUND]


def pipelines() -> list[Path]:
    """Folders of finished pipelines, up to two folders below a root."""
    return [path.parent for path in _found(INDEX, f"*/{INDEX}", f"*/*/{INDEX}")]


def upscalers() -> list[Path]:
    """Those of `pipelines` that enlarge images."""
    return [path for path in pipelines() if b"StableDiffusionUpscalePipeline" in (path / INDEX).read_bytes()]


def runs() -> list[Path]:
    """Folders of trainings, finished or not, up to two folders below a root."""
    return [path.parent for path in _found("config.yaml", "*/config.yaml", "*/*/config.yaml")]


def started_runs() -> list[Path]:
    """Folders of trainings, and of those that the app started and that had no time to write more; the newest first."""
    logs = [path.parent for path in _found("process.json", "*/process.json", "*/*/process.json")]
    return sorted(dict.fromkeys([*runs(), *logs]), key=lambda run: -run.stat().st_mtime)


def learned_runs() -> list[Path]:
    """Those of `runs` that learn their noise schedule."""
    return [
        run
        for run in runs()
        if (run / "stage2/checkpoints").is_dir() and b"beta_schedule: learned\n" in (run / "config.yaml").read_bytes()
    ]


def classifiers() -> list[Path]:
    """Runs of classifiers that guide, up to two folders below a root."""
    files = _found("model/config.json", "*/model/config.json", "*/*/model/config.json")
    return [path.parents[1] for path in files if b'"NoisyClassifier"' in path.read_bytes()]


def families() -> list[Path]:
    """Finished comparisons of a GAN, a VAE and a diffusion model, up to two folders below a root."""
    return [path.parent for path in _found("families.md", "*/families.md", "*/*/families.md")]


def loras() -> list[Path]:
    """Adapters that trainings wrote: files in `RUN/lora`; of one adapter in several layouts, diffusers' own."""
    files = _found("lora/*.safetensors", "*/lora/*.safetensors")
    return [file for file in files if file.name == DIFFUSERS_LORA or not file.with_name(DIFFUSERS_LORA).exists()]


def adapter_name(path: Path) -> str:
    """An adapter as menus show it: by its run, where it is the run's only one."""
    return short(path.parents[1] if path.name == DIFFUSERS_LORA else path)


def short(path: Path) -> str:
    """A path as menus show it: from its root on."""
    root = next((root for root in roots() if path.is_relative_to(root)), path)
    return str(path.relative_to(root.parent)) if root != path else path.name
