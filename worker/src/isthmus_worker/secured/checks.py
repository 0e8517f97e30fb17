"""The rules of a secured round that need to know who we are and what we did before. One sentence each.

The protocol's own rules, on messages and signatures, are in `isthmus.secagg.client`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from isthmus.secagg.parameters import threshold_of
from isthmus.wire.base import canonical_json
from isthmus.wire.rounds import TaskOffer
from isthmus.wire.strategies import Weighting
from isthmus_worker.secured.records import Record, Sessions, session_key

if TYPE_CHECKING:
    from isthmus.secagg.client import Keyed
    from isthmus.secagg.roster import Member, Roster


def attempt_objections(sessions: Sessions, offer: TaskOffer) -> list[str]:
    """Why what is kept of earlier attempts does not allow this one; empty if it does.

    An attempt goes on with the secrets that it has, if it is the same in all that these are bound to. Another one has
    to be a later one, of the same round or of a later round.
    """
    newest = sessions.newest(str(offer.participation_id))
    if newest is None or newest[0] < offer.round_number:
        return []
    number, attempt, round_id = newest
    if offer.round_number < number:
        return [f"Round {offer.round_number} is over for this worker: it has taken part in round {number} since."]
    return _attempt_objections(sessions, offer, attempt, round_id)


def _attempt_objections(sessions: Sessions, offer: TaskOffer, attempt: int, round_id: str) -> list[str]:
    """The same, where the last session was of the same round: of this attempt and id."""
    number, secured = offer.round_number, offer.secured
    assert secured is not None, "only offers of secured rounds are asked about"
    if round_id != str(secured.round_id):
        return [f"Round {number} has another id than when this worker first took part in it."]
    if offer.attempt < attempt:
        return [
            f"Attempt {offer.attempt} of round {number} is over for this worker: it has taken part in attempt {attempt}"
            " since."
        ]
    if offer.attempt > attempt:
        return []
    record = sessions.find(session_key(offer))
    if record is None:
        return [f"Attempt {attempt} of round {number} is over for this worker, and its keys are deleted."]
    return _changed(record, offer)


def _changed(record: Record, offer: TaskOffer) -> list[str]:
    """What of an attempt is not as it was: its keys are for what it was."""
    before = record.offer
    assert before.secured is not None and offer.secured is not None, "both are of the same secured round"  # noqa: PT018
    facts = {
        "roster": (before.secured, offer.secured),
        "model": (before.model.digest, offer.model.digest),
        "job": (before.spec_digest, offer.spec_digest),
    }
    return [
        f"Attempt {offer.attempt} of round {offer.round_number} has another {name} than when this worker joined it."
        for name, (then, now) in facts.items()
        if then != now
    ]


def needed_of(offer: TaskOffer) -> int:
    """So many members have to be in the sum: the threshold, or the job's `min_updates` where that is more."""
    assert offer.secured is not None, "only offers of secured rounds are asked about"
    return max(threshold_of(offer.secured.members), offer.spec.cohort.min_updates)


def own_place_objections(
    roster: "Roster", offer: TaskOffer, *, identity: bytes, announced_rows: frozenset[int]
) -> list[str]:
    """How our own place in a roster is not what it has to be.

    Args:
        roster: has the digest and the number of members that the offer names.
        offer: says which place is ours.
        identity: our public key.
        announced_rows: with which the dataset was announced at some time: a job may count it by any of them.
    """
    assert offer.secured is not None, "only offers of secured rounds are asked about"
    if offer.secured.index >= len(roster):
        return ["This worker's place is not in the roster."]
    mine, found = roster[offer.secured.index], []
    if (mine.organization, mine.dataset) != (offer.organization, offer.dataset):
        found.append(f"This worker's place in the roster belongs to {mine.organization}/{mine.dataset}.")
    if mine.identity != identity:
        found.append("The roster has another key for this worker than its own.")
    if offer.spec.strategy.weights is Weighting.UNIFORM:
        if any(member.weight != 1 for member in roster.members):
            found.append("The job counts all members the same, and the roster does not.")
    elif mine.weight not in announced_rows:
        found.append(
            f"The roster counts {offer.dataset} with {mine.weight} records, which this worker never announced."
        )
    return found


def others_of(roster: "Roster", index: int) -> list["Member"]:
    """Everybody else in a roster."""
    return [member for place, member in enumerate(roster.members) if place != index]


def too_few(came: int, needed: int, what: str) -> list[str]:
    """Whether so few members are left that the job's own smallest number cannot be reached any more."""
    return [f"Only {came} members sent {what}; the job needs {needed} in a sum."] if came < needed else []


def summed_of(keyed: "Keyed", survivors: Sequence[int]) -> str:
    """What the sum over these members is made of, as canonical JSON: two sums that differ in it tell single updates.

    Who is in it, with which key and which weight, and what the weights are shares of.
    """
    members = [keyed.roster[index] for index in survivors]
    plain = {
        "largest_weight": largest_weight(keyed),
        "survivors": [
            {"member": f"{one.organization}/{one.dataset}", "identity": one.identity.hex(), "weight": one.weight}
            for one in members
        ],
    }
    return canonical_json(plain).decode()


def other_sum_objections(revealed: Sequence[str], summed: str) -> list[str]:
    """Whether shares of this round were revealed for another sum than this one, as `summed_of` tells them."""
    if any(before != summed for before in revealed):
        return [
            "This worker has revealed its shares of this round for another set of survivors, or for the same with "
            "another key or weight or for another largest weight of the roster: the difference of two sums would show "
            "the updates of those who differ."
        ]
    return []


def largest_weight(keyed: "Keyed") -> int:
    """Of the roster: what every member's weight is a share of."""
    return max(member.weight for member in keyed.roster.members)
