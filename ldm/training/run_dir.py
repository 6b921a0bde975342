"""A run's folder: who it belongs to, and the card that says what lies in it."""

from __future__ import annotations

import itertools
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from ldm.config.loader import differences, dump, parse
from ldm.config.schema import Config
from ldm.data import openmoji
from ldm.distributed.launch import join, on_main
from ldm.models.autoencoder import STATISTICS
from ldm.training.checkpoint import checkpoints
from ldm.utils.atomic_files import whole_file
from ldm.utils.errors import UserError

# Keys that change neither the numbers of a run nor what they mean; a run may be continued with others.
FREE = (
    "run.dir",
    "run.preflight",
    "run.checkpoints_total_limit",
    "run.log_every",
    "run.max_skipped",
    "run.tracker",
    "run.device",
    "data.workers",
    "data.cache_dir",
    "data.on_error",
    "data.max_bad",
    "sample.",
)
FREE_ENDS = (".checkpoint_every", ".ema_snapshot_every", ".evaluate_every", ".evaluate_images", ".device_batch")


def prepare_run_dir(config: Config, fresh: bool = False) -> Config:
    """Makes the run's folder, or takes it up again, and writes `config.yaml`.

    UserError, with the keys that differ, where it belongs to another configuration. With `fresh` a used folder is left
    alone and the first free one of `DIR-2`, `DIR-3`, … is taken: the configuration that comes back names it.
    """
    join(config.run)
    folder = on_main(lambda: _claim(config, config.run.dir, fresh))
    return config.model_copy(update={"run": config.run.model_copy(update={"dir": folder})})


def _claim(config: Config, folder: Path, fresh: bool) -> Path:
    file = folder / "config.yaml"
    if file.exists() and fresh:
        folder = _free(folder)
        file = folder / "config.yaml"
        print(f"This run is in {folder}; to continue it, give run.dir={folder} without --fresh.", file=sys.stderr)
    known: dict[str, Any] = {}
    if file.exists():
        begun = (folder / "pipeline").exists() or any((folder / "stage2" / "checkpoints").glob("step-*"))
        still_free = FREE if begun else (*FREE, "stage2.", "text.")
        one = config.stage1
        ends: tuple[str, ...] = FREE_ENDS
        together = one.gan and (one.gan.adaptive or one.gan.norm == "batch")
        if together or one.family == "vq":  # weighed, normalised or revived by what is computed together
            still_free = (*still_free, "stage2.device_batch")
            ends = tuple(end for end in FREE_ENDS if end != ".device_batch")
        written = yaml.safe_load(file.read_text("utf-8"))
        known, old = written["about"] if begun else {}, _completed(written["configuration"])
        changed = [
            change for change in differences(old, dump(config))
            if not change.startswith(still_free) and not change.partition(":")[0].endswith(ends)
        ]  # fmt: skip
        if changed:
            raise UserError(
                f"run.dir: {folder} belongs to another configuration ({'; '.join(changed)}); "
                "give another run.dir, or --fresh to start beside it"
            )
    make_dir("run.dir", folder)
    known = known or about()
    with whole_file(file) as tmp_path:
        tmp_path.write_text(yaml.safe_dump({"about": known, "configuration": dump(config)}, sort_keys=False), "utf-8")
    if config.data.cache_dir:
        make_dir("data.cache_dir", config.data.cache_dir)
    return folder


def about() -> dict[str, Any]:
    """By what a run is made: command, commit and versions."""
    return {
        "command": " ".join(sys.argv), "git_commit": _commit(), "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "diffusers", "transformers", "accelerate")},
    }  # fmt: skip


def _completed(old: dict[str, Any]) -> dict[str, Any]:
    """A configuration of an older version, with the keys that there were not yet as they are by default."""
    try:
        return dump(parse(old, "config.yaml"))
    except UserError:  # it has a key that there no longer is
        return old


def make_dir(key: str, folder: Path) -> None:
    """Makes the folder of a key, or takes the one that is there; UserError where that can't be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{key}: can't write {folder}: {error.strerror}; give a folder that you may write to") from None


def check_finished(folder: Path, contract: dict[str, Any]) -> None:
    """UserError where the finished stage in `folder` was trained under another contract, on other pictures for one."""
    for checkpoint in checkpoints(folder)[-1:]:
        before = json.loads((checkpoint / "state.json").read_text())["contract"]
        changed = [name for name, value in contract.items() if before.get(name) != value]
        if changed:
            raise UserError(
                f"{folder.parent} is finished, but its {' and '.join(changed)} changed since; "
                "give another run.dir, or --fresh to train beside it"
            )


def _free(folder: Path) -> Path:
    """Makes and returns the first of `DIR-2`, `DIR-3`, … that was not there."""
    for number in itertools.count(2):
        free = folder.with_name(f"{folder.name}-{number}")
        try:
            free.mkdir()
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"run.dir: can't write {free}: {error.strerror}; give another folder") from None
        return free
    raise AssertionError("unreachable")


def write_card(config: Config, figures: Mapping[str, Any] = MappingProxyType({})) -> None:
    """`README.md` of a finished run: what it was trained on and how, the figures reached, a sheet of samples.

    `figures` are added to those of the autoencoder's own folder; nested ones are written in one row each.
    """
    folder = config.run.dir
    facts = folder / "autoencoder" / STATISTICS
    found = json.loads(facts.read_text("utf-8")).get("held_out", {}) if facts.exists() else {}
    rebuilt = {name: found[name] for name in ("psnr", "ssim") if name in found}
    grids = list((folder / "stage2" / "samples").glob("step-*.png"))
    if grids:
        newest = max(grids, key=lambda path: int(path.stem.removeprefix("step-")))
        shutil.copy(newest, folder / "samples.png")
    one, two = config.stage1, config.stage2
    trained = "none: pixels" if one.needs_none else f"{one.model}, {one.steps} steps of {one.batch}"
    lines = [
        f"# {folder.name}", "", f"{_kind(config)} {_usage(config)}", "",
        *(["![samples](samples.png)", ""] if grids else []),
        *(["Framed: prompts whose pictures no training saw.", ""] if grids and two.text and not two.image else []),
        "| | |", "|---|---|",
        f"| data | `{config.data.name}`, {config.data.size} px |",
        f"| conditions | {', '.join(two.conditions) or 'none'} |",
        *([f"| text encoder | `{config.text.model}`{', trained along' * config.text.train} |"] if two.text else []),
        f"| autoencoder | {one.pretrained or trained} |",
        f"| U-Net | {two.init_from or f'channels {list(two.channels)}'}, {two.steps} steps of {two.batch} |",
        f"| process | {two.prediction_type}{f', {two.beta_schedule} schedule' * (two.prediction_type != 'flow')} |",
        f"| sampling | {config.sample.solver}, {config.sample.steps} steps, guidance {config.sample.guidance} |",
        *(f"| {name} | {value:.3f} |" for name, value in _flat({**rebuilt, **figures})),
        "",
        *([openmoji.ATTRIBUTION, ""] if any(source.path in openmoji.SUBSETS for source in config.data.source) else []),
        "Everything that was set is in `config.yaml`.", "",
    ]  # fmt: skip
    with whole_file(folder / "README.md") as tmp_path:
        tmp_path.write_text("\n".join(lines), "utf-8")


def _kind(config: Config) -> str:
    two, space = config.stage2, "latent" if config.stage1.factor > 1 else "pixel"
    if two.image:
        does = (
            "fills holes in pictures"
            if "inpaint" in two.conditions
            else f"enlarges pictures {config.stage1.factor}-fold"
        )
        return f"A {space} diffusion model that {does}."
    kind = "text-to-image" if two.text else "class-conditional" if two.classes else "unconditional"
    return f"A {kind} {space} diffusion model."


def _usage(config: Config) -> str:
    """How the pipeline is used: in plain diffusers where its pipelines have arguments for the model's conditions."""
    two, sample, folder = config.stage2, config.sample, config.run.dir / "pipeline"
    prompt = json.dumps((sample.prompts or ("a red heart",))[0], ensure_ascii=False)
    steps = f"num_inference_steps={sample.steps}"
    guided = f"{steps}, guidance_scale={sample.guidance}"
    call = {
        "text": f"pipe({prompt}, {guided}).images[0]",
        "": f"pipe({steps}).images[0]",
        "text inpaint": f"pipe({prompt}, image=picture, mask_image=mask, {guided}).images[0]",
        "text upscale": f"pipe({prompt}, image=small, {guided}).images[0]",
    }.get(" ".join(two.conditions))
    decoded = not two.text or config.stage1.family in ("kl", "tiny")  # by diffusers' Stable Diffusion pipelines
    ours = two.uncond_embedding == "learned" or config.text.chunks > 1 or not decoded
    if call and not ours:
        code = [
            "from diffusers import DiffusionPipeline",
            f'pipe = DiffusionPipeline.from_pretrained("{folder}")',
            call,
        ]
        return "\n".join(["The folder `pipeline` opens in plain diffusers:", "", "```python", *code, "```"])
    told = {"text": prompt, "class": "labels=0", "inpaint": "image=picture, mask=mask", "upscale": "image=small"}
    given = ", ".join(told[each] for each in two.conditions if each in told)
    code = [
        "from ldm.sampling.pipeline import LatentDiffusion",
        f'model = LatentDiffusion.load("{folder}")',
        f"model({given})[0]",
    ]
    return "\n".join(["With `ldm` installed:", "", "```python", *code, "```"])


def _flat(figures: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    rows: list[tuple[str, float]] = []
    for name, value in figures.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name} ")
        elif isinstance(value, float):
            rows.append((prefix + name, value))
    return rows


def _commit() -> str:
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:  # no git here
        return "unknown"
    return found.stdout.strip() or "unknown"
