"""What the exit codes of `isthmus` mean."""

from enum import IntEnum


class ExitCode(IntEnum):
    """One code for each thing that a script would do differently."""

    OK = 0
    FAILED = 1  # unexpected: a bug, or an answer that does not speak the contract
    USAGE = 2  # the command line, or a file given on it, is wrong
    REFUSED = 3  # the service understood and said no
    NOT_FOUND = 4  # there is no such thing, or this key may not see it
    NOT_ALLOWED = 5  # no valid key, or one that may not do that
    UNREACHABLE = 6  # the service cannot be reached or does not answer
    JOB_UNSUCCESSFUL = 7  # the job that was watched failed or was cancelled
    INTERRUPTED = 130  # Ctrl-C
