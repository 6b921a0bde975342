"""The records of all sources, in order: one process of a machine lists them, and sends the others theirs."""

from __future__ import annotations

import hashlib
import secrets
import socket
import uuid
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Client, Connection, Listener

from accelerate import PartialState

from ldm.data.records import BadSample, Record
from ldm.data.sources import Sources
from ldm.distributed.consensus import gather_objects

Listed = tuple[int, int, Record | BadSample]
"""The position of a record among all, the number of its source, and the record."""


class Listing:
    """The records of all sources, of which this process opens every n-th chunk; every process of the run makes one.

    Within its block, iterating yields the records to open, once. Then `count` and `digest` are those of all records,
    as this machine sees them; a single machine has no use for a digest.
    """

    def __init__(self, sources: Sources, chunk: int):
        state = PartialState()
        self.sources, self.chunk, self.rank, self.processes = sources, chunk, state.process_index, state.num_processes
        self.count, self.digest = 0, ""
        machines = gather_objects((socket.gethostname(), uuid.getnode()))
        self._single_machine = len(set(machines)) == 1
        local = [rank for rank, machine in enumerate(machines) if machine == machines[self.rank]]
        self._readers: dict[int, Connection] = {}  # the other processes of the machine by rank, where this one lists
        self._lister: Connection | None = None
        self._connect(local)

    def _connect(self, local: list[int]) -> None:
        """Connects the first of the machine's processes, which lists, with the others."""
        lists, key = self.rank == local[0] and len(local) > 1, secrets.token_bytes(32)
        listener = Listener(("127.0.0.1", 0), backlog=len(local), authkey=key) if lists else None
        address, key = gather_objects((listener and listener.address, key))[local[0]]
        if listener:
            with listener:
                for _ in local[1:]:
                    reader = listener.accept()
                    self._readers[reader.recv()] = reader
        elif address:
            self._lister = Client(address, authkey=key)
            self._lister.send(self.rank)

    def __enter__(self) -> Listing:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in (*self._readers.values(), *filter(None, [self._lister])):
            connection.close()

    def __iter__(self) -> Iterator[Listed]:
        return self._received(self._lister) if self._lister else self._listed()

    def _listed(self) -> Iterator[Listed]:
        digest, chunk = hashlib.sha256(), list[Listed]()
        for number in range(len(self.sources.configs)):
            for record in self.sources.records(number):
                if not self._single_machine:  # of a bad one only the name: its reason may contain an object's address
                    digest.update(repr(record.key if isinstance(record, BadSample) else record).encode())
                rank = self.count // self.chunk % self.processes
                if rank == self.rank:
                    yield self.count, number, record
                elif rank in self._readers:
                    chunk.append((self.count, number, record))
                self.count += 1
                if len(chunk) == self.chunk:
                    self._send(rank, chunk)
                    chunk = []
        if chunk:
            self._send(rank, chunk)
        self.digest = digest.hexdigest()
        for reader in self._readers:
            self._send(reader, (self.count, self.digest))

    def _send(self, rank: int, message: object) -> None:
        with suppress(OSError):  # a process that failed reads no more, and reports itself
            self._readers[rank].send(message)

    def _received(self, lister: Connection) -> Iterator[Listed]:
        with suppress(EOFError, OSError):  # the process that lists failed, and reports itself
            while isinstance(message := lister.recv(), list):
                yield from message
            self.count, self.digest = message
