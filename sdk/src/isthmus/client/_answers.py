"""What came back, as plain data, and what it means: the same for httpx and for the admission's own connection."""

from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from isthmus.client.errors import BadResponse, IsthmusError, Refused, Unreachable
from isthmus.wire.problems import Problem

MAX_ANSWER_BYTES: Final = 32 * 2**20
"""No JSON of the contract is longer. What is, is not ours, and is not read into memory."""

LONGEST_RETRY_AFTER_S: Final = 3600.0
"""Whatever an answer asks for, nobody waits longer."""

GATEWAY_STATUSES: Final = frozenset({502, 503, 504})

Body = TypeVar("Body", bound=BaseModel)


class Answer(NamedTuple):
    """A whole response. The names of `headers` are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def retry_after_s(headers: Mapping[str, str], now: datetime) -> float | None:
    """How long the service asks to wait, as seconds or an HTTP date: 0 to LONGEST_RETRY_AFTER_S; None: it does not say.

    A date is measured from the response's own `Date`, so that a wrong clock here does no harm; `now` stands in for it.
    """
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return min(LONGEST_RETRY_AFTER_S, float(value[:9]))
    until = _http_date(value)
    if until is None:
        return None
    since = _http_date(headers.get("date", "")) or now
    return min(LONGEST_RETRY_AFTER_S, max(0.0, (until - since).total_seconds()))


def _http_date(value: str) -> datetime | None:
    try:
        moment = parsedate_to_datetime(value)
    except (ValueError, OverflowError, TypeError):
        return None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def failure_of(answer: Answer, address: str, now: datetime) -> IsthmusError:
    """The error that an answer outside of 2xx stands for."""
    try:
        problem = Problem.model_validate_json(answer.body)
    except ValidationError:
        problem = None
    if problem is not None:
        return Refused(problem, retry_after_s=retry_after_s(answer.headers, now))
    if answer.status in GATEWAY_STATUSES:
        return Unreachable(address, f"a gateway answered {answer.status}")
    if 300 <= answer.status < 400:
        elsewhere = answer.headers.get("location", "nowhere")
        return BadResponse(f"{address} redirects to {elsewhere}; is this the address of the service?")
    return BadResponse(f"{address} answered {answer.status} without a problem document; is this the service?")


def decode(answer: Answer, kind: type[Body], address: str) -> Body:
    """The body as a model of the contract.

    Raises:
        BadResponse: it is something else.
    """
    try:
        return kind.model_validate_json(answer.body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the body"
        raise BadResponse(f"{address} answered no {kind.__name__}: {where}: {first['msg']}") from None
