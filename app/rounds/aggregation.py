"""From a frozen set to the next model: read in canonical order, summed off the event loop, stored, published."""

import contextlib
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final
from uuid import UUID

import anyio.to_thread
import structlog
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit.service import append, job_stream
from app.blobs import StoredBlob, checkpoint_key
from app.database import clock
from app.dependencies import Parts
from app.errors import BudgetExhausted, NotFound
from app.federation.lifecycle import RoundEvent, advance_round
from app.federation.pooling import pool_metrics
from app.ledger.pricing import noises_the_sum
from app.models import Checkpoint, Job, Participation, Round
from app.rounds.central import price_ahead, spend_for_noise
from app.rounds.discarding import delete_blobs
from app.rounds.ending import fail, forget_inputs
from app.rounds.opening import proceed
from app.rounds.queries import Contribution, hold_round, list_contributions
from app.rounds.secured.closing import ask_for_more
from app.rounds.secured.unmasking import Masked, noting_progress, read_masked, write_sum
from app.rounds.specs import is_secured, manifest_of, plan_of, spec_of
from isthmus.codec.blocks import TensorFile, TensorFileWriter
from isthmus.codec.header import header_limit
from isthmus.federation.aggregation import aggregate
from isthmus.federation.central import aggregate_noised
from isthmus.federation.rounds import merge_statistics
from isthmus.federation.secured import aggregate_sum
from isthmus.federation.strategies import Strategy, state_manifest, strategy_of
from isthmus.secagg.violations import SharesWrong, TooFewShares
from isthmus.wire.data import FeatureStatistics
from isthmus.wire.events import EventKind
from isthmus.wire.jobs import JobReason, JobSpec, JobState
from isthmus.wire.manifest import Manifest
from isthmus.wire.rounds import RoundPhase, TaskKind

log = structlog.get_logger(__name__)

FOLD_THREADS: Final = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
"""How many threads compute a sum, beside the one that writes it. The bytes do not depend on it."""
BLOCK_ELEMENTS: Final = 1 << 15 if FOLD_THREADS == 1 else 1 << 17
"""Small enough for a core's cache; where there are several threads, large enough that they seldom wait for each other
at the interpreter's lock."""

_LOCK_SPACE = 0x15_74_4D_55_00_00_00_00  # advisory locks of rounds, apart from other users' of the database


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is summed: everything that the result is a function of."""

    job_id: UUID
    round_id: UUID
    number: int
    kind: TaskKind
    spec: JobSpec
    manifest: Manifest
    model_digest: str
    state_digest: str | None
    contributions: list[Contribution]
    noise_multiplier: float
    """Of central noise; 0 where the service adds none."""
    attempt: int
    masked: Masked | None
    """What unmasks the sum, of a secured round."""


@dataclass(frozen=True, slots=True)
class CentralNoise:
    """What clips and noises a sum of updates, beside the updates themselves."""

    clip_norm: float
    noise_multiplier: float
    key: bytes


@dataclass(frozen=True, slots=True)
class _Result:
    """What was measured, and the next model and the strategy's next state, durable."""

    metrics: dict[str, float]
    statistics: FeatureStatistics | None
    checkpoint: StoredBlob | None
    state: StoredBlob | None


def lock_key(round_id: UUID) -> int:
    """The advisory lock under which a round is aggregated: a signed 64-bit number."""
    return (round_id.int ^ _LOCK_SPACE) & 0x7FFF_FFFF_FFFF_FFFF


async def aggregate_round(parts: Parts, round_id: UUID) -> None:
    """Aggregate a frozen round. Run twice at once, or when there is nothing to do, it does nothing.

    A crash leaves the round aggregating and its lock free; the sweep asks again. A set without a finite mean, or an
    update that cannot be read, fails the round and its job with the reason.
    """
    async with parts.locks.hold(lock_key(round_id)) as held:
        if not held:
            return
        async with parts.single_statements() as session:
            plan = await _plan(session, round_id)
        if plan is None:
            return
        began = time.perf_counter()
        try:
            noise = await _central_noise(parts, plan)
            result = await _compute(parts, plan, noise)
        except (SharesWrong, TooFewShares) as wrong:
            log.warning("a sum cannot be unmasked yet", round_id=str(round_id), error=str(wrong))
            parts.meters.aggregations.labels("shares-wrong").inc()
            await _ask_for_more(parts, plan, wrong.suspects if isinstance(wrong, SharesWrong) else ())
            return
        except (ArithmeticError, ValueError, NotFound, BudgetExhausted) as error:  # NonFiniteAggregate, CodecError too
            log.error("a round cannot be aggregated", round_id=str(round_id), error=str(error))
            parts.meters.aggregations.labels("rejected").inc()
            await _reject(parts, plan, str(error))
            return
        async with parts.sessions.begin() as session:
            forgotten = await _complete(session, plan, result)
        await delete_blobs(parts, forgotten)
        parts.meters.aggregations.labels("published").inc()
        parts.meters.aggregation_seconds.observe(time.perf_counter() - began)


async def _plan(session: AsyncSession, round_id: UUID) -> _Plan | None:
    found = await session.execute(
        select(Job, Round, Checkpoint.state_digest)
        .join(Round, Round.job_id == Job.id)
        .join(Checkpoint, (Checkpoint.job_id == Job.id) & (Checkpoint.round_number == Job.rounds_completed))
        .where(Round.id == round_id, Round.phase == RoundPhase.AGGREGATING)
    )
    row = found.one_or_none()
    if row is None:
        return None
    job, of, state_digest = row
    contributions = await list_contributions(session, round_id)
    secured = is_secured(job, of.kind)
    masked = await read_masked(session, round_id, contributions) if secured else None
    if secured and masked is None:
        return None
    return _Plan(
        job_id=job.id,
        round_id=of.id,
        number=of.number,
        kind=of.kind,
        spec=spec_of(job),
        manifest=manifest_of(job),
        model_digest=of.model_digest,
        state_digest=state_digest,
        contributions=contributions,
        noise_multiplier=await _noise_multiplier(session, spec_of(job), of.kind, contributions),
        attempt=of.attempt,
        masked=masked,
    )


async def _noise_multiplier(
    session: AsyncSession, spec: JobSpec, kind: TaskKind, contributions: Sequence[Contribution]
) -> float:
    """Of central noise: what the plans of all that take part ask for, which is the same; 0 where there is none."""
    if not noises_the_sum(spec, kind):
        return 0.0
    parts = await session.scalars(
        select(Participation).where(Participation.id.in_([item.update.participation_id for item in contributions]))
    )
    return max(plan.noise_multiplier for part in parts if (plan := plan_of(part)) is not None)


async def _central_noise(parts: Parts, plan: _Plan) -> CentralNoise | None:
    """What the sum is noised with: committed, and spent for, before the first of it is drawn. None: not here."""
    if not noises_the_sum(plan.spec, plan.kind):
        return None
    async with parts.single_statements() as session:
        await price_ahead(session, plan.round_id)
    async with parts.sessions.begin() as session:
        key = await spend_for_noise(session, plan.round_id)
    if key is None:
        raise NotFound("round to sum", plan.round_id)  # cancelled meanwhile: `_reject` finds that too
    assert plan.spec.privacy.clip_norm is not None, "checked by the spec"
    return CentralNoise(plan.spec.privacy.clip_norm, plan.noise_multiplier, key)


async def _compute(parts: Parts, plan: _Plan, noise: CentralNoise | None) -> _Result:
    """Everything that can go wrong with the sites' numbers goes wrong here, before anything is changed."""
    metrics = pool_metrics([item.update.released for item in plan.contributions])
    if plan.kind is TaskKind.TRAIN:
        return _Result(metrics, None, *await _next_model(parts, plan, noise))
    released = [item.update.released for item in plan.contributions]
    statistics = merge_statistics(plan.spec.data, released) if plan.kind is TaskKind.STATISTICS else None
    return _Result(metrics, statistics, None, None)


async def _next_model(parts: Parts, plan: _Plan, noise: CentralNoise | None) -> tuple[StoredBlob, StoredBlob | None]:
    blobs = parts.blobs
    model = await blobs.open_path(checkpoint_key(plan.model_digest))
    state = None if plan.state_digest is None else await blobs.open_path(checkpoint_key(plan.state_digest))
    updates = [await blobs.open_path(item.update.blob_key or "") for item in plan.contributions]
    strategy = strategy_of(plan.spec.strategy)
    drafts = (blobs.draft(), blobs.draft())
    try:
        if plan.masked is None:
            weights = [item.update.weight for item in plan.contributions]
            digest, state_digest = await anyio.to_thread.run_sync(
                write_aggregate, plan.manifest, strategy, model, state, updates, weights, drafts, noise
            )
        else:
            digest, state_digest = await _unmasked(parts, plan, plan.masked, strategy, model, state, updates, drafts)
        checkpoint = await blobs.adopt(checkpoint_key(digest), drafts[0], digest)
        kept = None
        if state_digest is not None:
            kept = await blobs.adopt(checkpoint_key(state_digest), drafts[1], state_digest)
        return checkpoint, kept
    finally:
        for draft in drafts:
            draft.unlink(missing_ok=True)


async def _unmasked(
    parts: Parts,
    plan: _Plan,
    masked: Masked,
    strategy: Strategy,
    model: Path,
    state: Path | None,
    updates: Sequence[Path],
    drafts: tuple[Path, Path],
) -> tuple[str, str | None]:
    """As `write_aggregate`, by way of the sum of what is masked."""
    total = parts.blobs.draft()
    elements = plan.manifest.averaged_elements
    try:
        async with noting_progress(parts.single_statements, plan.round_id, masked) as progress:
            unmask = partial(
                write_sum, masked, plan.spec, elements, updates, total, threads=FOLD_THREADS, progress=progress
            )
            await anyio.to_thread.run_sync(unmask)
        return await anyio.to_thread.run_sync(_write_mean_of_sum, plan, masked, strategy, model, state, total, drafts)
    finally:
        total.unlink(missing_ok=True)


def _write_mean_of_sum(
    plan: _Plan,
    masked: Masked,
    strategy: Strategy,
    model: Path,
    state: Path | None,
    total: Path,
    drafts: tuple[Path, Path],
) -> tuple[str, str | None]:
    with contextlib.ExitStack() as stack:
        files = _open(stack, plan.manifest, strategy, model, state, drafts)
        aggregate_sum(
            plan.manifest,
            files.model,
            stack.enter_context(TensorFile(total)),
            plan.spec,
            masked.plan,
            math.fsum(masked.weight_shares),
            strategy,
            sink=files.sink,
            state=files.state,
            state_sink=files.state_sink,
            block_elements=BLOCK_ELEMENTS,
            threads=FOLD_THREADS,
        )
    return files.digests()


@dataclass(frozen=True, slots=True)
class _Files:
    """A round's model and what becomes of it, open."""

    model: TensorFile
    state: TensorFile | None
    sink: TensorFileWriter
    state_sink: TensorFileWriter | None

    def digests(self) -> tuple[str, str | None]:
        """Of what was written, once it is closed."""
        return self.sink.digest, None if self.state_sink is None else self.state_sink.digest


def _open(
    stack: contextlib.ExitStack,
    manifest: Manifest,
    strategy: Strategy,
    model: Path,
    state: Path | None,
    drafts: tuple[Path, Path],
) -> _Files:
    """What an aggregate reads and writes, until the stack is left."""
    limit = header_limit(manifest)
    states = state_manifest(strategy, manifest)
    sink = stack.enter_context(TensorFileWriter(drafts[0], manifest.tensors))
    state_sink = None
    if states is not None:
        state_sink = stack.enter_context(TensorFileWriter(drafts[1], states.tensors))
    present = stack.enter_context(TensorFile(model, limit))
    former = None if state is None else stack.enter_context(TensorFile(state, 4 * limit))
    return _Files(present, former, sink, state_sink)


def write_aggregate(
    manifest: Manifest,
    strategy: Strategy,
    model: Path,
    state: Path | None,
    updates: Sequence[Path],
    weights: Sequence[float],
    drafts: tuple[Path, Path],
    noise: CentralNoise | None = None,
) -> tuple[str, str | None]:
    """Write the next model, and the strategy's next state if any, to `drafts`; their digests. Blocks a thread.

    With `noise` the updates count the same, are clipped once more, and their sum is noised.
    """
    with contextlib.ExitStack() as stack:
        sources = [stack.enter_context(TensorFile(path)) for path in updates]
        files = _open(stack, manifest, strategy, model, state, drafts)
        if noise is not None:
            aggregate_noised(
                manifest,
                files.model,
                sources,
                strategy,
                clip_norm=noise.clip_norm,
                noise_multiplier=noise.noise_multiplier,
                key=noise.key,
                sink=files.sink,
                state=files.state,
                state_sink=files.state_sink,
                threads=FOLD_THREADS,
            )
        else:
            aggregate(
                manifest,
                files.model,
                sources,
                weights,
                strategy,
                sink=files.sink,
                state=files.state,
                state_sink=files.state_sink,
                block_elements=BLOCK_ELEMENTS,
                threads=FOLD_THREADS,
            )
    return files.digests()


async def _ask_for_more(parts: Parts, plan: _Plan, suspects: Sequence[int]) -> None:
    assert plan.masked is not None, "only shares can be wrong"
    async with parts.sessions.begin() as session:
        job, of = await hold_round(session, plan.round_id)
        if of.phase is not RoundPhase.AGGREGATING or of.attempt != plan.attempt:
            return
        answers, now = len(plan.masked.reveals), await clock(session)
        await ask_for_more(session, parts.queue, job, of, answers=answers, suspects=suspects, now=now)


async def _reject(parts: Parts, plan: _Plan, why: str) -> None:
    async with parts.sessions.begin() as session:
        job, of = await hold_round(session, plan.round_id)
        if of.phase is not RoundPhase.AGGREGATING or of.attempt != plan.attempt:
            return
        detail = f"The updates of round {of.number} cannot be aggregated: {why}"
        now = await clock(session)
        await fail(session, job, of, RoundEvent.AGGREGATE_REJECTED, JobReason.AGGREGATE_REJECTED, detail, now)


async def _complete(session: AsyncSession, plan: _Plan, result: _Result) -> list[str]:
    """Publish the result, and open what comes next, in one transaction. A job cancelled meanwhile stays cancelled.

    Returns:
        Keys of blobs to delete once this is committed: what central noise was added to, and what was masked.
    """
    job, of = await hold_round(session, plan.round_id)
    if of.phase is not RoundPhase.AGGREGATING or job.state not in (JobState.RUNNING, JobState.PAUSED):
        return []
    if of.attempt != plan.attempt:
        return []
    now = await clock(session)
    of.phase = advance_round(of.phase, RoundEvent.AGGREGATE_STORED)
    of.completed_at = now
    of.metrics = result.metrics
    of.result_digest = plan.model_digest
    if result.checkpoint is not None:
        job.model_digest = of.result_digest = result.checkpoint.digest
        job.rounds_completed = of.number
        session.add(
            Checkpoint(
                job_id=job.id,
                round_number=of.number,
                digest=result.checkpoint.digest,
                size_bytes=result.checkpoint.size_bytes,
                state_digest=None if result.state is None else result.state.digest,
                created_at=now,
            )
        )
    if result.statistics is not None:
        job.statistics = result.statistics.model_dump(mode="json")
    append(
        session,
        job_stream(job.id),
        EventKind.ROUND_COMPLETED,
        at=now,
        round=of.number,
        task=of.kind.value,
        updates=len(plan.contributions),
        model_digest=of.model_digest,
        result_digest=of.result_digest,
        state_digest=None if result.state is None else result.state.digest,
        metrics=of.metrics,
        seconds=round((now - of.opened_at).total_seconds(), 6),
    )
    forgotten = await forget_inputs(session, job, of, now)
    await proceed(session, job, of.number, now)
    return forgotten
