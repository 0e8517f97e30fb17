"""A relay between one agent and the service: it follows what is said, and cuts or stalls where it is told to.

An agent that was enrolled at the relay's address never notices a service that moves: `upstream` may change between two
connections, which is how a load balancer in front of two servers behaves.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.torture.points import WirePoint

PIECE_BYTES = 1 << 16
CONNECT_S = 2.0


@dataclass
class WireOrder:
    """What is done when a wire point is passed for the n-th time: `act` runs while nothing goes on in either way."""

    point: WirePoint
    passage: int
    act: Callable[["Line"], None]
    done: bool = False


class Line:
    """One connection of the agent, and its continuation to the service."""

    def __init__(self, agent: socket.socket, service: socket.socket) -> None:
        self._agent, self._service = agent, service
        self.stalled_until = 0.0
        self.request = b""
        """The first line of the request that is going on, and a little more."""

    def cut(self) -> None:
        """End the connection both ways, at once."""
        for end in (self._agent, self._service):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def stall(self, seconds: float) -> None:
        """Let nothing through for a while, without ending anything."""
        self.stalled_until = time.monotonic() + seconds

    def wait(self) -> None:
        """Until the line is not stalled."""
        while (left := self.stalled_until - time.monotonic()) > 0:
            time.sleep(min(left, 0.05))


class Relay:
    """Listens on a port of its own, for one agent."""

    def __init__(self, upstream: int) -> None:
        self.upstream = upstream
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._orders: list[WireOrder] = []
        self._lines: set[Line] = set()
        self._lock = threading.Lock()
        threading.Thread(target=self._listen, daemon=True, name=f"relay {self.port}").start()

    @property
    def url(self) -> str:
        """Where the agent believes the service to be."""
        return f"http://127.0.0.1:{self.port}"

    def give(self, order: WireOrder) -> None:
        """Add an order."""
        with self._lock:
            self._orders.append(order)

    def take_back(self) -> None:
        """Forget all orders."""
        with self._lock:
            self._orders.clear()

    def cut(self) -> None:
        """Cut all connections."""
        with self._lock:
            lines = list(self._lines)
        for line in lines:
            line.cut()

    def stall(self, seconds: float) -> None:
        """Stall all connections."""
        with self._lock:
            lines = list(self._lines)
        for line in lines:
            line.stall(seconds)

    def close(self) -> None:
        """Listen no more."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _listen(self) -> None:
        while True:
            try:
                agent, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(agent,), daemon=True, name=f"line of {self.port}").start()

    def _serve(self, agent: socket.socket) -> None:
        try:
            service = socket.create_connection(("127.0.0.1", self.upstream), timeout=CONNECT_S)
        except OSError:  # nobody is there: the agent finds its connection closed
            agent.close()
            return
        service.settimeout(None)
        for end in (agent, service):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        line = Line(agent, service)
        with self._lock:
            self._lines.add(line)
        up = threading.Thread(target=self._pump, args=(line, agent, service, True), daemon=True)
        up.start()
        self._pump(line, service, agent, False)
        up.join()
        with self._lock:
            self._lines.discard(line)
        agent.close()
        service.close()

    def _pump(self, line: Line, source: socket.socket, sink: socket.socket, upwards: bool) -> None:
        talk = _Talk((b"GET /", b"POST /", b"PUT /") if upwards else (b"HTTP/1.1 ",))
        try:
            while piece := source.recv(PIECE_BYTES):
                line.wait()
                before = 0 if talk.follow(piece) else talk.before_bytes
                if upwards:
                    line.request = talk.head[:200]
                split_at, order = self._due(line, talk, piece, before, upwards)
                sink.sendall(piece[:split_at])
                if order is not None:
                    order.act(line)
                    line.wait()
                    sink.sendall(piece[split_at:])
        except OSError:
            pass
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def _due(self, line: Line, talk: "_Talk", piece: bytes, before: int, upwards: bool) -> tuple[int, WireOrder | None]:
        """How much of the piece goes on before something is to be done, and what; all of it if nothing is."""
        with self._lock:
            for order in self._orders:
                point = order.point
                if order.done or point.upwards is not upwards or not line.request.startswith(point.request):
                    continue
                if point.within not in line.request.split(b"\r\n", 1)[0]:
                    continue
                if not (piece if point.after_bytes is None else talk.head).startswith(point.answer):
                    continue
                if point.after_bytes is None:
                    split_at = 0
                elif before < point.after_bytes <= talk.body_bytes:
                    split_at = len(piece) - (talk.body_bytes - point.after_bytes)
                else:
                    continue
                order.passage -= 1
                if order.passage == 0:
                    order.done = True
                    return split_at, order
        return len(piece), None


@dataclass
class _Talk:
    """How far the messages of one direction got. A message's head comes at the beginning of a piece."""

    beginnings: tuple[bytes, ...]
    head: bytes = b""
    body_bytes: int = 0
    before_bytes: int = 0
    """Of the body, before the last piece."""
    _in_head: bool = False

    def follow(self, piece: bytes) -> bool:
        """Take the next piece in; whether it began a message."""
        began = piece.startswith(self.beginnings)
        if began:
            self.head, self.body_bytes, self._in_head = b"", 0, True
        self.before_bytes = self.body_bytes
        if not self._in_head:
            self.body_bytes += len(piece)
            return began
        self.head += piece
        end = self.head.find(b"\r\n\r\n")
        if end >= 0:
            self.body_bytes = len(self.head) - end - 4
            self.head, self._in_head = self.head[:end], False
        return began
