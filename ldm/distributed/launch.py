"""The processes of a run and their devices, as accelerate finds them."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import broadcast_object_list, patch_environment

from ldm.config.loader import key_of
from ldm.config.schema import RunConfig, Training
from ldm.distributed.accumulation import Accumulation, accumulation
from ldm.distributed.sharding import KINDS
from ldm.utils.cpu_load import SECONDS, own_cpus, threads_with_a_core
from ldm.utils.errors import UserError
from ldm.utils.folder_lock import release_locks

Result = TypeVar("Result")
Item = TypeVar("Item", covariant=True)

TIMEOUT = timedelta(hours=12)  # of the others, while one encodes a data set or draws samples


def join(config: RunConfig) -> PartialState:
    """Joins the processes that torchrun or `accelerate launch` started."""
    with unsharded():
        state = PartialState(cpu=_on_cpu(config), timeout=TIMEOUT)
    if not hasattr(state, "unsharded"):
        state.unsharded = state.distributed_type
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != world_size:  # each would train alone, and overwrite the others
        raise UserError(
            f"{world_size} processes were started, but accelerate joined {state.num_processes}; use torchrun"
        )
    return state


@contextmanager
def training_processes(config: RunConfig) -> Iterator[PartialState]:
    """The processes of a training command, which join at its start and leave together at its end.

    SIGUSR1, which asks a run for a checkpoint, is ignored until a run handles it.
    """
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    state = join(config)
    with release_locks():
        yield state
    state.wait_for_everyone()  # not after an error: the others may have none, and never arrive
    state.destroy_process_group()  # or gloo's threads may abort the process as it ends


@cache
def say_idle_cores(processes: int) -> None:
    """Prints a hint, once, where cores are idle: by default `accelerate launch` gives a CPU process one thread."""
    cores = len(own_cpus())
    share = cores // processes if processes > 1 else threads_with_a_core(cores, SECONDS)
    if torch.get_num_threads() == 1 < share:
        print(
            f"One thread a process on {cores} cores; OMP_NUM_THREADS={share}, or accelerate launch "
            f"--num_cpu_threads_per_process {share}, would be faster.",
            file=sys.stderr,
        )


@cache
def say_dynamo_is_ignored(backend: str) -> None:
    """Prints, once, that accelerate's configuration compiles nothing, where it names a `backend` to compile with."""
    if backend != "no":
        print(
            f"accelerate's dynamo_backend ({backend}) is ignored; stage2.compile=true compiles the U-Net.",
            file=sys.stderr,
        )


def on_main(action: Callable[[], Result]) -> Result:
    """Runs `action` on the main process and returns its result, or raises its UserError, on all processes."""
    state = PartialState()
    outcome: list[Any] = [None, None]
    if state.is_main_process:
        try:
            outcome = [action(), None]
        except UserError as error:
            outcome = [None, str(error)]
    broadcast_object_list(outcome)
    if outcome[1]:
        raise UserError(outcome[1])
    return outcome[0]  # type: ignore[no-any-return]


def precision(config: RunConfig) -> str:
    """`no`, `bf16` or `fp16`: `run.precision`, with `auto` resolved for this machine."""
    if config.precision != "auto":
        return config.precision
    cpu = _on_cpu(config)
    native = torch.cpu._is_avx512_bf16_supported() if cpu else torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if native else "no"


def accelerator(config: RunConfig, accumulation_steps: int = 1, project_dir: Path | None = None) -> Accelerator:
    """accelerate for this run's device and precision.

    It shards nothing, which `ldm.distributed.sharding` does, and compiles nothing, which `stage2.compile` decides.
    """
    state = join(config)
    if state.is_main_process:
        say_dynamo_is_ignored(os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower())
    cpu = _on_cpu(config)
    if not cpu:  # the rest of float32: TF32 in matrix products, as in convolutions; the fastest convolutions
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    # Buffers are equal in all processes already. Gradients as views of the buckets save a copy.
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)
    state.distributed_type = state.unsharded  # an earlier run of this process may have been sharded
    precedence = patch_environment(ACCELERATE_GRADIENT_ACCUMULATION_STEPS=str(accumulation_steps))
    with unsharded(), precedence:
        return Accelerator(
            cpu=cpu,
            mixed_precision=precision(config),
            dynamo_backend="no",
            gradient_accumulation_steps=accumulation_steps,
            kwargs_handlers=[ddp],
            log_with=None if config.tracker == "none" else config.tracker,
            project_dir=str(project_dir or config.dir),
        )


class DataLoader(torch.utils.data.DataLoader[Item]):
    """torch's, whose processes ignore signals to the whole process group, so that the run has data until it saved.

    By default torch ends a worker at a SIGTERM, and with it the run. A SIGTERM of the parent itself still ends it.
    """

    def __init__(self, dataset: torch.utils.data.Dataset[Item], **options: Any):
        super().__init__(dataset, worker_init_fn=_leave_signals_to_parent, **options)

    def __iter__(self) -> Any:
        if not hasattr(signal, "pthread_sigmask"):
            return super().__iter__()
        # Threads that a library starts in a forked process have the mask of the thread that forks.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_parent(_worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    # A thread that has unblocked it may receive it instead of `wait`: then the sender isn't known.
    signal.signal(signal.SIGTERM, lambda _number, _frame: None)

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def unsharded() -> AbstractContextManager[None]:
    """A context in which accelerate ignores its configuration for FSDP or DeepSpeed."""
    return patch_environment(**dict.fromkeys(KINDS, "false"))  # type: ignore[no-any-return]


def accumulated(stage: str, training: Training, processes: int) -> Accumulation:
    """How a stage's batch is accumulated; UserError where it can't be divided evenly among the processes."""
    try:
        return accumulation(training.batch, processes, training.device_batch)
    except ValueError as error:
        raise UserError(f"{key_of(stage, 'batch')}: {error}") from None


def _on_cpu(config: RunConfig) -> bool:
    return config.device == "cpu" or not torch.cuda.is_available()
