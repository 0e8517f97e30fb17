"""Members of secured rounds in tests: they go through the steps by hand, with vectors instead of training.

def test_the_sum_is_published(secured: Federation) -> None:
    job = secured.start(secured_spec())
    members = enter(secured)
    complete(members)
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.federation.secured import lattice_of
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
from isthmus.secagg.masks import add_masks
from isthmus.wire.jobs import JobSpec, JobView
from isthmus.wire.rounds import TaskOffer, UpdateReceipt
from isthmus.wire.secured import MASKED, SecuredRound, Step, terms_digest
from tests.federation import Arrays, Federation, Site, filled, job_spec

CLIPPED: dict[str, Any] = {"unit": "none", "clip_norm": 1.0}
STEPS = tuple(Step)


def secured_spec(min_updates: int = 3, **changes: Any) -> JobSpec:
    """A small job under secure aggregation, with weights that count the same."""
    cohort = {"min_updates": min_updates, "deadline_s": 60, **changes.pop("cohort", {})}
    spec: dict[str, Any] = {
        "privacy": CLIPPED,
        "strategy": {"fedavg": {"weights": "uniform"}},
        "secure_aggregation": True,
        "cohort": cohort,
    }
    return job_spec(**{**spec, **changes})


class Masking:
    """One site in one attempt of a round: its secrets, and what it has learned so far."""

    def __init__(self, site: Site, offer: TaskOffer, vector: NDArray[np.int32] | None = None) -> None:
        assert offer.secured is not None
        self.site, self.offer, self.index = site, offer, offer.secured.index
        self.secured = offer.secured
        self.secrets = Secrets.draw()
        elements = offer.upload_manifest.tensors[MASKED].elements
        drawn = np.random.default_rng(self.index).integers(-(1 << 17), 1 << 17, elements, np.int32)
        self.vector: NDArray[np.int32] = drawn if vector is None else vector
        self.context = context_of(
            round_id=offer.secured.round_id,
            spec_digest=offer.spec_digest,
            model_digest=offer.model.digest,
            terms_digest=terms_digest(offer.model_manifest, offer.statistics, offer.plan),
            roster_digest=offer.secured.roster_digest,
            round_number=offer.round_number,
            attempt=offer.attempt,
        )
        self.sent: dict[Step, bytes] = {}
        self.answers: dict[Step, bytes] = {}
        self.keyed: Keyed | None = None
        self.shared: Shared | None = None
        self.survivors: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """As views and events tell of it."""
        return f"{self.offer.organization}/{self.offer.dataset}"

    def sign(self, statement: bytes) -> bytes:
        """With the worker's own key, by which the roster knows it."""
        key, _ = self.site.platform.signing[self.site.worker]
        return key.sign(statement)

    def message(self, step: Step) -> bytes:
        """What an honest member sends for a step; the steps before must have been answered."""
        if step is Step.KEYS:
            return advertise(self.context, self.index, self.secrets, self.sign)
        if step is Step.SHARES:
            assert self.keyed is not None
            return share_out(self.context, self.index, self.secrets, self.keyed)
        if step is Step.UPDATE:
            return b""
        assert self.shared is not None
        assert self.survivors is not None
        if step is Step.SURVIVORS:
            return confirm(self.context, self.survivors, self.sign)
        return reveal(self.shared, self.survivors)

    def exchange(self, step: Step, message: bytes | None = None, *, wait_s: int = 0) -> bytes | None:
        """Send a message, an honest one if none is given, and take in what the step's closing gives."""
        sending = self.message(step) if message is None else message
        answer = self.site.worker.tasks.exchange(
            self.offer.task_id, step, sending, fence=self.offer.fence, wait_s=wait_s
        )
        self.sent[step] = sending
        if answer is not None:
            self.answers[step] = answer
            self._open(step, answer)
        return answer

    def _open(self, step: Step, answer: bytes) -> None:
        """Check an answer as a worker does."""
        if step is Step.KEYS:
            self.keyed = open_keys(
                self.context, self.secured.roster_digest, self.secured.members, self.index, self.secrets, answer
            )
        elif step is Step.SHARES:
            assert self.keyed is not None
            self.shared = open_shares(self.context, self.index, self.secrets, self.keyed, answer)
        elif step is Step.UPDATE:
            assert self.shared is not None
            self.survivors = open_survivors(self.index, self.shared, answer, needed=3)
        elif step is Step.SURVIVORS:
            assert self.keyed is not None
            assert self.survivors is not None
            open_confirmations(self.context, self.keyed.roster, self.survivors, answer)

    def masked(self) -> Arrays:
        """The vector as it is uploaded."""
        assert self.keyed is not None
        assert self.shared is not None
        words = self.vector.view(np.uint32).copy()
        add_masks(words, 0, masks_of(self.context, self.index, self.secrets, self.keyed, self.shared))
        return {MASKED: words}

    def upload(self) -> UpdateReceipt:
        """Hand the masked vector in."""
        return self.site.hand_in(self.offer, self.masked())


def enter(sites: Iterable[Site], vectors: Mapping[int, NDArray[np.int32]] | None = None) -> list[Masking]:
    """Members of the present attempt, in the roster's order: every site claims its task."""
    members = [Masking(site, site.claim()) for site in sites]
    for member in members:
        member.vector = (vectors or {}).get(member.index, member.vector)
    return sorted(members, key=lambda member: member.index)


def take(members: Sequence[Masking], step: Step) -> None:
    """All send their message of a step, which must close it, and get their answers."""
    for member in members:
        if step is Step.UPDATE:
            member.upload()
        else:
            member.exchange(step)
    for member in members:
        if step is not Step.UNMASK and step not in member.answers:
            assert member.exchange(step) is not None, f"{step} has not closed"


def go(members: Sequence[Masking], *, through: Step = Step.UNMASK) -> None:
    """All the steps up to one, with the same members from the first to the last."""
    for step in STEPS[: STEPS.index(through) + 1]:
        take(members, step)


def published(federation: Federation, job: JobView, members: Sequence[Masking]) -> Arrays:
    """The model that the exact mean of these members' vectors gives, from the initial one of zeros."""
    largest = max(_weight(member) for member in members)
    total = np.sum([member.vector.astype(np.int64) for member in members], axis=0)
    spec = federation.job(job).spec
    lattice, _ = lattice_of(spec, members[0].offer.plan, total.size)
    weights = sum(_weight(member) / largest for member in members)
    mean = (total * (lattice.step / weights)).astype(np.float32)
    found, start = {}, 0
    for name, shape in sorted((name, array.shape) for name, array in filled(0.0).items()):
        count = int(np.prod(shape))
        found[name] = mean[start : start + count].reshape(shape)
        start += count
    return found


def _weight(member: Masking) -> int:
    assert member.keyed is not None
    return member.keyed.roster[member.index].weight


def assert_published(federation: Federation, job: JobView, members: Sequence[Masking]) -> None:
    """The newest model is that of the sum of these members' vectors, to the last bit."""
    model, expected = federation.model(job), published(federation, job, members)
    assert {name: array.tolist() for name, array in model.items()} == {
        name: array.tolist() for name, array in expected.items()
    }


def assert_forgotten(federation: Federation) -> None:
    """No message, no masked update and no draft is kept any more."""

    def gone() -> bool:
        rows = federation.platform.execute(
            "SELECT (SELECT count(*) FROM secured_attempts) + (SELECT count(*) FROM secured_members)"
            " + (SELECT count(*) FROM discarded_blobs) + (SELECT count(*) FROM updates WHERE blob_key IS NOT NULL)"
        )
        return rows == [(0,)] and not federation.blobs("updates") and not federation.blobs("drafts")

    federation.until(gone)


def view_of(federation: Federation, job: JobView, number: int = 1) -> SecuredRound:
    """Where the secured round stands."""
    secured = federation.researcher.jobs.round(job.id, number).secured
    assert secured is not None
    return secured


def pass_step(federation: Federation, by: timedelta = timedelta(hours=1)) -> None:
    """Let the time of the present step be over."""
    federation.platform.execute("UPDATE secured_attempts SET step_closes_at = step_closes_at - %s", [by])


def pass_round(federation: Federation, by: timedelta = timedelta(hours=1)) -> None:
    """Let the deadline of the present attempt be over."""
    federation.platform.execute("UPDATE rounds SET closes_at = closes_at - %s WHERE completed_at IS NULL", [by])
