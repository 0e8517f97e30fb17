"""The one place where requests leave: addresses, the key, retries, and bodies as models of the contract."""

import os
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Final, NoReturn, TypeVar
from urllib.parse import quote, urlsplit

import httpx
from pydantic import BaseModel

from isthmus import __version__
from isthmus.client._answers import MAX_ANSWER_BYTES, Answer, Body, decode, failure_of
from isthmus.client._retry import Clock, Retries, with_retries
from isthmus.client.errors import BadResponse, IsthmusError, TimedOut, Unreachable
from isthmus.wire.base import Page
from isthmus.wire.version import API_PREFIX, IDEMPOTENCY_HEADER

Item = TypeVar("Item")
Query = Mapping[str, str | int | None]

USER_AGENT: Final = f"isthmus/{__version__}"


_TRUST_FROM: Final = ("SSL_CERT_FILE", "SSL_CERT_DIR")
"""What of the environment decides whom the usual context trusts."""


@lru_cache(maxsize=8)
def _usual_trust(_file: str | None, _folder: str | None) -> ssl.SSLContext:
    """The context of all clients that bring none: reading the certificates takes longer than a request."""
    return httpx.create_ssl_context()


class Service:
    """A service at an address, spoken to with one key. Safe to share between threads."""

    def __init__(
        self,
        base_url: str,
        api_key: str | None,
        *,
        timeout_s: float,
        retries: Retries,
        clock: Clock,
        transport: httpx.BaseTransport | None,
        tls: ssl.SSLContext | None,
    ) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{base_url!r} is no address of a service: it must begin with https:// (or http://)")
        if parts.username or parts.query or parts.fragment:
            raise ValueError("the address of a service holds no user name, no query and no fragment")
        self.base_url: Final = base_url.rstrip("/").removesuffix(API_PREFIX)
        self.timeout_s: Final = timeout_s
        self.retries: Final = retries
        self.clock: Final = clock
        self.tls: Final = tls if tls is not None else _usual_trust(*map(os.environ.get, _TRUST_FROM))
        self.own_transport: Final = transport is not None
        self.headers: Final = {"User-Agent": USER_AGENT, "Accept": "application/json"}
        if api_key is not None:
            self.headers["Authorization"] = f"Bearer {api_key}"
        self.http: Final = httpx.Client(
            headers=self.headers,
            timeout=timeout_s,
            transport=transport,
            verify=self.tls,
            follow_redirects=False,
        )

    def address(self, path: str) -> str:
        """The whole address of a path below `/v1`; a path that begins with '/' is taken from the root."""
        return self.base_url + (path if path.startswith("/") else f"{API_PREFIX}/{path}")

    def ask(
        self,
        method: str,
        path: str,
        kind: type[Body],
        body: BaseModel | None = None,
        *,
        query: Query | None = None,
        idempotency_key: str | None = None,
        repeatable: bool | None = None,
        timeout_s: float | None = None,
    ) -> Body:
        """Send a body of the contract, if any, and read the answer as `kind`. Raises what `errors` lists."""
        answer = self.send(
            method,
            path,
            body,
            query=query,
            idempotency_key=idempotency_key,
            repeatable=repeatable,
            timeout_s=timeout_s,
        )
        return decode(answer, kind, self.address(path))

    def send(
        self,
        method: str,
        path: str,
        body: BaseModel | None = None,
        *,
        query: Query | None = None,
        idempotency_key: str | None = None,
        repeatable: bool | None = None,
        timeout_s: float | None = None,
        headers: Mapping[str, str] | None = None,
        content: Callable[[], Iterator[bytes] | bytes] | None = None,
    ) -> Answer:
        """Send, repeat as `Retries` allows, and give the answer if it is of 2xx. `content` is begun anew each time."""
        sent = dict(headers or {})
        if idempotency_key is not None:
            sent[IDEMPOTENCY_HEADER] = idempotency_key
        data: bytes | None = None
        if body is not None:
            data = body.model_dump_json(by_alias=True).encode()
            sent["Content-Type"] = "application/json"
        address = self.address(path)

        def once() -> Answer:
            request = self.http.build_request(
                method,
                address,
                params=_given(query),
                headers=sent,
                content=content() if content is not None else data,
                timeout=self.timeout_s if timeout_s is None else timeout_s,
            )
            response = self.http.send(request, stream=True)
            try:
                return read_answer(response)
            finally:
                response.close()

        if repeatable is None:
            repeatable = method in ("GET", "PUT") or idempotency_key is not None
        with self.translated(address):
            answer = with_retries(once, retries=self.retries, repeatable=repeatable, clock=self.clock)
        if not 200 <= answer.status < 300:
            raise failure_of(answer, address, self.clock.now())
        return answer

    @contextmanager
    def stream(
        self,
        path: str,
        *,
        query: Query | None = None,
        headers: Mapping[str, str] | None = None,
        read_timeout_s: float | None = None,
    ) -> Iterator[httpx.Response]:
        """One GET, without retries, whose body is read by the caller; an answer outside of 2xx is raised.

        httpx.TransportError is left as it is: the caller decides whether to go on from where it was cut.
        """
        timeout = httpx.Timeout(self.timeout_s, read=self.timeout_s if read_timeout_s is None else read_timeout_s)
        address = self.address(path)
        with self.http.stream(
            "GET", address, params=_given(query), headers=dict(headers or {}), timeout=timeout
        ) as response:
            if not 200 <= response.status_code < 300:
                raise failure_of(read_answer(response), address, self.clock.now())
            yield response

    def pages(self, path: str, kind: type[Page[Item]], query: Query | None = None) -> Iterator[Item]:
        """Every item of a list; a page is asked for when its first item is."""
        cursor: str | None = None
        while True:
            page = self.ask("GET", path, kind, query={**(query or {}), "cursor": cursor})
            yield from page.items
            if page.next_cursor is None:
                return
            if page.next_cursor == cursor:
                raise BadResponse(f"{self.address(path)} gave the same page twice")
            cursor = page.next_cursor

    @contextmanager
    def translated(self, address: str) -> Iterator[None]:
        """httpx's errors as ours."""
        try:
            yield
        except httpx.HTTPError as error:
            raise_translated(error, address)

    def close(self) -> None:
        """Give the connections back."""
        self.http.close()


def read_answer(response: httpx.Response) -> Answer:
    """The whole response, if it is of a size that the contract knows.

    Raises:
        BadResponse: it is longer.
    """
    body = bytearray()
    for piece in response.iter_bytes():
        body += piece
        if len(body) > MAX_ANSWER_BYTES:
            raise BadResponse(f"{response.request.url} answered more than {MAX_ANSWER_BYTES // 2**20} MiB")
    return Answer(response.status_code, {name.lower(): value for name, value in response.headers.items()}, bytes(body))


def translated_error(error: httpx.HTTPError, address: str) -> IsthmusError:
    """An error of httpx as ours."""
    reason = str(error) or type(error).__name__
    if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
        return TimedOut(address, reason)
    if isinstance(error, httpx.DecodingError):
        return BadResponse(f"{address} answered what cannot be decoded: {reason}")
    return Unreachable(address, reason)


def raise_translated(error: httpx.HTTPError, address: str) -> NoReturn:
    """Raise an error of httpx as ours."""
    raise translated_error(error, address) from error


def segment(value: object) -> str:
    """An id or a name as one segment of a path.

    Raises:
        ValueError: it would be no segment of its own.
    """
    if str(value) in ("", ".", ".."):
        raise ValueError(f"{value!r} is no id and no name")
    return quote(str(value), safe="")


def _given(query: Query | None) -> dict[str, Any]:
    return {name: str(value) for name, value in (query or {}).items() if value is not None}
