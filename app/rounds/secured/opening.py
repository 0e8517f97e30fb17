"""The roster of an attempt: everybody with a task on offer, under the identity of the worker that it is for."""

from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.federation.lifecycle import OPEN_TASKS
from app.models import Dataset, Job, Organization, Participation, Round, SecuredAttempt, SecuredMember, Task, Worker
from app.rounds.specs import manifest_of, plan_of, spec_of
from isthmus.federation.rounds import weight_of
from isthmus.secagg.context import context_of
from isthmus.secagg.parameters import threshold_of
from isthmus.secagg.roster import Member, Roster
from isthmus.wire.data import FeatureStatistics
from isthmus.wire.secured import Step, terms_digest


async def open_attempt(
    session: AsyncSession,
    job: Job,
    of: Round,
    now: datetime,
    *,
    suspects: Sequence[str] | None = None,
    bound_to: Sequence[str] | None = None,
) -> SecuredAttempt:
    """Begin the present attempt of a round: its members are those whose tasks are open. Needs the round's lock.

    There must be no other attempt of the round any more.

    Args:
        session: of the transaction that begins it.
        job: the round's.
        of: the round.
        now: by Postgres's clock.
        suspects: of wrong shares in former attempts.
        bound_to: for whose sum shares were told in a former attempt: these are the members, and all are needed.
    """
    spec = spec_of(job)
    assert spec.secure_aggregation is not None, "asked only for secured rounds"
    found = await session.execute(
        select(Task.id, Organization.name, Dataset.name, Worker.public_key, Participation)
        .join(Participation, Participation.id == Task.participation_id)
        .join(Dataset, Dataset.id == Participation.dataset_id)
        .join(Organization, Organization.id == Dataset.organization_id)
        .join(Worker, Worker.id == Task.worker_id)
        .where(Task.round_id == of.id, Task.state.in_(OPEN_TASKS))
    )
    rows = found.all()
    members = {
        Member(organization, dataset, bytes.fromhex(key), int(weight_of(spec.strategy, part.declared_rows))): task_id
        for task_id, organization, dataset, key, part in rows
    }
    roster = Roster(members)
    statistics = None if job.statistics is None else FeatureStatistics.model_validate(job.statistics)
    threshold = threshold_of(len(roster))
    needed = max(threshold, of.min_updates) if bound_to is None else len(roster)
    asked_for_all = spec.cohort.over_selection == 0
    attempt = SecuredAttempt(
        round_id=of.id,
        attempt=of.attempt,
        step=Step.KEYS,
        roster=roster.to_bytes(),
        roster_digest=roster.digest(),
        context=context_of(
            round_id=of.id,
            spec_digest=job.spec_digest,
            model_digest=of.model_digest,
            terms_digest=terms_digest(manifest_of(job), statistics, plan_of(rows[0][-1])),  # all plans agree in it
            roster_digest=roster.digest(),
            round_number=of.number,
            attempt=of.attempt,
        ),
        members=len(roster),
        threshold=threshold,
        needed=needed,
        target=len(roster) if asked_for_all else max(needed, min(of.target_updates, len(roster))),
        step_closes_at=now + timedelta(seconds=spec.secure_aggregation.step_s),
        answers_needed=threshold,
        suspects=None if suspects is None else list(suspects),
        bound_to=None if bound_to is None else list(bound_to),
    )
    session.add(attempt)
    await session.flush()
    described = [
        {
            "round_id": of.id,
            "index": index,
            "task_id": members[member],
            "organization": member.organization,
            "dataset": member.dataset,
            "identity": member.identity,
            "weight": member.weight,
        }
        for index, member in enumerate(roster.members)
    ]
    await session.execute(insert(SecuredMember).values(described))
    return attempt
