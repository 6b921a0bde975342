"""`forked_python.py OUTPUT ARGUMENTS` runs `python ARGUMENTS` in a fork of the server, here, in this environment.

It is for what starts a process by itself, as Jupyter and the app do, and ends as that does. What the fork writes goes
to OUTPUT, and from there to this one's output once it has ended. SIGINT and SIGTERM are passed on to it.
"""

import contextlib
import json
import os
import signal
import socket
import sys
from pathlib import Path

import fork_server


def number() -> int:
    return int(fork_server.NUMBER.unpack(server.recv(fork_server.NUMBER.size, socket.MSG_WAITALL))[0])


def pass_on(received: int, _: object) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(pid, received)


output, *arguments = sys.argv[1:]
arguments = [argument for argument in arguments if argument != "-u"]  # a fork writes each line at once
Path(output).touch()
with fork_server.connect() as server:
    server.sendall(f"{json.dumps([arguments, str(Path.cwd()), dict(os.environ), output])}\n".encode())
    pid = number()
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, pass_on)
    status = number()
print(Path(output).read_text(), end="")
sys.exit(status)
