"""A member's side: what it sends in each step, and what it makes sure of before it goes on.

Everything follows from the context, the member's index, its `Secrets` and the service's answers: after a crash the same
calls give the same bytes. What the functions cannot see is the caller's to keep:

- new secrets for every attempt, and never two masked vectors under one set of them;
- that the roster has the right members: `Keyed.roster` against the identities it knows;
- one set of survivors is confirmed in an attempt, and `reveal` comes after `open_confirmations` for that set.
"""

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from isthmus.secagg.derivation import (
    Mask,
    agree,
    channel_key,
    commitment_to,
    is_signed,
    pair_mask,
    polynomial,
    public_key,
    self_mask_key,
)
from isthmus.secagg.messages import (
    ADVERTISEMENT_BYTES,
    MASK_KEY,
    OWN_MASK,
    SEALED_BYTES,
    SIGNATURE_BYTES,
    Advertisement,
    keys_statement,
    survivors_statement,
    u32s,
)
from isthmus.secagg.parameters import threshold_of
from isthmus.secagg.reading import Reader
from isthmus.secagg.roster import Roster
from isthmus.secagg.shamir import PRIME, SECRET_BYTES, SHARE_BYTES, values_at
from isthmus.secagg.violations import ProtocolViolation

Sign = Callable[[bytes], bytes]
"""Signs a statement with the organization's identity (Ed25519)."""
_SECRETS: Final = 4


@dataclass(frozen=True)
class Secrets:
    """What a member draws for one attempt, 32 bytes each. Whoever has them and its upload has its vector."""

    channel: bytes = field(repr=False)
    """X25519 key for the encryption of shares."""
    mask: bytes = field(repr=False)
    """X25519 key for the masks between two."""
    seed: bytes = field(repr=False)
    """Of the member's own mask."""
    coins: bytes = field(repr=False)
    """What the sharing of the two secrets before is drawn from."""

    def __post_init__(self) -> None:
        """Raises ValueError where one has not 32 bytes."""
        if any(len(secret) != SECRET_BYTES for secret in (self.channel, self.mask, self.seed, self.coins)):
            raise ValueError("each of a member's secrets has 32 bytes")

    @classmethod
    def draw(cls) -> "Secrets":
        """New secrets from the operating system."""
        return cls(*(os.urandom(SECRET_BYTES) for _ in range(_SECRETS)))

    def to_bytes(self) -> bytes:
        """128 bytes, for the member's own journal."""
        return self.channel + self.mask + self.seed + self.coins

    @classmethod
    def from_bytes(cls, raw: bytes) -> "Secrets":
        """What `to_bytes` gave. Raises ValueError for another length."""
        if len(raw) != _SECRETS * SECRET_BYTES:
            raise ValueError(f"the secrets of an attempt have 128 bytes, not {len(raw)}")
        return cls(*(raw[at : at + SECRET_BYTES] for at in range(0, len(raw), SECRET_BYTES)))


@dataclass(frozen=True)
class Keyed:
    """What a member knows once the first step has closed: everybody's keys, checked."""

    roster: Roster
    advertisements: Mapping[int, Advertisement]
    """By index, ascending, its own among them."""
    peers: tuple[int, ...]
    """With whom it shares masks and secrets: of those that are keyed, its neighbours."""
    threshold: int
    """So many shares rebuild a secret."""


@dataclass(frozen=True)
class Shared:
    """What a member knows once the second step has closed: who is in the masks, and its shares of their secrets."""

    index: int
    indices: tuple[int, ...]
    """Everybody whose shares have arrived at the service, ascending, itself among them."""
    held: Mapping[int, tuple[bytes, bytes]] = field(repr=False)
    """By index, ascending, itself among them: shares of the seed of that member's own mask and of its mask key."""
    threshold: int


def advertise(context: bytes, index: int, secrets: Secrets, sign: Sign) -> bytes:
    """The keys message: fresh public keys, and the commitment to the seed of the member's own mask, signed."""
    fields = _own_keys(context, index, secrets).fields()
    return fields + sign(keys_statement(context, fields))


def open_keys(
    context: bytes,
    roster_digest: str,
    members: int,
    index: int,
    secrets: Secrets,
    answer: bytes,
    *,
    neighbours: Collection[int] | None = None,
    threshold: int | None = None,
) -> Keyed:
    """Check the answer to the keys message: the roster, and the keys of everybody who sent some.

    Args:
        context: of the attempt.
        roster_digest: that the task was offered with, in hex; it is part of the context.
        members: how many the offer said there are.
        index: the member's own.
        secrets: the member's own.
        answer: the service's.
        neighbours: with whom secrets are shared; None: with everybody.
        threshold: so many shares rebuild a secret; None: as for everybody.

    Raises:
        ProtocolViolation: anything is not as it has to be, or too few are keyed for the sum ever to be unmasked.
    """
    reader = Reader(answer, "The answer to the keys")
    roster = Roster.from_bytes(reader.take(reader.u32()))
    if roster.digest() != roster_digest:
        raise ProtocolViolation("The roster is not the one that the task was offered with.")
    if len(roster) != members:
        raise ProtocolViolation(f"The roster has {len(roster)} members; the offer said {members}.")
    count = reader.u32()
    found = [Advertisement.from_bytes(reader.take(ADVERTISEMENT_BYTES)) for _ in range(min(count, members + 1))]
    reader.end()
    keyed = tuple(advertisement.index for advertisement in found)
    reader.require_ascending(keyed)
    if keyed and keyed[-1] >= members:
        raise ProtocolViolation("Keys came of a member that is not in the roster.")
    advertisements = dict(zip(keyed, found, strict=True))
    for place, advertisement in advertisements.items():
        try:
            advertisement.require_valid(context, roster[place].identity)
        except ValueError as error:
            named = roster[place].organization
            raise ProtocolViolation(f"The keys of {named} cannot be trusted: {error}.") from error
    if index not in advertisements:
        raise ProtocolViolation("The answer to the keys leaves out this member's own.")
    if advertisements[index].fields() != _own_keys(context, index, secrets).fields():
        raise ProtocolViolation("The answer to the keys has other keys of this member than it sent.")
    public = [key for advertisement in found for key in (advertisement.channel, advertisement.mask)]
    if len(set(public)) < len(public):
        raise ProtocolViolation("The same public key comes twice.")
    if len(found) < threshold_of(members):
        raise ProtocolViolation(f"Only {len(found)} of {members} members sent keys; {threshold_of(members)} have to.")
    peers = tuple(place for place in keyed if place != index and (neighbours is None or place in neighbours))
    return Keyed(roster, advertisements, peers, threshold or threshold_of(members))


def share_out(context: bytes, index: int, secrets: Secrets, keyed: Keyed) -> bytes:
    """The shares message: for each peer, in their order, a share of the seed and one of the mask key, encrypted."""
    channel = X25519PrivateKey.from_private_bytes(secrets.channel)
    dealt = _deal(context, secrets, keyed, keyed.peers)
    return b"".join(
        AESGCM(_channel_key(context, channel, index, peer, keyed)).encrypt(
            u32s((index, peer, 1)), b"".join(dealt[peer]), context + u32s((index, peer))
        )
        for peer in keyed.peers
    )


def open_shares(context: bytes, index: int, secrets: Secrets, keyed: Keyed, answer: bytes) -> Shared:
    """Check the answer to the shares message: who sent shares, and those that are for this member.

    Raises:
        ProtocolViolation: anything is not as it has to be, or too few have shared for the sum ever to be unmasked.
    """
    reader = Reader(answer, "The answer to the shares")
    indices = reader.indices()
    if not keyed.advertisements.keys() >= set(indices):
        raise ProtocolViolation("Shares came of a member that has sent no keys.")
    if index not in indices:
        raise ProtocolViolation("The answer to the shares leaves out this member's own.")
    needed = threshold_of(len(keyed.roster))
    if len(indices) < needed:
        raise ProtocolViolation(f"Only {len(indices)} members sent shares; {needed} have to.")
    channel = X25519PrivateKey.from_private_bytes(secrets.channel)
    held = _deal(context, secrets, keyed, (index,))
    for peer in sorted(set(indices) & set(keyed.peers)):
        key = _channel_key(context, channel, index, peer, keyed)
        sealed = reader.take(SEALED_BYTES)
        named = keyed.roster[peer].organization
        try:
            opened = AESGCM(key).decrypt(u32s((peer, index, 1)), sealed, context + u32s((peer, index)))
        except InvalidTag as error:
            reason = f"The shares from {named} are not what it encrypted for this member."
            raise ProtocolViolation(reason, peer=named) from error
        held[peer] = opened[:SHARE_BYTES], opened[SHARE_BYTES:]
        if any(int.from_bytes(share, "big") >= PRIME for share in held[peer]):
            raise ProtocolViolation(f"The shares from {named} are not numbers of the field.", peer=named)
    reader.end()
    if len(held) < keyed.threshold:
        raise ProtocolViolation(f"Only {len(held)} neighbours sent shares; {keyed.threshold} have to.")
    return Shared(index, indices, dict(sorted(held.items())), keyed.threshold)


def masks_of(context: bytes, index: int, secrets: Secrets, keyed: Keyed, shared: Shared) -> tuple[Mask, ...]:
    """The masks that the vector gets: the member's own, and one with each peer that has shared."""
    secret = X25519PrivateKey.from_private_bytes(secrets.mask)
    pairs = (
        pair_mask(context, agree(secret, keyed.advertisements[peer].mask), index, peer)
        for peer in keyed.peers
        if peer in shared.held
    )
    return Mask(self_mask_key(context, secrets.seed), 1), *pairs


def open_survivors(index: int, shared: Shared, answer: bytes, *, needed: int) -> tuple[int, ...]:
    """Check the answer to the masked update: whose vectors are in the sum.

    Args:
        index: the member's own.
        shared: from the step before.
        answer: the service's.
        needed: at least so many: the job's smallest number of updates. The threshold is needed anyway.

    Raises:
        ProtocolViolation: the set is not one that this member's vector may be summed in.
    """
    reader = Reader(answer, "The answer to the update")
    survivors = reader.indices()
    reader.end()
    if not set(survivors) <= set(shared.indices):
        raise ProtocolViolation("A member is said to be in the sum that has not shared its secrets.")
    if index not in survivors:
        raise ProtocolViolation("This member's own update is not in the sum.")
    if len(survivors) < max(needed, shared.threshold):
        least = max(needed, shared.threshold)
        raise ProtocolViolation(f"Only {len(survivors)} updates are in the sum; {least} have to be.")
    return survivors


def confirm(context: bytes, survivors: Collection[int], sign: Sign) -> bytes:
    """The survivors message: the signature of the one set. Never sign another one in the same attempt."""
    return sign(survivors_statement(context, survivors))


def open_confirmations(context: bytes, roster: Roster, survivors: Collection[int], answer: bytes) -> None:
    """Check that enough members of the sum have signed the very same set of survivors.

    More than two thirds of the roster: no other set can have as many, unless a third of the members is dishonest.

    Raises:
        ProtocolViolation: a signature is not for this set or not of a survivor, or there are too few.
    """
    reader = Reader(answer, "The answer to the survivors")
    statement = survivors_statement(context, survivors)
    confirmed = []
    for _ in range(min(reader.u32(), len(roster) + 1)):
        place, signature = reader.u32(), reader.take(SIGNATURE_BYTES)
        if place not in survivors:
            raise ProtocolViolation("Somebody signed the survivors who is not one of them.")
        if not is_signed(roster[place].identity, signature, statement):
            raise ProtocolViolation(f"{roster[place].organization} did not sign this set of survivors in this attempt.")
        confirmed.append(place)
    reader.end()
    reader.require_ascending(tuple(confirmed))
    needed = threshold_of(len(roster))
    if len(confirmed) < needed:
        raise ProtocolViolation(f"Only {len(confirmed)} members signed the survivors; {needed} have to.")


def reveal(shared: Shared, survivors: Collection[int]) -> bytes:
    """The unmask message: one share of one secret of each member that has shared, never of both.

    Of a survivor the share of its own mask's seed; of one that left, of its mask key, to take the masks off that the
    survivors made with it. Call it for a set that `open_confirmations` has let through, and for no other.

    Raises:
        ProtocolViolation: the set is not one that this member's vector may be summed in.
    """
    inside = set(survivors)
    if shared.index not in inside or not inside <= set(shared.indices) or len(inside) < shared.threshold:
        raise ProtocolViolation("Shares are revealed for no other set of survivors than a confirmed one.")
    return b"".join(
        u32s([member]) + (bytes([OWN_MASK]) + of_seed if member in inside else bytes([MASK_KEY]) + of_mask_key)
        for member, (of_seed, of_mask_key) in shared.held.items()
    )


def _own_keys(context: bytes, index: int, secrets: Secrets) -> Advertisement:
    channel, mask = public_key(secrets.channel), public_key(secrets.mask)
    return Advertisement(index, channel, mask, commitment_to(context, secrets.seed), b"")


def _channel_key(context: bytes, channel: X25519PrivateKey, index: int, peer: int, keyed: Keyed) -> bytes:
    return channel_key(context, agree(channel, keyed.advertisements[peer].channel), index, peer)


def _deal(context: bytes, secrets: Secrets, keyed: Keyed, to: Collection[int]) -> dict[int, tuple[bytes, bytes]]:
    """The member's own shares for these indices: of its seed and of its mask key."""
    xs = [member + 1 for member in to]
    of_seed = polynomial(context, secrets.coins, b"b-share", secrets.seed, keyed.threshold)
    of_mask_key = polynomial(context, secrets.coins, b"m-share", secrets.mask, keyed.threshold)
    dealt = zip(values_at(of_seed, xs), values_at(of_mask_key, xs), strict=True)
    return {
        member: (one.to_bytes(SHARE_BYTES, "big"), other.to_bytes(SHARE_BYTES, "big"))
        for member, (one, other) in zip(to, dealt, strict=True)
    }
