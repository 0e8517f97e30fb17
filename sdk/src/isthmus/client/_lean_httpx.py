"""Import httpx without its command line, which would load rich, pygments and click into every agent (some 6 MiB).

httpx imports `httpx._main` where it can and does without it where it cannot; for the length of one import it cannot.
"""

import sys

_first = "httpx" not in sys.modules
if _first:
    sys.modules["httpx._main"] = None  # type: ignore[assignment]  # the documented way to make an import fail

import httpx  # noqa: E402

if _first:
    del sys.modules["httpx._main"]

__all__ = ["httpx"]
