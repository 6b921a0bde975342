"""The folder of a run, or of a model made from one: made, continued, or refused where it is another's."""

from __future__ import annotations

import itertools
import platform
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from ldm.config.loader import differences, dump, parse
from ldm.config.old_names import rename_keys
from ldm.config.schema import Config, Section
from ldm.distributed.launch import join, on_main
from ldm.training.checkpoint import steps_done
from ldm.training.optimizer import lr_factor
from ldm.utils.atomic_files import atomic_file
from ldm.utils.errors import UserError
from ldm.utils.folder_lock import lock

# Keys that change neither a run's numbers nor their meaning: a run may be continued with other values.
CHANGEABLE = (
    "run.dir",
    "run.preflight",
    "run.checkpoints_total_limit",
    "run.log_every",
    "run.max_skipped",
    "run.tracker",
    "run.device",
    "data.workers",
    "data.prefetch_factor",
    "data.cache_dir",
    "data.on_error",
    "data.max_bad",
    "sample.",
    "budget.",
    "stage2.evaluate.",
    "stage2.evaluate:",  # where it is switched on or off
)
CHANGEABLE_IN_STAGES = ("checkpoint_every", "ema_snapshot_every", "evaluate_every", "evaluate_images", "device_batch")


def prepare_run_dir(config: Config, fresh: bool = False) -> Config:
    """Makes the run's folder, or continues the one there, and writes `config.yaml`.

    With more `stage2.steps` than it was trained for, a run continues to these; its pipeline (or adapter) is kept as
    `pipeline-STEPS`, and comes back where the steps are lowered again before the longer run is finished.

    UserError, with the keys that differ, where it belongs to another configuration, or where another process trains in
    it: the main process locks it. With `fresh` a used folder is left alone and the first free one of `DIR-2`, `DIR-3`,
    … is made: the configuration returned names it.
    """
    join(config.run)
    folder = on_main(lambda: _prepare(config, config.run.dir, fresh))
    return config.model_copy(update={"run": config.run.model_copy(update={"dir": folder})})


def _prepare(config: Config, folder: Path, fresh: bool) -> Path:
    if (folder / "config.yaml").exists() and fresh:
        folder = _make_next(folder)
        print(f"This run is in {folder}; to continue it, give run.dir={folder} without --fresh.", file=sys.stderr)
    file, origin, stage2_begun = folder / "config.yaml", None, False
    if file.exists():
        written = yaml.safe_load(file.read_text("utf-8"))
        if not isinstance(written, dict) or "configuration" not in written:
            raise UserError(f"run.dir: {folder} is not a run of train_ldm.py; give another folder")
        stage2_begun = any(_results(folder, config)) or any((folder / "stage2" / "checkpoints").glob("step-*"))
        origin, old = written["about"] if stage2_begun else None, _with_defaults(written["configuration"])
        if changed := _fixed_changes(folder, old, config, stage2_begun):
            raise UserError(
                f"run.dir: {folder} belongs to another configuration ({'; '.join(changed)}); "
                "give another run.dir, or --fresh to start in a new one"
            )
        lock("run.dir", folder)
        if stage2_begun:
            _change_steps(folder, old["stage2"]["steps"], config)
    make_dir("run.dir", folder)
    lock("run.dir", folder)
    tree = {"about": origin or provenance(), "configuration": dump(config)}
    with atomic_file(file) as tmp_path:
        tmp_path.write_text(yaml.safe_dump(tree, sort_keys=False), "utf-8")
    if stage2_begun:
        _restore_results(folder, config)  # after config.yaml, which then has its steps
    if config.data.cache_dir:
        make_dir("data.cache_dir", config.data.cache_dir)
    return folder


def prepare_out_dir(folder: Path, kind: type[Section], section: str, tree: dict[str, Any]) -> None:
    """Makes the folder of a model made from a run, or continues it, and writes `tree` to its `config.yaml`.

    `tree` has the configuration, of the `kind`, in its `section`, and what the model is made from. Once there is a
    checkpoint, UserError where it differs from what was written, but for the run's path and CHANGEABLE_IN_STAGES; also
    where another process trains in the folder.
    """
    file, origin = folder / "config.yaml", provenance()
    if file.exists():
        old = yaml.safe_load(file.read_text("utf-8"))
        if not isinstance(old, dict) or section not in old:
            raise UserError(f"--out: {folder} is a folder of another kind; give another one")
        if "pictures" in old:  # a former name
            old["fingerprint"] = old.pop("pictures")
        finished = any((folder / name).exists() for name in ("model", "pipeline"))
        if finished or any(folder.glob("*/checkpoints/step-*")):
            origin = old.get("about", origin)
            if changed := _fixed_out_changes(kind, section, old, tree):
                raise UserError(f"--out: {folder} belongs to another training ({'; '.join(changed)}); give another one")
    make_dir("--out", folder)
    lock("--out", folder)
    with atomic_file(file) as tmp_path:
        tmp_path.write_text(yaml.safe_dump({"about": origin, **tree}, sort_keys=False), "utf-8")


def _fixed_out_changes(kind: type[Section], section: str, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Differences in keys that may not change any more, named as the command takes them."""
    renamed, _ = rename_keys(kind, old[section])
    values = {**kind().model_dump(mode="json"), **renamed}  # an older version's may lack some
    changed = [
        change
        for change in differences(values, new[section])
        if change.partition(":")[0].rpartition(".")[2] not in CHANGEABLE_IN_STAGES
    ]
    origins = new.keys() - {section, "run"}  # the run may have moved
    return changed + differences({name: old.get(name) for name in origins}, {name: new[name] for name in origins})


def _fixed_changes(folder: Path, old: dict[str, Any], config: Config, stage2_begun: bool) -> list[str]:
    """Differences from a run's configuration in keys that may not change any more."""
    prefixes = CHANGEABLE if stage2_begun else (*CHANGEABLE, "stage2.", "text.", "finetune.")
    names = set(CHANGEABLE_IN_STAGES)
    gan = config.stage1.gan
    if config.stage1.family == "vq" or (gan and (gan.adaptive or gan.norm == "batch")):
        names.remove("device_batch")  # stage one's loss depends on what is computed together
        prefixes = (*prefixes, "stage2.device_batch")
    if config.finetune.dropout:  # drawn for what is computed together
        names.discard("device_batch")
    steps = config.stage2.steps
    if old.get("stage2", {}).get("steps", 0) < steps or (stage2_begun and _can_be_lowered(folder, config)):
        prefixes = (*prefixes, "stage2.steps")
    return [
        change
        for change in differences(old, dump(config))
        if not (change.startswith(prefixes) or change.partition(":")[0].rpartition(".")[2] in names)
    ]


def _results(folder: Path, config: Config) -> list[Path]:
    """The folders of stage two's result that are there."""
    return [folder / name for name in config.finetune.deliverables if (folder / name).exists()]


def _can_be_lowered(folder: Path, config: Config) -> bool:
    """Whether an unfinished stage two may end at its `steps`: it has not gone further, or has been exported there."""
    deliverable, steps = config.finetune.deliverable, config.stage2.steps
    if (folder / deliverable).exists():
        return False
    return (folder / f"{deliverable}-{steps}").exists() or steps_done(folder / "stage2") <= steps


def _change_steps(folder: Path, old_steps: int, config: Config) -> None:
    """Says what other steps mean, and sets the result of the old number aside: without it, stage two continues."""
    stage2, deliverable = config.stage2, config.finetune.deliverable
    if stage2.steps == old_steps:
        return
    done, change = steps_done(folder / "stage2"), f"stage2.steps: {old_steps} → {stage2.steps}"
    lr = "the learning rate stays constant"
    if stage2.lr_scheduler != "constant":
        factor = lr_factor(done, stage2)
        lr = f"lr_scheduler {stage2.lr_scheduler} now ends at {stage2.steps}: {factor:.0%} of stage2.lr at {done}"
    if not (folder / f"{deliverable}-{stage2.steps}").exists():
        if not done:
            weights = f"stage2.init_from={folder / 'pipeline'} with another run.dir trains from its weights"
            remedy = weights if deliverable == "pipeline" else "train in another run.dir"
            raise UserError(
                f"{change}, but {folder / 'stage2/checkpoints'} has no checkpoint to continue from; {remedy}"
            )
        if done > stage2.steps:
            raise UserError(f"{change}, but the run has gone to {done}; give {done} or more")
        print(f"{change}; {lr}.", file=sys.stderr)
    for result in reversed(_results(folder, config)):  # before config.yaml is written: it always has the steps there
        kept = folder / f"{result.name}-{old_steps}"
        result.replace(kept)
        print(f"The {result.name} of {old_steps} steps is kept as {kept}.", file=sys.stderr)


def _restore_results(folder: Path, config: Config) -> None:
    """Takes up the result of the configured steps again, which was set aside for a longer training."""
    steps = config.stage2.steps
    for name in config.finetune.deliverables:
        result, kept = folder / name, folder / f"{name}-{steps}"
        if kept.exists() and not result.exists():
            kept.replace(result)
            print(f"The {name} of {steps} steps, {kept}, is {result} again.", file=sys.stderr)


def provenance() -> dict[str, Any]:
    """What makes a run: the command as a shell takes it, commit and versions."""
    return {
        "command": shlex.join(sys.argv),
        "git_commit": _commit(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "diffusers", "transformers", "accelerate")},
    }


def _with_defaults(old: dict[str, Any]) -> dict[str, Any]:
    """A configuration of an older version, with defaults for the keys that it lacks."""
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


def _make_next(folder: Path) -> Path:
    """Makes and returns the first of `DIR-2`, `DIR-3`, … that doesn't exist."""
    for number in itertools.count(2):
        candidate = folder.with_name(f"{folder.name}-{number}")
        try:
            candidate.mkdir()
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"run.dir: can't write {candidate}: {error.strerror}; give another folder") from None
        return candidate
    raise AssertionError("unreachable")


def _commit() -> str:
    try:
        result = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:  # git is not installed
        return "unknown"
    return result.stdout.strip() or "unknown"


def remove_later_outputs(stage_dir: Path, step: int) -> None:
    """Removes sample grids and snapshots of later steps than the one that a run continues from; it makes them again."""
    for path in (*stage_dir.glob("samples/step-*"), *stage_dir.glob("ema/step-*")):
        number = path.name.split("-")[1].partition(".")[0]
        if number.isdigit() and (int(number) > step or not step):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
