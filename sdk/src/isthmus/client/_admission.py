"""An update is admitted before its body is sent: `Expect: 100-continue`, over a connection of its own.

The worker must know the moment of admission, because it writes the spend of privacy budget into its ledger between
that moment and the first byte of the body. httpx does not show interim responses, so this speaks HTTP/1.1 by h11 (the
engine within httpx) over a plain socket:

    headers ──▶ 100 Continue     on_admitted(), body, receipt or refusal
            ──▶ a final answer   the receipt of an update accepted before, or a refusal; no body is sent
            ──▶ silence          after `expect_s` seconds on_admitted(), then as if 100 had come

Silence counts as admission because some proxies swallow `Expect`: whoever records a spend that was not made errs on
the safe side. While the body is sent we listen: an early answer ends the sending and is what the caller gets, also
where the service closes the connection on us.
"""

import base64
import errno
import os
import selectors
import socket
import ssl
import sys
import time
from collections.abc import Callable, Mapping
from io import FileIO
from pathlib import Path
from typing import Final
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import h11

from isthmus.client._answers import MAX_ANSWER_BYTES, Answer
from isthmus.client._transfer import PIECE_BYTES, Progress
from isthmus.client.errors import BadResponse, TimedOut, Unreachable

EXPECT_S: Final = 10.0
"""So long we wait for an interim response before we take silence for admission."""
LONGEST_ANSWER: Final = 10
"""So many times `timeout_s` the final answer may take from its first byte to its last, however it trickles."""
MOST_INTERIM: Final = 100
"""More informational responses than that are no conversation."""


def put_when_admitted(
    address: str,
    path: Path,
    headers: Mapping[str, str],
    *,
    on_admitted: Callable[[], None],
    progress: Progress | None = None,
    timeout_s: float = 30.0,
    expect_s: float = EXPECT_S,
    tls: ssl.SSLContext,
) -> Answer:
    """PUT the file at `path`; the final answer, whatever its status.

    Args:
        address: http:// or https://. HTTP_PROXY, HTTPS_PROXY and NO_PROXY are obeyed; a proxy itself is spoken to in
            plain HTTP, and carries https through a CONNECT tunnel.
        headers: without Host, Content-Length and Expect, which are written here.
        on_admitted: called at most once, before the first byte of the body. What it raises ends the call.
        timeout_s: bound on connecting and on every single wait for the socket.

    Raises:
        Unreachable: no connection, or it was cut and no answer was there to be read.
        TimedOut: a wait passed `timeout_s`, or the final answer took LONGEST_ANSWER times as long.
        BadResponse: what answers does not speak HTTP, or says no more than that it will.
    """
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        with Connection(address, timeout_s, tls) as connection:
            connection.send_head("PUT", [*headers.items(), ("Content-Length", str(size)), ("Expect", "100-continue")])
            answer = connection.hear(expect_s)
            if answer is not None:
                return answer
            on_admitted()
            if connection.send_body(file, size, progress):
                connection.end_body()
            return connection.answer()


class Connection:
    """One request over one socket, which does not block: every wait has a bound and looks both ways."""

    def __init__(self, address: str, timeout_s: float, tls: ssl.SSLContext) -> None:
        self._address = address
        self._timeout_s = timeout_s
        self._parts = urlsplit(address)
        self._target = _target(self._parts)
        self._h11 = h11.Connection(h11.CLIENT)
        self._response: h11.Response | None = None
        self._body = bytearray()
        self._complete = False
        self._admitted = False
        self._interim = 0
        self._closed_by_peer = False
        self._extra: list[tuple[str, str]] = []
        self._selector = selectors.DefaultSelector()
        self._socket = self._open(tls)
        self._socket.setblocking(False)
        self._selector.register(self._socket, selectors.EVENT_READ)

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self._selector.close()
        self._socket.close()

    # --- Opening -----------------------------------------------------------------------------------------------------

    def _open(self, tls: ssl.SSLContext) -> socket.socket:
        host, port = _host_and_port(self._parts)
        proxy = proxy_for(self._parts)
        plain: socket.socket | None = None
        try:
            plain = socket.create_connection(
                (host, port) if proxy is None else _host_and_port(proxy), timeout=self._timeout_s
            )
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if proxy is not None and self._parts.scheme == "https":
                self._tunnel(plain, proxy, host, port)
            elif proxy is not None:
                self._target = self._address
                self._extra = _proxy_authorization(proxy)
            if self._parts.scheme == "https":
                return tls.wrap_socket(plain, server_hostname=host)
        except TimeoutError:
            _close(plain)
            raise Unreachable(self._address, "connecting took too long") from None
        except OSError as error:  # also what ssl raises
            _close(plain)
            raise Unreachable(self._address, str(error)) from error
        except BaseException:
            _close(plain)
            raise
        return plain

    def _tunnel(self, plain: socket.socket, proxy: SplitResult, host: str, port: int) -> None:
        name = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        talk = h11.Connection(h11.CLIENT)
        head = h11.Request(method="CONNECT", target=name, headers=[("Host", name), *_proxy_authorization(proxy)])
        plain.sendall(talk.send(head) or b"")
        plain.sendall(talk.send(h11.EndOfMessage()) or b"")
        while True:
            try:
                event = talk.next_event()
            except h11.RemoteProtocolError as error:
                raise Unreachable(self._address, f"the proxy {proxy.hostname} does not speak HTTP: {error}") from None
            if event is h11.NEED_DATA:
                talk.receive_data(plain.recv(4096))
            elif isinstance(event, h11.Response) and 200 <= event.status_code < 300:
                return
            elif isinstance(event, h11.Response | h11.ConnectionClosed):
                said = event.status_code if isinstance(event, h11.Response) else "nothing"
                raise Unreachable(self._address, f"the proxy {proxy.hostname} answered {said} to CONNECT")

    def ask(self, method: str, headers: list[tuple[str, str]]) -> socket.socket:
        """Send a request without a body; the socket, which blocks from now on, for whoever reads the answer."""
        self.send_head(method, headers)
        self._socket.settimeout(self._timeout_s)
        return self._socket

    # --- Speaking ----------------------------------------------------------------------------------------------------

    def send_head(self, method: str, headers: list[tuple[str, str]]) -> None:
        """The request line and the headers."""
        try:
            request = h11.Request(
                method=method, target=self._target, headers=[("Host", self._parts.netloc), *headers, *self._extra]
            )
        except h11.LocalProtocolError as error:
            raise ValueError(str(error)) from error
        self._send(self._h11.send(request) or b"")

    def send_body(self, file: FileIO, size: int, progress: Progress | None) -> bool:
        """Send until the end of the file, or until there is an answer; whether all was sent."""
        done = 0
        if sys.platform == "linux" and not isinstance(self._socket, ssl.SSLSocket):
            try:
                return self._send_file(file, size, progress)
            except _NotByTheKernel:
                pass  # and nothing was sent
        buffer = memoryview(bytearray(min(PIECE_BYTES, size)))  # one for all pieces: new memory is slow memory
        while count := file.readinto(buffer[: size - done]):
            for data in self._h11.send_with_data_passthrough(h11.Data(data=buffer[:count])) or ():  # type: ignore[arg-type]  # anything with a length passes through
                if not self._send(data):
                    return False
            done += count
            if progress is not None:
                progress(done, size)
        if done != size:
            raise _became_shorter(done, size)
        return True

    def _send_file(self, file: FileIO, size: int, progress: Progress | None) -> bool:
        """As `send_body`, by the kernel alone: the bytes are not copied into this process and out of it again.

        Raises:
            _NotByTheKernel: the file lies where it cannot do that.
        """
        done = 0
        self._selector.modify(self._socket, selectors.EVENT_READ | selectors.EVENT_WRITE)
        while done < size:
            able = self._able_to_send()
            if not able & selectors.EVENT_WRITE:
                if not able:
                    return False
                continue
            try:
                count = os.sendfile(self._socket.fileno(), file.fileno(), done, min(PIECE_BYTES, size - done))
            except BlockingIOError:
                continue
            except OSError as error:
                if error.errno in (errno.EINVAL, errno.ENOSYS) and not done:
                    raise _NotByTheKernel from None
                if error.errno == errno.EIO:  # the disk's
                    raise
                return False  # cut: what the service said before may still be there to read
            if not count:
                raise _became_shorter(done, size)
            self._h11.send_with_data_passthrough(h11.Data(data=_Announced(count)))  # type: ignore[arg-type]  # counted only
            done += count
            if progress is not None:
                progress(done, size)
        return True

    def end_body(self) -> None:
        """Nothing follows."""
        self._h11.send(h11.EndOfMessage())

    def _send(self, data: bytes | memoryview) -> bool:
        """Send all of `data`; False if an answer came first, or nothing can be sent any more."""
        view = memoryview(data)
        self._selector.modify(self._socket, selectors.EVENT_READ | selectors.EVENT_WRITE)
        while view:
            able = self._able_to_send()
            if not able:
                return False
            if able & selectors.EVENT_WRITE:
                try:
                    view = view[self._socket.send(view) :]
                except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                    continue
                except OSError:  # cut: what the service said before may still be there to read
                    return False
        return True

    def _able_to_send(self) -> int:
        """EVENT_WRITE; EVENT_READ where something came first, which is taken in; 0 once nothing more is wanted."""
        if self._response is not None or self._closed_by_peer:
            return 0
        able = self._wait(self._timeout_s)
        if not able:
            raise TimedOut(self._address, f"nothing could be sent for {self._timeout_s:g} s")
        if able & selectors.EVENT_READ:
            self._receive()
            return selectors.EVENT_READ
        return able

    # --- Listening ---------------------------------------------------------------------------------------------------

    def hear(self, patience_s: float) -> Answer | None:
        """A final answer, or None after 100 Continue (whatever came right behind it) or `patience_s` of silence."""
        until = time.monotonic() + patience_s
        self._selector.modify(self._socket, selectors.EVENT_READ)
        while self._response is None and not self._admitted and not self._closed_by_peer:
            left = until - time.monotonic()
            if left <= 0:
                return None
            if self._wait(left):
                self._receive()
        return None if self._admitted else self.answer()

    def answer(self) -> Answer:
        """The final answer, read to its end."""
        until = time.monotonic() + LONGEST_ANSWER * self._timeout_s
        self._selector.modify(self._socket, selectors.EVENT_READ)
        while not self._complete:
            if self._closed_by_peer:
                raise Unreachable(self._address, "the connection was cut before an answer came")
            if not self._wait(self._timeout_s):
                raise TimedOut(self._address, f"no answer for {self._timeout_s:g} s")
            if time.monotonic() > until:
                raise TimedOut(self._address, f"no whole answer within {LONGEST_ANSWER * self._timeout_s:g} s")
            self._receive()
        assert self._response is not None
        headers = {name.decode("ascii").lower(): value.decode("latin-1") for name, value in self._response.headers}
        return Answer(self._response.status_code, headers, bytes(self._body))

    def _wait(self, seconds: float) -> int:
        if isinstance(self._socket, ssl.SSLSocket) and self._socket.pending():
            return selectors.EVENT_READ
        ready = self._selector.select(seconds)
        return ready[0][1] if ready else 0

    def _receive(self) -> None:
        """Take in what is there, without waiting."""
        while not self._closed_by_peer and not self._complete:
            try:
                data = self._socket.recv(2**16)
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return
            except OSError:
                data = b""
            self._closed_by_peer = not data
            try:
                self._h11.receive_data(data)
                self._take_events()
            except h11.RemoteProtocolError as error:
                if self._closed_by_peer:
                    return
                raise BadResponse(f"{self._address} does not speak HTTP: {error}") from error

    def _take_events(self) -> None:
        while not self._complete:
            event = self._h11.next_event()
            if isinstance(event, h11.InformationalResponse):
                self._admitted = self._admitted or event.status_code == 100
                self._interim += 1
                if self._interim > MOST_INTERIM:
                    raise BadResponse(f"{self._address} gave more than {MOST_INTERIM} informational responses")
            elif isinstance(event, h11.Response):
                self._response = event
            elif isinstance(event, h11.Data):
                self._body += event.data
                if len(self._body) > MAX_ANSWER_BYTES:
                    raise BadResponse(f"{self._address} answered more than {MAX_ANSWER_BYTES // 2**20} MiB")
            elif isinstance(event, h11.EndOfMessage):
                self._complete = True
            else:
                return


class _NotByTheKernel(Exception):
    """The file's system has no `sendfile`."""


class _Announced:
    """So many bytes, for h11 to count."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size


def _became_shorter(done: int, size: int) -> ValueError:
    return ValueError(f"the file became shorter while it was sent: {done} of {size} bytes")


def proxy_for(parts: SplitResult) -> SplitResult | None:
    """The proxy that the environment names for an address; None: go straight.

    Raises:
        ValueError: it is a proxy of a kind that is not spoken here.
    """
    host, port = _host_and_port(parts)
    proxies = getproxies()
    named = proxies.get(parts.scheme) or proxies.get("all")
    if not named or proxy_bypass(host) or proxy_bypass(f"{host}:{port}"):
        return None
    proxy = urlsplit(named if "://" in named else f"http://{named}")
    if proxy.scheme != "http" or not proxy.hostname:
        raise ValueError(f"updates go through http:// proxies only, not {proxy.scheme}://{proxy.hostname}")
    return proxy


def _proxy_authorization(proxy: SplitResult) -> list[tuple[str, str]]:
    if proxy.username is None:
        return []
    pair = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return [("Proxy-Authorization", f"Basic {base64.b64encode(pair.encode()).decode()}")]


def _host_and_port(parts: SplitResult) -> tuple[str, int]:
    return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def _target(parts: SplitResult) -> str:
    return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def _close(plain: socket.socket | None) -> None:
    if plain is not None:
        plain.close()
