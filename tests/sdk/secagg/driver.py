"""Drives whole attempts of secure aggregation in memory: members, and a service that does what it should.

    attempt = Attempt(4)
    outcome = attempt.run([Last.EVERYTHING, Last.SHARES, Last.EVERYTHING, Last.EVERYTHING])

Every step is computed once for the same sets of members, so that thousands of patterns of drop-outs cost little. All
secrets follow from the seed.
"""

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import TypeVar
from uuid import UUID

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from isthmus.secagg import client, server
from isthmus.secagg.context import context_of
from isthmus.secagg.derivation import Mask
from isthmus.secagg.graph import neighbours
from isthmus.secagg.masks import add_masks
from isthmus.secagg.parameters import threshold_of
from isthmus.secagg.roster import Member, Roster
from isthmus.secagg.violations import ProtocolViolation, TooFewShares
from isthmus.wire.secured import Step

Indices = tuple[int, ...]
K = TypeVar("K")
V = TypeVar("V")


class Last(IntEnum):
    """The last message that a member sends before it is gone."""

    NOTHING = 0
    KEYS = 1
    SHARES = 2
    UPDATE = 3
    SURVIVORS = 4
    EVERYTHING = 5


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended."""

    aborted: Step | None
    """The step that too few took."""
    survivors: Indices
    total: NDArray[np.uint32] | None
    """The unmasked sum."""


def drawn(seed: str, *numbers: int) -> bytes:
    """32 bytes that follow from the arguments."""
    return hashlib.sha256(repr((seed, *numbers)).encode()).digest()


class Attempt:
    """One attempt among `members`, all of whom are honest."""

    def __init__(
        self,
        members: int,
        *,
        seed: str = "attempt",
        elements: int = 5,
        degree: int | None = None,
        threshold: int | None = None,
        round_number: int = 1,
        number: int = 1,
        model: str = "model",
    ) -> None:
        """Make the members, their secrets and their vectors.

        Args:
            members: in the roster.
            seed: what all secrets follow from.
            elements: of each vector.
            degree: neighbours of each; None: everybody.
            threshold: so many shares rebuild a secret; None: as for everybody.
            round_number: of the round.
            number: of the attempt.
            model: whatever stands for the round's model.
        """
        self.identities = [Ed25519PrivateKey.from_private_bytes(drawn(seed + "/id", i)) for i in range(members)]
        self.roster = Roster(
            Member(f"org-{i:03}", "patients", identity.public_key().public_bytes_raw(), 1)
            for i, identity in enumerate(self.identities)
        )
        self.context = context_of(
            round_id=UUID(bytes=drawn(seed + "/round")[:16]),
            spec_digest=drawn(seed + "/spec").hex(),
            model_digest=drawn(seed + model).hex(),
            terms_digest=drawn(seed + "/terms").hex(),
            roster_digest=self.roster.digest(),
            round_number=round_number,
            attempt=number,
        )
        self.secrets = [
            client.Secrets(*(drawn(f"{seed}/{number}/secret", i, which) for which in range(4))) for i in range(members)
        ]
        self.threshold = threshold or threshold_of(members)
        generator = np.random.default_rng(list(seed.encode()))
        self.vectors = generator.integers(0, 1 << 32, (members, elements), np.uint32)
        self._graph = [
            neighbours(members, members - 1 if degree is None else degree, seed.encode(), i) for i in range(members)
        ]
        self._keyed: dict[Indices, dict[int, client.Keyed] | ProtocolViolation] = {}
        self._shared: dict[tuple[Indices, Indices], dict[int, client.Shared] | ProtocolViolation] = {}
        self._masked: dict[tuple[Indices, Indices], NDArray[np.uint32]] = {}

    def __len__(self) -> int:
        return len(self.roster)

    def sign(self, index: int) -> Callable[[bytes], bytes]:
        """How this member signs."""
        return self.identities[index].sign

    def near(self, index: int) -> frozenset[int]:
        """The neighbours of a member."""
        return self._graph[index]

    @cached_property
    def advertisements(self) -> dict[int, bytes]:
        """Everybody's keys message."""
        return {i: client.advertise(self.context, i, self.secrets[i], self.sign(i)) for i in range(len(self))}

    def keys_answer(self, keyed: Indices) -> bytes:
        """What a service answers when these have sent their keys."""
        return server.keys_answer(self.roster, {i: self.advertisements[i] for i in keyed})

    def open_keys(self, index: int, answer: bytes) -> client.Keyed:
        """What a member makes of an answer to its keys."""
        return client.open_keys(
            self.context,
            self.roster.digest(),
            len(self),
            index,
            self.secrets[index],
            answer,
            neighbours=self._graph[index],
            threshold=self.threshold,
        )

    def keyed(self, keyed: Indices) -> dict[int, client.Keyed]:
        """What the members know once these have sent their keys."""
        return _remembered(self._keyed, keyed, lambda: self._all_keyed(keyed))

    def _all_keyed(self, keyed: Indices) -> dict[int, client.Keyed]:
        for i in keyed:
            others = (self.advertisements[j] for j in keyed if j != i)
            server.check_keys(self.context, i, self.roster[i].identity, self.advertisements[i], others=others)
        answer = self.keys_answer(keyed)
        return {i: self.open_keys(i, answer) for i in keyed}

    def share_out(self, keyed: Indices, index: int) -> bytes:
        """A member's shares message."""
        return client.share_out(self.context, index, self.secrets[index], self.keyed(keyed)[index])

    def shares_answer(self, keyed: Indices, shared: Indices, index: int, messages: Mapping[int, bytes]) -> bytes:
        """What a service answers to a member's shares, when these have sent theirs."""
        parts = {}
        for sender in set(shared) & self.near(index):
            peers = sorted({sender, *(self.near(sender) & set(keyed))})
            parts[sender] = server.ciphertext_for(messages[sender], sender, index, peers)
        return server.shares_answer(index, shared, parts)

    def open_shares(self, keyed: Indices, index: int, answer: bytes) -> client.Shared:
        """What a member makes of an answer to its shares."""
        return client.open_shares(self.context, index, self.secrets[index], self.keyed(keyed)[index], answer)

    def shared(self, keyed: Indices, shared: Indices) -> dict[int, client.Shared]:
        """What the members know once these have sent their shares."""
        return _remembered(self._shared, (keyed, shared), lambda: self._all_shared(keyed, shared))

    def _all_shared(self, keyed: Indices, shared: Indices) -> dict[int, client.Shared]:
        messages = {i: self.share_out(keyed, i) for i in shared}
        for i, message in messages.items():
            server.check_shares(message, 1 + len(self.near(i) & set(keyed)))
        answers = {i: self.shares_answer(keyed, shared, i, messages) for i in shared}
        return {i: self.open_shares(keyed, i, answers[i]) for i in shared}

    def masks(self, keyed: Indices, shared: Indices, index: int) -> tuple[Mask, ...]:
        """The masks of a member's vector."""
        known = self.shared(keyed, shared)[index]
        return client.masks_of(self.context, index, self.secrets[index], self.keyed(keyed)[index], known)

    def masked(self, keyed: Indices, shared: Indices) -> NDArray[np.uint32]:
        """The masked vectors of those that shared; other rows stay 0."""
        if (keyed, shared) not in self._masked:
            rows = np.zeros_like(self.vectors)
            for i in shared:
                rows[i] = self.vectors[i]
                add_masks(rows[i], 0, self.masks(keyed, shared, i))
            self._masked[keyed, shared] = rows
        return self._masked[keyed, shared]

    def reveals(self, keyed: Indices, shared: Indices, survivors: Indices, answering: Indices) -> dict[int, bytes]:
        """The unmask messages of those that answer."""
        found = {}
        for i in answering:
            found[i] = client.reveal(self.shared(keyed, shared)[i], survivors)
            server.check_reveal(found[i], self.revealed_by(shared, i), survivors)
        return found

    def revealed_by(self, shared: Indices, index: int) -> set[int]:
        """Whose shares this member holds."""
        return {index, *self.near(index)} & set(shared)

    def rebuild(self, shared: Indices, survivors: Indices, reveals: Mapping[int, bytes]) -> server.Rebuilt:
        """What a service makes of the shares that came in."""
        return server.rebuild(
            self.context,
            self.roster,
            self.advertisements,
            shared,
            survivors,
            reveals,
            neighbours=self.near,
            threshold=self.threshold,
        )

    def confirm(self, survivors: Indices, confirming: Indices) -> bytes:
        """What a service answers when these have signed the survivors."""
        signatures = {i: client.confirm(self.context, survivors, self.sign(i)) for i in confirming}
        for i, signature in signatures.items():
            server.check_confirmation(self.context, survivors, self.roster[i].identity, signature)
        return server.confirmations_answer(signatures)

    def unmasked(self, rows: NDArray[np.uint32], survivors: Indices, masks: Collection[Mask]) -> NDArray[np.uint32]:
        """The sum of the survivors' rows with the masks added."""
        total = rows[list(survivors)].sum(axis=0, dtype=np.uint32)
        add_masks(total, 0, list(masks))
        return total

    def run(self, last: Sequence[Last]) -> Outcome:
        """One attempt in which each member's last message is as given.

        Nothing counts here but the protocol's own functions: whether too few are left is for them to say.
        """

        def until(message: Last) -> Indices:
            return tuple(i for i in range(len(self)) if last[i] >= message)

        keyed, shared, survivors, confirming, answering = (until(message) for message in list(Last)[1:])
        rebuilt: server.Rebuilt | None = None
        step = Step.KEYS
        try:
            _somebody(self.keyed(keyed))
            step = Step.SHARES
            _somebody(self.shared(keyed, shared))
            step = Step.UPDATE
            rows, known = self.masked(keyed, shared), self.shared(keyed, shared)
            answer = server.survivors_answer(survivors)
            sets = {client.open_survivors(i, known[i], answer, needed=threshold_of(len(self))) for i in survivors}
            assert sets <= {survivors}
            _somebody(sets)
            step = Step.SURVIVORS
            answer = self.confirm(survivors, confirming)
            if confirming:  # everybody checks the same
                client.open_confirmations(self.context, self.roster, survivors, answer)
            _somebody(confirming)
            step = Step.UNMASK
            rebuilt = self.rebuild(shared, survivors, self.reveals(keyed, shared, survivors, answering))
        except (ProtocolViolation, TooFewShares):
            return Outcome(step, survivors, None)
        return Outcome(None, survivors, self.unmasked(rows, survivors, rebuilt.masks))


def _remembered(known: dict[K, V | ProtocolViolation], key: K, find: Callable[[], V]) -> V:
    """What was found for the key before, or the violation that was."""
    if key not in known:
        try:
            known[key] = find()
        except ProtocolViolation as violation:
            known[key] = violation
    found = known[key]
    if isinstance(found, ProtocolViolation):
        raise found
    return found


def _somebody(found: Collection[object]) -> None:
    if not found:
        raise TooFewShares("nobody is left")
