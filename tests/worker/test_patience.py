"""How long a worker listens to a service that trickles."""

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from isthmus.client import BadResponse, TimedOut
from isthmus.client._admission import MOST_INTERIM, put_when_admitted
from isthmus.client._answers import LONGEST_RETRY_AFTER_S, retry_after_s

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)


@contextmanager
def _saying(talk: Callable[[socket.socket], None]) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                connection.recv(65536)
                talk(connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/update"
        thread.join(5)


def _put(address: str, path: Path) -> None:
    path.write_bytes(b"noised")
    put_when_admitted(
        address, path, {}, on_admitted=lambda: None, timeout_s=0.1, expect_s=2.0, tls=ssl.create_default_context()
    )


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_an_answer_that_trickles_without_end_is_given_up(tmp_path: Path) -> None:
    def trickle(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        for _ in range(200):
            connection.sendall(b" ")
            time.sleep(0.02)

    began = time.monotonic()
    with _saying(trickle) as address, pytest.raises(TimedOut, match="no whole answer"):
        _put(address, tmp_path / "update")

    assert time.monotonic() - began < 15


def test_promises_without_end_are_no_answer(tmp_path: Path) -> None:
    def promise(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 102 Processing\r\n\r\n" * (MOST_INTERIM + 1))
        time.sleep(0.5)

    with _saying(promise) as address, pytest.raises(BadResponse, match="informational"):
        _put(address, tmp_path / "update")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("999999999999", LONGEST_RETRY_AFTER_S),
        ("Fri, 31 Dec 9999 23:59:59 GMT", LONGEST_RETRY_AFTER_S),
        ("Fri, 31 Dec 99999999999 23:59:59 GMT", None),
        ("Fri, 31 Dec 2026 23:59:59 +99999999999999", None),
        ("12", 12.0),
    ],
)
def test_what_a_service_asks_to_wait_has_a_bound(value: str, expected: float | None) -> None:
    assert retry_after_s({"retry-after": value}, NOW) == expected
