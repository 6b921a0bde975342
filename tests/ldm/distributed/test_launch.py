"""The Accelerator that a run builds."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from ldm.config.schema import RunConfig, Training
from ldm.distributed import launch
from ldm.utils.errors import UserError

CONFIG = RunConfig(device="cpu", tracker="none")


def is_compiled(accelerator: Accelerator) -> bool:
    return isinstance(accelerator.prepare_model(nn.Linear(2, 2)), torch._dynamo.eval_frame.OptimizedModule)


@pytest.mark.parametrize(
    "environment", [{"BACKEND": "INDUCTOR"}, {"BACKEND": "eager", "USE_REGIONAL_COMPILATION": "true"}, {}]
)
def test_dynamo_settings_of_accelerates_configuration_are_ignored_with_one_line(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launch.say_dynamo_is_ignored.cache_clear()
    for name, value in environment.items():
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", value)
    for _ in range(2):
        assert not is_compiled(launch.accelerator(CONFIG))
    backend = environment.get("BACKEND", "").lower()
    message = f"accelerate's dynamo_backend ({backend}) is ignored; stage2.compile=true compiles the U-Net.\n"
    assert capsys.readouterr().err == (message if environment else "")


@pytest.mark.parametrize(("stage", "key"), [("stage2", "stage2.batch"), ("steps-8", "batch"), ("classifier", "batch")])
def test_a_batch_that_cannot_be_shared_is_named_as_its_command_takes_it(stage: str, key: str) -> None:
    with pytest.raises(UserError, match=rf"^{key}: 63 can't be shared evenly by 2 processes; 64 can"):
        launch.accumulated(stage, Training(batch=63), 2)


class OpenToSigterm(torch.utils.data.Dataset[int]):
    """Whose loader process unblocks SIGTERM, in its main thread or in another, as a library's thread has it."""

    def __init__(self, other_thread: bool):
        self.other_thread = other_thread

    def __getitem__(self, n: int) -> int:
        if n == 0 and self.other_thread:
            threading.Thread(target=self.unblock, args=[60], daemon=True).start()
        elif n == 0:
            self.unblock(0)
        return n

    def unblock(self, seconds: float) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        time.sleep(seconds)


@pytest.mark.parametrize("other_thread", [False, True])
def test_a_loader_process_outlives_a_sigterm_that_its_parent_did_not_send(other_thread: bool) -> None:
    dataset = OpenToSigterm(other_thread)
    loader = launch.DataLoader(dataset, sampler=range(8), batch_size=None, num_workers=1, prefetch_factor=1)
    batches = iter(loader)
    assert next(batches) == 0
    (worker,) = batches._workers
    subprocess.run(["kill", "-TERM", *[str(worker.pid)] * 1000], check=True)  # faster than one thread takes them
    assert list(batches) == list(range(1, 8))


@pytest.fixture
def thread_at_fork() -> Iterator[None]:
    """A thread of a library, which it starts in each forked process."""
    active = True

    def start() -> None:
        if active:
            threading.Thread(target=time.sleep, args=[60], daemon=True).start()

    os.register_at_fork(after_in_child=start)
    yield
    active = False


def test_a_loader_process_ends_at_its_parents_sigterm(thread_at_fork: None) -> None:
    batches = iter(launch.DataLoader(range(8), batch_size=None, num_workers=1))
    assert next(batches) == 0
    (worker,) = batches._workers
    worker.terminate()
    worker.join(30)
    assert worker.exitcode == 0
