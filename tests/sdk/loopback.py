"""Real servers on the loopback interface: an ASGI app under uvicorn, and a socket that follows a script."""

import asyncio
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import uvicorn

Message = MutableMapping[str, Any]
App = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]


@contextmanager
def serve(app: App, **options: Any) -> Iterator[str]:
    """The address of `app` under uvicorn, in a thread."""
    listener = socket.create_server(("127.0.0.1", 0))
    settings: dict[str, Any] = {"log_level": "error", "lifespan": "off", "timeout_graceful_shutdown": 1, **options}
    server = uvicorn.Server(uvicorn.Config(app, **settings))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        listener.close()


@contextmanager
def script(play: Callable[[socket.socket], None], tls: ssl.SSLContext | None = None) -> Iterator[int]:
    """The port of a listener that plays one script for each connection, one after the other."""
    listener = socket.create_server(("127.0.0.1", 0))
    stopped = threading.Event()

    def accept() -> None:
        while not stopped.is_set():
            try:
                plain, _ = listener.accept()
            except OSError:
                return
            try:
                connection = tls.wrap_socket(plain, server_side=True) if tls is not None else plain
                with connection:
                    play(connection)
            except OSError:
                plain.close()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        stopped.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(timeout=5)


def read_head(connection: socket.socket) -> bytes:
    """Everything up to the empty line, and nothing of the body."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        piece = connection.recv(1)
        if not piece:
            break
        head += piece
    return head


def read_exactly(connection: socket.socket, size: int) -> bytes:
    """So many bytes."""
    body = b""
    while len(body) < size:
        piece = connection.recv(size - len(body))
        if not piece:
            break
        body += piece
    return body


def response(status: int, body: bytes, media_type: str = "application/json") -> bytes:
    """A whole HTTP/1.1 response."""
    head = f"HTTP/1.1 {status} Said\r\nContent-Type: {media_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body
