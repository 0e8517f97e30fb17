"""What one member knows of an attempt, made again from what is kept of it: the same record gives the same bytes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from isthmus.secagg.client import (
    Keyed,
    Secrets,
    Shared,
    advertise,
    confirm,
    masks_of,
    open_confirmations,
    open_keys,
    open_shares,
    open_survivors,
    reveal,
    share_out,
)
from isthmus.secagg.context import context_of
from isthmus.secagg.derivation import Mask
from isthmus.secagg.reading import Reader
from isthmus.secagg.roster import Roster
from isthmus.secagg.violations import ProtocolViolation
from isthmus.wire.rounds import TaskOffer
from isthmus.wire.secured import terms_digest
from isthmus_worker.secured.checks import (
    largest_weight,
    needed_of,
    own_place_objections,
    summed_of,
    too_few,
)
from isthmus_worker.secured.records import Record

Sign = Callable[[bytes], bytes]


@dataclass
class Standing:
    """One attempt as its member sees it. No I/O; each `open_...` checks an answer before it is known.

    Attributes:
        offer: of the attempt.
        identity: our public key.
        sign: signs with it.
        announced_rows: see `checks.own_place_objections`.
        secrets: of this attempt alone.
    """

    offer: TaskOffer
    identity: bytes
    sign: Sign = field(repr=False)
    announced_rows: frozenset[int]
    secrets: Secrets = field(repr=False)
    _keyed: Keyed | None = None
    _shared: Shared | None = field(default=None, repr=False)
    _survivors: tuple[int, ...] | None = None

    @classmethod
    def of(cls, record: Record, *, identity: bytes, sign: Sign, announced_rows: frozenset[int]) -> "Standing":
        """The standing of what is kept.

        Raises:
            ProtocolViolation: what is kept does not pass today's checks: it is damaged.
        """
        found = cls(record.offer, identity, sign, announced_rows, Secrets.from_bytes(record.secrets))
        if record.keys_answer is not None:
            found.open_keys(record.keys_answer)
        if record.shares_answer is not None:
            found.open_shares(record.shares_answer)
        if record.survivors is not None:
            found.open_survivors(record.survivors)
        return found

    @cached_property  # a model may have thousands of tensors, and each message asks for it
    def context(self) -> bytes:
        """What all keys and signatures of the attempt are bound to."""
        secured = self.offer.secured
        assert secured is not None, "only offers of secured rounds have a standing"
        return context_of(
            round_id=secured.round_id,
            spec_digest=self.offer.spec_digest,
            model_digest=self.offer.model.digest,
            terms_digest=terms_digest(self.offer.model_manifest, self.offer.statistics, self.offer.plan),
            roster_digest=secured.roster_digest,
            round_number=self.offer.round_number,
            attempt=self.offer.attempt,
        )

    @property
    def index(self) -> int:
        """Our place in the roster."""
        assert self.offer.secured is not None, "only offers of secured rounds have a standing"
        return self.offer.secured.index

    @property
    def keyed(self) -> Keyed:
        """Whose keys came."""
        assert self._keyed is not None, "the answer to the keys was opened"
        return self._keyed

    @property
    def shared(self) -> Shared:
        """Whose shares came."""
        assert self._shared is not None, "the answer to the shares was opened"
        return self._shared

    @property
    def survivors(self) -> tuple[int, ...]:
        """Who is in the sum."""
        assert self._survivors is not None, "the answer to the update was opened"
        return self._survivors

    def keys_message(self) -> bytes:
        """Our fresh public keys, signed."""
        return advertise(self.context, self.index, self.secrets, self.sign)

    def open_keys(self, answer: bytes) -> None:
        """Check whose keys came.

        Raises:
            ProtocolViolation: some rule is broken.
        """
        secured = self.offer.secured
        assert secured is not None, "only offers of secured rounds have a standing"
        reader = Reader(answer, "The answer to the keys")
        roster = Roster.from_bytes(reader.take(reader.u32()))
        if roster.digest() == secured.roster_digest:  # else `open_keys` says so
            _leave_for(
                own_place_objections(roster, self.offer, identity=self.identity, announced_rows=self.announced_rows)
            )
        keyed = open_keys(self.context, secured.roster_digest, secured.members, self.index, self.secrets, answer)
        _leave_for(too_few(len(keyed.advertisements), needed_of(self.offer), "keys"))
        self._keyed = keyed

    def shares_message(self) -> bytes:
        """Shares of our secrets, encrypted for each of the others."""
        return share_out(self.context, self.index, self.secrets, self.keyed)

    def open_shares(self, answer: bytes) -> None:
        """Check whose shares came.

        Raises:
            ProtocolViolation: some rule is broken.
        """
        shared = open_shares(self.context, self.index, self.secrets, self.keyed, answer)
        _leave_for(too_few(len(shared.indices), needed_of(self.offer), "shares"))
        self._shared = shared

    def masks(self) -> tuple[Mask, ...]:
        """What our vector is masked with."""
        return masks_of(self.context, self.index, self.secrets, self.keyed, self.shared)

    def weight_share(self) -> float:
        """Our weight over the largest of the roster."""
        return self.keyed.roster[self.index].weight / largest_weight(self.keyed)

    def open_survivors(self, answer: bytes) -> None:
        """Check who is in the sum.

        Raises:
            ProtocolViolation: some rule is broken.
        """
        self._survivors = open_survivors(self.index, self.shared, answer, needed=needed_of(self.offer))

    def summed(self) -> str:
        """What the sum is made of: see `checks.summed_of`."""
        return summed_of(self.keyed, self.survivors)

    def survivors_message(self) -> bytes:
        """Our signature of who is in the sum."""
        return confirm(self.context, self.survivors, self.sign)

    def open_confirmations(self, answer: bytes) -> None:
        """Check that enough others have signed the very same set.

        Raises:
            ProtocolViolation: some rule is broken.
        """
        open_confirmations(self.context, self.keyed.roster, self.survivors, answer)

    def unmask_message(self) -> bytes:
        """Our shares of what is taken off the sum: of each peer one secret, never both."""
        return reveal(self.shared, self.survivors)


def _leave_for(found: list[str]) -> None:
    if found:
        raise ProtocolViolation(" ".join(found))
