"""`forked_python.py OUTPUT ARGUMENTS` runs `python ARGUMENTS` in a fork of the server, here, in this environment.

It is for what starts a process by itself, as Jupyter does, and ends as that does. What the fork writes goes to OUTPUT.
"""

import json
import os
import socket
import sys
from pathlib import Path

import fork_server

output, *arguments = sys.argv[1:]
Path(output).touch()
with fork_server.connect() as server:
    server.sendall(f"{json.dumps([arguments, str(Path.cwd()), dict(os.environ), output])}\n".encode())
    pid, status = (fork_server.NUMBER.unpack(server.recv(fork_server.NUMBER.size, socket.MSG_WAITALL))[0] for _ in "12")
sys.exit(status)
