"""How many members have to stay until the end."""


def threshold_of(members: int) -> int:
    """So many shares rebuild a secret, and so many members have to sign one set of survivors: more than two thirds.

    With fewer than a third of the members on its side, a service cannot get two different sets signed: any two groups
    of this size have an honest member in common. Fewer than this learn nothing from their shares.

    Args:
        members: how many were asked, whether they answered or not; at least 1.

    Raises:
        ValueError: there are none.
    """
    if members < 1:
        raise ValueError("an attempt needs members")
    return max(2, 2 * members // 3 + 1)
