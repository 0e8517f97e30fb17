"""Who shares masks and secrets with whom. Isthmus' jobs use the complete graph: everybody with everybody."""

import hashlib


def neighbours(members: int, degree: int, seed: bytes, index: int) -> frozenset[int]:
    """The neighbours of a member in a graph where everybody has `degree` of them.

    With `degree` = `members` - 1 that is everybody else. With fewer, the members sit on a ring in an order that the
    seed shuffles, and each is linked to the nearest on both sides (Harary), with an odd degree to the one opposite too.

    Args:
        members: in the roster.
        degree: neighbours of each; from 1 to `members` - 1; even unless `members` is.
        seed: what nobody can choose alone; not looked at in the complete graph.
        index: whose neighbours, from 0.

    Raises:
        ValueError: there is no such member or no such graph.
    """
    if not 0 <= index < members:
        raise ValueError(f"there is no member {index} among {members}")
    if not 1 <= degree < members or (degree % 2 and members % 2):
        raise ValueError(f"no graph of {members} members has {degree} neighbours for each")
    if degree == members - 1:
        return frozenset(range(members)) - {index}
    ring = sorted(range(members), key=lambda member: hashlib.sha256(seed + member.to_bytes(4, "big")).digest())
    place = ring.index(index)
    steps = [*range(1, degree // 2 + 1)]
    found = {ring[(place + step) % members] for step in steps} | {ring[place - step] for step in steps}
    if degree % 2:
        found.add(ring[(place + members // 2) % members])
    return frozenset(found)
