"""The service without its checks of a body: `python -m benchmarks.unchecked_service serve --no-migrate`.

Only for comparison. The route, the server, the store and the transactions are the product's own; what is left out is
exactly what judging a body costs: SHA-256 over it and the comparison with the declared digest, its header, and every
element's finiteness and square. Whatever arrives with the declared length is taken and durable as ever.
"""

from types import ModuleType
from typing import Any

from app import blobs
from app.__main__ import main
from app.rounds import uploads


class _Nothing:
    """Takes the place of a check: whatever is asked of it, it has no objection."""

    l2_norm = 0.0

    def __init__(self, *_: Any) -> None:
        pass

    def feed(self, _chunk: bytes | memoryview) -> None:
        """No objection."""

    update = feed

    def finish(self) -> None:
        """No objection."""

    def require(self, _digest: str) -> None:
        """No objection."""

    def released(self) -> dict[str, Any]:
        """No results: the job of the benchmark asks for none."""
        return {}


class _Unjudged(_Nothing):
    """An inspector that measures nothing."""

    scanner = _Nothing()


def _leave_out(module: ModuleType, check: str, nothing: type) -> None:
    """Put `nothing` in the place of a check; the benchmark would compare like with like if there were none there."""
    if not hasattr(module, check):
        raise ImportError(f"{module.__name__} has no {check} to leave out: the benchmark does not fit this service")
    setattr(module, check, nothing)


if __name__ == "__main__":
    _leave_out(uploads, "UpdateInspector", _Unjudged)
    _leave_out(blobs, "BodyDigest", _Nothing)
    main()
