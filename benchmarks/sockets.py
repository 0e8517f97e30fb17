"""The floor of a round: the same bytes over plain TCP, and nothing else.

One process sends a file to N receiving processes at once (`sendfile`); when a receiver has it all, it sends as many
bytes back, and a thread for each connection writes them to a new file, fsyncs it and says so with one byte. A round
lasts until the last of these bytes has arrived. No framing, no digest, no check, no database.
"""

import multiprocessing
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Final

PIECE_BYTES: Final = 1 << 20
LONGEST_S: Final = 120.0


class SocketFloor:
    """The connections between the sender and its receivers; `round` moves the bytes once and says how long it took."""

    def __init__(self, folder: Path, size_bytes: int, connections: list[socket.socket]) -> None:
        self._folder, self._size, self._connections = folder, size_bytes, connections
        self._model = folder / "model"
        with self._model.open("wb") as file:
            _fill(file.fileno(), size_bytes)

    def round(self) -> float:
        """Seconds for one round: the model down to all, one update up from each, each fsynced."""
        failures: list[Exception] = []

        def serve(number: int, connection: socket.socket) -> None:
            try:
                self._exchange(connection, self._folder / f"update-{number}")
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=serve, args=pair, daemon=True) for pair in enumerate(self._connections)]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took_s = time.perf_counter() - began
        if failures:
            raise failures[0]
        for number in range(len(self._connections)):
            (self._folder / f"update-{number}").unlink()
        return took_s

    def _exchange(self, connection: socket.socket, path: Path) -> None:
        with self._model.open("rb") as file:
            connection.sendfile(file)
        buffer, left = memoryview(bytearray(PIECE_BYTES)), self._size
        with path.open("wb", buffering=0) as out:
            while left:
                got = connection.recv_into(buffer, min(left, PIECE_BYTES))
                if not got:
                    raise ConnectionError("a receiver has ended")
                out.write(buffer[:got])
                left -= got
            os.fsync(out.fileno())
        connection.sendall(b"!")
        if connection.recv(1) != b"!":
            raise ConnectionError("a receiver has ended")


@contextmanager
def socket_floor(folder: Path, size_bytes: int, receivers: int) -> Iterator[SocketFloor]:
    """So many receiving processes, connected over TCP on this machine. Ended on leaving."""
    folder.mkdir(parents=True, exist_ok=True)
    start = multiprocessing.get_context("spawn")
    processes: list[BaseProcess] = []
    connections: list[socket.socket] = []
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(LONGEST_S)
            for _ in range(receivers):
                processes.append(
                    start.Process(target=_receive, args=(server.getsockname()[1], size_bytes), daemon=True)
                )
                processes[-1].start()
                connection, _address = server.accept()
                connection.settimeout(LONGEST_S)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connections.append(connection)
        yield SocketFloor(folder, size_bytes, connections)
    finally:
        for connection in connections:
            connection.close()
        for process in processes:
            process.join(5)
            process.kill()
            process.join()


def _receive(port: int, size_bytes: int) -> None:
    """A receiver's life: take the model, send an update back, confirm its receipt, until the sender closes."""
    connection = socket.create_connection(("127.0.0.1", port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    model = memoryview(bytearray(size_bytes))
    while True:
        got = 0
        while got < size_bytes:
            piece = connection.recv_into(model[got:])
            if not piece:
                return
            got += piece
        connection.sendall(model)
        if connection.recv(1) != b"!":
            return
        connection.sendall(b"!")


def _fill(descriptor: int, size_bytes: int) -> None:
    piece = secrets.token_bytes(min(size_bytes, PIECE_BYTES))
    while size_bytes:
        size_bytes -= os.write(descriptor, piece[:size_bytes])
