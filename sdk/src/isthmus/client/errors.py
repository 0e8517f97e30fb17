"""What can go wrong between a client and the service. Everything here is an IsthmusError.

IsthmusError
  Refused        the service understood and said no: a problem of the catalogue, with its stable code
  Unreachable    no connection, a connection cut, or a gateway without a service behind it
  TimedOut       the service took the request and did not answer in time: whether it acted is not known
  BadResponse    what answered does not speak the contract, or the bytes are not those that were named
"""

from isthmus.wire.problems import FieldProblem, Problem, ProblemCode


class IsthmusError(Exception):
    """The base of everything that the client raises on purpose."""


class Refused(IsthmusError):
    """The service refused. `code` is what to decide on; `detail` is a sentence for people."""

    def __init__(self, problem: Problem, *, retry_after_s: float | None = None) -> None:
        self.problem = problem
        self.code: ProblemCode | str = _known(problem.code)
        """A string only where the service is newer than this client."""
        self.status = problem.status
        self.detail = problem.detail
        self.errors: tuple[FieldProblem, ...] = problem.errors
        self.retry_after_s = retry_after_s
        """What a 429 or 503 asked for, if it did."""
        fields = "".join(f"\n  {error.field}: {error.message}" for error in problem.errors)
        super().__init__(f"{problem.title}: {problem.detail} [{problem.code}]{fields}")


class Unreachable(IsthmusError):
    """The service could not be reached at `address`."""

    def __init__(self, address: str, reason: str) -> None:
        super().__init__(f"{address} cannot be reached: {reason}")
        self.address = address
        self.reason = reason


class TimedOut(IsthmusError):
    """The service did not answer in time. Whether it acted is not known."""

    def __init__(self, address: str, reason: str) -> None:
        super().__init__(f"{address} did not answer in time: {reason}")
        self.address = address
        self.reason = reason


class BadResponse(IsthmusError):
    """What answered does not speak the contract."""


def _known(code: str) -> ProblemCode | str:
    try:
        return ProblemCode(code)
    except ValueError:
        return code
