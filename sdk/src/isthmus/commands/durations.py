"""Spans of time as people write them."""

import re
from typing import Final

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_SPAN: Final = re.compile(r"([0-9]{1,9})([smhdw])")


def parse_duration(text: str) -> int:
    """`90s`, `15m`, `12h`, `30d`, `2w`, or `1d12h` in seconds.

    Raises:
        ValueError: it is something else.
    """
    parts = _SPAN.findall(text.strip().lower())
    if not parts or "".join(number + unit for number, unit in parts) != text.strip().lower():
        raise ValueError(f"{text!r} is no span of time: write 90s, 15m, 12h, 30d or 2w")
    return sum(int(number) * _UNITS[unit] for number, unit in parts)
