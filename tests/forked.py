"""Processes that have imported everything already: a script runs in a fork of a server, not in a new Python.

The imports of a new Python take ten seconds; a fork takes none. A script sees the same in both: `sys.argv`, `__main__`,
the environment that torchrun sets for several processes, its own output, signals.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["imported"])


def start_server(root: Path) -> None:
    """Starts the server, which gets no `sys.path` before Python 3.13."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (root, root / "scripts", root / "tests"))))
        forkserver.ensure_running()


def of_accelerate(config: Path) -> dict[str, str]:
    """The variables that `accelerate launch --config_file CONFIG` sets for two processes."""
    arguments = ["--config_file", str(config), "--num_processes", "2", "any.py"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    return {name: str(value) for name, value in prepare_multi_gpu_env(args).items()}


class Forked:
    """A script in one process, or in several that find each other; like `subprocess.Popen`, as far as tests need it.

    A failure ends all of them, as it does with torchrun. Their output, errors included, goes to one file.
    """

    def __init__(
        self, script: Sequence[object], processes: int, root: Path, environment: Mapping[str, str], output: Path
    ):
        start_server(root)
        self.output = output
        output.touch()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        shared = {**environment, "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self.ranks = []
        for rank in map(str, range(processes)):
            own = {**shared, "RANK": rank, "LOCAL_RANK": rank} if processes > 1 else dict(environment)
            arguments = ([*map(str, script)], root, own, output)
            self.ranks.append(SERVER.Process(target=_run, args=arguments))
            self.ranks[-1].start()

    @property
    def pid(self) -> int:
        """The id of the first process."""
        assert self.ranks[0].pid
        return self.ranks[0].pid

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        codes = [process.exitcode for process in self.ranks]
        if None in codes:
            return None
        return next((code for code in codes if code), 0)

    def kill(self) -> None:
        for process in self.ranks:
            process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """What all of them wrote, once they have ended; TimeoutError if that takes longer than `timeout` seconds."""
        end = time.monotonic() + (timeout or 600)
        while running := [process.sentinel for process in self.ranks if process.exitcode is None]:
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(self.output.read_text()[-3000:])
            wait(running, 1)
            if any(process.exitcode for process in self.ranks):
                for process in self.ranks:
                    process.join(30)  # an error in one reaches the others, which report it
                    process.terminate()
        return self.output.read_text(), None


ScriptProcess = subprocess.Popen[str] | Forked


def _run(script: list[str], root: Path, environment: dict[str, str], output: Path) -> None:
    """Runs in the fork; `script` has the arguments of Python: a file or `-m MODULE`, then its own."""
    assert "imported" in sys.modules, "the server could not import it, and printed nothing"
    multiprocessing.set_start_method(None, force=True)  # its own processes start in the default way, as in any command
    os.setsid()  # Ctrl-C is for pytest
    written = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(written, stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(root)
    if script[0] == "-m":
        sys.argv = script[1:]
        runpy.run_module(script[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = script
        sys.path.insert(0, str(Path(script[0]).parent.absolute()))
        runpy.run_path(script[0], run_name="__main__")
