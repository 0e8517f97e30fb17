"""Errors as a sentence, what to do about it, and an exit code."""

from collections.abc import Mapping
from typing import Final, NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from isthmus.client import BadResponse, IsthmusError, Refused, TimedOut, Unreachable
from isthmus.commands.credentials import CredentialsInvalid, NotLoggedIn
from isthmus.commands.exits import ExitCode
from isthmus.commands.lookup import Ambiguous, NoSuch
from isthmus.jobfile import FileInvalid, sentence
from isthmus.privacy.chain import ChainBroken
from isthmus.submission import CannotDraw
from isthmus.wire.problems import ProblemCode


class Failure(NamedTuple):
    """What is told of an error."""

    code: ExitCode
    sentence: str
    hint: str | None = None


def explain(error: Exception) -> Failure:
    """What went wrong and what to do."""
    failure = _explain(error)
    notes = " ".join(getattr(error, "__notes__", []))
    if not notes:
        return failure
    return failure._replace(hint=notes if failure.hint is None else f"{failure.hint} {notes}")


def _explain(error: Exception) -> Failure:  # noqa: PLR0911 - a table: one line for each kind of error
    match error:
        case Refused():
            return _refusal(error)
        case Unreachable():
            return Failure(
                ExitCode.UNREACHABLE,
                f"The service cannot be reached at {error.address}: {error.reason}.",
                "Is it running, and is the address right? `isthmus login` or ISTHMUS_URL set another one.",
            )
        case TimedOut():
            return Failure(
                ExitCode.UNREACHABLE,
                f"The service at {error.address} did not answer in time: {error.reason}.",
                "Whether it acted is not known: look before you repeat the command.",
            )
        case BadResponse():
            return Failure(ExitCode.FAILED, f"{error}.", "Is this the address of an Isthmus service of this version?")
        case NotLoggedIn():
            return Failure(ExitCode.NOT_ALLOWED, str(error), "Log in with: isthmus login URL")
        case CredentialsInvalid():
            return Failure(ExitCode.USAGE, str(error))
        case NoSuch():
            return Failure(ExitCode.NOT_FOUND, str(error))
        case Ambiguous() | FileInvalid() | CannotDraw():
            return Failure(ExitCode.USAGE, str(error))
        case ValidationError():
            return Failure(ExitCode.USAGE, "; ".join(_said(details) for details in error.errors(include_url=False)))
        case ChainBroken():
            return Failure(
                ExitCode.FAILED,
                str(error),
                "Ask the service's operator: its database was changed outside of the service.",
            )
        case OSError(filename=str() as name, strerror=str() as why):
            return Failure(ExitCode.USAGE, f"{name}: {why}.")
        case IsthmusError():
            return Failure(ExitCode.FAILED, str(error))
    return Failure(
        ExitCode.FAILED,
        f"This should not have happened: {type(error).__name__}: {error}",
        "Set ISTHMUS_DEBUG=1 for the details to report.",
    )


def _said(details: ErrorDetails) -> str:
    where = ".".join(map(str, details["loc"]))
    return f"{where}: {sentence(details)}" if where else sentence(details)


def _refusal(error: Refused) -> Failure:
    fields = "".join(f"\n  {field.field}: {field.message}" for field in error.errors)
    words = f"{error.detail or error.problem.title}{fields}"
    if error.status == 401:
        why = _EXPIRED.get(str(error.code))
        return Failure(
            ExitCode.NOT_ALLOWED,
            why or f"The service does not accept this API key. {words}",
            "Log in with a valid key: isthmus login URL (or set ISTHMUS_API_KEY).",
        )
    if error.status == 403:
        return Failure(ExitCode.NOT_ALLOWED, words, "`isthmus whoami` shows what this key may do.")
    if error.status == 404:
        return Failure(ExitCode.NOT_FOUND, words)
    if error.status in (429, 503):
        later = f" in {error.retry_after_s:g} s" if error.retry_after_s else " later"
        return Failure(ExitCode.UNREACHABLE, words, f"Try again{later}.")
    if error.status >= 500:
        return Failure(ExitCode.FAILED, words, "The service's log has the details.")
    return Failure(ExitCode.REFUSED, words, _HINTS.get(str(error.code)))


_EXPIRED: Final[Mapping[str, str]] = {
    ProblemCode.KEY_EXPIRED: "The API key has expired.",
    ProblemCode.KEY_REVOKED: "The API key was revoked.",
}

_HINTS: Final[Mapping[str, str]] = {
    ProblemCode.MODEL_MISSING: "Submit with `isthmus job submit`, which uploads the initial model too.",
    ProblemCode.NO_MATCHING_DATASET: "`isthmus dataset list` shows what there is; only confirmed datasets count.",
    ProblemCode.SECRET_SHOWN_ONCE: "If the secret was lost, revoke it and create another.",
    ProblemCode.GRANT_REFUSED_BY_POLICY: "`isthmus dataset policy` shows the policy.",
    ProblemCode.BUDGET_EXHAUSTED: "`isthmus dataset ledger` shows what the budget was spent for, and what is promised.",
    ProblemCode.PRIVACY_IMPOSSIBLE: "`isthmus privacy plan` shows what noise would be needed.",
    ProblemCode.POLICY_LOOSENED: "Only the configuration of the worker beside the data can allow more.",
}
