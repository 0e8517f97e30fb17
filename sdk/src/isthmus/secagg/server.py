"""The service's side: checks what members send, puts together what they get, and rebuilds what unmasks the sum.

It learns nothing here that would tell one member's vector from another's: of each member only one of its two secrets
is ever told, and with that the masks are known that do not cancel in the sum.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from isthmus.secagg.derivation import Mask, agree, commitment_to, is_signed, pair_mask, public_key, self_mask_key
from isthmus.secagg.messages import (
    ADVERTISEMENT_BYTES,
    MASK_KEY,
    OWN_MASK,
    REVEALED_BYTES,
    SEALED_BYTES,
    SIGNATURE_BYTES,
    Advertisement,
    survivors_statement,
    u32s,
)
from isthmus.secagg.parameters import threshold_of
from isthmus.secagg.recovery import Shares, recover
from isthmus.secagg.roster import Roster
from isthmus.secagg.shamir import PRIME
from isthmus.secagg.violations import MessageInvalid, TooFewShares

Neighbours = Callable[[int], Collection[int]]
"""With whom a member shares masks and secrets."""


def check_keys(context: bytes, index: int, identity: bytes, message: bytes, *, others: Iterable[bytes] = ()) -> None:
    """Goes on with a keys message that every other member will accept.

    Args:
        context: of the attempt.
        index: the sender's.
        identity: the sender's, from the roster.
        message: what it sent.
        others: the keys messages that are in already, of other members.

    Raises:
        MessageInvalid: it has another form, another index, a signature that does not hold, or keys that cannot be used
            or that somebody else has.
    """
    _require_length(message, ADVERTISEMENT_BYTES, "A keys message")
    found = Advertisement.from_bytes(message)
    if found.index != index:
        raise MessageInvalid(f"The keys are of member {found.index}; the sender is member {index}.")
    try:
        found.require_valid(context, identity)
    except ValueError as error:
        raise MessageInvalid(f"The keys cannot be used: {error}.") from error
    taken = [key for other in map(Advertisement.from_bytes, others) for key in (other.channel, other.mask)]
    if found.channel == found.mask or {found.channel, found.mask} & set(taken):
        raise MessageInvalid("A public key comes twice; each has to be fresh.")


def keys_answer(roster: Roster, messages: Mapping[int, bytes]) -> bytes:
    """Everybody's keys, for everybody: the roster, and the messages by index."""
    listed = roster.to_bytes()
    keyed = b"".join(messages[index] for index in sorted(messages))
    return u32s([len(listed)]) + listed + u32s([len(messages)]) + keyed


def check_shares(message: bytes, keyed_count: int) -> None:
    """Goes on with a shares message of the right length; its parts can only be read by those that they are for.

    Raises:
        MessageInvalid: it has not one part for each of the others that are keyed.
    """
    _require_length(message, (keyed_count - 1) * SEALED_BYTES, "A shares message")


def ciphertext_for(message: bytes, sender: int, recipient: int, keyed: Sequence[int]) -> bytes:
    """The part of a shares message that is for one recipient.

    Args:
        message: what the sender sent, checked.
        sender: its index.
        recipient: another index.
        keyed: the indices whom the message has parts for, with the sender's own, ascending.

    Raises:
        ValueError: there is no such recipient.
    """
    place = [index for index in keyed if index != sender].index(recipient)
    return message[place * SEALED_BYTES : (place + 1) * SEALED_BYTES]


def shares_answer(index: int, shared: Sequence[int], ciphertexts: Mapping[int, bytes]) -> bytes:
    """Who has shared, and what the others encrypted for this member.

    Args:
        index: the recipient.
        shared: everybody whose shares are in, ascending.
        ciphertexts: by sender, for those of them that share with the recipient.
    """
    parts = (ciphertexts[sender] for sender in sorted(ciphertexts) if sender != index)
    return _listed(shared) + b"".join(parts)


def survivors_answer(survivors: Sequence[int]) -> bytes:
    """Whose vectors are in the sum, ascending."""
    return _listed(survivors)


def check_confirmation(context: bytes, survivors: Collection[int], identity: bytes, message: bytes) -> None:
    """Goes on with a signature that every other member will accept.

    Args:
        context: of the attempt.
        survivors: the set, ascending.
        identity: the sender's, from the roster.
        message: what it sent.

    Raises:
        MessageInvalid: it is not the sender's signature of this set in this attempt.
    """
    _require_length(message, SIGNATURE_BYTES, "A survivors message")
    if not is_signed(identity, message, survivors_statement(context, survivors)):
        raise MessageInvalid("The signature is not this identity's, for this set of survivors in this attempt.")


def confirmations_answer(signatures: Mapping[int, bytes]) -> bytes:
    """Who has signed the survivors, for everybody."""
    return u32s([len(signatures)]) + b"".join(u32s([index]) + signatures[index] for index in sorted(signatures))


def check_reveal(message: bytes, shared: Collection[int], survivors: Collection[int]) -> None:
    """Goes on with an unmask message that has what was asked for; whether the shares are right shows in `reconstruct`.

    Args:
        message: what a survivor sent.
        shared: whose shares it holds, with its own.
        survivors: whose vectors are in the sum.

    Raises:
        MessageInvalid: it has another form, or a share that was not asked for.
    """
    _require_length(message, len(shared) * REVEALED_BYTES, "An unmask message")
    for place, member in enumerate(sorted(shared)):
        entry = message[place * REVEALED_BYTES : (place + 1) * REVEALED_BYTES]
        if int.from_bytes(entry[:4], "big") != member:
            raise MessageInvalid(f"Share {place} is not of member {member}, whose turn it is.")
        if entry[4] != (OWN_MASK if member in survivors else MASK_KEY):
            raise MessageInvalid(f"The share of member {member} is not of the secret that was asked for.")
        if int.from_bytes(entry[5:], "big") >= PRIME:
            raise MessageInvalid(f"The share of member {member} is not a number of the field.")


@dataclass(frozen=True)
class Rebuilt:
    """What unmasks a sum."""

    masks: tuple[Mask, ...] = field(repr=False)
    """To be added to the sum of the masked vectors, with their signs."""
    suspects: tuple[int, ...]
    """Members that sent wrong shares; the sum is right all the same."""


def reconstruct(
    context: bytes,
    roster: Roster,
    advertisements: Mapping[int, bytes],
    shared: Collection[int],
    survivors: Collection[int],
    reveals: Mapping[int, bytes],
) -> tuple[Mask, ...]:
    """The masks to be added to the sum of the survivors' masked vectors, so that their sum remains.

    They are every survivor's own mask, taken off, and the masks that survivors made with those that left.

    Args:
        context: of the attempt.
        roster: of the attempt.
        advertisements: the keys messages, by index, checked.
        shared: whose shares were passed on.
        survivors: whose vectors are in the sum.
        reveals: the unmask messages by sender, checked.

    Raises:
        TooFewShares: fewer than the threshold have answered.
        SharesWrong: the shares do not fit what was promised with the keys. With more answers it may work.
    """
    return rebuild(context, roster, advertisements, shared, survivors, reveals).masks


def rebuild(
    context: bytes,
    roster: Roster,
    advertisements: Mapping[int, bytes],
    shared: Collection[int],
    survivors: Collection[int],
    reveals: Mapping[int, bytes],
    *,
    neighbours: Neighbours | None = None,
    threshold: int | None = None,
) -> Rebuilt:
    """The same as `reconstruct`, told with who sent wrong shares, for any graph.

    Args:
        context: see `reconstruct`; likewise those up to `reveals`.
        roster: see above.
        advertisements: see above.
        shared: see above.
        survivors: see above.
        reveals: see above.
        neighbours: with whom a member shares; None: with everybody.
        threshold: so many shares rebuild a secret; None: as for everybody.

    Raises:
        TooFewShares: see `reconstruct`.
        SharesWrong: see `reconstruct`.
        ValueError: survivors have not shared, or a message is not of a survivor.
    """
    near = neighbours or (lambda _: range(len(roster)))
    inside, dealers = set(survivors), sorted(shared)
    if not inside <= set(dealers) or not reveals.keys() <= inside:
        raise ValueError("survivors have shared, and only they tell shares")
    keys = {index: Advertisement.from_bytes(advertisements[index]) for index in dealers}
    shares = _by_dealer(dealers, reveals, near)
    least = threshold or threshold_of(len(roster))
    for dealer in dealers:
        if len(shares[dealer]) < least:
            raise TooFewShares(f"{len(shares[dealer])} shares of a secret are in; {least} are needed.")

    def fits(dealer: int, secret: bytes) -> bool:
        if dealer in inside:
            return commitment_to(context, secret) == keys[dealer].commitment
        return public_key(secret) == keys[dealer].mask

    secrets, suspects = recover(shares, least, fits)
    masks = [Mask(self_mask_key(context, secrets[index]), -1) for index in dealers if index in inside]
    for left in (index for index in dealers if index not in inside):
        own = X25519PrivateKey.from_private_bytes(secrets[left])
        peers = inside & set(near(left))
        # What the one that left would have put on is just what the survivors' masks with it lack.
        masks += [pair_mask(context, agree(own, keys[peer].mask), left, peer) for peer in sorted(peers)]
    return Rebuilt(tuple(masks), suspects)


def _by_dealer(dealers: Sequence[int], reveals: Mapping[int, bytes], near: Neighbours) -> dict[int, Shares]:
    """For each member that has shared: the share of its secret that each of the senders told, by the sender's place."""
    found: dict[int, Shares] = {dealer: {} for dealer in dealers}
    for sender, message in reveals.items():
        known = {sender, *near(sender)}
        entries = (dealer for dealer in dealers if dealer in known)
        for place, dealer in enumerate(entries):
            share = message[place * REVEALED_BYTES + 5 : (place + 1) * REVEALED_BYTES]
            found[dealer][sender] = int.from_bytes(share, "big")
    return found


def _listed(indices: Sequence[int]) -> bytes:
    return u32s([len(indices)]) + u32s(indices)


def _require_length(message: bytes, length: int, what: str) -> None:
    if len(message) != length:
        raise MessageInvalid(f"{what} has {length} bytes here, not {len(message)}.")
