"""Every refusal becomes one kind of document; this is the only place that renders them."""

import random
from http import HTTPStatus

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from sqlalchemy.exc import DataError, DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from app.errors import PlatformError
from isthmus.codec.errors import CodecError
from isthmus.wire.problems import PROBLEMS, FieldProblem, Problem, ProblemCode, problem
from isthmus.wire.version import PROBLEM_MEDIA_TYPE

log = structlog.get_logger(__name__)

_BY_STATUS = {
    401: ProblemCode.UNAUTHENTICATED,
    403: ProblemCode.FORBIDDEN,
    404: ProblemCode.NOT_FOUND,
    405: ProblemCode.METHOD_NOT_ALLOWED,
    413: ProblemCode.BODY_TOO_LARGE,
    415: ProblemCode.UNSUPPORTED_MEDIA_TYPE,
    416: ProblemCode.RANGE_NOT_SATISFIABLE,
    429: ProblemCode.TOO_MANY_REQUESTS,
    503: ProblemCode.NOT_READY,
}


_SENTENCES = {
    404: "There is no such address; /docs lists those that there are.",
    405: "This address does not take that method; `Allow` lists those that it takes.",
}
"""For refusals of the router, which says no more than `Not Found`."""


def render(document: Problem, *, headers: dict[str, str] | None = None) -> JSONResponse:
    """A problem document as a response."""
    return JSONResponse(
        document.model_dump(mode="json", exclude_none=True),
        status_code=document.status,
        media_type=PROBLEM_MEDIA_TYPE,
        headers=headers,
    )


_OF_KEYS = (
    ProblemCode.UNAUTHENTICATED,
    ProblemCode.KEY_EXPIRED,
    ProblemCode.KEY_REVOKED,
    ProblemCode.FORBIDDEN,
    ProblemCode.INVALID_REQUEST,
)


def refuses(*codes: ProblemCode, needs_key: bool = True) -> dict[int | str, dict[str, object]]:
    """What an operation may refuse, for its page in the documentation; what all with a key may refuse is added."""
    grouped: dict[int, list[ProblemCode]] = {}
    for code in (*(_OF_KEYS if needs_key else ()), *codes):
        grouped.setdefault(PROBLEMS[code].status, []).append(code)
    return {
        status: {
            "model": Problem,
            "description": "; ".join(f"`{code}`: {PROBLEMS[code].title}" for code in dict.fromkeys(found)),
            "content": {
                PROBLEM_MEDIA_TYPE: {
                    "examples": {
                        code.value: {"value": problem(code, PROBLEMS[code].title + ".").model_dump(exclude_none=True)}
                        for code in dict.fromkeys(found)
                    }
                }
            },
        }
        for status, found in sorted(grouped.items())
    }


def _field(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location if part != "body") or "body"


def _message(text: str) -> str:
    return text.removeprefix("Value error, ")


def invalid(error: RequestValidationError | ValidationError) -> Problem:
    """The refusal of a body, a path or a query that does not fit, with every field that is wrong."""
    found = error.errors()
    fields = [FieldProblem(field=_field(tuple(item["loc"])), message=_message(item["msg"])) for item in found]
    detail = "; ".join(f"{field.field}: {field.message}" for field in fields[:3])
    if len(fields) > 3:
        detail += f"; and {len(fields) - 3} more"
    return problem(ProblemCode.INVALID_REQUEST, detail, errors=fields)


async def _platform_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, PlatformError)
    headers = {}
    if error.code in (ProblemCode.UNAUTHENTICATED, ProblemCode.KEY_EXPIRED, ProblemCode.KEY_REVOKED):
        headers["WWW-Authenticate"] = "Bearer"
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, round(error.retry_after_s)))
    return render(problem(error.code, error.detail, errors=error.errors), headers=headers)


async def _codec_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, CodecError)
    return render(problem(error.code, str(error)))


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return render(invalid(error))


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code = _BY_STATUS.get(error.status_code)
    if code is None:
        code = ProblemCode.INVALID_REQUEST if error.status_code < 500 else ProblemCode.INTERNAL
    bare = error.detail == HTTPStatus(error.status_code).phrase
    detail = _SENTENCES.get(error.status_code, error.detail) if bare else error.detail
    return render(problem(code, detail), headers=dict(error.headers or {}))


async def _cut_off(request: Request, error: Exception) -> JSONResponse:
    """The connection ended within the body. Nobody hears this; it is no failure of ours."""
    return render(problem(ProblemCode.LENGTH_MISMATCH, "The connection ended within the body: send it again."))


async def _unstorable(request: Request, error: Exception) -> JSONResponse:
    """Postgres has no place for a value that came with the request, such as a NUL character in a text."""
    detail = "A value cannot be stored: a number is too large, or a text holds a NUL character."
    return render(problem(ProblemCode.INVALID_REQUEST, detail))


async def _too_deep(request: Request, error: Exception) -> JSONResponse:
    return render(problem(ProblemCode.INVALID_REQUEST, "The body is nested too deeply."))


async def _database_gone(request: Request, error: Exception) -> JSONResponse:
    log.warning("the database does not answer", error=str(error))
    document = problem(ProblemCode.NOT_READY, "The service's database does not answer just now; try again.")
    return render(document, headers={"Retry-After": "1"})


async def _too_busy(request: Request, error: Exception) -> JSONResponse:
    """So many asked at once that no connection to the database came free in time. They must not come back as one."""
    log.warning("no connection to the database came free", path=request.url.path)
    document = problem(ProblemCode.NOT_READY, "The service has more to do just now than it can; try again.")
    return render(document, headers={"Retry-After": str(random.randint(2, 10))})  # noqa: S311 -- jitter


async def _bug(request: Request, error: Exception) -> JSONResponse:
    log.exception("unexpected failure", path=request.url.path)
    return render(
        problem(ProblemCode.INTERNAL, "The failure was logged. Look at how things stand before you repeat the request.")
    )


def install(app: FastAPI) -> None:
    """Teach `app` to answer with problem documents, and with nothing else, when it refuses."""
    app.add_exception_handler(PlatformError, _platform_error)
    app.add_exception_handler(CodecError, _codec_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ClientDisconnect, _cut_off)
    app.add_exception_handler(DataError, _unstorable)
    app.add_exception_handler(RecursionError, _too_deep)
    app.add_exception_handler(OperationalError, _database_gone)
    app.add_exception_handler(PoolTimeout, _too_busy)
    app.add_exception_handler(DBAPIError, _bug)
    app.add_exception_handler(Exception, _bug)
