"""The service's side of a secured round, and all its members but one, so that a single real worker can take part.

The service's functions are those of `isthmus.secagg.server`; the other members are made of `isthmus.secagg.client` and
hold vectors of made-up numbers. Tests make the service lie: `lies` changes an answer, `refusals` gives none.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid4

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from isthmus.codec.arrays import decode
from isthmus.secagg import client, server
from isthmus.secagg.context import context_of
from isthmus.secagg.masks import add_masks
from isthmus.secagg.parameters import threshold_of
from isthmus.secagg.roster import Member, Roster
from isthmus.wire.base import digest_of
from isthmus.wire.jobs import JobSpec
from isthmus.wire.problems import ProblemCode
from isthmus.wire.rounds import TaskOffer
from isthmus.wire.secured import MASKED, SecuredOffer, Step, terms_digest
from isthmus.wire.strategies import Weighting
from tests.worker.factories import DATASET, ORGANIZATION, ROWS, make_offer, make_secured_spec

PEERS = ("basel", "chur", "jena", "lyon", "ulm", "york")
"""Organizations of the others; one sorts before ours."""
KEYS = {name: Ed25519PrivateKey.generate() for name in (*PEERS, "mallory")}
"""Their identities, for all rounds."""


@dataclass
class Other:
    """A member that is not the real worker."""

    index: int
    key: Ed25519PrivateKey
    vector: NDArray[np.uint32]
    secrets: client.Secrets = field(default_factory=client.Secrets.draw)
    keyed: client.Keyed | None = None
    shared: client.Shared | None = None


@dataclass
class SecuredRound:
    """One attempt of a round of `members`, of whom one is real."""

    identity: bytes
    """The real member's public key."""
    spec: JobSpec = field(default_factory=make_secured_spec)
    members: int = 4
    number: int = 1
    attempt: int = 1
    fence: int = 1
    round_id: UUID = field(default_factory=uuid4)
    task_id: UUID = field(default_factory=uuid4)
    leaving: frozenset[str] = frozenset()
    """Organizations that share their secrets and never send an update."""
    weights: dict[str, int] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    """Fields of the offer."""
    # moods
    lies: dict[Step, Callable[[bytes], bytes]] = field(default_factory=dict)
    """What is answered to a message instead of the truth."""
    refusals: dict[Step, ProblemCode] = field(default_factory=dict)
    held: set[Step] = field(default_factory=set)
    """Steps that stay open."""
    # what was heard
    heard: list[tuple[Step, bytes]] = field(default_factory=list)
    upload: bytes | None = None
    total: NDArray[np.int32] | None = None
    """The unmasked sum."""

    def __post_init__(self) -> None:
        """Draw up the roster, and the others' vectors."""
        names = sorted([*PEERS[: self.members - 1], ORGANIZATION])
        self.roster = Roster(
            Member(
                name,
                DATASET,
                self.identity if name == ORGANIZATION else KEYS[name].public_key().public_bytes_raw(),
                self._weight(name),
            )
            for name in names
        )
        self.index = names.index(ORGANIZATION)
        self.base = make_offer(self.spec, self.number, attempt=self.attempt, task_id=self.task_id, **self.changes)
        self.context = self.context_for(self.roster)
        generator, elements = np.random.default_rng(self.attempt), self.base.model_manifest.averaged_elements
        self.others = {
            place: Other(place, KEYS[name], generator.integers(0, 1000, elements, dtype=np.uint32))
            for place, name in enumerate(names)
            if name != ORGANIZATION
        }
        self.survivors = tuple(place for place, name in enumerate(names) if name not in self.leaving)

    def _weight(self, name: str) -> int:
        if self.spec.strategy.weights is Weighting.UNIFORM:
            return self.weights.get(name, 1)
        return self.weights.get(name, ROWS)

    def context_for(self, roster: Roster) -> bytes:
        """What the keys of this attempt are bound to."""
        return context_of(
            round_id=self.round_id,
            spec_digest=digest_of(self.spec),
            model_digest=self.base.model.digest,
            terms_digest=terms_digest(self.base.model_manifest, self.base.statistics, self.base.plan),
            roster_digest=roster.digest(),
            round_number=self.number,
            attempt=self.attempt,
        )

    def offer(self, **changes: Any) -> TaskOffer:
        """The real member's task."""
        secured = SecuredOffer(
            round_id=self.round_id, roster_digest=self.roster.digest(), members=len(self.roster), index=self.index
        )
        return self.base.model_copy(update={"secured": secured, "fence": self.fence, **changes})

    def next_attempt(self, **changes: Any) -> "SecuredRound":
        """The same round once more: another attempt, with new secrets of the others."""
        plain: dict[str, Any] = {
            "identity": self.identity, "spec": self.spec, "members": self.members, "number": self.number,
            "attempt": self.attempt + 1, "fence": self.fence + 1, "round_id": self.round_id, "task_id": self.task_id,
            "leaving": self.leaving, "weights": self.weights, "changes": self.changes,
        }  # fmt: skip
        return SecuredRound(**{**plain, **changes})

    def messages(self, step: Step) -> list[bytes]:
        """What the real member sent in a step."""
        return [message for heard, message in self.heard if heard is step]

    def hear(self, step: Step, message: bytes, *, fence: int, upload: bytes | None) -> bytes | ProblemCode | None:
        """Take a message of the real member; the answer, a refusal, or None: the step is open."""
        if fence != self.fence:
            return ProblemCode.LEASE_LOST
        self.heard.append((step, message))
        if step in self.refusals:
            return self.refusals[step]
        if step in self.held:
            return None
        self.upload = upload
        return self.lies[step](message) if step in self.lies else self.truth(step, message)

    def truth(self, step: Step, message: bytes) -> bytes:
        """What an honest service answers."""
        honest: dict[Step, Callable[[bytes], bytes]] = {
            Step.KEYS: self._keys,
            Step.SHARES: self._shares,
            Step.UPDATE: self._update,
            Step.SURVIVORS: self._survivors,
            Step.UNMASK: self._unmask,
        }
        return honest[step](message)

    def _keys(self, message: bytes) -> bytes:
        server.check_keys(self.context, self.index, self.identity, message)
        self.advertisements = {
            place: client.advertise(self.context, place, other.secrets, other.key.sign)
            for place, other in self.others.items()
        } | {self.index: message}
        return server.keys_answer(self.roster, self.advertisements)

    def _shares(self, message: bytes) -> bytes:
        server.check_shares(message, len(self.roster))
        answer = server.keys_answer(self.roster, self.advertisements)
        keyed, everybody = self.roster.digest(), range(len(self.roster))
        sent = {self.index: message}
        for place, other in self.others.items():
            other.keyed = client.open_keys(self.context, keyed, len(self.roster), place, other.secrets, answer)
            sent[place] = client.share_out(self.context, place, other.secrets, other.keyed)

        def inbox(recipient: int) -> bytes:
            parts = {
                sender: server.ciphertext_for(sent[sender], sender, recipient, everybody)
                for sender in everybody
                if sender != recipient
            }
            return server.shares_answer(recipient, everybody, parts)

        for place, other in self.others.items():
            assert other.keyed is not None
            other.shared = client.open_shares(self.context, place, other.secrets, other.keyed, inbox(place))
        return inbox(self.index)

    def _update(self, _message: bytes) -> bytes:
        assert self.upload is not None, "the update step is asked for when the masked update is in"
        return server.survivors_answer(self.survivors)

    def _survivors(self, message: bytes) -> bytes:
        server.check_confirmation(self.context, self.survivors, self.identity, message)
        return server.confirmations_answer({**self.confirmations(self.survivors), self.index: message})

    def confirmations(self, survivors: tuple[int, ...]) -> dict[int, bytes]:
        """The others' signatures of a set of survivors."""
        return {
            place: client.confirm(self.context, survivors, other.key.sign)
            for place, other in self.others.items()
            if place in survivors
        }

    def _unmask(self, message: bytes) -> bytes:
        assert self.upload is not None
        everybody = range(len(self.roster))
        server.check_reveal(message, everybody, self.survivors)
        reveals = {self.index: message}
        total = decode(self.upload, self.base.upload_manifest)[MASKED].copy()
        for place in self.survivors:
            if place == self.index:
                continue
            other = self.others[place]
            assert other.keyed is not None
            assert other.shared is not None
            reveals[place] = client.reveal(other.shared, self.survivors)
            masked = other.vector.copy()
            add_masks(masked, 0, client.masks_of(self.context, place, other.secrets, other.keyed, other.shared))
            total += masked
        masks = server.reconstruct(self.context, self.roster, self.advertisements, everybody, self.survivors, reveals)
        add_masks(total, 0, masks)
        self.total = total.view(np.int32)
        return b""

    def mine(self) -> NDArray[np.int32]:
        """The real member's part of the unmasked sum: what is left once the others' is taken off."""
        assert self.total is not None
        rest = sum(self.others[place].vector.view(np.int32) for place in self.survivors if place != self.index)
        return self.total - rest

    @property
    def threshold(self) -> int:
        """Of this roster."""
        return threshold_of(len(self.roster))
