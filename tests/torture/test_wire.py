"""The relay: it passes everything on, and cuts or stalls at the byte that it was told."""

import socket
import threading
from collections.abc import Iterator

import pytest

from tests.torture.points import WIRE, WirePoint
from tests.torture.wire import Line, Relay, WireOrder

UPLOAD = b"PUT /v1/tasks/7/update HTTP/1.1\r\nexpect: 100-continue\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 \r\n\r\n"
RECEIPT = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"
PATIENCE_S = 20


class Talk:
    """Both ends of a connection through a relay."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.relay = Relay(self._listener.getsockname()[1])
        self.agent = socket.create_connection(("127.0.0.1", self.relay.port), timeout=PATIENCE_S)
        self.service, _ = self._listener.accept()
        self.service.settimeout(PATIENCE_S)

    def close(self) -> None:
        for end in (self.agent, self.service, self._listener):
            end.close()
        self.relay.close()


@pytest.fixture
def talk() -> Iterator[Talk]:
    opened = Talk()
    yield opened
    opened.close()


def read(end: socket.socket, size: int) -> bytes:
    """So many bytes, or what came before the end."""
    data = b""
    while len(data) < size and (piece := end.recv(size - len(data))):
        data += piece
    return data


def everything(end: socket.socket) -> bytes:
    """What comes until the connection ends."""
    try:
        return read(end, 1 << 20)
    except ConnectionResetError:
        return b"reset"


def exchange(talk: Talk, body: bytes, *, receipt: bytes = RECEIPT) -> None:
    """A whole upload, undisturbed."""
    talk.agent.sendall(UPLOAD)
    assert read(talk.service, len(UPLOAD)) == UPLOAD
    talk.service.sendall(CONTINUE)
    assert read(talk.agent, len(CONTINUE)) == CONTINUE
    talk.agent.sendall(body)
    assert read(talk.service, len(body)) == body
    talk.service.sendall(receipt)
    assert read(talk.agent, len(receipt)) == receipt


def test_everything_goes_through(talk: Talk) -> None:
    for size in (0, 1, 3_000):
        exchange(talk, bytes(size))
    talk.agent.shutdown(socket.SHUT_WR)
    assert everything(talk.service) == b""


@pytest.mark.parametrize("pieces", [1, 3])
def test_a_cut_comes_after_exactly_so_many_bytes_of_the_second_body(talk: Talk, pieces: int) -> None:
    talk.relay.give(WireOrder(WIRE["wire-update"], 2, Line.cut))
    exchange(talk, bytes(3_000))
    talk.agent.sendall(UPLOAD)
    read(talk.service, len(UPLOAD))
    talk.service.sendall(CONTINUE)
    read(talk.agent, len(CONTINUE))
    for _ in range(pieces):
        try:
            talk.agent.sendall(bytes(3_000 // pieces))
        except OSError:  # it was cut already
            break
    assert everything(talk.service) == bytes(500)
    assert everything(talk.agent) in (b"", b"reset")


@pytest.mark.parametrize("name", ["wire-admission", "wire-receipt"])
def test_an_answer_is_held_back_to_its_first_byte(talk: Talk, name: str) -> None:
    talk.relay.give(WireOrder(WIRE[name], 1, Line.cut))
    talk.agent.sendall(UPLOAD)
    read(talk.service, len(UPLOAD))
    talk.service.sendall(CONTINUE)
    if name == "wire-receipt":
        assert read(talk.agent, len(CONTINUE)) == CONTINUE
        talk.agent.sendall(b"body")
        assert read(talk.service, 4) == b"body"
        talk.service.sendall(RECEIPT)
    assert everything(talk.agent) in (b"", b"reset")


def test_another_request_s_bytes_are_none_of_its_business(talk: Talk) -> None:
    talk.relay.give(WireOrder(WIRE["wire-update"], 1, Line.cut))
    heartbeat = b"POST /v1/tasks/7/heartbeat HTTP/1.1\r\ncontent-length: 900\r\n\r\n" + bytes(900)
    talk.agent.sendall(heartbeat)
    assert read(talk.service, len(heartbeat)) == heartbeat
    talk.service.sendall(RECEIPT)
    assert read(talk.agent, len(RECEIPT)) == RECEIPT


def test_who_is_stalled_goes_on_with_the_same_bytes(talk: Talk) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def wait(line: Line) -> None:
        reached.set()
        assert go_on.wait(PATIENCE_S)

    point = WirePoint("here", b"GET /", upwards=False, after_bytes=10, answer=b"HTTP/1.1 200", words="")
    talk.relay.give(WireOrder(point, 1, wait))
    asked = b"GET /v1/checkpoints/7 HTTP/1.1\r\n\r\n"
    talk.agent.sendall(asked)
    assert read(talk.service, len(asked)) == asked  # a service answers what it has heard
    answer = b"HTTP/1.1 200 OK\r\n\r\n" + bytes(range(100))
    talk.service.sendall(answer)
    assert reached.wait(PATIENCE_S)
    assert read(talk.agent, len(answer) - 90) == answer[:-90]
    talk.agent.settimeout(0.05)
    with pytest.raises(TimeoutError):
        talk.agent.recv(1)
    go_on.set()
    talk.agent.settimeout(PATIENCE_S)
    assert read(talk.agent, 90) == answer[-90:]
