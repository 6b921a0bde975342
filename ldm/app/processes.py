"""Trainings that the app starts: processes of their own, which outlive it and are found again by a file of the run.

`RUN/process.json` names the process by its id and the time at which it began, so that a later process with the same id
isn't taken for it. What the training prints goes to `RUN/train.log`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from ldm.utils.atomic_files import atomic_file
from ldm.utils.errors import UserError, cant_write
from ldm.utils.folder_lock import is_locked

FILE, LOG = "process.json", "train.log"
CLOCK = 5.0  # seconds by which a clock that was set changes the time at which a process began
LOG_BYTES = 2**16  # of the log's end that are read
FULL = 2**24  # bytes free below which a disk is full
_starting = threading.Lock()  # for the tabs of this app, which share a process


@dataclass(frozen=True)
class Record:
    """What `process.json` says of a run's last training."""

    pid: int
    began: float
    """The process's start, in seconds since the epoch, as the system has it."""
    log: int
    """Bytes that the log had before."""
    asked_to_end: bool = False

    @classmethod
    def read(cls, folder: Path) -> Record | None:
        """None where the app started no training in the folder, or its file is damaged."""
        try:
            values = json.loads((folder / FILE).read_text("utf-8"))
            return cls(int(values["pid"]), float(values["began"]), int(values["log"]), values["asked_to_end"] is True)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, folder: Path) -> None:
        with atomic_file(folder / FILE) as tmp_path:
            tmp_path.write_text(json.dumps(asdict(self)) + "\n", "utf-8")

    @property
    def process(self) -> psutil.Process | None:
        """The process, while it runs."""
        with contextlib.suppress(psutil.Error, ValueError, OverflowError):
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.began) < CLOCK
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        return None


def is_ours(folder: Path) -> bool:
    """Whether a training that the app started goes on in the folder."""
    record = Record.read(folder)
    return bool(record and record.process)


def is_running(folder: Path) -> bool:
    """Whether a training goes on in the folder, of the app or of a terminal."""
    return is_ours(folder) or is_locked(folder)


def command(config: Path, overrides: Iterable[str], *flags: str) -> list[str]:
    """The arguments of the training's process; no shell reads them."""
    return [sys.executable, "-u", "-m", "train_ldm", "--config", str(config), *flags, *overrides]


def start(folder: Path, arguments: Sequence[str], others: Iterable[Path]) -> None:
    """Starts a training in the folder, which is made.

    UserError where one goes on there, or in one of the `others`, or where the folder can't be written.
    """
    with _starting:
        if is_running(folder):
            raise UserError(f"run.dir: {folder} is being trained already; watch it, or stop it first")
        if busy := [other for other in others if is_running(other)]:
            raise UserError(
                f"run.dir: {busy[0]} is being trained, and a second training would share this machine's memory and "
                f"its {os.cpu_count()} cores; wait until it ends, or stop it"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / LOG).open("ab") as log:
                size = log.tell()
                process = subprocess.Popen(
                    arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
        except OSError as error:
            raise UserError(f"run.dir: can't write {folder}: {cant_write(error) or error.strerror}") from None
        try:
            Record(process.pid, psutil.Process(process.pid).create_time(), size).write(folder)
        except UserError:
            process.kill()  # nothing would find it again
            raise
        finally:
            threading.Thread(target=process.wait, daemon=True).start()  # or it stays as a zombie once it ends


def stop(folder: Path) -> None:
    """Asks the training to save and end; a second time, three seconds later, to end at once."""
    if (record := Record.read(folder)) and (process := record.process):
        with contextlib.suppress(UserError):  # a full disk must not keep it going
            replace(record, asked_to_end=True).write(folder)
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGTERM)


def wait(folder: Path, seconds: float) -> bool:
    """Waits until no training goes on in the folder, so many seconds at most; whether that came true."""
    end = time.monotonic() + seconds
    while running := is_running(folder):
        if time.monotonic() > end:
            break
        time.sleep(0.1)
    return not running


def lines(folder: Path) -> list[str]:
    """The last lines that the run's last training printed; of a progress bar, what it showed last."""
    record = Record.read(folder)
    try:
        with (folder / LOG).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(record.log if record else 0, size - LOG_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)
    shown = (line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n"))
    return [line for line in shown if line]


def why_ended(folder: Path) -> str:
    """A sentence on why a training that has not finished goes on no more; empty where it ended as it was asked to."""
    record, printed = Record.read(folder), lines(folder)
    if errors := [line for line in printed if line.startswith("error: ")]:
        return errors[-1].removeprefix("error: ")
    if any(line.startswith("Traceback ") for line in printed):
        return f"{printed[-1]} (a defect: its log has the traceback)"
    if record is None or record.asked_to_end:
        return ""
    if shutil.disk_usage(folder).free < FULL:
        return f"the disk of {folder} is full; make room"
    return "the training was killed, perhaps because the memory was full; a smaller batch or device_batch needs less"
