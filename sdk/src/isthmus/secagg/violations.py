"""What is wrong with a message. A client leaves the attempt, a service refuses the message; neither goes on with it."""

from collections.abc import Iterable


class ProtocolViolation(Exception):
    """What a member was sent does not follow the protocol: it leaves the attempt and reveals nothing more."""

    def __init__(self, reason: str, *, peer: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        """One sentence for the log and for the service. It holds no secrets."""
        self.peer = peer
        """The organization that may have caused it, where no honest service could have seen that; None: the service."""


class MessageInvalid(ValueError):
    """A member's message is not what its step asks for."""


class TooFewShares(Exception):
    """Fewer members than the threshold have told their share of some secret: nobody can rebuild it yet."""


class SharesWrong(Exception):
    """Some secret cannot be rebuilt from the shares that are in: one at least is wrong. More shares may help."""

    def __init__(self, suspects: Iterable[int]) -> None:
        self.suspects = tuple(sorted(suspects))
        """Who may have caused it: members whose shares are known to be wrong, and those whose own secret cannot be
        rebuilt (they may have dealt shares that do not fit). All who answered, where no secret at all can be."""
        named = ", ".join(map(str, self.suspects))
        super().__init__(f"The shares that came in do not fit together; members {named} may have sent wrong ones.")
