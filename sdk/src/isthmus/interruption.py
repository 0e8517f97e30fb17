"""Signals that end a program, as one exception which is raised wherever the program is.

An exception out of a signal handler can come in the middle of any library, and some make another one of it: pydantic
says `PydanticSerializationError`, a `ValueError`, which then looks like a fault, or is borne like one. So the signal is
remembered besides: whatever leaves the block afterwards is `Interrupted`, and who bears errors asks `check` first.
It is a `SystemExit` because asyncio logs any other that comes out of a callback, and goes on.
"""

import signal
from types import FrameType, TracebackType
from typing import Any, Self


class Interrupted(SystemExit):
    """Somebody wants the program to end. Where nobody catches it the exit code is 128 and the number, as in a shell.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number

    def __str__(self) -> str:
        return signal.Signals(self.number).name


class Interruption:
    """Within the block the first of these signals raises `Interrupted`; what ends the program is not disturbed again.

    Left without a signal, the block puts the handlers back that were there before.

    Args:
        numbers: the signals. Enter the block in the main thread, which is where they are raised.
    """

    def __init__(self, *numbers: signal.Signals) -> None:
        self._numbers = numbers
        self._before: list[Any] = []
        self._came: int | None = None

    def __enter__(self) -> Self:
        self._before = [signal.signal(number, self._interrupt) for number in self._numbers]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._came is None:
            for number, handler in zip(self._numbers, self._before, strict=True):
                signal.signal(number, handler)
        elif not isinstance(error, Interrupted):
            raise Interrupted(self._came) from error

    def check(self) -> None:
        """Raise what a signal has raised already, if that was lost on the way.

        Raises:
            Interrupted: a signal has come.
        """
        if self._came is not None:
            raise Interrupted(self._came)

    def _interrupt(self, number: int, _frame: FrameType | None) -> None:
        for again in self._numbers:
            signal.signal(again, signal.SIG_IGN)
        self._came = number
        raise Interrupted(number)
