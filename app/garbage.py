"""When this process looks for garbage that refers to itself. What does not is freed at once, as ever in Python."""

import asyncio
import gc
from typing import Final

EVERY_S: Final = 60.0
"""Seconds from one look through all objects to the next. One takes some 20 to 40 us for each worker that waits here."""
_NEVER: Final = 2**31 - 1


async def collect_seldom() -> None:
    """Look through all objects by the clock instead of by their number, until cancelled.

    Python does so whenever a quarter of all objects is new. Where thousands of workers wait that is every few seconds,
    as their polls end and begin, and all of them stand still while it looks; yet it finds next to nothing, since a
    request that is over refers to itself nowhere. Young objects are looked through as often as before.
    """
    before = gc.get_threshold()
    gc.set_threshold(*before[:2], _NEVER)
    try:
        while True:
            await asyncio.sleep(EVERY_S)
            gc.collect()
    finally:
        gc.set_threshold(*before)
