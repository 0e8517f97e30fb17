"""Large models on their way in: over a connection of their own, straight into one buffer that is used again.

httpx hands out what it receives in pieces of 64 KiB, each copied several times and each a new object: for a large model
that is nearly as much work as its SHA-256. Small models go through httpx, whose connections are open already.
"""

import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from typing import Final

from isthmus.client._admission import Connection
from isthmus.client._answers import MAX_ANSWER_BYTES, Answer
from isthmus.client._transfer import Incoming
from isthmus.client.errors import BadResponse, TimedOut, Unreachable

LARGE_BYTES: Final = 4 << 20
"""From here on a connection of its own costs less than it saves."""
_BUFFER_BYTES: Final = 1 << 18


@contextmanager
def streamed(
    address: str, headers: Mapping[str, str], *, timeout_s: float, tls: ssl.SSLContext
) -> Iterator[Incoming | Answer]:
    """GET `address`: a response of 2xx, whose body is read by the caller, or another one as a whole.

    A piece of the body is good until the next one is asked for.

    Raises:
        Unreachable, TimedOut, BadResponse: also while the body is read.
    """
    with Connection(address, timeout_s, tls) as connection:
        with _translated(address, timeout_s):
            response = HTTPResponse(connection.ask("GET", list(headers.items())), method="GET")
            response.begin()
        found = {name.lower(): value for name, value in response.getheaders()}
        try:
            if 200 <= response.status < 300:
                yield Incoming(address, response.status, found, _pieces(response, address, timeout_s))
            else:
                with _translated(address, timeout_s):
                    body = response.read(MAX_ANSWER_BYTES)
                yield Answer(response.status, found, body)
        finally:
            response.close()


def _pieces(response: HTTPResponse, address: str, timeout_s: float) -> Iterator[memoryview]:
    """The body as it comes, until its announced length or, where none was announced, its end."""
    if response.length is None:
        while True:
            with _translated(address, timeout_s):
                piece = response.read1(_BUFFER_BYTES)
            if not piece:
                return
            yield memoryview(piece)
    buffer, left = memoryview(bytearray(_BUFFER_BYTES)), response.length
    source = response.fp  # `response.readinto` would wait until the buffer is full
    while left:
        with _translated(address, timeout_s):
            count = source.readinto1(buffer[:left])
        if not count:
            raise Unreachable(address, f"the connection was cut {left} bytes before the end of the answer")
        left -= count
        yield buffer[:count]


@contextmanager
def _translated(address: str, timeout_s: float) -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise TimedOut(address, f"nothing came for {timeout_s:g} s") from error
    except OSError as error:  # also what ssl raises
        raise Unreachable(address, str(error)) from error
    except (HTTPException, ValueError) as error:
        raise BadResponse(f"{address} does not speak HTTP: {error!r}") from error
