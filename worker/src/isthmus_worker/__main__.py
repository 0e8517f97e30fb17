"""The program `isthmus-worker`. `run` becomes the agent at once; all else stands in `isthmus_worker.commands`.

An agent starts in a fraction of a second because nothing of the command line is imported on its way.
"""

import sys

_HELP = "--help"


def main() -> None:
    """The program."""
    command, *arguments = sys.argv[1:] or [_HELP]
    if command == "run" and _HELP not in arguments:
        if not sys.flags.safe_path:
            del sys.path[0]  # where the program or the caller stands: no module is to be found there
        from isthmus_worker.agent import main as work  # noqa: PLC0415 - not for other commands

        work(arguments)
    else:
        from isthmus_worker.commands import app  # noqa: PLC0415 - not for the agent

        app()


if __name__ == "__main__":
    main()
