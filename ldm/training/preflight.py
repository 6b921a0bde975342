"""Time and memory that a stage needs, measured before it starts: two real steps, a validation, samples."""

from __future__ import annotations

import gc
import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object, wait_for_everyone

from ldm.config.loader import dump
from ldm.config.schema import Config
from ldm.data import cache
from ldm.data.crops import Augmentation
from ldm.data.index import Index
from ldm.data.records import HELD_OUT, TRAINED
from ldm.data.stream import Stream
from ldm.distributed import sharding
from ldm.distributed.launch import join, on_main
from ldm.models import autoencoder
from ldm.models.adapters.base_precision import base_bytes
from ldm.training import plan
from ldm.training.checkpoint import steps_done
from ldm.training.dry_run import DryRun
from ldm.training.evaluation_sizes import SHEET_BATCH, sheet_of_prompts
from ldm.training.resource_estimate import ResourceEstimate, format_bytes, format_time
from ldm.utils.atomic_files import atomic_file
from ldm.utils.errors import UserError
from ldm.utils.host_memory import available_memory
from ldm.utils.peak_memory import peak_memory, reset_peak_memory

STEPS = 2  # the first, which also warms up, isn't timed
HELD_OUT_IMAGES = 32  # of the validation, at most
FILE = "preflight.json"
Train = Callable[[Config, Any], None]  # configuration, data


def measure(
    config: Config, stage: str, data: Index | Stream, train: Train, steps: int = STEPS, anew: bool = False
) -> str:
    """A line on what `stage` needs, or why it isn't measured. It is kept in the run's folder for the same machine.

    Measured are `steps` steps without the first, which warms up; with `anew`, also where the folder has a measurement.
    UserError where a step doesn't fit in the GPU's memory.
    """
    state = join(config.run)
    done = steps_done(config.run.dir / stage)
    if not anew and (estimate := on_main(lambda: measured(config, stage))):
        return estimate.describe(config, stage, done)
    if too_little := on_main(lambda: _lacks_memory(config, stage)):
        return too_little
    folder = config.run.dir / ".preflight"  # where all machines of a run can see it
    on_main(partial(shutil.rmtree, folder, ignore_errors=True))  # of a killed one
    try:
        estimate = _measure(config, stage, data, train, folder, steps)
        wait_for_everyone()  # not after an error, which the others may not have: they would never come
    finally:
        if state.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)

    def write() -> None:
        with atomic_file(config.run.dir / FILE) as tmp_path:
            entry = {"about": _cache_key(config, stage), "needs": asdict(estimate)}
            tmp_path.write_text(json.dumps({**_read(config.run.dir), stage: entry}, indent=1) + "\n")

    on_main(write)
    return estimate.describe(config, stage, done)


def measured(config: Config, stage: str) -> ResourceEstimate | None:
    """What a stage needs, as measured in the run's folder on this machine; None where it was not."""
    entry = _read(config.run.dir).get(stage, {})
    return ResourceEstimate(**entry["needs"]) if entry.get("about") == _cache_key(config, stage) else None


def _read(folder: Path) -> dict[str, Any]:
    file = folder / FILE
    return json.loads(file.read_text()) if file.exists() else {}


def describe_total(config: Config, stages: Sequence[str]) -> str:
    """A line on stages together, which `measure` has measured in the run's folder; empty where it has not, or no stage.

    They take their memory one after the other.
    """
    estimates = {stage: estimate for stage in stages if (estimate := measured(config, stage))}
    if not stages or len(estimates) < len(stages):
        return ""
    seconds = sum(
        estimate.seconds_left(config, stage, steps_done(config.run.dir / stage))
        for stage, estimate in estimates.items()
    )
    memory, disk = (max(e.memory for e in estimates.values()), sum(e.disk for e in estimates.values()))
    return f"in all: {format_time(seconds)}, {format_bytes(memory)} of memory, {format_bytes(disk)} of disk"


def _measure(
    config: Config, stage: str, data: Index | Stream, train: Train, folder: Path, steps: int
) -> ResourceEstimate:
    """Dry-runs a small configuration. UserError where memory runs out; no memory is held afterwards."""
    small, cuda = _small(config, stage, folder, steps), _on_gpu(config)
    if isinstance(data, Stream):
        few: Index | Stream = data.with_report(folder / "data-report.jsonl")
    else:
        few = _few(data, getattr(config, stage).batch)
    reset_peak_memory(cuda)
    out_of_memory = ""
    dry_run = DryRun()
    try:
        with dry_run, redirect_stdout(io.StringIO()):  # the real run prints it again
            train(small, few)
    except torch.OutOfMemoryError as error:  # whose traceback holds all tensors, and ends with this block
        out_of_memory = _too_large(config, stage, dry_run.activity, str(error))
    peak = peak_memory(cuda).reserved
    gc.collect()  # networks and their hooks refer to each other
    if cuda:
        torch.cuda.empty_cache()
    if out_of_memory:
        raise UserError(out_of_memory)
    return _estimate(config, stage, data, small, few, dry_run, max(gather_object([peak])))


def _small(config: Config, stage: str, folder: Path, steps: int = STEPS) -> Config:
    """So many steps, then a validation and a sample grid of one batch; writes only to `folder`."""
    sample, processes = config.sample, join(config.run).num_processes
    changes: dict[str, dict[str, Any]] = {
        "run": {"dir": folder, "tracker": "none", "log_every": steps},
        "data": {"cache_dir": None},
        "sample": {"steps": min(STEPS, sample.steps), "prompts": sample.prompts[: SHEET_BATCH * processes]},
        stage: {"steps": steps},
    }
    if stage == "stage2":
        changes[stage]["evaluate_images"] = HELD_OUT_IMAGES
        if evaluate := config.stage2.evaluate:
            few = {"images": evaluate.batch * processes, "steps": min(STEPS, evaluate.steps or sample.steps)}
            changes[stage]["evaluate"] = evaluate.model_copy(update=few)
    elif config.stage1.gan:  # as it is when the discriminator trains
        changes[stage]["gan"] = config.stage1.gan.model_copy(update={"start": 0.0, "warmup": 0, "ramp": 0})
    sections = {name: getattr(config, name).model_copy(update=update) for name, update in changes.items()}
    return config.model_copy(update=sections)


def _estimate(
    config: Config, stage: str, data: Index | Stream, small: Config, few: Index | Stream, dry_run: DryRun, memory: int
) -> ResourceEstimate:
    """What the whole stage needs, from what the small configuration took."""
    t, seconds, processes = getattr(config, stage), dry_run.seconds, join(config.run).num_processes
    cache_dir = small.run.dir / "cache"
    written = sum(path.stat().st_size for path in cache_dir.rglob("*") if path.is_file())
    share = len(data.select(*TRAINED)) / len(few.select(*TRAINED)) if isinstance(data, Index) else 0.0  # of the images
    kept = dry_run.checkpoint_bytes * (config.run.checkpoints_total_limit + 1) + _result_bytes(config, stage, dry_run)
    if t.ema_widths:
        kept += dry_run.weight_bytes * len(t.ema_widths) * math.ceil(t.steps / t.ema_snapshot_every)
    first, *others = dry_run.step_ends  # the first one warms up
    return ResourceEstimate(
        step=(others[-1] - first) / len(others),
        validation=seconds["a validation"]
        * _validation_images(config, stage, data)
        / _validation_images(small, stage, few),
        sheet=_sheet(config, small, seconds["a sample grid"], dry_run.denoising["a sample grid"], processes),
        encoding=seconds["encoding the data"] * share / _encoders(config, data, processes) if written else 0.0,
        memory=memory,
        disk=int(written * share + kept),
        device=_machine(processes, _on_gpu(config)),
        evaluation=_evaluation(config, small, dry_run, processes) if stage == "stage2" else 0.0,
    )


def _evaluation(config: Config, small: Config, dry_run: DryRun, processes: int) -> float:
    """Seconds of `stage2.evaluate`, of which the dry run drew a batch on each process; without the figures' own."""
    evaluate, tried = config.stage2.evaluate, small.stage2.evaluate
    if not (evaluate and tried and tried.steps):
        return 0.0
    seconds, denoising = dry_run.seconds["an evaluation"], dry_run.denoising["an evaluation"]
    steps = evaluate.steps or config.sample.steps
    if steps > tried.steps:
        seconds += denoising * (steps - tried.steps) / (tried.steps - 1)
    return seconds * math.ceil(math.ceil(evaluate.images / evaluate.batch) / processes)


def _result_bytes(config: Config, stage: str, dry_run: DryRun) -> int:
    """Bytes of what a stage hands over: an autoencoder, a pipeline, an adapter's two files, a word."""
    trained, frozen, finetune = dry_run.weight_bytes, dry_run.frozen_bytes, config.finetune
    if stage == "stage1":
        return trained + frozen
    files = 0 if finetune.kind == "full" else 2 * trained
    if finetune.deliverable != "pipeline":
        return files
    with torch.device("meta"):
        others = 4 * sum(p.numel() for p in autoencoder.build(config.stage1, config.data.size).parameters())
    if config.stage2.text and not (config.text.train or finetune.text_encoder):  # or it is in the network
        others += 4 * plan.text_encoder_sizes(config.text).frozen
    return files + others + frozen + (trained if finetune.kind == "full" else 0)


def _sheet(config: Config, small: Config, seconds: float, denoising: float, processes: int) -> float:
    """Seconds of a full sample grid: each further solver step takes as long as the small one's later ones."""
    steps, tried = config.sample.steps, small.sample.steps
    if steps > tried:
        seconds += denoising * (steps - tried) / (tried - 1)
    if not sheet_of_prompts(config):  # all of whose images were sampled
        return seconds
    full, sampled = (-(-len(c.sample.prompts) // processes) for c in (config, small))
    return seconds * full / max(1, sampled)


def _encoders(config: Config, data: Index | Stream, processes: int) -> int:
    """Processes that encode the data in parallel; each writes complete files of the cache."""
    if not isinstance(data, Index):
        return 1
    files = -(-len(data) * len(cache.variants_of(Augmentation.of(config.data), data)) // cache.PER_FILE)
    return max(1, min(processes, files))


def _too_large(config: Config, stage: str, activity: str, error: str) -> str:
    """The error line: what does not fit in a GPU's memory, and what to do."""
    lower = f"lower {stage}.device_batch"
    remedies = {
        "the model": f"set {stage}.optimizer=adamw8bit, take a smaller {stage}.model, or shard it with FSDP",
        "a training step": f"{lower}, or set {stage}.gradient_checkpointing=true",
        "encoding the data": "free the GPU of other programs, or take a smaller data.size",
        "an evaluation": "lower stage2.evaluate.batch",
    }
    if stage == "stage1":  # never sharded; a validation computes so many pixels at once, whatever the device_batch
        remedies["the model"] = "set stage1.optimizer=adamw8bit, or take a smaller stage1.model"
        remedies["a validation"] = "take a smaller stage1.model or data.size"
        if config.stage1.family != "kl":  # others have no gradient checkpointing
            remedies["a training step"] = lower
    remedy = remedies.get(activity, f"{lower}, which it follows")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "the device"
    return f"{stage}: {activity} does not fit in the memory of {gpu} ({error.split('. ')[0]}); {remedy}"


def _lacks_memory(config: Config, stage: str) -> str:
    """On a CPU, where a step that does not fit kills the process silently: why it isn't tried."""
    if _on_gpu(config):
        return ""
    networks = dict(zip(("stage1", "stage2"), plan.networks(config), strict=True))
    least = 20 * sum(p.numel() for p in networks[stage].parameters())  # float32 weights, gradients, moments, average
    if stage == "stage2" and config.finetune.kind != "full":
        least = base_bytes(networks[stage], config.finetune.base_precision)
    if sharding.sharding_kind() != "fsdp":  # which divides them
        least *= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if least < (available := available_memory()):
        return ""
    needed, free = format_bytes(least), format_bytes(available)
    return f"{stage}: not measured: it needs more than {needed} of memory, and {free} are free here"


def _few(data: Index, batch: int) -> Index:
    """A batch of the images that are resized to the largest size, and some held-out ones."""
    train, held = data.select("train"), data.select(*HELD_OUT).subset(HELD_OUT_IMAGES)
    size = max(train.sizes.used(), key=lambda size: size[0] * size[1])
    largest = np.flatnonzero(train.sizes.numbers() == train.sizes.distinct.index(size))[:batch]
    return Index(data.table, data.sources, data.data, np.concatenate([train.rows[largest], held.rows]))


def _validation_images(config: Config, stage: str, data: Index | Stream) -> int:
    """How many images a validation has, for its time is proportional; 1 where that is not known."""
    if not isinstance(data, Index) or not (held := len(data.select(*HELD_OUT))):
        return 1
    most = getattr(config, stage).evaluate_images
    return min(held, most) if stage == "stage1" else min(held, most) + min(len(data.select("train")), most)


def _cache_key(config: Config, stage: str) -> dict[str, Any]:
    """What the measurement depends on."""
    keys = dump(config)
    parts = {name: keys[name] for name in ("data", "text", "stage1", "stage2")}
    if not config.stage2.evaluate:  # as before there was this key
        parts["stage2"] = {name: value for name, value in keys["stage2"].items() if name != "evaluate"}
    if config.finetune.kind != "full":  # as before there was this section
        parts["finetune"] = keys["finetune"]
    parts["run"] = {name: keys["run"][name] for name in ("precision", "checkpoints_total_limit")}
    for name in ("stage1", "stage2"):
        if not getattr(config, name).ema_widths:  # whose snapshots take disk
            parts[name] = {**parts[name], "steps": None}
    parts["data"] = {**parts["data"], "cache_dir": None}
    del parts["data"]["prefetch_factor"]  # which changes no step that has its data
    if stage == "stage2":  # keys that may change while a run goes on
        parts["sample"] = {name: keys["sample"][name] for name in ("steps", "guidance", "solver", "prompts")}
    return {
        "configuration": hashlib.sha256(json.dumps([stage, parts], sort_keys=True).encode()).hexdigest(),
        "machine": _machine(join(config.run).num_processes, _on_gpu(config)),
        "torch": torch.__version__,
    }


def _on_gpu(config: Config) -> bool:
    return torch.cuda.is_available() and config.run.device != "cpu"


def _machine(processes: int, cuda: bool) -> str:
    name = torch.cuda.get_device_name() if cuda else f"the CPU ({torch.get_num_threads()} threads)"
    return name if processes == 1 else f"each of {processes} processes, on {name}"
