"""Processes that have imported everything already: a script runs in a fork of a server, not in a new Python.

The imports of a new Python take ten seconds; a fork takes none. A script sees the same in both: `sys.argv`, `__main__`,
the environment that torchrun sets for several processes, its own output, signals.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path

import fork_server
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env


class Fork:
    """A script in one process; like `multiprocessing.Process`."""

    def __init__(self, *arguments: object):
        self.connection = fork_server.connect()
        self.connection.sendall(f"{json.dumps(arguments)}\n".encode())
        self.pid = self._number()
        self._exitcode: int | None = None

    def _number(self) -> int:
        number = self.connection.recv(fork_server.NUMBER.size, socket.MSG_WAITALL)
        assert number, "the server of forks has ended"
        return int(fork_server.NUMBER.unpack(number)[0])

    @property
    def exitcode(self) -> int | None:
        if self._exitcode is None and wait([self.connection], 0):
            self._exitcode = self._number()
            self.connection.close()
        return self._exitcode

    def join(self, timeout: float) -> None:
        if self.exitcode is None:
            wait([self.connection], timeout)

    def send_signal(self, number: int) -> None:
        if self.exitcode is None:
            with contextlib.suppress(ProcessLookupError):  # its status is on the way
                os.kill(self.pid, number)


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
        self.output = output
        output.touch()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        shared = {**environment, "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self.ranks = []
        for rank in map(str, range(processes)):
            own = {**shared, "RANK": rank, "LOCAL_RANK": rank} if processes > 1 else dict(environment)
            self.ranks.append(Fork([*map(str, script)], str(root), own, str(output)))

    @property
    def pid(self) -> int:
        """The id of the first process."""
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
            process.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """What all of them wrote, once they have ended; TimeoutError if that takes longer than `timeout` seconds."""
        end = time.monotonic() + (timeout or 600)
        while running := [process.connection for process in self.ranks if process.exitcode is None]:
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(self.output.read_text()[-3000:])
            wait(running, 1)
            if any(process.exitcode for process in self.ranks):
                for process in self.ranks:
                    process.join(30)  # an error in one reaches the others, which report it
                    process.send_signal(signal.SIGTERM)
        return self.output.read_text(), None


ScriptProcess = subprocess.Popen[str] | Forked
