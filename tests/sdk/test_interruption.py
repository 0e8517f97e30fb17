"""A signal ends a program in order wherever it comes, even where a library makes another error of its exception."""

import signal
import subprocess
import sys
from textwrap import dedent, indent

import pytest

PROGRAM = """
import asyncio, os, signal, sys
from pydantic import BaseModel, field_serializer
from isthmus.interruption import Interrupted, Interruption

class Body(BaseModel):
    number: int = 1
    @field_serializer("number")
    def _told(self, number: int) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        return number

def end():
    os.kill(os.getpid(), signal.SIGTERM)

try:
    with Interruption(signal.SIGINT, signal.SIGTERM) as interruption:
        try:
{what}
            print("went on")
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            print("ended in order")
except Interrupted as interrupted:
    print(interrupted, "after", type(interrupted.__cause__).__name__)
    sys.exit(128 + interrupted.number)
print("nobody has heard it")
"""


def said_by(what: str) -> tuple[int, list[str]]:
    """What a program says whose block does `what`, and its exit code."""
    program = PROGRAM.format(what=indent(dedent(what).strip(), " " * 12))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


ENDED = 128 + signal.SIGTERM
IN_ORDER = "ended in order"


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("end()", [IN_ORDER, "SIGTERM after NoneType"]),
        ("Body().model_dump_json()", [IN_ORDER, "SIGTERM after PydanticSerializationError"]),
        (
            """
            try:
                Body().model_dump_json()
            except ValueError:
                interruption.check()
            """,
            [IN_ORDER, "SIGTERM after NoneType"],
        ),
        (
            """
            async def called():
                asyncio.get_running_loop().call_soon(end)
                await asyncio.sleep(60)
            asyncio.run(called())
            """,
            [IN_ORDER, "SIGTERM after NoneType"],
        ),
        (
            """
            try:
                Body().model_dump_json()
            except ValueError:
                pass
            """,
            ["went on", IN_ORDER, "SIGTERM after NoneType"],
        ),
    ],
    ids=["raised", "made another error", "borne, and asked for", "in a callback", "borne"],
)
def test_a_signal_ends_the_program_once_and_in_order(what: str, said: list[str]) -> None:
    assert said_by(what) == (ENDED, said)


def test_afterwards_the_handlers_of_before_are_back() -> None:
    program = """
        signal.signal(signal.SIGUSR1, lambda *_: print("as before"))
        with Interruption(signal.SIGUSR1):
            pass
        os.kill(os.getpid(), signal.SIGUSR1)
        end()
    """
    assert said_by(program) == (ENDED, ["as before", IN_ORDER, "SIGTERM after NoneType"])


def test_an_error_without_a_signal_stays_what_it_is() -> None:
    program = """
        try:
            with Interruption(signal.SIGUSR1):
                raise KeyError("mine")
        except KeyError as error:
            print(error)
        end()
    """
    assert said_by(program) == (ENDED, ["'mine'", IN_ORDER, "SIGTERM after NoneType"])
