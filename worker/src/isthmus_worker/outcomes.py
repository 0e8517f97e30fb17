"""What a step of the agent came to."""

from enum import StrEnum


class Outcome(StrEnum):
    """What a step came to."""

    IDLE = "idle"
    SUBMITTED = "submitted"
    REFUSED = "refused"
    FAILED = "failed"
    CANCELLED = "cancelled"
    KEPT = "kept"  # the upload waits for the round's next offer
    SUMMED = "summed"  # of a secured task: all that was to be done for the sum is done
    PARKED = "parked"  # a secured task waits for the others; meanwhile there is room for another
