"""The command line `isthmus`. `main` is its entry point; `exits` says what its exit codes mean."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from isthmus.commands.session import Surroundings


def main() -> None:
    """The entry point."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str], surroundings: "Surroundings | None" = None) -> int:
    """Run one command line; its exit code. Tests bring their own surroundings."""
    from isthmus.commands.app import app  # noqa: PLC0415 - so that importing the package costs nothing
    from isthmus.commands.exits import ExitCode  # noqa: PLC0415
    from isthmus.commands.failures import explain  # noqa: PLC0415
    from isthmus.commands.session import Surroundings  # noqa: PLC0415

    around = surroundings or Surroundings()
    try:
        app(args=list(arguments), prog_name="isthmus", obj=around)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else ExitCode.OK if end.code is None else ExitCode.FAILED
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except Exception as error:
        if around.environ.get("ISTHMUS_DEBUG"):
            raise
        failure = explain(error)
        around.complain(failure.sentence, failure.hint)
        return failure.code
    return ExitCode.OK
