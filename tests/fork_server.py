"""`fork_server.py SOCKET`: a process that has imported everything already, and runs scripts in forks of itself.

It serves all of pytest-xdist's workers, until the process that started it has ended. A connection to the socket is a
script: what the client writes is a line of JSON, `[arguments, root, environment, output]`; what it reads are two
numbers, the id of the script's process and its exit status.
"""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import runpy
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path

ADDRESS = "LDM_TESTS_FORK_SERVER"  # the environment variable with the socket's path
NUMBER = struct.Struct("i")
TESTS = Path(__file__).parent
servers: list[subprocess.Popen[bytes]] = []  # what this process started, at most one: its standard input stays open


def start() -> None:
    """Starts the server, where this process or the one that started it has none; it imports while others begin."""
    if ADDRESS in os.environ:
        return
    address = Path(tempfile.mkdtemp(prefix="ldm-fork-")) / "socket"
    path = os.pathsep.join(map(str, (TESTS.parent, TESTS.parent / "scripts", TESTS)))
    command = [sys.executable, __file__, address]
    environment = {**os.environ, "PYTHONPATH": path}
    # a session of its own: Ctrl-C is for pytest
    servers.append(subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, start_new_session=True))
    os.environ[ADDRESS] = str(address)


def connect() -> socket.socket:
    """A connection to the server, which may only just begin."""
    start()
    end = time.monotonic() + 60
    while True:
        client = socket.socket(socket.AF_UNIX)
        try:
            client.connect(os.environ[ADDRESS])
        except (FileNotFoundError, ConnectionRefusedError):
            client.close()
            ended = any(server.poll() is not None for server in servers)
            assert not ended and time.monotonic() < end, "the server of forks does not answer"
            time.sleep(0.02)
        else:
            return client


def main(address: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(address))
        server.listen()
        gc.disable()
        import imported  # noqa: F401  # who connects meanwhile waits
        from flops import count_once

        from ldm.training import throughput

        gc.enable()
        # as in tests: FLOPs are counted once, and what a killed process wrote is there without fsync
        throughput.forward_flops, os.fsync = count_once, lambda descriptor: None

        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for forks
        while sys.stdin not in select.select([server, sys.stdin], [], [])[0]:  # until its other end is closed
            connection, _ = server.accept()
            if not os.fork():
                server.close()
                _answer(connection)
                os._exit(0)
            connection.close()
    shutil.rmtree(address.parent)
    os._exit(0)  # taking all modules apart takes seconds


def _answer(connection: socket.socket) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with connection.makefile(encoding="utf-8") as file:
        arguments = json.loads(file.readline())
    process = multiprocessing.get_context("fork").Process(target=_run, args=arguments)
    process.start()
    connection.sendall(NUMBER.pack(process.pid))
    wait([process.sentinel, connection])
    process.kill()  # where it runs, nobody waits any more
    process.join()
    with contextlib.suppress(BrokenPipeError):  # nobody waits any more
        connection.sendall(NUMBER.pack(process.exitcode))


def _run(script: list[str], root: str, environment: dict[str, str], output: str) -> None:
    """Runs in the fork; `script` has the arguments of Python: a file or `-m MODULE`, then its own."""
    multiprocessing.set_start_method(None, force=True)  # its own processes start in the default way, as in any command
    os.setsid()  # a script's signals are its own
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


if __name__ == "__main__":
    main(Path(sys.argv[1]))
