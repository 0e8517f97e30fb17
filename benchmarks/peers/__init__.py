"""The same work on other platforms, each in an environment of its own under `.peers/`, made when it is first asked for.

Nothing of a peer is imported here: its parts run as processes of its own environment and tell their figures in a file.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final, Protocol

from benchmarks.peers.flower import Flower
from benchmarks.peers.nvflare import NVFlare
from benchmarks.peers.running import PeerRounds, Shape


class Peer(Protocol):
    """A platform that can do rounds in which nobody trains."""

    name: str
    notes: list[str]
    """What the reader of the table should know of how it was run."""

    def rounds(self, shapes: Sequence[Shape], clients: int, rounds: int) -> PeerRounds:
        """Run so many rounds over float32 arrays of these shapes.

        Raises:
            RuntimeError: it cannot be installed, does not start, or does not get there in time.
        """
        ...


PEERS: Final[Mapping[str, Peer]] = MappingProxyType({"flower": Flower(), "nvflare": NVFlare()})
